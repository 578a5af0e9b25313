"""Minibatches: every example once per epoch, in an order that only seed, subset and epoch decide, from any cursor on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data.batches import Batches, Cursor, gather
from dbnet.data.file import Examples
from dbnet.data.portions import Blocks, Portion, Reader
from dbnet.data.subsets import order

F4 = np.dtype("float32")


def numbered(n: int, batch: int, key: tuple[int, int] | None = (1, 0)) -> Batches:
    """Return batches whose examples are (i, 2 i) with label i."""
    x = np.stack([np.arange(n), 2 * np.arange(n)], axis=1).astype(np.float64)
    return Batches(Examples(x, np.arange(n)), batch, 1.0, F4, None if key is None else order(*key, n, Range(0, n)))


def take(batches: Batches, times: int) -> list[list[int]]:
    """Return the examples of the next minibatches, having checked input and target against each other."""
    x, out = np.full((2, batches.batch), np.nan, F4), []
    for _ in range(times):
        count = batches.next(x)
        assert np.array_equal(x[0, :count], batches.target[:count]) and np.array_equal(x[1, :count], 2 * x[0, :count])
        out.append([int(i) for i in x[0, :count]])
    return out


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_example_once_per_epoch(n: int, batch: int, epochs: int) -> None:
    batches, per = numbered(n, batch), -(-n // batch)
    for epoch in range(epochs):
        assert batches.cursor == Cursor(epoch, 0)
        got = take(batches, per)
        assert sorted(i for one in got for i in one) == list(range(n))
        assert [len(one) for one in got[:-1]] == [batch] * (per - 1)


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 30), st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_a_cursor_goes_on_where_it_stood(n: int, batch: int, before: int, after: int) -> None:
    one, other = numbered(n, batch), numbered(n, batch)
    take(one, before)
    other.seek(one.cursor)
    assert take(one, after) == take(other, after)


def test_unused_columns_repeat_the_first_example() -> None:
    batches, x = numbered(5, 3), np.zeros((2, 3), F4)
    assert [batches.next(x), batches.next(x)] == [3, 2]
    assert np.array_equal(x[:, 2], x[:, 0]) and not np.array_equal(x[:, 1], x[:, 0])


@pytest.mark.parametrize("value", [3e38, -3e38])
def test_what_the_scale_takes_beyond_the_type_is_refused(value: float) -> None:
    part = Examples(np.array([[1.0], [value]]), np.arange(2))
    assert Batches(part, 2, 1.0, F4, None).next(np.zeros((1, 2), F4)) == 2
    with pytest.raises(UserError, match=r"Example 1 holds -?3e\+38, which times the data's scale \(10\)"):
        Batches(part, 2, 10.0, F4, None)


def test_order_is_seeded() -> None:
    def first(key: tuple[int, int]) -> list[list[int]]:
        return take(numbered(100, 100, key), 2)

    assert first((1, 0)) == first((1, 0))
    assert first((1, 0)) != first((2, 0)) != first((1, 1))
    one, two = first((1, 0))
    assert one != two
    assert take(numbered(5, 5, None), 2) == [list(range(5))] * 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("units", "count"), [(7, 5), (16, 32), (37, 33), (1, 17)])
def test_gather_against_indexing(dtype: str, compiled: bool, units: int, count: int) -> None:
    """Less than a tile, whole tiles, and tiles with edges."""
    rng = np.random.default_rng(3)
    for data in (rng.integers(0, 256, (20, units)).astype("u1"), rng.random((20, units)).astype(dtype)):
        index, out = rng.integers(0, 20, count + 1), np.full((units, count + 3), -1, dtype)
        (gather if compiled else gather.py_func)(data, index, count, 0.25, out)
        expected = np.dtype(dtype).type(0.25) * data[index[:count]].T.astype(dtype)
        assert np.array_equal(out[:, :count], expected) and (out[:, count:] == -1).all()


def test_vector_targets_and_bytes() -> None:
    y = np.arange(12, dtype=np.float64).reshape(4, 3)
    batches = Batches(Examples(np.arange(8, dtype=np.uint8).reshape(4, 2), y), 3, 0.5, F4, None)
    x = np.zeros((2, 3), F4)
    assert batches.next(x) == 3
    assert x.tolist() == [[0, 1, 2], [0.5, 1.5, 2.5]] and np.array_equal(batches.target, y[:3].T) and batches.target.dtype == F4


@pytest.mark.parametrize("shape", [(1, 4), (3, 4), (2, 3), (2, 5), (8,)])
def test_an_input_of_another_size_is_never_written_to(shape: tuple[int, ...]) -> None:
    batches, blocks = numbered(6, 4, None), Blocks(6, 6)
    reader = Reader(lambda rows: batches.part, blocks, 4, 1.0, F4, 2)
    reader.open(Portion(0, 0, 6))
    for source in (batches, reader):
        x = np.full(shape, -1, F4)
        with pytest.raises(ValueError, match="4 examples of 2 units do not fill an input of shape"):
            source.next(x)
        assert (x == -1).all()
        # Also after one that fits.
        source.next(np.zeros((2, 4), F4))
        with pytest.raises(ValueError, match="do not fill"):
            source.next(x)
    with pytest.raises(ValueError, match="do not fill"):
        numbered(6, 2, None).next(np.zeros((2, 4), F4)[:, ::2])
    reader.close()


def test_examples_that_are_not_there_are_never_read() -> None:
    for index in (-1, 6):
        with pytest.raises(ValueError, match="The order of epoch 0 names examples beyond the 6 that there are"):
            Batches(numbered(6, 4).part, 4, 1.0, F4, lambda epoch, index=index: np.array([0, index, 2]))
    reader = Reader(lambda rows: numbered(6, 4).part, Blocks(6, 6), 4, 1.0, F4, 2)
    for lo, hi in ((-1, 2), (4, 7), (3, 2)):
        with pytest.raises(ValueError, match="does not lie in its block of 6 examples"):
            reader.open(Portion(0, lo, hi))
    reader.close()
