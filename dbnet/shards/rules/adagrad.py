"""Adagrad (Duchi et al. 2011) as DistBelief runs it, inside each shard.

h = h + g^2;  w = w - rate g / sqrt(h). There is no epsilon in the paper: a coordinate whose gradients were all zero would be 0/0;
it does not move. `initial_sum` is the value that h starts from.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.jit import kernel
from dbnet.shards.rules.base import Rule, square_root


@kernel("T[:];T[:];T[:];f8")
def adagrad(w: np.ndarray, g: np.ndarray, h: np.ndarray, rate: float) -> None:
    r, zero, one = w.dtype.type(rate), w.dtype.type(0), w.dtype.type(1)
    for i in range(w.size):
        d = g[i]
        s = h[i] + d * d
        h[i] = s
        # The selection instead of a branch lets the loop vectorise; where s is 0, d is 0 too.
        w[i] -= r * d / w.dtype.type(sqrt(s if s > zero else one))


class Adagrad(Rule):
    """Adaptive rate per parameter.

    Parameters
    ----------
    rate
        The paper's gamma, about ten times the best fixed rate.
    initial_sum
        What the sum of squared gradients starts from.
    """

    kind: ClassVar[str] = "adagrad"
    state: ClassVar[tuple[str, ...]] = ("sum",)
    initial_sum: float = Field(default=0.0, ge=0)

    def initial(self, name: str) -> float:
        return self.initial_sum

    def local_rate(self) -> float:
        return self.rate / 10

    def largest(self, dtype: np.dtype) -> float:
        return square_root(dtype)

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int) -> None:
        adagrad(w, g, state["sum"], self.rate)
