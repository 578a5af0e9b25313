"""Variance 1 / n_in: uniform in +-sqrt(3 / n_in), or normal, not truncated (LeCun et al. 1998, "Efficient BackProp")."""

from __future__ import annotations

from typing import ClassVar

from dbnet.network.parameters.initializers.base import Initializer, normal, uniform
from dbnet.network.parameters.layout import Drawn


class LecunUniform(Initializer):
    """Uniform, sums of variance 1 from inputs of variance 1."""

    kind: ClassVar[str] = "lecun_uniform"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        return uniform(1 / n_in)


class LecunNormal(Initializer):
    """Normal, sums of variance 1 from inputs of variance 1."""

    kind: ClassVar[str] = "lecun_normal"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        return normal(1 / n_in)
