"""Rows of figures in an HDF5 file that pandas reads back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.disk import hdf5
from dbnet.errors import writing


def write(path: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same keys as one dataset, whole or not at all."""
    columns = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else {})}
    dtype = [(key, h5py.string_dtype() if values.dtype.kind == "U" else values.dtype) for key, values in columns.items()]
    data = np.zeros(len(rows), dtype)
    for key, values in columns.items():
        data[key] = values.astype(object) if values.dtype.kind == "U" else values
    with writing(path) as part, hdf5(part) as file:
        file[name] = data
