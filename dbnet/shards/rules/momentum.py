"""Momentum at the shard (Polyak 1964; Sutskever et al. 2013 for the Nesterov form).

v = mu v + g;  w = w - rate v,  or with `nesterov`  w = w - rate (g + mu v).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.jit import kernel
from dbnet.shards.rules.base import Rule


@kernel("T[:];T[:];T[:];f8;f8;b1")
def momentum(w: np.ndarray, g: np.ndarray, v: np.ndarray, rate: float, mu: float, nesterov: bool) -> None:
    r, m, zero = w.dtype.type(rate), w.dtype.type(mu), w.dtype.type(0)
    ahead = m if nesterov else w.dtype.type(1)
    now = r if nesterov else zero
    for i in range(w.size):
        v[i] = m * v[i] + g[i]
        w[i] -= r * ahead * v[i] + now * g[i]


class Momentum(Rule):
    """Heavy-ball or Nesterov momentum over all replicas' pushes.

    Parameters
    ----------
    momentum
        Share of the velocity that each update keeps.
    nesterov
        Nesterov's form instead of the heavy ball.
    """

    kind: ClassVar[str] = "momentum"
    state: ClassVar[tuple[str, ...]] = ("velocity",)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False

    def local_rate(self) -> float:
        return self.rate / (1 - self.momentum)

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int) -> None:
        momentum(w, g, state["velocity"], self.rate, self.momentum, self.nesterov)
