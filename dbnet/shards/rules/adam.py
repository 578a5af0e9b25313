"""Adam at the shard (Kingma & Ba 2015, algorithm 1); t is the shard's count of updates.

m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w = w - rate m' / (sqrt(v') + epsilon)
with m' = m / (1 - b1^t),  v' = v / (1 - b2^t).
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.jit import kernel
from dbnet.shards.rules.base import Rule, square_root


@kernel("T[:];T[:];T[:];T[:];f8;f8;f8;f8;f8")
def adam(
    w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, rate: float, beta1: float, beta2: float, epsilon: float, root: float
) -> None:
    """`rate` is divided by 1 - b1^t, `root` is sqrt(1 - b2^t)."""
    t = w.dtype.type
    r, b1, b2, e, up = t(rate), t(beta1), t(beta2), t(epsilon), t(1 / root)
    c1, c2 = t(1 - beta1), t(1 - beta2)
    for i in range(w.size):
        d = g[i]
        m[i] = b1 * m[i] + c1 * d
        v[i] = b2 * v[i] + c2 * d * d
        w[i] -= r * m[i] / (t(sqrt(v[i])) * up + e)


class Adam(Rule):
    """Adaptive moments over all replicas' pushes.

    Parameters
    ----------
    beta1
        Decay of the mean gradient.
    beta2
        Decay of the mean square.
    epsilon
        Least divisor.
    """

    kind: ClassVar[str] = "adam"
    state: ClassVar[tuple[str, ...]] = ("mean", "square")
    rate: float = Field(default=0.001, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)

    def largest(self, dtype: np.dtype) -> float:
        return square_root(dtype)

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int) -> None:
        rate, root = self.rate / (1 - self.beta1**t), sqrt(1 - self.beta2**t)
        adam(w, g, state["mean"], state["square"], rate, self.beta1, self.beta2, self.epsilon, root)
