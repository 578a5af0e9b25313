"""Parameters alone, as .safetensors and .npz: written from a checkpoint, and read to begin from; both by ranges, never as a whole.

Arrays have the names of the network's layout (LAYER.KIND.NAME, such as "0.dense.W") and its shapes. A .safetensors file is eight
bytes with the length of a JSON header (per name: dtype, shape, first and last byte), then the arrays; an .npz file is a zip archive
of .npy files. Compressed ones are read, too.
"""

from __future__ import annotations

import json
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from dbnet.checkpoint.reader import Checkpoint
from dbnet.core.errors import UserError
from dbnet.core.files import UNREADABLE, words, writing
from dbnet.core.ranges import Range, overlap
from dbnet.core.version import __version__
from dbnet.network.model import Model
from dbnet.network.parameters.layout import Entry

ENDINGS = (".safetensors", ".npz")
_RUN = 1 << 20  # elements that are in memory at a time
_HEADER = 100 << 20  # bytes, the limit of the safetensors library
_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
# What the libraries of these formats raise besides.
_DAMAGED = (zipfile.BadZipFile, struct.error, zlib.error, lzma.LZMAError, EOFError, tokenize.TokenError)
_NAMES = {"float32": "F32", "float64": "F64"}


def about(point: Checkpoint) -> dict[str, str]:
    """Return what an exported file says of where it comes from."""
    return {
        "dbnet": __version__, "run": point.config.run.name, "checkpoint": point.id, "loss": point.config.model.loss.kind,
    }  # fmt: skip


def runs(point: Checkpoint, part: Range) -> Iterator[np.ndarray]:
    """Yield the parameters of a range, some at a time; the array is the same one each time."""
    buffer = np.empty(min(_RUN, part.size), point.dtype)
    for lo in range(part.lo, part.hi, _RUN):
        here = Range(lo, min(lo + _RUN, part.hi))
        point.read("params", here, buffer[: here.size])
        yield buffer[: here.size]


def arrays(point: Checkpoint) -> Iterator[tuple[str, tuple[int, ...], Range]]:
    """Yield name, shape and range of each array of a checkpoint's parameters, in their order."""
    for name, offset, shape in point.layout:
        yield name, tuple(shape), Range(offset, offset + prod(shape))


def write(point: Checkpoint, path: Path, force: bool) -> None:
    """Write the parameters of a checkpoint, whole or not at all; in which format says the path's ending."""
    with writing(path, force) as part:
        (_write_npz if path.suffix == ".npz" else _write_safetensors)(point, part)


def _write_safetensors(point: Checkpoint, path: Path) -> None:
    size = point.dtype.itemsize
    header: dict[str, object] = {"__metadata__": about(point)}
    for name, shape, part in arrays(point):
        header[name] = {"dtype": _NAMES[point.dtype.name], "shape": shape, "data_offsets": [part.lo * size, part.hi * size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in runs(point, Range(0, point.size)):
            file.write(values)


def _write_npz(point: Checkpoint, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, shape, part in arrays(point):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, {"descr": point.dtype.str, "fortran_order": False, "shape": shape})
                for values in runs(point, part):
                    file.write(values)


class Placed(NamedTuple):
    """An array in a file: its shape and type, the zip member that it is in (or none), and the byte that it begins at."""

    shape: tuple[int, ...]
    dtype: np.dtype
    member: str
    at: int


class Weights:
    """The parameters of a .safetensors or .npz file, for a network that has just these.

    Parameters
    ----------
    path
        The file; only what it says of its arrays is read.
    model
        The network.

    Raises
    ------
    UserError
        No such file, a damaged one, or one of another network.
    """

    def __init__(self, path: str | Path, model: Model) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"No file '{path}' to begin from; 'dbnet export' makes one of a checkpoint.")
        with self._reading():
            self._arrays = _placed_npz(self.path) if self.path.suffix == ".npz" else _placed_safetensors(self.path)
        self._entries = model.layout.entries
        wanted = {entry.name: entry.shape for entry in self._entries}
        for name, shape in wanted.items():
            if name not in self._arrays:
                raise UserError(f"'{path}' lacks the array '{name}' {shape} of the network; it holds {_listed(self._arrays)}.")
            found = self._arrays[name]
            if found.shape != shape:
                raise UserError(f"'{path}': '{name}' has shape {found.shape}, in the network {shape}; use a file of this network.")
            if found.dtype.kind != "f":
                raise UserError(f"'{path}': '{name}' is {found.dtype}; use float16, float32 or float64.")
        if strange := [name for name in self._arrays if name not in wanted]:
            raise UserError(f"'{path}' holds '{strange[0]}', which the network has not; its arrays are {_listed(wanted)}.")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (*UNREADABLE, *_DAMAGED) as error:
            raise UserError(f"'{self.path}' cannot be read ({words(error)}); save it again.") from None

    def read(self, name: str, part: Range, out: np.ndarray) -> None:
        """Read a range of the flat vector into `out` [part.size]; `name` is "params", as there is nothing else."""
        for entry in self._entries:
            both = overlap(part, entry.range)
            if both.size:
                self._read(entry, both, out[both.shift(-part.lo).slice])

    def _read(self, entry: Entry, part: Range, out: np.ndarray) -> None:
        place = self._arrays[entry.name]
        with self._reading(), self._opened(place) as file:
            file.seek(place.at + (part.lo - entry.offset) * place.dtype.itemsize)
            for lo in range(0, part.size, _RUN):
                mine = out[lo : lo + _RUN]
                data = file.read(mine.nbytes // mine.itemsize * place.dtype.itemsize)
                mine[:] = np.frombuffer(data, place.dtype, mine.size)
                if not (np.isfinite(mine.min()) and np.isfinite(mine.max())):
                    raise ValueError(f"'{entry.name}' holds values that are not finite")

    @contextmanager
    def _opened(self, place: Placed) -> Iterator[IO[bytes]]:
        if not place.member:
            with open(self.path, "rb") as file:
                yield file
            return
        with zipfile.ZipFile(self.path) as archive, archive.open(place.member) as file:
            yield file


def _listed(names: dict[str, object]) -> str:
    """Return the first names."""
    shown = ", ".join(f"'{name}'" for name in [*names][:4]) or "none"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _placed_safetensors(path: Path) -> dict[str, Placed]:
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size, _HEADER):
            raise ValueError("it is no safetensors file")
        header = json.loads(file.read(length))
    out = {}
    for name, given in header.items():
        if name == "__metadata__":
            continue
        shape, (lo, hi) = tuple(given["shape"]), given["data_offsets"]
        if given["dtype"] not in _TYPES:
            raise ValueError(f"'{name}' is {given['dtype']}, which is not one of {', '.join(_TYPES)}")
        dtype = np.dtype(_TYPES[given["dtype"]])
        if any(type(n) is not int or n < 0 for n in (*shape, lo, hi)) or hi - lo != prod(shape) * dtype.itemsize:
            raise ValueError(f"shape and bytes of '{name}' do not fit each other")
        if 8 + length + hi > size:
            raise ValueError(f"it is cut off in '{name}'")
        out[name] = Placed(shape, dtype, "", 8 + length + lo)
    return out


def _placed_npz(path: Path) -> dict[str, Placed]:
    out = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as file:
                if npy.read_magic(file) != (1, 0):
                    # Others are for headers of more than 64 kB, and would be read whole.
                    raise ValueError(f"'{name}' is of a version of .npy that arrays of numbers do not need")
                shape, columns, dtype = npy.read_array_header_1_0(file)
                at = file.tell()
            if columns and len(shape) > 1:
                raise ValueError(f"'{name}' is stored by columns; save numpy.ascontiguousarray of it")
            if dtype.hasobject or at + prod(shape) * dtype.itemsize != info.file_size:
                raise ValueError(f"shape and bytes of '{name}' do not fit each other")
            out[name] = Placed(shape, dtype, info.filename, at)
    return out


def begun(path: str | Path, model: Model) -> Checkpoint | Weights:
    """Return what a run begins from by `run.start`: a checkpoint, .safetensors or .npz; UserError where it does not fit."""
    if Path(path).suffix in ENDINGS:
        return Weights(path, model)
    point = Checkpoint(path)
    point.require(model)
    return point
