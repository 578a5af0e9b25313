"""A user's own rule: the rate divided by the staleness (Zhang et al. 2016, "Staleness-aware async-SGD")."""

from typing import ClassVar

import numpy as np

from dbnet import Arrival, Rule, kernel


@kernel("T[:];T[:];f8")
def step(w, g, rate):
    for i in range(w.size):
        w[i] -= w.dtype.type(rate) * g[i]


class StalenessAware(Rule):
    """w = w - rate / max(1, staleness) g."""

    kind: ClassVar[str] = "staleness_aware"
    informed: ClassVar[bool] = True

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int, arrival: Arrival) -> None:
        step(w, g, self.rate / max(1, arrival.staleness))
