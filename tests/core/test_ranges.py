"""The ownership arithmetic against sets of integers and NumPy's indexing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dbnet.core.ranges import Range, flatten, intersect, overlap, piece, relative, shape_of, size_of, split, whole

small = st.integers(0, 12)
ranges = st.tuples(small, small).map(lambda pair: Range(min(pair), max(pair)))


def members(r: Range) -> set[int]:
    return set(range(r.lo, r.hi))


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Range, ...], tuple[Range, ...]]:
    """Draw a shape and two boxes within it."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))

    def box() -> tuple[Range, ...]:
        return tuple(Range(*sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))) for n in shape)

    return shape, box(), box()


@given(st.integers(0, 200), st.integers(1, 30))
def test_split_covers_everything_once_and_evenly(n: int, parts: int) -> None:
    cut = split(n, parts)
    assert [i for r in cut for i in range(r.lo, r.hi)] == list(range(n))
    sizes = [r.size for r in cut]
    assert len(cut) == parts and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert cut == [piece(n, parts, i) for i in range(parts)]


@given(ranges, ranges)
def test_overlap_is_the_intersection(a: Range, b: Range) -> None:
    both = overlap(a, b)
    assert members(both) == members(a) & members(b)
    assert both.size == len(members(both)) and both.lo <= both.hi


@given(ranges, st.integers(0, 9))
def test_shift_and_slice(r: Range, by: int) -> None:
    assert members(r.shift(by)) == {i + by for i in members(r)}
    assert list(range(20))[r.slice] == sorted(members(r))


def test_a_backward_range_is_empty() -> None:
    assert Range(5, 2).size == 0 and list(range(9))[Range(5, 2).slice] == []


@given(boxes())
def test_boxes_against_numpy(case: tuple) -> None:
    shape, a, b = case
    flat = np.arange(np.prod(shape)).reshape(shape)
    pick = tuple(r.slice for r in a)
    assert shape_of(a) == flat[pick].shape and size_of(a) == flat[pick].size
    found = flatten(a, shape)
    assert [i for r in found for i in range(r.lo, r.hi)] == flat[pick].ravel().tolist()
    assert all(x.hi < y.lo for x, y in pairwise(found)), "neighbours are merged"
    both = intersect(a, b)
    assert set(flat[tuple(r.slice for r in both)].ravel()) == set(flat[pick].ravel()) & set(flat[tuple(r.slice for r in b)].ravel())
    if size_of(both):
        assert np.array_equal(flat[pick][relative(both, a)], flat[tuple(r.slice for r in both)])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_whole_is_one_run(shape: list[int]) -> None:
    assert flatten(whole(tuple(shape)), tuple(shape)) == [Range(0, int(np.prod(shape)))]
