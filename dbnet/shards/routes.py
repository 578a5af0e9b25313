"""Which elements of an origin's vector lie where on which shard."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dbnet.core.ranges import Range, overlap
from dbnet.network.model import Piece


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
        out, i, end = [], bisect_right(self.starts, first) - 1, first + n
        at = first
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
