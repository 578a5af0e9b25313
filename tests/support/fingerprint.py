"""A hash of all that a run in one process computed: its last checkpoint's numbers and every row, without what a clock measured.

python tests/fingerprint.py runs/digits.h5 ...      the hash of each run, and of its parts
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

# Of the rows: what is measured in seconds. Of the checkpoint: texts with names, folders and times.
MEASURED = {"seconds", "throughput", "waited"}
SAID = {"about", "config", "chain"}


def contents(run_file: str | Path) -> dict[str, np.ndarray]:
    """Return all that is to be equal when a run in one process is repeated: the run file's columns, the checkpoint's datasets."""
    out: dict[str, np.ndarray] = {}
    with h5py.File(run_file, "r") as file:
        for table in sorted(set(file) - {"state"}):
            rows = file[table][:]
            columns = [name for name in rows.dtype.names or () if name not in MEASURED]
            out.update({f"{table}.{name}": rows[name] for name in columns} if columns else {table: rows})
    last = stored(Path(run_file).with_suffix(".checkpoint.h5"))
    return {**out, **{f"checkpoint.{name}": values for name, values in last.items()}}


def stored(checkpoint: str | Path) -> dict[str, np.ndarray]:
    """Return the numbers of a checkpoint: parameters, state of the rule or of the batch method, clocks, cursors."""
    with h5py.File(checkpoint, "r") as file:
        found = {name: file[name][()] for name in sorted(set(file) - SAID)}
    return {name: np.frombuffer(v, np.uint8) if isinstance(v, bytes) else np.asarray(v) for name, v in found.items()}


def fingerprint(parts: Mapping[str, np.ndarray]) -> str:
    """Return one hash of names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, values in sorted(parts.items()):
        digest.update(f"{name} {values.dtype} {values.shape} ".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def differing(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> list[str]:
    """Return the names of what two runs, or two checkpoints, have not in common to the bit."""
    return sorted(n for n in set(a) | set(b) if n not in a or n not in b or fingerprint({n: a[n]}) != fingerprint({n: b[n]}))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        parts = contents(path)
        print(fingerprint(parts), path)
        for name, values in sorted(parts.items()):
            print(" ", fingerprint({name: values})[:16], name)
