"""IDX, the format of MNIST and its kin, plain or gzipped.

A file starts with two zero bytes, a type code and the number of axes, then one big-endian 32-bit size per axis, then the values.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.data.formats.base import Format

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str) -> np.ndarray:
    """Return the array of one IDX file, gzipped or not; UserError where it is missing, cut off or something else."""
    if not Path(path).exists():
        raise UserError(f"No file '{path}'; give the path of an IDX file (MNIST format), gzipped or not.")
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"'{path}' cannot be read: {error}.") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _TYPES:
        raise UserError(f"'{path}' is not an IDX file: it does not start with two zero bytes and a known type code.")
    dtype, axes = np.dtype(_TYPES[raw[2]]), raw[3]
    header = 4 + 4 * axes
    shape = struct.unpack(f">{axes}I", raw[4:header]) if len(raw) >= header else ()
    expected = header + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not shape or len(raw) != expected:
        raise UserError(f"'{path}' has {len(raw)} bytes where its header promises {expected}; fetch it again.")
    return np.frombuffer(raw, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))


class Idx(Format):
    """Images and labels of a training and a test set, four IDX files."""

    kind: ClassVar[str] = "idx"
    train_images: str = Field(description="IDX file, gzipped or not")
    train_labels: str = Field(description="IDX file, gzipped or not")
    test_images: str = Field(description="IDX file, gzipped or not")
    test_labels: str = Field(description="IDX file, gzipped or not")
    name: str = Field(default="idx", description="name of the data set")

    def read(self) -> dict[str, Any]:
        out: dict[str, Any] = {"name": self.name, "source": self.train_images, "scale": 1.0}
        for part in ("train", "test"):
            x, y = read_idx(getattr(self, f"{part}_images")), read_idx(getattr(self, f"{part}_labels"))
            if len(x) != len(y):
                raise UserError(f"{part}: {len(x)} images but {len(y)} labels; are the files of one set?")
            if part == "train" and not len(x):
                raise UserError(f"'{self.train_images}' has no training examples; give files of at least one image.")
            if x.dtype != np.uint8:
                x = x.astype(np.float32)
            out[f"{part}/x"], out[f"{part}/y"] = x, y.astype(np.int64)
        out["classes"] = int(max(out["train/y"].max(initial=-1), out["test/y"].max(initial=-1))) + 1
        if out["train/x"].dtype == np.uint8:
            out["scale"] = 1 / 255
        return out
