"""Into which slices of a shard pushes come, and how often each has been changed: what makes a fetch whole and repeatable.

All origins of one partition index push the same slices. A shard counts in its window, for each contiguous piece of each slice, its
changes: the number is raised before and after one, so it is odd meanwhile. Who reads the numbers, the parameters, and the numbers
again has of each piece whose number is even and the same exactly that version. A long slice that is one of few is changed in
several pieces, so that less of it is under way when somebody reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dbnet.core.ranges import Range
from dbnet.shards.routes import Route

# Elements of the shortest piece that a slice is cut into, and pieces of a push beyond which none is cut.
SHORTEST, MANY = 1 << 16, 16


class SlicePiece(NamedTuple):
    """A contiguous piece of a slice: where it lies in its shard, and which slice of which partition index it is of."""

    lo: int
    size: int
    partition: int
    slice: int

    @property
    def range(self) -> Range:
        return Range(self.lo, self.lo + self.size)


def slice_pieces(routes: Sequence[Route | None], longest: int | None) -> list[SlicePiece]:
    """Return the pieces of one shard.

    Parameters
    ----------
    routes
        For each partition index by which route it pushes to the shard.
    longest
        Elements of a slice; None: a push comes whole.
    """
    out = []
    for partition, route in enumerate(routes):
        at = number = 0
        most = 0 if route is None else max(SHORTEST, -(-route.size // MANY))
        while route is not None and at < route.size:
            n = route.size if longest is None else span(route, at, longest)
            for _, lo, size in route.segments(at, n):
                out += [SlicePiece(lo + cut, min(most, size - cut), partition, number) for cut in range(0, size, most)]
            at, number = at + n, number + 1
    return out


def span(route: Route, at: int, longest: int) -> int:
    """Return the elements of the slice of a push that begins at element `at`."""
    here = route.slice(at, longest)
    return here.stop - here.start
