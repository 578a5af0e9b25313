"""Variance scale / n, with n = n_in, n_out, or their mean: uniform in +-sqrt(3 scale / n), or normal, not truncated.

The others are its cases: glorot is scale 1 with mode "fan_avg", he is scale 2 and lecun scale 1 with mode "fan_in".
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dbnet.network.parameters.initializers.base import Initializer, normal, uniform
from dbnet.network.parameters.layout import Drawn


class Scaled(Initializer):
    """Variance scaling, of which the named ones are cases.

    Parameters
    ----------
    scale
        Variance times n.
    mode
        What n is: fan_in, fan_out, or fan_avg, their mean.
    distribution
        uniform or normal.
    """

    kind: ClassVar[str] = "scaled"
    scale: float = Field(default=1.0, gt=0)
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in"
    distribution: Literal["uniform", "normal"] = "uniform"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        n = {"fan_in": n_in, "fan_out": n_out, "fan_avg": (n_in + n_out) / 2}[self.mode]
        return (uniform if self.distribution == "uniform" else normal)(self.scale / n)
