"""Data files: what is written comes back, what would spoil a run is refused; IDX files, plain and gzipped, whole and broken."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data import preparation
from dbnet.data.file import DataFile, read_inputs, write
from dbnet.data.formats.idx import Idx, read_idx

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx(array: np.ndarray) -> bytes:
    """Return an array as the bytes of an IDX file."""
    code = CODES[array.dtype.str[1:]]
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


@pytest.mark.parametrize("dtype", ["u1", "f4", "f8"])
@pytest.mark.parametrize("shape", [(3,), (4, 5), (4, 5, 2)])
def test_what_is_written_comes_back(dtype: str, shape: tuple[int, ...], make_data: Callable[..., Path]) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 200, (9000, *shape)).astype(dtype), rng.integers(0, 4, 9000)
    path = make_data(train__x=x, train__y=y, test__x=x[:3], test__y=y[:3], classes=4, scale=0.5)
    data = DataFile(path)
    assert data.shape == ((*shape, 1) if len(shape) == 2 else shape)
    assert (data.classes, data.targets, data.scale, data.sizes) == (4, 0, 0.5, {"train": 9000, "test": 3})
    part = data.read("train")
    assert np.array_equal(part.x, x.reshape(9000, -1)) and part.x.dtype == x.dtype and np.array_equal(part.y, y)
    rows = np.sort(rng.choice(9000, 57, replace=False))
    some = data.read("train", rows)
    assert np.array_equal(some.x, x[rows].reshape(57, -1)) and np.array_equal(some.y, y[rows])
    assert len(data.read("train", np.zeros(0, np.int64))) == 0


def test_vector_targets(make_data: Callable[..., Path]) -> None:
    y = np.arange(16, dtype=np.float32).reshape(8, 2)
    data = DataFile(make_data(train__y=y, test__x=None, test__y=None, classes=None))
    assert (data.classes, data.targets, data.sizes) == (0, 2, {"train": 8})
    assert np.array_equal(data.read("train").y, y)


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=30, suppress_health_check=list(HealthCheck), deadline=None)
def test_subsets_cover_all_examples_once(make_data: Callable[..., Path], n: int, parts: int, seed: int) -> None:
    data = DataFile(make_data(train__x=np.zeros((n, 3), np.float32), train__y=np.zeros(n, np.int64)))
    subsets = [data.subset(i, parts, seed) for i in range(parts)]
    assert sorted(np.concatenate(subsets).tolist()) == list(range(n))
    assert all((np.diff(rows) > 0).all() for rows in subsets)
    assert max(map(len, subsets)) - min(map(len, subsets)) <= 1


def test_subsets_depend_on_the_seed(make_data: Callable[..., Path]) -> None:
    data = DataFile(make_data(train__x=np.zeros((99, 3), np.float32), train__y=np.zeros(99, np.int64)))
    assert np.array_equal(data.subset(0, 3, 1), data.subset(0, 3, 1))
    assert not np.array_equal(data.subset(0, 3, 1), data.subset(0, 3, 2))


BAD = {
    "label too large": ({"train__y": np.array([0, 1, 2, 0, 1, 0, 1, 0])}, "/train/y[2] = 2 is not a label; with 2 classes"),
    "negative label": ({"test__y": np.array([0, -1, 0, 0])}, "/test/y[1] = -1 is not a label"),
    "float labels": ({"train__y": np.zeros(8)}, "labels must be integers"),
    "negative labels only": ({"train__y": np.full(8, -1), "classes": None}, "label"),
    "short y": ({"train__y": np.zeros(7, np.int64)}, "do not fit each other"),
    "another test shape": ({"test__x": np.zeros((4, 2), np.float32)}, "do not fit each other and /train"),
    "no test y": ({"test__y": None}, "has /test/x but no /test/y"),
    "no train y": ({"train__y": None}, "has no /train/x and /train/y"),
    "four axes too many": ({"train__x": np.zeros((8, 2, 2, 2, 2), np.float32)}, "must have 1, 2 or 3 axes"),
    "scalars": ({"train__x": np.zeros(8, np.float32)}, "must have 1, 2 or 3 axes"),
    "integers": ({"train__x": np.zeros((8, 3), np.int32)}, "use float32, float64 or uint8"),
    "no examples": (
        {"train__x": np.zeros((0, 3), np.float32), "train__y": np.zeros(0, np.int64), "test__x": None, "test__y": None},
        "has no examples",
    ),
    "no units": ({"train__x": np.zeros((8, 0), np.float32), "test__x": None, "test__y": None}, "units"),
    "zero scale text": ({"scale": "much"}, "scale"),
    "scale not finite": ({"scale": float("nan")}, "scale"),
    "classes is text": ({"classes": "ten"}, "classes"),
    "targets of three axes": ({"train__y": np.zeros((8, 2, 2), np.float32), "test__x": None, "test__y": None}, "/train/y"),
    "targets are text": ({"train__y": np.full((8, 2), b"a"), "test__x": None, "test__y": None}, "/train/y"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_would_spoil_a_run_is_refused(case: str, make_data: Callable[..., Path]) -> None:
    changes, said = BAD[case]
    with pytest.raises(UserError) as error:
        DataFile(make_data(**changes))
    assert said in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["train", "test"])
def test_values_that_are_not_finite(value: float, part: str, make_data: Callable[..., Path]) -> None:
    x = np.zeros((8, 3))
    x[5, 1] = value
    data = DataFile(
        make_data(**{f"{part}__x": x, f"{part}__y": np.zeros(8, np.int64), "train__x": x, "train__y": np.zeros(8, np.int64)})
    )
    with pytest.raises(UserError, match=f"/{part}/x of example 5 is {value}"):
        data.read(part)
    with pytest.raises(UserError, match="not finite"):
        read_inputs(data.path, part, (3,))


def test_targets_that_are_not_finite(make_data: Callable[..., Path]) -> None:
    y = np.zeros((8, 2), np.float32)
    y[3, 1] = np.nan
    with pytest.raises(UserError, match="/train/y of example 3 is nan"):
        DataFile(make_data(train__y=y, test__x=None, test__y=None)).read("train")


def test_groups_in_place_of_arrays(place: Path) -> None:
    with h5py.File(place / "odd.h5", "w") as file:
        file.create_group("train/x")
        file.create_group("train/y")
    with pytest.raises(UserError):
        DataFile(place / "odd.h5")
    with pytest.raises(UserError):
        read_inputs(place / "odd.h5", "train", (3,))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_file_that_is_cut_off(share: float, digits: Path, place: Path) -> None:
    whole = digits.read_bytes()
    cut = place / "cut.h5"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError):
        DataFile(cut).read("train")
    with pytest.raises(UserError):
        read_inputs(cut, "train", (8, 8, 1))


@given(st.data())
@settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
def test_damaged_bytes_give_data_or_a_sentence(make_data: Callable[..., Path], data: st.DataObject) -> None:
    path = make_data()
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 20))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with suppress(UserError):
        DataFile(path).read("train")


def test_a_failed_write_leaves_nothing(place: Path) -> None:
    (place / "taken").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write(place / "taken" / "data.h5", {"train/x": np.zeros(3)})
    (place / "folder.h5").mkdir()
    with pytest.raises(UserError, match="Cannot write"):
        write(place / "folder.h5", {"train/x": np.zeros((3, 2), np.uint8), "train/y": np.zeros(3, np.int64)})
    with pytest.raises(UserError, match=r"^'[^']*/small.h5'.* holds no label"):
        write(place / "small.h5", {"train/x": np.zeros((3, 2), np.uint8), "train/y": np.full(3, -1)})
    assert sorted(p.name for p in place.iterdir()) == ["folder.h5", "taken"]


# --- IDX ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_comes_back(dtype: str, shape: tuple[int, ...], packed: bool, place: Path) -> None:
    array = np.random.default_rng(2).integers(0, 100, shape).astype(dtype)
    raw = idx(array)
    (place / "a").write_bytes(gzip.compress(raw) if packed else raw)
    back = read_idx(str(place / "a"))
    assert np.array_equal(back, array) and back.dtype == array.dtype and back.dtype.isnative


def test_idx_without_training_examples_is_refused(place: Path) -> None:
    for name, array in (("x", np.zeros((0, 4, 4), "u1")), ("y", np.zeros(0, "u1"))):
        (place / name).write_bytes(idx(array))
    with pytest.raises(UserError, match="'x' has no training examples"):
        Idx(train_images="x", train_labels="y", test_images="x", test_labels="y").read()


@pytest.mark.parametrize("packed", [False, True])
def test_idx_cut_anywhere(packed: bool, place: Path) -> None:
    raw = idx(np.arange(20, dtype="u1").reshape(4, 5))
    raw = gzip.compress(raw) if packed else raw
    for n in range(len(raw)):
        (place / "a").write_bytes(raw[:n])
        with pytest.raises(UserError):
            read_idx(str(place / "a"))


@given(
    st.binary(max_size=60),
    st.booleans(),
    st.sampled_from([b"", b"\0\0", b"\0\0\x08\x01", b"\0\0\x0e\xff", b"\x1f\x8b", b"\x1f\x8b\x08\0"]),
)
@settings(max_examples=200, suppress_health_check=list(HealthCheck), deadline=None)
def test_any_bytes_are_idx_or_a_sentence(place: Path, raw: bytes, packed: bool, start: bytes) -> None:
    raw = start + raw
    (place / "a").write_bytes(gzip.compress(raw) if packed else raw)
    try:
        assert isinstance(read_idx(str(place / "a")), np.ndarray)
    except UserError as error:
        assert "\n" not in str(error)


def test_idx_missing_or_a_folder(place: Path) -> None:
    for path in ("none", "."):
        with pytest.raises(UserError):
            read_idx(path)


LAYOUTS = {
    "contiguous": {},
    "chunks": {"chunks": (7, 2, 5)},
    "gzip": {"chunks": (16, 4, 5), "compression": "gzip"},
    "one chunk": {"chunks": (3000, 4, 5)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_what_holds_wanted_rows_is_read(place: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.random((3000, 4, 5)).astype(np.float32), rng.random((3000, 6))
    with h5py.File("rows.h5", "w") as file:
        file.create_dataset("train/x", data=x, **LAYOUTS[layout])
        file["train/y"] = y
    data, spans, read = DataFile("rows.h5"), [], h5py.Dataset.__getitem__
    monkeypatch.setattr("dbnet.data.file._BLOCK", 1 << 12)
    monkeypatch.setattr("dbnet.data.file._GAP", 1 << 10)

    def noting(source: h5py.Dataset, index: Any) -> Any:
        spans.append((source.name, index.stop - index.start))
        return read(source, index)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", noting)
    few = np.array([0, 1, 1400, 1407, 2999])
    for rows in (few, np.sort(rng.permutation(3000)[:400]), np.zeros(0, np.int64), None):
        for columns in (None, [Range(0, 3), Range(11, 20)], []):
            part, wanted = data.read("train", rows, columns), np.arange(3000) if rows is None else rows
            units = np.arange(20) if columns is None else np.array([u for r in columns for u in range(*r)], int)
            np.testing.assert_array_equal(part.x, x.reshape(3000, 20)[wanted][:, units])
            np.testing.assert_array_equal(part.y, y[wanted])
    spans.clear()
    data.read("train", few)
    total, grain = sum(n for name, n in spans if name == "/train/x"), {"chunks": 7, "gzip": 16, "one chunk": 3000}.get(layout, 12)
    assert total <= len(few) * grain
    # In blocks, between which others have their turn.
    data.read("train")
    assert max(n for _, n in spans) <= max(grain, (1 << 12) // 48)


def test_a_written_file_keeps_examples_whole(place: Path) -> None:
    x = np.zeros((500, 28, 28), np.uint8)
    write(
        "whole.h5", {"train/x": x, "train/y": np.arange(500) % 10, "test/x": x[:0], "test/y": np.zeros(0, np.int64), "classes": 10}
    )
    with h5py.File("whole.h5") as file:
        assert file["train/x"].chunks == (83, 28, 28) and file["train/y"].chunks == (500,)


def test_a_variance_is_taken_by_blocks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_READ", 8 * 3 * 7)
    y = np.random.default_rng(1).normal(size=(100, 3)) * [1, 10, 0.1] + [1e3, 0, -5]
    y[:7] += 1e4
    asked: list[int] = []

    class Watched(np.ndarray):
        def astype(self, *args: Any) -> np.ndarray:
            asked.append(len(self))
            return np.asarray(self).astype(*args)

    for values in (y, np.sort(y, axis=0), y.astype(np.float32), y[:1]):
        wanted = values.astype(np.float64).var(axis=0).sum()
        assert preparation.variance(values.view(Watched)) == pytest.approx(wanted, rel=1e-12, abs=0)
    assert max(asked) == 7
    write("v.h5", {"train/x": np.ones((100, 2), np.float32), "train/y": y})
    assert DataFile("v.h5").variance("train") == pytest.approx(y.var(axis=0).sum(), rel=1e-12)


def test_labels_are_looked_at_by_one_rank_only(make_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_data(train__y=np.array([0, 1, 7, 1, 0, 1, 0, 1]))
    with pytest.raises(UserError, match=r"/train/y\[2\] = 7 is not a label"):
        DataFile(path)
    monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda source, index: pytest.fail(f"read {source.name}[{index}]"))
    assert DataFile(path, check=False).classes == 2
