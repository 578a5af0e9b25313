"""Check the mappings of virtual arrays in the bytes of an HDF5 file.

HDF5 decodes the mappings before it looks at their checksum, and damaged ones crash the process: they are checked before HDF5 sees
them. Only headers and what they lead to are read. The names are those of the HDF5 File Format Specification: a dataset's object
header (IV.A.1) has a message on its layout, of a virtual one with the place of its mappings in a global heap collection (III.E).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

_LAYOUT, _CONTINUATION = 8, 16
_VIRTUAL = 3
# No checkpoint comes near these; what claims more is damaged.
_CHUNKS, _LARGEST = 100, 1 << 24
_WORD = 0xFFFFFFFF


class Raw:
    """The bytes of an HDF5 file.

    Parameters
    ----------
    file
        Descriptor of the open file.
    base
        Where address 0 is in it.
    address, size
        How many bytes an address has, and a size.
    """

    def __init__(self, file: int, base: int, address: int, size: int) -> None:
        self._file, self._base, self._end = file, base, os.fstat(file).st_size
        self.address, self.size = address, size

    def read(self, address: int, size: int) -> bytes:
        """Return as many of the bytes as there are, none where far too many are asked for."""
        where = self._base + address
        return os.pread(self._file, size, where) if 0 < size <= _LARGEST and where < self._end else b""


def intact(raw: Raw, header: int) -> bool:
    """Whether the object with this header has mappings as they were written, or none at all."""
    for layout in _layouts(raw, header):
        address, index = number(layout[2 : 2 + raw.address]), number(layout[2 + raw.address : 6 + raw.address])
        # An array without any mapping has the address that means none.
        if layout[0] < 4 or layout[1] != _VIRTUAL or address == (1 << 8 * raw.address) - 1:
            continue
        block = _block(raw, address, index)
        if len(block) <= 4 or checksum(block[:-4]) != number(block[-4:]):
            return False
    return True


def number(content: bytes) -> int:
    """Return the number that bytes stand for."""
    return int.from_bytes(content, "little")


def checksum(content: bytes) -> int:
    """Return the checksum of HDF5's metadata, Jenkins' lookup3."""
    a = b = c = (0xDEADBEEF + len(content)) & _WORD
    # The last up to twelve bytes are mixed in another way.
    last = max(0, len(content) - 1) // 12 * 12
    for at in range(0, last, 12):
        a, b, c = (
            (a + number(content[at : at + 4])),
            (b + number(content[at + 4 : at + 8])),
            (c + number(content[at + 8 : at + 12])),
        )
        for turn in (4, 6, 8, 16, 19, 4):
            a = ((a - c) ^ _turned(c, turn)) & _WORD
            a, b, c = b, (c + b) & _WORD, a
    if not content:
        return c
    rest = content[last:].ljust(12, b"\0")
    a, b, c = a + number(rest[:4]), b + number(rest[4:8]), c + number(rest[8:])
    for turn in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _turned(b, turn)) & _WORD
        a, b, c = b, c, a
    return b


def _turned(word: int, by: int) -> int:
    word &= _WORD
    return (word << by | word >> 32 - by) & _WORD


def _layouts(raw: Raw, header: int) -> Iterator[bytes]:
    """Yield the messages on the layout in an object header of either version; of a damaged one what can be found."""
    start = raw.read(header, 34)
    new = start[:4] == b"OHDR"
    if len(start) < 16 or not (new or start[0] == 1):
        return
    if new:
        flags = start[5]
        at, width, head = 6 + (flags >> 5 & 1) * 16 + (flags >> 4 & 1) * 4, 1 << (flags & 3), 4 + (flags >> 2 & 1) * 2
        waiting = [(header + at + width, number(start[at : at + width]))]
    else:
        head, waiting = 8, [(header + 16, number(start[8:12]))]
    for _ in range(_CHUNKS):
        if not waiting:
            return
        chunk, at = raw.read(*waiting.pop()), 0
        while at + head <= len(chunk):
            kind, size = (chunk[at], number(chunk[at + 1 : at + 3])) if new else (chunk[at], number(chunk[at + 2 : at + 4]))
            message = chunk[at + head : at + head + size]
            if kind == _CONTINUATION:
                address, length = number(message[: raw.address]), number(message[raw.address : raw.address + raw.size])
                # A new one has a signature before its messages, and a checksum after them.
                waiting.append((address + 4, length - 8) if new else (address, length))
            elif kind == _LAYOUT and len(message) >= 6 + raw.address:
                yield message
            at += head + size


def _block(raw: Raw, address: int, index: int) -> bytes:
    """Return an object of a global heap collection; nothing where the collection is not as it must be."""
    head = 8 + -(-raw.size // 8) * 8
    start = raw.read(address, head)
    size = number(start[8 : 8 + raw.size])
    heap, at, found = raw.read(address, size), head, b""
    if start[:5] != b"GCOL\1" or len(heap) != size:
        return b""
    while at + head <= size:
        which, length = number(heap[at : at + 2]), number(heap[at + 8 : at + 8 + raw.size])
        # The free space has number 0, and counts its own head.
        need = head + -(-length // 8) * 8 if which else length
        if need < head or at + need > size:
            return b""
        if which == index:
            found = heap[at + head : at + head + length]
        at += need
    return found
