"""Which elements of an origin's vector lie where on which shard; the shards' ranges and rings, as all ranks know them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dbnet.comm.topology import Topology
from dbnet.comm.window import Field
from dbnet.core.ranges import Range, overlap
from dbnet.network.model import Piece

HEADER = 8


class Rings(NamedTuple):
    """The shards' side as all ranks know it.

    Attributes
    ----------
    ranges, users
        Each shard's range, and the origins that have a ring there.
    dtype
        Of the parameters.
    slot, slots
        Bytes of a slice, slices of a ring.
    narrow
        Whether float32 travels as bfloat16.
    """

    ranges: Sequence[Range]
    users: Sequence[Sequence[int]]
    dtype: np.dtype
    slot: int
    slots: int
    narrow: bool = False

    @property
    def wire(self) -> np.dtype:
        """The type of what is pushed and fetched; bfloat16 is uint16 here."""
        return np.dtype("uint16") if self.narrow else np.dtype(self.dtype)

    @property
    def elements(self) -> int:
        """Gradient values of a slice."""
        return max(1, self.slot // self.wire.itemsize)

    def fields(self, shard: int, topology: Topology) -> list[Field]:
        """Return the window fields of one shard."""
        n, name, size, rows = topology.origins, np.dtype(self.dtype).name, self.ranges[shard].size, len(self.users[shard])
        return [
            Field("params", name, (size,)),
            *([Field("rounded", self.wire.name, (size,))] if self.narrow else []),
            Field("clock", "int64", (topology.partitions,)),
            Field("head", "int64", (n,)),
            Field("tail", "int64", (n,)),
            Field("header", "int64", (rows, self.slots, HEADER)),
            Field("ring", self.wire.name, (rows, self.slots, self.elements)),
        ]


class Route(NamedTuple):
    """One origin's part of one shard.

    Attributes
    ----------
    shard
        Index of the shard.
    size
        Parameters of the origin that this shard holds; elements of the part are counted 0 .. size - 1.
    starts, targets, places
        For each contiguous piece of it its first element, where that lies in the shard, and where in the origin's own vector.
    """

    shard: int
    size: int
    starts: tuple[int, ...]
    targets: tuple[int, ...]
    places: tuple[int, ...]

    def segments(self, first: int, n: int) -> list[tuple[int, int, int]]:
        """Return (element within the slice, place in the shard, length) for `n` elements from `first` on."""
        i, at, end = bisect_right(self.starts, first) - 1, first, first + n
        if n > 0 and (i + 1 == len(self.starts) or end <= self.starts[i + 1]):
            return [(0, self.targets[i] + first - self.starts[i], n)]
        out = []
        while at < end:
            stop = min(end, self.starts[i + 1] if i + 1 < len(self.starts) else end)
            out.append((at - first, self.targets[i] + at - self.starts[i], stop - at))
            at, i = stop, i + 1
        return out

    def moves(self, first: int, most: int) -> list[tuple[int, int, int]]:
        """Return (place in the origin's vector, place in the shard, length) for up to `most` elements from `first` on."""
        out = []
        for start, target, n in self.segments(first, min(most, self.size - first)):
            i = bisect_right(self.starts, first + start) - 1
            out.append((self.places[i] + first + start - self.starts[i], target, n))
        return out

    def slice(self, first: int, most: int) -> slice:
        """Return where up to `most` elements from `first` on lie in the origin's vector: as many as lie there in one run."""
        i = bisect_right(self.starts, first) - 1
        place = self.places[i] + first - self.starts[i]
        ends = (*self.starts[1:], self.size)
        while ends[i] - first < most and ends[i] < self.size and self.places[i + 1] == place + ends[i] - first:
            i += 1
        return slice(place, place + min(ends[i] - first, most))

    def slices(self, most: int) -> dict[int, slice]:
        """Return where the slices of a push lie in the origin's vector, by the first element of each."""
        out, at = {}, 0
        while at < self.size:
            out[at] = here = self.slice(at, most)
            at += here.stop - here.start
        return out


def routes(footprint: Sequence[Piece], shard_ranges: Sequence[Range]) -> list[Route]:
    """Return the routes of an origin to every shard that holds some of its footprint."""
    out = []
    for index, part in enumerate(shard_ranges):
        cut = [(overlap(piece.range, part), piece) for piece in footprint]
        cut = [(both, piece.at + both.lo - piece.range.lo) for both, piece in cut if both.size]
        if cut:
            ends = np.cumsum([0, *(both.size for both, _ in cut)]).tolist()
            targets, places = tuple(both.lo - part.lo for both, _ in cut), tuple(at for _, at in cut)
            out.append(Route(index, ends[-1], tuple(ends[:-1]), targets, places))
    return out
