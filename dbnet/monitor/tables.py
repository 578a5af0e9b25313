"""The rows of a run file's tables; see `runfile` for what they mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.core.files import hdf5, writing

PROGRESS = np.dtype(
    [
        ("seconds", "f8"),
        ("replica", "i4"),
        ("steps", "i8"),
        ("examples", "i8"),
        ("loss", "f8"),
        ("accuracy", "f8"),
        ("throughput", "f8"),
        ("pushes", "i8"),
        ("fetches", "i8"),
        ("bytes_pushed", "i8"),
        ("bytes_fetched", "i8"),
        ("waited", "f8"),
    ]
)
EVALUATION = np.dtype(
    [
        ("seconds", "f8"),
        ("replica", "i4"),
        ("steps", "i8"),
        ("epochs", "f8"),
        ("loss", "f8"),
        ("accuracy", "f8"),
        ("train_loss", "f8"),
        ("train_accuracy", "f8"),
    ]
)
ITERATIONS = np.dtype(
    [
        ("seconds", "f8"),
        ("iteration", "i4"),
        ("loss", "f8"),
        ("gradient_norm", "f8"),
        ("step", "f8"),
        ("passes", "i4"),
        ("rounds", "i4"),
        ("backups", "i4"),
        ("discarded", "i4"),
    ]
)
EVENTS = np.dtype(
    [
        ("shard", "i4"),
        ("replica", "i4"),
        ("partition", "i4"),
        ("push", "i8"),
        ("fetched", "i8"),
        ("applied", "i8"),
        ("steps", "i4"),
        ("seconds", "f8"),
    ]
)
LOST = np.dtype([("replica", "i4"), ("seconds", "f8"), ("steps", "i8"), ("applied", "i8")])
REFUSED = np.dtype(
    [
        ("seconds", "f8"),
        ("shard", "i4"),
        ("replica", "i4"),
        ("partition", "i4"),
        ("push", "i8"),
        ("fetched", "i8"),
        ("steps", "i4"),
        ("step", "i8"),
        ("index", "i8"),
        ("value", "f8"),
    ]
)
TABLES = {
    "progress": PROGRESS,
    "evaluation": EVALUATION,
    "iterations": ITERATIONS,
    "events": EVENTS,
    "lost": LOST,
    "refused": REFUSED,
}


def evaluations(errors: Sequence[str]) -> np.dtype:
    """Return the table `evaluation` of a run whose loss says this besides, like "mean squared error": columns of their own."""
    names = [prefix + column(error) for prefix in ("", "train_") for error in errors]
    return np.dtype([*EVALUATION.descr, *((name, "f8") for name in names)])


def column(error: str) -> str:
    """Return the column of what a loss says besides."""
    return error.replace(" ", "_")


def write(path: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same keys as one dataset, whole or not at all."""
    columns = {key: np.array([row[key] for row in rows]) for key in (rows[0] if rows else {})}
    dtype = [(key, h5py.string_dtype() if values.dtype.kind == "U" else values.dtype) for key, values in columns.items()]
    data = np.zeros(len(rows), dtype)
    for key, values in columns.items():
        data[key] = values.astype(object) if values.dtype.kind == "U" else values
    with writing(path) as part, hdf5(part) as file:
        file[name] = data
