"""The data file that dbnet trains on, and what a format is that prepares one.

Layout (HDF5), for your own arrays too:

    /train/x   [examples, ...]   float32, float64 or uint8; one example per row: (units) or (rows, columns[, maps]),
                                 maps (colour channels) last
    /train/y   [examples]        integers 0 .. classes - 1,   or [examples, units] floats for the squared error
    /test/x, /test/y             the same, for evaluation (optional); /validation, too
    /class_names                 [classes] texts (optional)
    /normalize/mean, spread      how x was normalized ('dbnet data --normalize' writes them; optional)
    attributes of /              classes (integer; for labels), scale (x is multiplied by it; 1 if missing; 1 / 255 for
                                 images of bytes), name, source

For example, from arrays of Python:

    with h5py.File("mine.h5", "w") as file:
        file["train/x"], file["train/y"] = images, labels        # (60000, 28, 28) uint8, (60000,) integers
        file["test/x"], file["test/y"] = more, theirs
        file.attrs["classes"], file.attrs["scale"] = 10, 1 / 255

Opening checks everything that would spoil a run later: shapes, label range, NaN or Inf, cut-off files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, nan, prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.files import hdf5, reading, writing
from dbnet.core.ranges import Range, piece
from dbnet.core.untrusted.opening import opened
from dbnet.data.preparation import Normalization, variance

PARTS = ("train", "test", "validation")
_AGAIN = "make it again, as 'dbnet data --help' shows"
# Bytes read at a time; what lies between wanted rows is read along where it is little.
_BLOCK, _GAP = 1 << 22, 1 << 16


@dataclass(frozen=True)
class Examples:
    """Examples in memory: x [n, units] in the type of the file, y [n] or [n, units], and which examples of the file they are."""

    x: np.ndarray
    y: np.ndarray
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.x)

    def example(self, row: int) -> int:
        """Return which example of the file a row is."""
        return row if self.rows is None else int(self.rows[row])


class DataFile:
    """A checked data file.

    Attributes
    ----------
    shape
        Shape of one example; two-dimensional images get one map: (rows, columns, 1).
    classes
        Number of classes, 0 for vector targets.
    targets
        Units of a vector target, 0 for labels.
    scale
        What x is multiplied with on its way into the network.
    one_hot
        Whether vector targets are class labels in disguise.
    class_names
        Of each class; none where the file names none.
    normalization
        How x was normalized, if it was.
    doubts
        Sentences about what is allowed but seldom meant.

    With `check=False` the labels are taken to be good ones: one of several ranks looks at them.
    """

    def __init__(self, path: str | Path, check: bool = True) -> None:
        self.path, self._check = Path(path), check
        if not self.path.exists():
            recipe = next((p for p in (self.path.with_name("README.md"), self.path.with_name("prepare.py")) if p.exists()), None)
            shown = f"{recipe} says" if recipe else "'dbnet data --help' says"
            raise UserError(f"No data file '{path}'; {shown} how to make it (paths start from the folder the command is given in).")
        with reading(path, _AGAIN), opened(self.path) as file:
            self._describe(file)

    def _describe(self, file: h5py.File) -> None:
        if "train/x" not in file or "train/y" not in file:
            raise UserError(f"'{self.path}' has no /train/x and /train/y; 'dbnet data --help' shows the layout.")
        for name in (f"{part}/{array}" for part in PARTS for array in "xy"):
            if name in file and not isinstance(file[name], h5py.Dataset):
                raise UserError(f"'{self.path}': /{name} is not an array; 'dbnet data --help' shows the layout.")
        x, y = file["train/x"], file["train/y"]
        shape = tuple(int(n) for n in x.shape[1:])
        self.shape = (*shape, 1) if len(shape) == 2 else shape
        if len(self.shape) not in (1, 3) or not prod(shape):
            raise UserError(f"'{self.path}': /train/x has shape {x.shape}; an example must have 1, 2 or 3 axes and some units.")
        if x.dtype not in (np.uint8, np.float32, np.float64):
            raise UserError(f"'{self.path}': /train/x is {x.dtype}; use float32, float64 or uint8.")
        self.dtype = x.dtype
        self.scale = _number(file, "scale", 1.0)
        self.name = str(file.attrs.get("name", self.path.stem))
        self.source = str(file.attrs.get("source", "unknown"))
        labels = y.ndim == 1
        if y.ndim not in (1, 2) or y.dtype.kind not in "iuf":
            raise UserError(f"'{self.path}': /train/y is {y.dtype} {y.shape}; use integer labels, or vectors [examples, units].")
        if labels and not np.issubdtype(y.dtype, np.integer):
            raise UserError(f"'{self.path}': /train/y holds {y.dtype}; labels must be integers (or vectors [examples, units]).")
        self.targets = 0 if labels else int(y.shape[1])
        most = max(int(y[:].max()), -1) + 1 if labels and len(y) and "classes" not in file.attrs else 0
        self.classes = int(_number(file, "classes", most)) if labels else 0
        if labels and len(y) and self.classes < 1:
            raise UserError(f"'{self.path}': /train/y holds no label 0 .. classes - 1.")
        self.sizes = {}
        for part in PARTS:
            if f"{part}/x" in file:
                self.sizes[part] = self._check_part(file, part, shape)
        if not self.sizes["train"]:
            raise UserError(f"'{self.path}': /train/x has no examples.")
        self.class_names = self._names(file)
        self.normalization = normalization(file, self.shape)
        some = y[:100] if self.targets > 1 else np.zeros((1, 1))
        self.one_hot = self.targets > 1 and bool(((some == 0) | (some == 1)).all() and (some.sum(axis=1) == 1).all())
        self.doubts = list(self._doubts("scale" in file.attrs, x[:10] if self._check else None))

    def _names(self, file: h5py.File) -> list[str]:
        """Return the names of the classes."""
        if "class_names" not in file:
            return []
        found = file["class_names"]
        if not isinstance(found, h5py.Dataset) or found.shape != (self.classes,) or found.dtype.kind not in "OS":
            raise UserError(f"'{self.path}': /class_names must hold {self.classes} texts, one for each class.")
        return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in found[:].tolist()]

    def _doubts(self, scaled: bool, some: np.ndarray | None) -> Iterator[str]:
        if len(self.shape) == 3 and self.shape[0] <= 4 < 8 <= min(self.shape[1:]):
            rows, columns, maps = self.shape
            yield (
                f"'{self.path}': examples are {rows}x{columns}x{maps}, which looks like channels first; axes are (rows, "
                f"columns, maps), so this is {maps} maps of {rows} x {columns}. Store x.transpose(0, 2, 3, 1) instead "
                "('dbnet data npz --channels first' does)."
            )
        if self.dtype == np.uint8 and not scaled:
            yield (
                f"'{self.path}': x is uint8 and the file has no attribute scale, so the network gets 0 .. 255 as they are; "
                "set file.attrs['scale'], for images 1 / 255, or prepare it with 'dbnet data npz', which does."
            )
        image = len(self.shape) == 3 and self.dtype.kind == "f" and self.scale == 1
        if image and some is not None and len(some) and 100 < some.max() <= 255 and some.min() >= 0:
            yield (
                f"'{self.path}': x holds numbers from {some.min():g} to {some.max():g}, which look like images of bytes that were "
                "not scaled; set file.attrs['scale'] = 1 / 255, or prepare it with --scale 0.00392157 or --normalize map."
            )

    def _check_part(self, file: h5py.File, part: str, shape: tuple[int, ...]) -> int:
        if f"{part}/y" not in file:
            raise UserError(f"'{self.path}' has /{part}/x but no /{part}/y.")
        x, y = file[f"{part}/x"], file[f"{part}/y"]
        if len(x) != len(y) or tuple(x.shape[1:]) != shape or y.shape[1:] != file["train/y"].shape[1:]:
            raise UserError(f"'{self.path}': /{part}/x {x.shape} and /{part}/y {y.shape} do not fit each other and /train.")
        if x.dtype not in (np.uint8, np.float32, np.float64) or y.dtype.kind not in ("iu" if self.classes else "iuf"):
            raise UserError(f"'{self.path}': /{part}/x is {x.dtype} and /{part}/y {y.dtype}; use the types of /train.")
        if self.classes and self._check:
            labels = y[:]
            bad = np.flatnonzero((labels < 0) | (labels >= self.classes))
            if bad.size:
                raise UserError(
                    f"'{self.path}': /{part}/y[{bad[0]}] = {labels[bad[0]]} is not a label; with {self.classes} classes labels are "
                    f"0 .. {self.classes - 1}."
                )
        return len(x)

    def read(self, part: str, rows: np.ndarray | None = None, columns: list[Range] | None = None) -> Examples:
        """Read the examples `rows` (sorted indices; None: all) of `part` and refuse NaN and Inf.

        Of each example only the units in `columns` are kept (None: all). Of the file only those chunks are read that hold one of
        the examples, a few megabytes at a time.

        Raises
        ------
        UserError
            A value is not finite, or the file is cut off.
        """
        n = self.sizes[part]
        rows = np.arange(n) if rows is None else rows
        with reading(self.path, _AGAIN), opened(self.path) as file:
            units = slice(None) if columns is None else np.concatenate([np.arange(*c) for c in columns] or [np.arange(0)])
            x = _read_rows(file[f"{part}/x"], rows, units)
            labels = file[f"{part}/y"]
            y = _read_rows(labels, rows, slice(None)).reshape(-1, *labels.shape[1:])
        for name, values in (("x", x), ("y", y)):
            if values.dtype.kind == "f":
                bad = np.argwhere(~np.isfinite(values))
                if len(bad):
                    raise UserError(
                        f"'{self.path}': /{part}/{name} of example {rows[bad[0][0]]} is {values[tuple(bad[0])]}; remove it."
                    )
        return Examples(x, y.astype(np.int64) if self.classes else y, rows)

    @property
    def described(self) -> dict[str, Any]:
        """What a checkpoint says of the data that it was made with."""
        outputs, vectors = self.targets or self.classes, bool(self.targets)
        said = {"shape": self.shape, "outputs": outputs, "vectors": vectors, "examples": self.sizes["train"], "labels": self.labels}
        plain = None if self.normalization is None else self.normalization.plain()
        return {**said, "class_names": self.class_names, "normalization": plain}

    @cached_property
    def labels(self) -> str:
        """SHA-256 of the training labels, or vectors, in the order of the file, whatever type they are stored in."""
        digest = hashlib.sha256()
        with reading(self.path, "make it again"), opened(self.path) as file:
            y = file["train/y"]
            rows = max(1, _BLOCK // max(1, y.dtype.itemsize * prod(y.shape[1:])))
            for lo in range(0, len(y), rows):
                digest.update(y[lo : lo + rows].astype("<i8" if self.classes else "<f8").tobytes())
        return digest.hexdigest()

    def variance(self, part: str, rows: np.ndarray | None = None) -> float:
        """Return the variance of a part's vector targets (None: of all `rows`), summed over their units; NaN for labels."""
        if not self.targets or not self.sizes.get(part) or (rows is not None and not len(rows)):
            return nan
        with reading(self.path, _AGAIN), opened(self.path) as file:
            y = file[f"{part}/y"]
            return variance(y if rows is None else _read_rows(y, rows, slice(None)))

    def shuffled(self, seed: int) -> np.ndarray:
        """Return the indices of all training examples in the seeded order that is cut into subsets."""
        return np.random.Generator(np.random.Philox(key=[seed, 0x5B5E7])).permutation(self.sizes["train"])

    def subset(self, index: int, parts: int, seed: int) -> np.ndarray:
        """Return the sorted example indices of one replica's subset: a seeded shuffle of all, cut in `parts`."""
        return np.sort(self.shuffled(seed)[piece(self.sizes["train"], parts, index).slice])


def normalization(file: h5py.File, shape: tuple[int, ...]) -> Normalization | None:
    """Return how x of a file was normalized, if it was; UserError where what it says cannot be."""
    if "normalize" not in file:
        return None
    try:
        group = file["normalize"]
        return Normalization.of({"scale": group.attrs["scale"], "mean": group["mean"][:], "spread": group["spread"][:]}, shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"'{file.filename}': /normalize is damaged ({str(error).strip(chr(39))}); {_AGAIN}.") from None


def read_inputs(path: str | Path, part: str, shape: tuple[int, ...]) -> tuple[np.ndarray, float, Normalization | None]:
    """Return x [n, units] of one part of a file, its scale, and how it was normalized; labels are not looked at.

    Raises
    ------
    UserError
        No such file or part, another shape, or values that are not finite.
    """
    if not Path(path).exists():
        raise UserError(f"No data file '{path}'.")
    with reading(path, _AGAIN), opened(path) as file:
        if f"{part}/x" not in file:
            raise UserError(f"'{path}' has no /{part}/x; name the group with --part.")
        x, scale, done = file[f"{part}/x"][:], _number(file, "scale", 1.0), normalization(file, shape)
    if x.dtype not in (np.uint8, np.float32, np.float64):
        raise UserError(f"'{path}': /{part}/x is {x.dtype}; use float32, float64 or uint8.")
    mine = (*x.shape[1:], 1) if x.ndim == 3 else x.shape[1:]
    if mine != tuple(shape):
        raise UserError(f"'{path}': /{part}/x holds examples of shape {mine}, the network takes {tuple(shape)}.")
    x = x.reshape(len(x), prod(shape))
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise UserError(f"'{path}': /{part}/x has values that are not finite; remove them.")
    return x, scale, done


def _read_rows(source: h5py.Dataset, rows: np.ndarray, units: Any) -> np.ndarray:
    """Return the sorted `rows` of an array, flat, and of each the elements `units`."""
    width = prod(source.shape[1:])
    size = max(1, width * source.dtype.itemsize)
    out = np.empty((len(rows), len(np.arange(width)[units])), source.dtype)
    # The rows that are read together or not at all, and how many of these at a time.
    grain = source.chunks[0] if source.chunks else max(1, _GAP // size)
    most = max(1, _BLOCK // (size * grain))
    # NumPy's `unique` would have every rank load masked arrays.
    wanted, at = (grains := rows // grain)[np.diff(grains, prepend=-1) > 0], 0
    for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
        for first in range(0, len(run), most):
            lo, hi = int(run[first]) * grain, min((int(run[min(first + most, len(run)) - 1]) + 1) * grain, source.shape[0])
            end = at + int(np.searchsorted(rows[at:], hi))
            out[at:end] = source[lo:hi].reshape(hi - lo, width)[rows[at:end] - lo][:, units]
            at = end
    return out


def _chunk(array: np.ndarray) -> tuple[int, ...] | bool:
    """Return the shape of chunks of whole examples, so that a replica can read its own."""
    return (max(1, min(len(array), _GAP * len(array) // array.nbytes)), *array.shape[1:]) if array.size else True


def _number(file: h5py.File, name: str, default: float) -> float:
    """Return an attribute of the file that must be a finite number other than nought."""
    given = file.attrs.get(name, default)
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = nan
    if not isfinite(value) or (value == 0 and name in file.attrs):
        raise UserError(f"'{file.filename}': the attribute {name} is {given!r}; it must be a number other than 0.")
    return value


def write(path: str | Path, contents: dict[str, Any], force: bool = False) -> None:
    """Write a data file, whole and checked or not at all; `contents` as `Format.read` returns it.

    A file that is there is replaced with `force` alone.
    """
    with writing(Path(path), force) as part:
        with hdf5(part) as file:
            for name, value in contents.items():
                if isinstance(value, np.ndarray):
                    file.create_dataset(
                        name, data=value, chunks=_chunk(value), compression="gzip" if value.dtype == np.uint8 else None
                    )
                elif isinstance(value, list):
                    file[name] = value
                else:
                    group, _, attribute = name.rpartition(".")
                    (file[group] if group else file).attrs[attribute] = value
        try:
            DataFile(part)
        except UserError as error:
            raise UserError(str(error).replace(str(part), str(path))) from None
