"""Stochastic gradient descent: w = w - rate g."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dbnet.core.jit import kernel
from dbnet.shards.rules.base import Rule


@kernel("T[:];T[:];f8")
def descend(w: np.ndarray, g: np.ndarray, rate: float) -> None:
    r = w.dtype.type(rate)
    for i in range(w.size):
        w[i] -= r * g[i]


class Sgd(Rule):
    """One rate for all parameters."""

    kind: ClassVar[str] = "sgd"

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int) -> None:
        descend(w, g, self.rate)
