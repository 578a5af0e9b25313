"""What an initializer is: the distribution that a layer's weights are drawn from, by what an output sees and where an input goes.

n_in is the number of inputs that an output sees (fan-in), n_out the number of outputs that an input goes to (fan-out); of an image
layer these are field x maps of the input, and field x maps / stride^2 of the output. U(-a, a) has the variance a^2 / 3. Weights are
drawn from fixed counters, so they do not depend on how the network is cut; biases start from 0.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

from dbnet.core.registry import Member, member
from dbnet.network.parameters.layout import Drawn

AnyInitializer = member("network.parameters.initializers", "init", short=True)


class Initializer(Member):
    """Base of all initializers."""

    family: ClassVar[str] = "network.parameters.initializers"

    def drawn(self, n_in: float, n_out: float, activation: str) -> Drawn:
        """Return what the weights of a layer are drawn from."""
        raise NotImplementedError


def uniform(variance: float) -> Drawn:
    """Return the uniform distribution around 0 with this variance."""
    return Drawn("uniform", sqrt(3 * variance))


def normal(variance: float) -> Drawn:
    """Return the normal distribution around 0 with this variance."""
    return Drawn("normal", sqrt(variance))
