"""Bias, activation and delta in one pass each, over unit-major arrays [units, batch].

Forward: y = f(y + b). Backward: dy = dy * f'(y), written through y alone (y (1 - y) for the sigmoid, 1 - y^2 for tanh), and
db = sum over the batch of dy. A shared bias (one value per map, maps innermost) is addressed as b[unit mod len(b)].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from dbnet.core.jit import exp, expm1, kernel

Activation = Literal["identity", "sigmoid", "tanh", "relu"]


@kernel("T[:,:];T[:]")
def identity(y: np.ndarray, b: np.ndarray) -> None:
    for u in range(y.shape[0]):
        bias = b[u % b.size]
        for j in range(y.shape[1]):
            y[u, j] += bias


@kernel("T[:,:];T[:]")
def sigmoid(y: np.ndarray, b: np.ndarray) -> None:
    one = y.dtype.type(1)
    for u in range(y.shape[0]):
        bias = b[u % b.size]
        for j in range(y.shape[1]):
            y[u, j] = one / (one + exp(-(y[u, j] + bias)))


@kernel("T[:,:];T[:]")
def tanh(y: np.ndarray, b: np.ndarray) -> None:
    zero, two = y.dtype.type(0), y.dtype.type(2)
    for u in range(y.shape[0]):
        bias = b[u % b.size]
        for j in range(y.shape[1]):
            # e^-2|v| - 1, so that a small value is not the difference of large ones.
            v = y[u, j] + bias
            less = expm1(-two * abs(v))
            size = -less / (two + less)
            y[u, j] = size if v >= zero else -size


@kernel("T[:,:];T[:]")
def relu(y: np.ndarray, b: np.ndarray) -> None:
    zero = y.dtype.type(0)
    for u in range(y.shape[0]):
        bias = b[u % b.size]
        for j in range(y.shape[1]):
            y[u, j] = max(y[u, j] + bias, zero)


@kernel("T[:,:];T[:,:];T[:];b1", fast=True)
def identity_delta(y: np.ndarray, dy: np.ndarray, db: np.ndarray, accumulate: bool) -> None:
    if not accumulate:
        db[:] = 0
    for u in range(y.shape[0]):
        total = y.dtype.type(0)
        for j in range(y.shape[1]):
            total += dy[u, j]
        db[u % db.size] += total


@kernel("T[:,:];T[:,:];T[:];b1", fast=True)
def sigmoid_delta(y: np.ndarray, dy: np.ndarray, db: np.ndarray, accumulate: bool) -> None:
    one = y.dtype.type(1)
    if not accumulate:
        db[:] = 0
    for u in range(y.shape[0]):
        total = y.dtype.type(0)
        for j in range(y.shape[1]):
            d = dy[u, j] * (y[u, j] * (one - y[u, j]))
            dy[u, j] = d
            total += d
        db[u % db.size] += total


@kernel("T[:,:];T[:,:];T[:];b1", fast=True)
def tanh_delta(y: np.ndarray, dy: np.ndarray, db: np.ndarray, accumulate: bool) -> None:
    one = y.dtype.type(1)
    if not accumulate:
        db[:] = 0
    for u in range(y.shape[0]):
        total = y.dtype.type(0)
        for j in range(y.shape[1]):
            d = dy[u, j] * (one - y[u, j] * y[u, j])
            dy[u, j] = d
            total += d
        db[u % db.size] += total


@kernel("T[:,:];T[:,:];T[:];b1", fast=True)
def relu_delta(y: np.ndarray, dy: np.ndarray, db: np.ndarray, accumulate: bool) -> None:
    zero = y.dtype.type(0)
    if not accumulate:
        db[:] = 0
    for u in range(y.shape[0]):
        total = y.dtype.type(0)
        for j in range(y.shape[1]):
            d = dy[u, j] if y[u, j] > zero else zero
            dy[u, j] = d
            total += d
        db[u % db.size] += total


class ActivationKernels(NamedTuple):
    """An activation's two kernels."""

    forward: Callable[[np.ndarray, np.ndarray], None]
    delta: Callable[[np.ndarray, np.ndarray, np.ndarray, bool], None]


ACTIVATIONS: dict[str, ActivationKernels] = {
    "identity": ActivationKernels(identity, identity_delta),
    "sigmoid": ActivationKernels(sigmoid, sigmoid_delta),
    "tanh": ActivationKernels(tanh, tanh_delta),
    "relu": ActivationKernels(relu, relu_delta),
}
