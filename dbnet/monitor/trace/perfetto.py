"""The packets of Perfetto's format that a timeline needs, as arrays: a row of bytes for each.

A trace is a sequence of packets (protobuf; perfetto/trace/trace_packet.proto): descriptors of tracks, names by number, then events.
All events of one kind have the same length, since a number in protobuf may be longer than it need be; so they are made by columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

BEGIN, END, COUNTER = 1, 2, 4
# Field numbers, by message.
_PACKET = 1
_TIME, _SEQUENCE, _EVENT, _INTERNED, _FLAGS, _TRACK = 8, 10, 11, 12, 13, 60
_TYPE, _TRACK_OF, _NAME, _CATEGORY, _NOTE, _VALUE, _FLOWS, _FLOWS_END = 9, 11, 10, 3, 4, 30, 47, 48
_CLEARED, _NEEDS_NAMES = 1, 2
_VARINT, _FIXED, _BYTES = 0, 1, 2
# Bytes of a time (63 bits), a track's number, a name's number, a note.
_TIME_BYTES, _TRACK_BYTES, _NAME_BYTES, _NOTE_BYTES = 9, 5, 3, 9


def varint(value: int) -> bytes:
    """Return a number as protobuf has it: seven bits a byte, the last one without the highest bit."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | bytes | str) -> bytes:
    """Return a field of a message: a number, or what has a length."""
    if isinstance(value, int):
        return varint(number << 3 | _VARINT) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | _BYTES) + varint(len(content)) + content


def packet(*fields: bytes) -> bytes:
    """Return a packet of the one sequence that there is."""
    return field(_PACKET, b"".join((*fields, field(_SEQUENCE, 1))))


def names(spans: Mapping[int, str], categories: Mapping[int, str], notes: Mapping[int, str]) -> bytes:
    """Return the packet that says what the numbers of names mean, before any event."""
    entries = [
        field(kind, field(1, number) + field(2, text))
        for kind, texts in ((2, spans), (1, categories), (3, notes))
        for number, text in texts.items()
    ]
    return packet(field(_INTERNED, b"".join(entries)), field(_FLAGS, _CLEARED))


def process(track: int, number: int, name: str) -> bytes:
    """Return the packet of a track that stands for a rank."""
    return packet(field(_TRACK, field(1, track) + field(3, field(1, number) + field(6, name))))


def track(number: int, parent: int, name: str, unit: str | None = None) -> bytes:
    """Return the packet of a track of a rank: spans, or with a `unit` a counter."""
    counter = b"" if unit is None else field(8, field(6, unit))
    return packet(field(_TRACK, field(1, number) + field(2, name) + field(5, parent) + counter))


def events(
    kind: int, times: np.ndarray, on: int, name: np.ndarray | None = None, category: np.ndarray | None = None,
    notes: Sequence[tuple[int, np.ndarray]] = (), flows: Sequence[np.ndarray] = (), ends: Sequence[np.ndarray] = (),
    value: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Return the packets of events [events, bytes].

    Parameters
    ----------
    kind, times, on
        BEGIN, END or COUNTER; when, ns, below 2^63; the number of the track.
    name, category
        Numbers of the spans' names and of their categories, 1 to 127.
    notes
        (number of its name, values below 2^63) of what is told of each.
    flows, ends
        Numbers of the flows that leave each span, and of those that end there.
    value
        Of a counter, not negative.
    """
    inner: list[bytes | np.ndarray] = [field(_TYPE, kind), _tag(_TRACK_OF, _VARINT), _padded(on, _TRACK_BYTES)]
    if name is not None and category is not None:
        inner += [_tag(_NAME, _VARINT), _padded(name, _NAME_BYTES), _tag(_CATEGORY, _VARINT), _padded(category, 1)]
    for number, values in notes:
        note = [field(1, number), _tag(4, _VARINT), _padded(values, _NOTE_BYTES)]
        inner += [_tag(_NOTE, _BYTES), varint(_size(note)), *note]
    for numbers, tag in ((flows, _FLOWS), (ends, _FLOWS_END)):
        for number in numbers:
            inner += [_tag(tag, _FIXED), np.ascontiguousarray(number, "<u8").view(np.uint8).reshape(-1, 8)]
    if value is not None:
        inner += [_tag(_VALUE, _VARINT), _padded(value, _NOTE_BYTES)]
    outer = [_tag(_TIME, _VARINT), _padded(times, _TIME_BYTES), field(_SEQUENCE, 1), field(_FLAGS, _NEEDS_NAMES)]
    outer += [_tag(_EVENT, _BYTES), varint(_size(inner)), *inner]
    return _joined(len(times), [_tag(_PACKET, _BYTES), varint(_size(outer)), *outer])


def _tag(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


def _padded(values: np.ndarray | int, size: int) -> np.ndarray:
    """Return numbers as protobuf has them, each as long as the longest may be [numbers, size]."""
    values = np.atleast_1d(np.asarray(values, np.uint64))
    out = np.empty((len(values), size), np.uint8)
    for i in range(size):
        out[:, i] = values >> np.uint64(7 * i) & np.uint64(127) | np.uint64(128 * (i < size - 1))
    return out


def _size(parts: Sequence[bytes | np.ndarray]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part.shape[1] for part in parts)


def _joined(rows: int, parts: Sequence[bytes | np.ndarray]) -> np.ndarray:
    out, at = np.empty((rows, _size(parts)), np.uint8), 0
    for part in parts:
        columns = np.frombuffer(part, np.uint8)[None] if isinstance(part, bytes) else part
        out[:, at : at + columns.shape[1]] = columns
        at += columns.shape[1]
    return out
