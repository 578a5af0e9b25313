"""A picture of a run: loss and accuracy over time, and the staleness of its updates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.core.errors import UserError
from dbnet.monitor.results import Run


def draw(run: Run, path: str | Path) -> None:
    """Write a PNG (or any format that Matplotlib knows by its ending)."""
    # Without pyplot, whose backend belongs to the notebook that calls this.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for replica, rows in run.progress.groupby("replica"):
        if run.config.topology.replicas <= 8:
            left.plot(rows.seconds, rows.loss, lw=1, label=f"replica {replica}")
    if len(run.iterations):
        left.plot(run.iterations.seconds, run.iterations.loss, "r.-", lw=1, label="iterations")
    points = run.evaluation
    if len(points):
        left.plot(points.seconds, points.test_loss, "k.-", label="test set")
        middle.set(xlabel="seconds")
        middle.plot(points.seconds, points.test_accuracy, "k.-", label="test set")
        middle.plot(points.seconds, points.train_accuracy, ".--", color="tab:gray", label="part of the training set")
        _zoom(middle, points[["test_accuracy", "train_accuracy"]].to_numpy())
    left.set(title="mean loss", xlabel="seconds", yscale="log")
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
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(title="staleness of the updates", xlabel="updates between fetch and apply", ylabel="share")
    if len(shares.columns) <= 8:
        right.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write the picture '{path}': {error}.") from None


def drawn(run_file: Path, picture: Path) -> str:
    """Draw a run; return the picture's path, or that there is none."""
    try:
        draw(Run(run_file), picture)
    except UserError as error:
        print(f"dbnet: {error}", file=sys.stderr)
        return "could not be drawn"
    return str(picture)


def _zoom(axes: Any, values: np.ndarray) -> None:
    """Show accuracies [evaluations, 2] where they differ: the first steep points may lie below."""
    known = values[np.isfinite(values)]
    if not len(known):
        axes.set_title("accuracy: no labelled test set")
        return
    low, high = np.quantile(known, 0.15), known.max()
    margin = max(0.1 * (high - low), 1e-3)
    axes.set_ylim(low - margin, high + margin)
    below = int((np.nanmin(values, axis=1, initial=2.0) < low - margin).sum())
    title = f"accuracy (best on the test set {np.nanmax(values[:, 0]):.4f})" if np.isfinite(values[:, 0]).any() else "accuracy"
    axes.set_title(title)
    if below:
        axes.set_xlabel(f"seconds ({below} early evaluation{'s lie' if below > 1 else ' lies'} below)")
