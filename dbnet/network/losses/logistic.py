"""One-vs-all logistic loss: loss = sum_k log(1 + exp(-s_k z_k)), s_k = +1 for the label's unit and -1 for all others.

delta_k = -s_k sigmoid(-s_k z_k). Computed as max(-s z, 0) + log1p(exp(-|z|)), which neither overflows nor cancels.
Statistics per example: the loss, the largest output, its unit. This is the output layer of the paper's image network.
"""

from __future__ import annotations

from math import log1p
from typing import ClassVar

import numpy as np

from dbnet.core.jit import exp, kernel
from dbnet.network.losses.base import Loss


@kernel("T[:,:];i8[:];i8;T[:,:];T[:,:]")
def reduce(z: np.ndarray, label: np.ndarray, lo: int, stats: np.ndarray, dz: np.ndarray) -> None:
    one, zero = z.dtype.type(1), z.dtype.type(0)
    stats[0] = 0
    stats[1] = -np.inf
    stats[2] = lo
    for k in range(z.shape[0]):
        for j in range(z.shape[1]):
            v = z[k, j]
            better = v > stats[1, j]
            stats[1, j] = v if better else stats[1, j]
            stats[2, j] = k + lo if better else stats[2, j]
            # What is wrong about this unit: -s z.
            sign = -one if label[j] == k + lo else one
            v *= sign
            e = exp(-abs(v))
            dz[k, j] = sign * (one if v >= zero else e) / (one + e)
            stats[0, j] += max(v, zero) + z.dtype.type(log1p(e))


class Logistic(Loss):
    """One logistic unit per class, on class labels."""

    kind: ClassVar[str] = "logistic"

    def reduce(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, dy: np.ndarray) -> None:
        reduce(y, target, lo, stats, dy)

    def delta(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, count: int, dy: np.ndarray) -> None:
        dy *= dy.dtype.type(1 / count)
        dy[:, count:] = 0
