"""Every weight is `value`: for tests and for models without hidden layers; units that start alike stay alike."""

from __future__ import annotations

from typing import ClassVar

from dbnet.network.parameters.initializers.base import Initializer
from dbnet.network.parameters.layout import Drawn


class ConstantValue(Initializer):
    """One value for all weights.

    Parameters
    ----------
    value
        The value.
    """

    kind: ClassVar[str] = "constant"
    value: float = 0.0

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        return Drawn("constant", self.value)
