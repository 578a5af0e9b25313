"""The replicas of one process read their examples together: the same ones as each by itself, once, and in memory once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data import together
from dbnet.data.file import DataFile, Examples
from dbnet.data.portions import Blocks, Portion, Reader
from dbnet.data.together import Together

N, PARTS, SEED = 23, 4, 3


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many examples each read of a file is of; few are read at a time."""
    counts, read = [], DataFile.read

    def counted(self: DataFile, part: str, rows: np.ndarray | None = None, columns: list[Range] | None = None) -> Examples:
        counts.append(self.sizes[part] if rows is None else len(rows))
        return read(self, part, rows, columns)

    monkeypatch.setattr(DataFile, "read", counted)
    monkeypatch.setattr(together, "_BLOCK", 100)
    return counts


@pytest.mark.parametrize("kind", ["u1", "f4", "f8"])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("columns", [None, [Range(0, 2), Range(4, 5)]])
def test_subsets_are_those_of_the_file(
    make_data: Callable[..., Path], passes: list[int], kind: str, vectors: bool, columns: list[Range] | None
) -> None:
    rng = np.random.default_rng(1)
    x, labels = rng.integers(0, 200, (N, 5)).astype(kind), rng.integers(0, 2, N)
    y = rng.standard_normal((N, 2)) if vectors else labels
    file = DataFile(make_data(train__x=x, train__y=y, test__x=None, test__y=None, classes=None if vectors else 2))
    data, inputs = Together(file, np.dtype("f4")), np.dtype("f4") if kind == "f8" else x.dtype
    subsets = [data.subset(i, PARTS, SEED) for i in range(PARTS)]
    parts = [data.read("train", rows[1:], columns) for rows in subsets]
    assert sum(passes) == N, "one pass over the file, however many there are"
    for i, (rows, part) in enumerate(zip(subsets, parts, strict=True)):
        np.testing.assert_array_equal(rows, file.subset(i, PARTS, SEED))
        alone = file.read("train", rows[1:], columns)
        np.testing.assert_array_equal(part.x, alone.x.astype(inputs), strict=True)
        np.testing.assert_array_equal(part.y, alone.y.astype("f4") if vectors else alone.y, strict=True)
        np.testing.assert_array_equal(part.rows, rows[1:])
    assert len({id(part.x.base) for part in parts}) == 1 and all(part.x.base is not None for part in parts), "held once"
    some = np.array([0, 7, 8, 22])
    np.testing.assert_array_equal(data.read("train", some).x, x[some].astype(inputs))
    assert len(data.read("train", some[:0], columns)) == 0
    others = data.subset(1, 2, SEED + 1)
    np.testing.assert_array_equal(data.read("train", others, columns).y, file.read("train", others).y.astype(parts[0].y.dtype))


def test_what_no_subset_is_comes_from_the_file(make_data: Callable[..., Path], passes: list[int]) -> None:
    data = Together(DataFile(make_data()), np.dtype("f4"))
    assert len(data.read("train", np.arange(2, 5))) == 3 and len(data.read("test")) == 4
    assert passes == [3, 4], "portions and what is evaluated: no more than is wanted"
    assert (data.sizes["train"], data.scale) == (8, 1.0)


def test_what_is_too_large_for_the_network_is_named(make_data: Callable[..., Path], passes: list[int]) -> None:
    x = np.ones((N, 5))
    x[17, 2] = 1e300
    data = Together(DataFile(make_data(train__x=x, train__y=np.arange(N) % 2, test__x=None, test__y=None)), np.dtype("f4"))
    with pytest.raises(UserError, match=r"Example 17 holds 1e\+300"):
        data.read("train", data.subset(0, PARTS, SEED))


def test_readers_take_blocks_from_each_other() -> None:
    x, asked = np.arange(24.0).reshape(8, 3), []

    def read(rows: Range) -> Examples:
        asked.append(rows.lo)
        return Examples(x[rows.slice], np.zeros(rows.size, np.int64))

    held: WeakValueDictionary[int, Examples] = WeakValueDictionary()
    readers = [Reader(read, Blocks(2, 8), 2, 1.0, np.dtype("f4"), 2) for _ in range(3)]
    for reader in readers:
        reader.at_once(held)
    out = np.zeros((3, 2), np.float32)
    for reader in readers:
        for block in (0, 1):
            reader.open(Portion(block, 0, 2))
            assert reader.next(out) == 2
            np.testing.assert_array_equal(out.T, x[2 * block : 2 * block + 2])
    assert asked == [0, 2] and [reader.reads for reader in readers] == [2, 0, 0]
    for reader in readers:
        for block in (2, 3):
            reader.open(Portion(block, 0, 2))
    gc.collect()
    assert sorted(held) == [2, 3], "what none of them keeps is not kept"
