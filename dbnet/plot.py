"""A picture of a run: loss and accuracy over time, and the staleness of its updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dbnet.errors import UserError
from dbnet.monitor import Run


def draw(run: Run, path: str | Path) -> None:
    """Write a PNG (or any format that Matplotlib knows by its ending)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for replica, rows in run.progress.groupby("replica"):
        if run.config.topology.replicas <= 8:
            left.plot(rows.seconds, rows.loss, lw=1, label=f"replica {replica}")
    if len(run.iterations):
        left.plot(run.iterations.seconds, run.iterations.loss, "r.-", lw=1, label="iterations")
    points = run.evaluation
    if len(points):
        left.plot(points.seconds, points.test_loss, "k.-", label="test set")
        middle.plot(points.seconds, points.test_accuracy, "k.-", label="test set")
        middle.plot(points.seconds, points.train_accuracy, ".--", color="tab:gray", label="part of the training set")
        best = np.nanmax(points.test_accuracy) if points.test_accuracy.notna().any() else np.nan
        middle.set_title(f"accuracy (best on the test set {best:.4f})")
    left.set(title="mean loss", xlabel="seconds", yscale="log")
    middle.set(xlabel="seconds")
    middle.grid(alpha=0.3)
    left.grid(alpha=0.3, which="both")
    for axes in (left, middle):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    shares = run.staleness / np.maximum(run.staleness.sum(), 1)
    width = 0.8 / len(shares.columns)
    # A few very late updates would squeeze all others into a corner.
    most = int((shares.cumsum() < 0.999).sum().max()) + 1
    for index, name in enumerate(shares.columns):
        right.bar(shares.index + (index - (len(shares.columns) - 1) / 2) * width, shares[name], width, label=name)
    right.set_xlim(-0.6, most + 0.6)
    right.set(title="staleness of the updates", xlabel="updates between fetch and apply", ylabel="share")
    if len(shares.columns) <= 8:
        right.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write the picture '{path}': {error}.") from None
    finally:
        plt.close(figure)
