"""One rank's part of a recorded schedule: NAME.schedule/shard-0, replica-1.0 (replica and partition), and coordinator.

A part is a line that names the format, and blocks: length, and as many bytes (zlib) of entries: kind, length, content. The first
entry says whose part it is. What has come since the last block lies in a file beside it, NAME.tail, which is mapped into its rank's
memory: an entry is in the system's hands as soon as it is added, without a call (one longer than a tail is a block of its own), and
whoever is killed leaves all that was added. The tail says how many blocks there were before it and where its entries end, so what
was just being written is told from what is whole. It goes when the part has come to its end; where a block could not be written it
stays, for then it holds what comes after the last whole one.

Of a shard, in the order of what it did:
    TAKES     slices taken: (origin, check sum) each; an origin's slices come in order, so nothing else need be said
    CLOSE     nothing more is taken of this replica, which is lost
    SAVE      a checkpoint is begun;  COPY  the next piece of it has been copied;  SAVED  SHA-256 of its registers
    END       the run is over; SHA-256 of what the shard holds
    BEGIN     of a batch method: a pass is begun, its number; what is taken until the next one is of this pass, what comes too late
              is not written down;  SUM  number of a pass all of whose bundles have come, and check sum of the gradient
Of a replica, in the order of its program:
    FETCH, SNAPSHOT   what was read: of each piece of each slice how often it had been changed, doubled, as in the shard's window;
                      of an uncut replica a fetch is added with what follows it: before that nothing of it has left the replica
    PUSH              number, gradients, newest step; stands before anything of the push can be applied
    ORDER             count of looks at the orders, and the row, when that has changed
    SHARE             number of a share and its row
    EVALUATED         the numbers of an evaluation
    END               the replica has left
A batch method's replicas decide nothing: theirs is empty, and the coordinator has one, in the order of its program:
    PASS              number, and of each bundle in the order in which it was accepted: replica, loss, portions
    ITERATION         number, loss, norm of the gradient, step;  STOP  why the method ends there, where the caller ended it
    EVALUATE          who is asked to evaluate what the shards hold;  EVALUATED  what came of it, which may be much later
    CHECKPOINT        name of one that is begun, number of the pass
    HALT              the run is to stop: number of the pass that is broken off, 0 between passes
    END               the run is over
FULL ends a part that has become too long; one that could not be written on just breaks off.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.files import mapped, put, why
from dbnet.shards.schedule.paths import tail_of

(
    ABOUT, TAKES, CLOSE, SAVE, COPY, SAVED, END, FETCH, SNAPSHOT, PUSH, ORDER, SHARE, EVALUATED,
    BEGIN, SUM, PASS, ITERATION, STOP, EVALUATE, CHECKPOINT, HALT, FULL,
) = range(22)  # fmt: skip
NAMES = (
    "its beginning", "slices taken", "the loss of a replica", "a checkpoint's beginning", "a checkpoint's piece",
    "a checkpoint's end", "the end", "a fetch", "a fetch to evaluate", "a push", "an order", "a share", "an evaluation",
    "a pass's beginning", "a pass's sum", "a pass", "an iteration", "a reason to end", "an order to evaluate", "a checkpoint",
    "a halt", "the end of the record",
)  # fmt: skip
TAKE = np.dtype([("origin", "<u4"), ("check", "<u4")])
_KIND, _VERSION = b"dbnet schedule ", 4
_FORMAT = b"%b%d\n" % (_KIND, _VERSION)
_HEAD = struct.Struct("<BI")
_LENGTH = struct.Struct("<I")
# What a tail begins with: blocks before it, and where its entries end.
_BLOCKS = struct.Struct("<q")
_PUT_BLOCKS, _PUT_HEAD, _PUT_LENGTH, _PUT_TAKE = (
    _BLOCKS.pack_into,
    _HEAD.pack_into,
    _LENGTH.pack_into,
    struct.Struct("<II").pack_into,
)
_FIRST = 2 * _BLOCKS.size
# Bytes of a block before it is compressed, at most and at least.
_MOST, _LEAST = 1 << 16, 1 << 10


class LogEntry(NamedTuple):
    """One entry of a part."""

    kind: int
    content: bytes

    @property
    def value(self) -> Any:
        """What was written as JSON."""
        return json.loads(self.content)

    def array(self, dtype: Any) -> np.ndarray:
        return np.frombuffer(self.content, dtype)


class PartLog:
    """The writer's end; used by one thread.

    Parameters
    ----------
    path
        The file to make.
    about
        What the part says of itself, besides its name.
    limit
        Bytes that it may have, its tail (1 KB at least) among them.
    say
        Is told in a sentence why the record ends early.
    """

    def __init__(self, path: Path, about: dict[str, Any], limit: int, say: Callable[[str], None]) -> None:
        self.path, self._limit, self._say = path, limit, say
        size = min(_MOST, max(_LEAST, limit // 4))
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._tail = mapped(tail_of(path), size, "to record, set run.folder to another one, or leave record.schedule out")
            put(self._file, _FORMAT)
        except OSError as error:
            raise UserError(
                f"Cannot write '{path}' ({why(error)}); to record, every rank must reach run.folder and have room there."
            ) from None
        self._held = b""
        # Where the next entry goes, and where slices taken are put down that are its content so far.
        self._at, self._taking = _FIRST, 0
        # FULL has room in it always.
        self._end, self._written, self._blocks = size - _HEAD.size, len(_FORMAT), 0
        _PUT_BLOCKS(self._tail, _BLOCKS.size, _FIRST)
        self.add(ABOUT, {"part": path.name, **about})

    @property
    def open(self) -> bool:
        """Whether the record still goes on."""
        return self._file is not None

    def take(self, origin: int, check: int) -> None:
        """Write down that a slice of `origin` is applied, or refused, next."""
        at = self._at
        if not self._taking or at + TAKE.itemsize > self._end:
            at = self._begin_to_take()
        if at:
            _PUT_TAKE(self._tail, at, origin, check)
            self._at = at = at + TAKE.itemsize
            _PUT_BLOCKS(self._tail, _BLOCKS.size, at)

    def _begin_to_take(self) -> int:
        """Begin an entry of slices taken, whose length is nought until it is over; return where they go, 0: nowhere."""
        at = self._place(_HEAD.size + TAKE.itemsize)
        if at:
            _PUT_HEAD(self._tail, at, TAKES, 0)
            self._taking, at = at, at + _HEAD.size
        return at

    def hold(self, kind: int, content: bytes) -> None:
        """Add an entry with the next one, before it; who is killed until then has not added it.

        Two at once take little longer than one, when a gradient has emptied the caches.
        """
        if self._held:
            self.add(kind, content)
        else:
            self._held = _HEAD.pack(kind, len(content)) + content

    def add(self, kind: int, content: Any = b"") -> None:
        """Add an entry: bytes, what has a buffer of bytes, or what JSON can hold."""
        if isinstance(content, np.ndarray):
            content = content.tobytes()
        elif not isinstance(content, (bytes, memoryview)):
            content = json.dumps(content).encode()
        entries, self._held = self._held + _HEAD.pack(kind, len(content)) + content, b""
        size = len(entries)
        at = self._place(size)
        if not at:
            if self._file is not None:
                self._append(entries)
            return
        self._tail[at : at + size] = entries
        self._at = at + size
        # Last: whoever is killed before this has not added it.
        _PUT_BLOCKS(self._tail, _BLOCKS.size, self._at)

    def _place(self, size: int) -> int:
        """Return where an entry of `size` bytes goes; 0: it is longer than a tail, or the record has ended."""
        if self._taking:
            _PUT_LENGTH(self._tail, self._taking + 1, self._at - self._taking - _HEAD.size)
            self._taking = 0
        if self._file is None:
            return 0
        if self._at + size > self._end:
            self._turn()
        return self._at if self._file is not None and self._at + size <= self._end else 0

    def _turn(self) -> None:
        """Make a block of the tail."""
        if self._at > _FIRST:
            self._append(self._tail[_FIRST : self._at])

    def _append(self, entries: bytes) -> None:
        """Write a block; afterwards the tail is empty, or the record has ended and the tail is left as it is."""
        data = block(entries)
        if self._written + len(data) + len(self._tail) > self._limit:
            _PUT_HEAD(self._tail, self._at, FULL, 0)
            _PUT_BLOCKS(self._tail, _BLOCKS.size, self._at + _HEAD.size)
            self._stop(f"'{self.path}' may have {self._limit:,} bytes, its part of record.limit")
        elif failed := self._write(data):
            self._stop(f"'{self.path}' cannot be written: {failed}")
        else:
            self._at, self._blocks = _FIRST, self._blocks + 1
            # In this order: what is in the block may not be taken to follow it.
            _PUT_BLOCKS(self._tail, _BLOCKS.size, _FIRST)
            _PUT_BLOCKS(self._tail, 0, self._blocks)

    def _write(self, data: bytes) -> str:
        """Write a block, or return why it cannot be written."""
        try:
            put(self._file, data)
        except OSError as error:
            # If this cannot be done either, a reader takes the tail in place of what is not whole.
            with suppress(OSError):
                os.ftruncate(self._file, self._written)
            return why(error)
        self._written += len(data)
        return ""

    def _stop(self, reason: str) -> None:
        self._say(f"The schedule is recorded no further ({reason}); the run goes on.")
        self._leave()

    def close(self, content: Any = b"") -> None:
        """End the part as that of a rank that has come to its end; again does nothing."""
        if self._file is not None:
            self.add(END, content)
        if self._file is not None:
            failed = self._at > _FIRST and self._write(block(self._tail[_FIRST : self._at]))
            # The tail holds the end, too: what does not reach the disk is read from there.
            if self._leave() and not failed:
                # Nobody reads one that its block has overtaken.
                with suppress(OSError):
                    tail_of(self.path).unlink(missing_ok=True)

    def _leave(self) -> bool:
        """Close the files; return whether all that was written is there."""
        number, self._file = self._file, None
        self._tail.close()
        try:
            os.close(number)
        except OSError as error:
            # Of a file elsewhere, which had no room for what was written before.
            self._say(f"The recorded schedule may lack entries ('{self.path}' cannot be closed: {why(error)}); the run goes on.")
            return False
        return True


def block(entries: bytes) -> bytes:
    """Return entries as a block of a part."""
    squeezed = zlib.compress(entries, 1)
    return _LENGTH.pack(len(squeezed)) + squeezed


class PartOfSchedule:
    """A part to read.

    Attributes
    ----------
    about
        What it says of itself.
    entries
        All that can be read, without the first.
    whole, full
        Whether its rank came to its end; whether it ended before that, being full.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"No part '{path}' of the recorded schedule can be read ({why(error)}).") from None
        if not data.startswith(_FORMAT):
            raise UserError(_refusal(path, data))
        self.path, self.entries = path, _entries(_unpacked(data[len(_FORMAT) :], tail_of(path)))
        if not self.entries or self.entries[0].kind != ABOUT:
            raise UserError(f"'{path}' is damaged: it does not say whose part it is.")
        self.about: dict[str, Any] = self.entries.pop(0).value
        last = self.entries[-1].kind if self.entries else None
        self.whole, self.full = last == END, last == FULL


def _refusal(path: Path, data: bytes) -> str:
    """Return why a file is no part that can be read here."""
    number = data[len(_KIND) : len(_KIND) + 9].split(b"\n")[0]
    if not data.startswith(_KIND) or not number.isdigit():
        return f"'{path}' is no part of a recorded schedule."
    other = "an older" if int(number) < _VERSION else "a newer"
    return (
        f"'{path}' was recorded by {other} dbnet, in format {int(number)} (here it is {_VERSION}): "
        "replay it with that one, or record the run anew."
    )


def _entries(data: bytes) -> list[LogEntry]:
    """Return all whole entries of bytes that may break off."""
    out, at = [], 0
    while at + _HEAD.size <= len(data):
        kind, length = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if end > len(data) or kind > FULL:
            break
        # Slices that were still being taken.
        if kind == TAKES and not length:
            end = len(data) - (len(data) - end) % TAKE.itemsize
        out.append(LogEntry(kind, data[at + _HEAD.size : end]))
        at = end
    return out


def _unpacked(data: bytes, tail: Path) -> bytes:
    """Return what can be read of blocks up to where they break off or are damaged, and of the tail, if it follows them."""
    out, at, number, part = [], 0, 0, b""
    while at + _LENGTH.size <= len(data):
        end = at + _LENGTH.size + _LENGTH.unpack_from(data, at)[0]
        part, whole = _unzipped(data[at + _LENGTH.size : end])
        if not whole:
            break
        out.append(part)
        at, number, part = end, number + 1, b""
    return b"".join(out) + (_left(tail, number) or part)


def _unzipped(squeezed: bytes) -> tuple[bytes, bool]:
    """Return what can be read of a block, and whether that is all."""
    stream, out = zlib.decompressobj(), []
    for lo in range(0, len(squeezed), 1 << 10):
        try:
            out.append(stream.decompress(squeezed[lo : lo + (1 << 10)]))
        except zlib.error:
            break
    return b"".join(out), stream.eof


def _left(path: Path, blocks: int) -> bytes:
    """Return the entries of a tail after so many blocks; nothing where there is none, or where a block holds them already."""
    data = path.read_bytes() if path.exists() else b""
    if len(data) < _FIRST or _BLOCKS.unpack_from(data)[0] != blocks:
        return b""
    return data[_FIRST : _BLOCKS.unpack_from(data, _BLOCKS.size)[0]]
