"""LIBSVM's sparse text: one example per line, ``label index:value index:value ...``, indices from 1; written out densely."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.data.formats.base import Format


def read_libsvm(path: str) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Return labels [examples] and each example's columns (from 0) and values; UserError names the line that is wrong."""
    labels: list[float] = []
    columns: list[np.ndarray] = []
    values: list[np.ndarray] = []
    try:
        with open(path, encoding="ascii") as file:
            for number, line in enumerate(file, start=1):
                words = line.partition("#")[0].split()
                if not words:
                    continue
                try:
                    labels.append(float(words[0]))
                    pairs = [word.split(":") for word in words[1:]]
                    here = np.array([int(index) - 1 for index, _ in pairs], np.int64)
                    values.append(np.array([float(value) for _, value in pairs]))
                except ValueError:
                    raise UserError(f"'{path}', line {number}: not of the form 'label index:value index:value ...'.") from None
                if here.size and here.min() < 0:
                    raise UserError(f"'{path}', line {number}: indices count from 1.")
                columns.append(here)
    except FileNotFoundError:
        raise UserError(f"No file '{path}'; give the path of a LIBSVM text file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read: {error}.") from None
    if not labels:
        raise UserError(f"'{path}' holds no examples.")
    return np.array(labels), columns, values


class Libsvm(Format):
    """LIBSVM's sparse text format; labels are mapped to 0, 1, ... in their order."""

    kind: ClassVar[str] = "libsvm"
    train: str = Field(description="LIBSVM text file")
    test: str = Field(default="", description="LIBSVM text file; default: no test set")
    name: str = Field(default="libsvm", description="name of the data set")

    def read(self) -> dict[str, Any]:
        parts = {"train": read_libsvm(self.train)} | ({"test": read_libsvm(self.test)} if self.test else {})
        width = max((int(c.max()) + 1 for _, columns, _ in parts.values() for c in columns if c.size), default=1)
        classes = np.unique(np.concatenate([labels for labels, _, _ in parts.values()]))
        everything = np.concatenate([v for _, _, values in parts.values() for v in values])
        # Bytes hold what are small whole numbers, as in binary features.
        small = bool(np.all((everything >= 0) & (everything <= 255) & (everything == np.floor(everything))))
        out: dict[str, Any] = {"name": self.name, "source": self.train, "scale": 1.0, "classes": len(classes)}
        for part, (labels, columns, values) in parts.items():
            x = np.zeros((len(labels), width), np.uint8 if small else np.float32)
            for row, (c, v) in enumerate(zip(columns, values, strict=True)):
                x[row, c] = v
            out[f"{part}/x"], out[f"{part}/y"] = x, np.searchsorted(classes, labels).astype(np.int64)
        return out
