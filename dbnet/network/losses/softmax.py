"""Softmax cross-entropy: loss = -log(exp(z_label) / sum_k exp(z_k)); delta = softmax(z) - onehot(label).

Statistics per example: row 0 the label's own z, row 1 the largest z, row 2 its unit, row 3 the sum of exp(z - largest) over the
others, row 4 the partition's own largest. Combined, row 0 becomes the loss, rows 1 to 3 speak of all units, row 4 stays the
partition's. In between, `dy` holds exp(z - this partition's largest).

Computed as (largest - z_label) + log1p(sum over the others), so that a small loss is not the difference of large numbers;
where the label's z is the largest its delta is -sum over the others / (1 + sum over the others), for the same reason.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from dbnet.core.jit import exp, kernel
from dbnet.network.losses.base import Loss


@kernel("T[:,:];i8[:];i8;T[:,:];T[:,:]")
def reduce(z: np.ndarray, label: np.ndarray, lo: int, stats: np.ndarray, e: np.ndarray) -> None:
    one, zero = z.dtype.type(1), z.dtype.type(0)
    stats[0] = 0
    stats[1] = -np.inf
    stats[2] = lo
    stats[3] = 0
    for k in range(z.shape[0]):
        for j in range(z.shape[1]):
            better = z[k, j] > stats[1, j]
            stats[1, j] = z[k, j] if better else stats[1, j]
            stats[2, j] = k + lo if better else stats[2, j]
    for k in range(z.shape[0]):
        for j in range(z.shape[1]):
            v = exp(z[k, j] - stats[1, j])
            e[k, j] = v
            # The largest one's 1 is subtracted, not left out, so that a NaN stays one.
            stats[3, j] += v - (one if stats[2, j] == k + lo else zero)
    for j in range(z.shape[1]):
        stats[4, j] = stats[1, j]
        if lo <= label[j] < lo + z.shape[0]:
            stats[0, j] = z[label[j] - lo, j]


@kernel("T[:,:,:];T[:,:]")
def combine(parts: np.ndarray, stats: np.ndarray) -> None:
    for j in range(stats.shape[1]):
        best, unit, label, first = parts[0, 1, j], parts[0, 2, j], parts[0, 0, j], 0
        for p in range(1, parts.shape[0]):
            label += parts[p, 0, j]
            if parts[p, 1, j] > best:
                best, unit, first = parts[p, 1, j], parts[p, 2, j], p
        one, others = stats.dtype.type(1), parts[first, 3, j]
        for p in range(parts.shape[0]):
            if p != first:
                others += (one + parts[p, 3, j]) * stats.dtype.type(math.exp(parts[p, 1, j] - best))
        stats[0, j] = (best - label) + stats.dtype.type(math.log1p(others))
        stats[1, j], stats[2, j], stats[3, j] = best, unit, others


@kernel("i8[:];i8;T[:,:];i8;T[:,:]")
def finish(label: np.ndarray, lo: int, stats: np.ndarray, count: int, dz: np.ndarray) -> None:
    one, n = dz.dtype.type(1), dz.dtype.type(count)
    for j in range(dz.shape[1]):
        shrink = dz.dtype.type(math.exp(stats[4, j] - stats[1, j])) / ((one + stats[3, j]) * n)
        stats[4, j] = shrink if j < count else dz.dtype.type(0)
    for k in range(dz.shape[0]):
        for j in range(dz.shape[1]):
            dz[k, j] *= stats[4, j]
    for j in range(count):
        if lo <= label[j] < lo + dz.shape[0]:
            # Where the label's z is the largest, its share of 1 less 1 is what the others have.
            best = int(stats[2, j]) == label[j]
            others = -stats[3, j] / ((one + stats[3, j]) * n)
            dz[label[j] - lo, j] = others if best else dz[label[j] - lo, j] - one / n


class Softmax(Loss):
    """Softmax cross-entropy on class labels."""

    kind: ClassVar[str] = "softmax"
    width: ClassVar[int] = 5

    def reduce(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, dy: np.ndarray) -> None:
        reduce(y, target, lo, stats, dy)

    def combine(self, parts: np.ndarray, stats: np.ndarray) -> None:
        combine(parts, stats)

    def delta(self, y: np.ndarray, target: np.ndarray, lo: int, stats: np.ndarray, count: int, dy: np.ndarray) -> None:
        finish(target, lo, stats, count, dy)
