"""Variance 2 / n_in, for relu: uniform in +-sqrt(6 / n_in), or normal, not truncated (He et al. 2015, "Kaiming")."""

from __future__ import annotations

from typing import ClassVar

from dbnet.network.parameters.initializers.base import Initializer, normal, uniform
from dbnet.network.parameters.layout import Drawn


class HeUniform(Initializer):
    """Uniform, signals of one size through layers of relu; also called Kaiming."""

    kind: ClassVar[str] = "he_uniform"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        return uniform(2 / n_in)


class HeNormal(Initializer):
    """Normal, signals of one size through layers of relu; also called Kaiming."""

    kind: ClassVar[str] = "he_normal"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        return normal(2 / n_in)
