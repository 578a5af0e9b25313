"""Squared error: loss = 1/2 sum_k (y_k - t_k)^2; delta = y - t. A class label stands for its unit vector.

Statistics per example: the loss, the largest output, its unit.
"""

from __future__ import annotations

from math import nan
from typing import ClassVar

import numpy as np

from dbnet.core.jit import kernel
from dbnet.network.losses.base import Loss


@kernel("T[:,:];i8;T[:,:];T[:,:]")
def reduce(y: np.ndarray, lo: int, stats: np.ndarray, dy: np.ndarray) -> None:
    half = y.dtype.type(0.5)
    stats[0] = 0
    stats[1] = -np.inf
    stats[2] = lo
    for k in range(y.shape[0]):
        for j in range(y.shape[1]):
            stats[0, j] += half * dy[k, j] * dy[k, j]
            better = y[k, j] > stats[1, j]
            stats[1, j] = y[k, j] if better else stats[1, j]
            stats[2, j] = k + lo if better else stats[2, j]


@kernel("T[:,:];i8[:];i8;T[:,:]")
def differ(y: np.ndarray, label: np.ndarray, lo: int, dy: np.ndarray) -> None:
    for k in range(y.shape[0]):
        for j in range(y.shape[1]):
            dy[k, j] = y[k, j]
    for j in range(y.shape[1]):
        if lo <= label[j] < lo + y.shape[0]:
            dy[label[j] - lo, j] -= y.dtype.type(1)


class Squared(Loss):
    """Half the squared distance to a target vector or to a label's unit vector."""

    kind: ClassVar[str] = "squared"
    vectors: ClassVar[bool] = True

    def reduce(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, dy: np.ndarray) -> None:
        if target.ndim == 1:
            differ(y, target, lo, dy)
        else:
            np.subtract(y, target[lo : lo + y.shape[0]], out=dy)
        reduce(y, lo, stats, dy)

    def errors(self, loss: float, units: int, variance: float) -> dict[str, float]:
        """The mean squared error of a unit, and R^2 = 1 - sum |y - t|^2 / sum |t - mean t|^2."""
        return {"mean squared error": 2 * loss / units, "R2": 1 - 2 * loss / variance if variance > 0 else nan}

    def delta(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, count: int, dy: np.ndarray) -> None:
        dy *= dy.dtype.type(1 / count)
        dy[:, count:] = 0
