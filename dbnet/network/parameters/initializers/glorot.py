"""Variance 2 / (n_in + n_out): uniform in +-sqrt(6 / (n_in + n_out)), or normal, not truncated (Glorot & Bengio 2010, "Xavier")."""

from __future__ import annotations

from typing import ClassVar

from dbnet.network.parameters.initializers.base import Initializer, normal, uniform
from dbnet.network.parameters.layout import Drawn


class GlorotUniform(Initializer):
    """Uniform, signals and gradients of one size in every layer; also called Xavier."""

    kind: ClassVar[str] = "glorot_uniform"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        return uniform(2 / (n_in + n_out))


class GlorotNormal(Initializer):
    """Normal, signals and gradients of one size in every layer; also called Xavier."""

    kind: ClassVar[str] = "glorot_normal"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        return normal(2 / (n_in + n_out))
