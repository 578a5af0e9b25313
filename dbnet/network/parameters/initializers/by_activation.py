"""he_uniform for relu; glorot_uniform for tanh and identity, and four times as wide for the sigmoid, whose slope is a quarter.

So +-sqrt(6 / n_in), +-sqrt(6 / (n_in + n_out)), +-4 sqrt(6 / (n_in + n_out)) (He et al. 2015; Glorot & Bengio 2010).
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

from dbnet.network.parameters.initializers.base import Initializer
from dbnet.network.parameters.layout import Drawn


class ByActivation(Initializer):
    """What suits the layer's activation: the default."""

    kind: ClassVar[str] = "by_activation"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        if activation == "relu":
            return Drawn("uniform", sqrt(6 / n_in))
        return Drawn("uniform", sqrt(6 / (n_in + n_out)) * (4 if activation == "sigmoid" else 1))
