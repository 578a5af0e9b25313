"""NumPy's own: arrays in one .npz file, as `np.savez("mine.npz", x_train=x, y_train=y, x_test=x2, y_test=y2)` writes them.

Names: `x_train` and `y_train`, or `train_x` and `train_y`, or `x` and `y`; with test and validation the same. An example is a row:
(units), or (rows, columns[, maps]) with colour channels last; --channels first turns (maps, rows, columns) around. x is multiplied
with --scale; default: 1 / 255 for images of bytes, else 1. Of y, integers and texts are labels, which become 0, 1, ... in their
order and keep their names; floats are values to be learned with the squared loss, [examples] or [examples, units]; or what
--targets says.
"""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.data.formats.base import Format

_PARTS = ("train", "test", "validation")
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_ROWS = 4096  # that are looked at together
_KINDS = {"b": "true or false", "i": "integers", "u": "integers", "f": "floats", "U": "texts", "S": "texts as bytes"}


def read_npz(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name; UserError where it is none, or holds objects of Python."""
    if not Path(path).is_file():
        raise UserError(f"No file '{path}'; give the path of a .npz file, as np.savez writes it.")
    try:
        with open(path, "rb") as file:
            begins = file.read(6)
            if begins == b"\x93NUMPY":
                raise UserError(f"'{path}' holds one array and no names; write np.savez('mine.npz', x_train=x, y_train=y).")
            if begins[:2] != b"PK":
                raise UserError(f"'{path}' is not a .npz file, as np.savez writes it.")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        if "pickle" in str(error) or "allow_pickle" in str(error):
            raise UserError(
                f"'{path}' holds objects of Python, which would have to be run to be read; save arrays of numbers or texts."
            ) from None
        raise UserError(f"'{path}' is not a .npz file that can be read: {str(error).rstrip('.')}.") from None


def pairs(found: dict[str, np.ndarray], path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (x, y) of each part that is there."""
    out = {}
    for part in _PARTS:
        names = [(f"x_{part}", f"y_{part}"), (f"{part}_x", f"{part}_y"), *([("x", "y")] if part == "train" else [])]
        for x, y in names:
            if x in found and y in found:
                out[part] = found[x], found[y]
                break
            if x in found or y in found:
                have, lacks = (x, y) if x in found else (y, x)
                raise UserError(f"'{path}' has {have} but no {lacks}; both are needed.")
    if "train" not in out:
        raise UserError(
            f"'{path}' holds {', '.join(sorted(found)) or 'nothing'}; name the arrays x_train and y_train (and x_test, y_test), "
            "or x and y."
        )
    return out


def inputs(x: np.ndarray, name: str, channels_first: bool) -> np.ndarray:
    """Return inputs in a type that a data file holds, colour channels last; UserError where they are no numbers."""
    if x.dtype.kind not in "biuf":
        raise UserError(f"{name} is {x.dtype}; it must hold numbers.")
    if channels_first:
        if x.ndim != 4:
            raise UserError(f"{name} has shape {x.shape}; --channels first is for images, (examples, maps, rows, columns).")
        x = x.transpose(0, 2, 3, 1)
    if x.dtype == bool:
        return x.astype(np.uint8)
    return np.ascontiguousarray(x, x.dtype if x.dtype in (np.uint8, np.float32, np.float64) else np.float32)


def targets(parts: dict[str, np.ndarray], how: str) -> tuple[dict[str, np.ndarray], list[str] | None]:
    """Return labels 0, 1, ... and the names of the classes, or vectors of values and None, for the y of each part.

    Raises
    ------
    UserError
        They are neither, or not the same in every part, or it is not clear which.
    """
    for part, y in parts.items():
        if y.ndim not in (1, 2) or y.dtype.kind not in _KINDS:
            raise UserError(f"y of {part} has shape {y.shape}, type {y.dtype}; give labels [examples] or values [examples, units].")
    y = parts["train"]
    if how != "values" and _one_hot(y):
        for part, v in parts.items():
            if not _one_hot(v) or v.shape[1] != y.shape[1]:
                raise UserError(
                    f"y of train holds one-hot vectors of {y.shape[1]}, y of {part} does not (shape {v.shape}); save labels "
                    "[examples] in both, or take --targets values if they are vectors of values."
                )
        return {part: v.argmax(axis=1).astype(np.int64) for part, v in parts.items()}, [str(k) for k in range(y.shape[1])]
    if how == "auto" and y.dtype.kind == "f" and y.ndim == 1 and len(np.unique(y)) <= 100 and (y == np.floor(y)).all():
        raise UserError(
            f"y holds {len(np.unique(y))} different whole numbers as {y.dtype}: say --targets labels if they are classes, "
            "--targets values if they are to be predicted as numbers."
        )
    for part, v in parts.items():
        if how != "values" and _KINDS[v.dtype.kind] != _KINDS[y.dtype.kind]:
            raise UserError(
                f"y of train holds {_KINDS[y.dtype.kind]}, y of {part} {_KINDS[v.dtype.kind]}; save both in one type"
                f"{'' if {v.dtype.kind, y.dtype.kind} & set('US') else ', or take --targets values'}."
            )
    return _values(parts) if how == "values" or (how == "auto" and y.dtype.kind == "f") else _labels(parts)


def _one_hot(y: np.ndarray) -> bool:
    hot = y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf"
    return hot and bool(((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all())


def _values(parts: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], None]:
    out = {}
    for part, v in parts.items():
        if v.dtype.kind in "US":
            raise UserError(f"y of {part} holds texts ({v.dtype}), which cannot be values; take --targets labels.")
        out[part] = np.asarray(v, np.float64 if v.dtype == np.float64 else np.float32).reshape(len(v), prod(v.shape[1:]))
        _require_finite(out[part], v, f"y of {part}")
        if out[part].shape[1] != out["train"].shape[1]:
            raise UserError(
                f"y of train has {out['train'].shape[1]} values an example, y of {part} {out[part].shape[1]}; give both the same."
            )
    return out, None


def _require_finite(values: np.ndarray, given: np.ndarray, name: str) -> None:
    """Raise UserError that names the first example with a value that is not finite, in the type in which it is kept."""
    for lo in range(0, len(values) if values.dtype.kind == "f" else 0, _ROWS):
        fine = np.isfinite(values[lo : lo + _ROWS]).reshape(len(values[lo : lo + _ROWS]), -1).all(axis=1)
        if not fine.all():
            row = lo + int(fine.argmin())
            bad = given[row][~np.isfinite(given[row])] if given.dtype.kind == "f" else ()
            said = f"holds {bad[0]}" if len(bad) else f"holds a value that {values.dtype} cannot"
            raise UserError(f"{name}, example {row}, {said}; leave the example out, or put a number there.")


def _labels(parts: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    parts = {part: v[:, 0] if v.ndim == 2 and v.shape[1] == 1 else v for part, v in parts.items()}
    for part, v in parts.items():
        if v.ndim != 1:
            raise UserError(f"y of {part} has shape {v.shape}, and its rows are no one-hot vectors; labels are [examples].")
        if v.dtype.kind == "f" and not np.isfinite(v).all():
            raise UserError(f"y of {part} holds labels that are no finite numbers; leave those examples out.")
    known = np.unique(np.concatenate(list(parts.values())))
    if known.dtype.kind in "iu" and len(known) and int(known[0]) >= 0 and int(known[-1]) < 2 * len(known):
        # A class of which there is no example is still one.
        names = [str(k) for k in range(int(known[-1]) + 1)]
        return {part: v.astype(np.int64) for part, v in parts.items()}, names
    return {part: np.searchsorted(known, v).astype(np.int64) for part, v in parts.items()}, [_name(v) for v in known.tolist()]


def _name(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


class Npz(Format):
    """NumPy arrays: x_train, y_train, and x_test, y_test in a .npz file."""

    kind: ClassVar[str] = "npz"
    file: str = Field(description="the .npz file", json_schema_extra={"positional": True})
    targets: Literal["auto", "labels", "values"] = Field(
        default="auto", description="what y is: labels, or values for the squared loss (default: auto, by its type)"
    )
    channels: Literal["last", "first"] = Field(default="last", description="where the axis of colour channels is (default: last)")
    scale: float | None = Field(default=None, description="what x is multiplied with; default: 1/255 for images of bytes, else 1")
    name: str = Field(default="", description="name of the data set; default: that of the file")

    def read(self) -> dict[str, Any]:
        if self.scale is not None and not _TINY <= abs(self.scale) <= _HUGE:
            raise UserError(f"--scale {self.scale:g} is not a scale: in float32 it must be finite and not 0, like 0.01.")
        found = pairs(read_npz(self.file), self.file)
        for part, (x, y) in found.items():
            if not x.ndim or not y.ndim or len(x) != len(y):
                raise UserError(f"'{self.file}': {part}: x {x.shape} and y {y.shape} are not of one number of examples.")
        if not len(found["train"][0]):
            raise UserError(f"'{self.file}' has no training examples; give x and y at least one row.")
        x = {part: inputs(both[0], f"x of {part}", self.channels == "first") for part, both in found.items()}
        for part, v in x.items():
            _require_finite(v, found[part][0], f"'{self.file}': x of {part}")
        if len({v.dtype for v in x.values()}) > 1:
            x = {part: v.astype(np.float32) for part, v in x.items()}
        y, names = targets({part: both[1] for part, both in found.items()}, self.targets)
        image = x["train"].dtype == np.uint8 and x["train"].ndim > 2 and found["train"][0].dtype != bool
        scale = self.scale if self.scale is not None else 1 / 255 if image else 1.0
        out: dict[str, Any] = {"name": self.name or Path(self.file).stem, "source": self.file, "scale": scale}
        for part in found:
            out[f"{part}/x"], out[f"{part}/y"] = x[part], y[part]
        return out if names is None else {**out, "classes": len(names), "class_names": names}
