"""What a loss is, on output units that may be cut over partitions.

Each partition reduces its own units to a few statistics per example (`reduce`); the partitions' statistics are brought together
and combined in the order of the partitions (`combine`), so that all of them go on with the same numbers; then each writes the
delta of its own units (`delta`). The value and the number of right answers follow from the combined statistics alone (`score`).

The loss of a minibatch is the mean over its examples; deltas carry the 1/count. Columns from `count` on are padding.
Targets are class labels [batch], or vectors [units, batch] where the loss allows them.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dbnet.core.jit import kernel
from dbnet.core.registry import Member


class Loss(Member):
    """Base of all losses.

    Attributes
    ----------
    width
        Statistics per example.
    vectors
        Whether targets may be vectors instead of labels.
    """

    family: ClassVar[str] = "network.losses"
    width: ClassVar[int] = 3
    vectors: ClassVar[bool] = False

    def reduce(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, dy: np.ndarray) -> None:
        """Write this partition's statistics [width, batch]; `lo` is the index of its first unit. `dy` is free working space."""
        raise NotImplementedError

    def combine(self, parts: np.ndarray, stats: np.ndarray) -> None:
        """Combine statistics [partitions, width, batch] to [width, batch]; here: rows loss (adds), best value, its unit."""
        combine_best(parts, stats)

    def delta(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, count: int, dy: np.ndarray) -> None:
        """Write d(mean loss)/dy of this partition's units, zero in the padding columns."""
        raise NotImplementedError

    def score(self, stats: np.ndarray, target: np.ndarray, count: int) -> tuple[float, int]:
        """Return the summed loss and the number of right answers (0 for vector targets) of the first `count` examples."""
        if target.ndim == 1:
            return tally(stats, target, count)
        return float(stats[0, :count].sum(dtype=np.float64)), 0

    def errors(self, loss: float, units: int, variance: float) -> dict[str, float]:
        """Return what else a mean loss says of vector targets with `units` units, whose variances sum up to `variance`; by name."""
        return {}

    def words(self, loss: float, units: int, variance: float) -> str:
        """Return these errors in words."""
        return ", ".join(f"{name} {value:.4g}" for name, value in self.errors(loss, units, variance).items())

    def answer(self, stats: np.ndarray, count: int) -> np.ndarray:
        """Return the predicted class of each example."""
        return stats[2, :count].astype(np.int64)


@kernel("T[:,:,:];T[:,:]")
def combine_best(parts: np.ndarray, stats: np.ndarray) -> None:
    """Add row 0; of rows 1 and 2 keep the pair with the largest row 1, the first partition's on a tie."""
    for j in range(stats.shape[1]):
        loss, best, unit = parts[0, 0, j], parts[0, 1, j], parts[0, 2, j]
        for p in range(1, parts.shape[0]):
            loss += parts[p, 0, j]
            if parts[p, 1, j] > best:
                best, unit = parts[p, 1, j], parts[p, 2, j]
        stats[0, j], stats[1, j], stats[2, j] = loss, best, unit


@kernel("T[:,:];i8[:];i8")
def tally(stats: np.ndarray, label: np.ndarray, count: int) -> tuple[float, int]:
    """Sum row 0 in float64 and count where row 2 is the label."""
    loss, right = 0.0, 0
    for j in range(count):
        loss += np.float64(stats[0, j])
        right += int(stats[2, j]) == label[j]
    return loss, right
