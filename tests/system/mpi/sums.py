"""Runs whose gradients are quarters of whole numbers, so that their sum is exact and no schedule may change it; see `tally`."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from dbnet.data.file import write
from dbnet.monitor.results import Run

EXAMPLES, UNITS, EPOCHS, BATCH = 96, 53, 3, 4


def _data() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(3).integers(-1000, 1000, (2, EXAMPLES, UNITS)).astype(np.float64)


def overrides(folder: Path) -> list[str]:
    """Write data, unless they are there, and return the overrides of such a run; slices and rings are small."""
    path = folder / "tally.h5"
    if not path.exists():
        x, y = _data()
        write(path, {"train/x": x, "train/y": y})
    return [
        f"data.path={path}", f"model.modules=['{Path(__file__).with_name('tally.py')}']", "model.layers=[{kind='tally'}]",
        "model.loss=squared", "model.dtype=float64", "rule={kind='sgd', rate=1.0}", f"method.minibatch={BATCH}",
        f"stop.epochs={EPOCHS}", "evaluate.train=0", "method.slot=64", "method.slots=2",
    ]  # fmt: skip


def check(run: Run) -> None:
    """Fail unless the parameters are the sum of all gradients, to the bit."""
    x, y = _data()
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        np.testing.assert_array_equal(file["params"][:], -EPOCHS * (x - y).sum(axis=0) / BATCH)
