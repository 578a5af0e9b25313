"""Rows of figures in an HDF5 file that pandas reads back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.errors import UserError


def write(path: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same keys as one dataset, whole or not at all."""
    columns = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else {})}
    dtype = [(key, h5py.string_dtype() if values.dtype.kind == "U" else values.dtype) for key, values in columns.items()]
    data = np.zeros(len(rows), dtype)
    for key, values in columns.items():
        data[key] = values.astype(object) if values.dtype.kind == "U" else values
    part = path.with_name(path.name + ".part")
    try:
        with h5py.File(part, "w") as file:
            file[name] = data
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"Cannot write '{path}': {error.strerror or error}; choose another place with --out.") from None
