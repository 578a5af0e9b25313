"""A user's own loss: sum_k |y_k - t_k| of a target vector, or of a label's unit vector."""

from typing import ClassVar

import numpy as np

from dbnet import Loss


class Absolute(Loss):
    """Sum of the absolute distances to a target."""

    kind: ClassVar[str] = "absolute"
    vectors: ClassVar[bool] = True

    def reduce(self, y, target, lo, stats, dy):
        units = np.arange(lo, lo + len(y))[:, None]
        dy[:] = y - (units == target if target.ndim == 1 else target[lo : lo + len(y)])
        # Of all partitions the best unit is the answer; one that holds no unit has none.
        stats[0], stats[1] = np.abs(dy).sum(axis=0), y.max(axis=0, initial=-np.inf)
        stats[2] = lo + (y.argmax(axis=0) if len(y) else 0)

    def delta(self, y, target, lo, stats, count, dy):
        dy[:] = np.sign(dy) / count
        dy[:, count:] = 0
