"""The one ownership arithmetic: half-open ranges and boxes of them.

Units, parameters, examples and shards are all owned by ranges. A message, a transfer, a subset is an overlap of what one side
needs with what the other side owns. An image layer's units are a box: one range per axis (row, column, map).
"""

from __future__ import annotations

from itertools import pairwise, product
from math import prod
from typing import NamedTuple


class Range(NamedTuple):
    """The integers lo, lo + 1, ..., hi - 1; empty when hi <= lo."""

    lo: int
    hi: int

    @property
    def size(self) -> int:
        return max(0, self.hi - self.lo)

    @property
    def slice(self) -> slice:
        return slice(self.lo, max(self.lo, self.hi))

    def shift(self, by: int) -> Range:
        return Range(self.lo + by, self.hi + by)


Region = tuple[Range, ...]


def split(n: int, parts: int) -> list[Range]:
    """Cut range(n) into `parts` ranges whose sizes differ by at most one, larger ones first; some are empty if parts > n."""
    base, extra = divmod(n, parts)
    bounds = [0]
    for i in range(parts):
        bounds.append(bounds[-1] + base + (i < extra))
    return [Range(lo, hi) for lo, hi in pairwise(bounds)]


def piece(n: int, parts: int, index: int) -> Range:
    """Return one range of `split`, whatever their number."""
    base, extra = divmod(n, parts)
    lo = index * base + min(index, extra)
    return Range(lo, lo + base + (index < extra))


def overlap(a: Range, b: Range) -> Range:
    """Return what both ranges have in common; empty ranges are (lo, lo)."""
    lo = max(a.lo, b.lo)
    return Range(lo, max(lo, min(a.hi, b.hi)))


def whole(shape: tuple[int, ...]) -> Region:
    """Return the box that covers an array of this shape."""
    return tuple(Range(0, n) for n in shape)


def shape_of(region: Region) -> tuple[int, ...]:
    return tuple(r.size for r in region)


def size_of(region: Region) -> int:
    return prod(shape_of(region))


def intersect(a: Region, b: Region) -> Region:
    """Return the box that two boxes have in common."""
    return tuple(overlap(x, y) for x, y in zip(a, b, strict=True))


def relative(region: Region, origin: Region) -> tuple[slice, ...]:
    """Return the slices that select `region` in an array that holds just the box `origin`."""
    return tuple(slice(r.lo - o.lo, r.lo - o.lo + r.size) for r, o in zip(region, origin, strict=True))


def flatten(region: Region, shape: tuple[int, ...]) -> list[Range]:
    """Return the box as sorted flat ranges of a C-ordered array of this shape, neighbours merged."""
    if size_of(region) == 0:
        return []
    # The innermost axes that are covered whole form one contiguous run together with the next axis outward.
    run, axis = 1, len(shape)
    while axis > 0:
        axis -= 1
        lo, n = region[axis].lo, region[axis].size
        if n != shape[axis] or axis == 0:
            break
        run *= shape[axis]
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    outer = product(*(range(r.lo, r.hi) for r in region[:axis]))
    starts = (sum(i * s for i, s in zip(index, strides, strict=False)) + lo * run for index in outer)
    return [Range(start, start + n * run) for start in starts]
