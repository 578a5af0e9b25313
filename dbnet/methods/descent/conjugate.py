"""Nonlinear conjugate gradients (Polak-Ribiere+), and gradient descent, which is the same with beta = 0."""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

from dbnet.methods.descent.base import Smooth
from dbnet.methods.descent.history import Directions, State
from dbnet.methods.descent.linesearch import Wolfe
from dbnet.shards.space import Command, Copy, Dot, Gram, Terms


class Conjugate(Directions):
    """The last direction and its factor: d = -g + beta d. Gradient descent is beta = 0.

    Polak-Ribiere+: beta = max(0, g . (g - g_previous) / |g_previous|^2), and 0 where d would not descend.
    """

    registers = (*Directions.registers, "heading")
    commit = (*Directions.commit, Copy("direction", "heading"))
    restore = (*Directions.restore, Copy("heading", "direction"))

    @property
    def fresh(self) -> bool:
        return self.state.memory["beta"] == 0

    def forget(self) -> None:
        self.state.memory = {"beta": 0.0, "slope": -self.state.square}
        self.state.step = 0.0

    def survey(self) -> list[Command]:
        return [Gram(("gradient",), ("gradient", "previous", "direction"))]

    def learn(self, products: list[float]) -> None:
        square, across, along = products
        beta = max(0.0, (square - across) / self.state.square)
        if beta * along >= square:
            beta = 0.0
        self.state.square = square
        self.state.memory = {"beta": beta, "slope": beta * along - square}

    def propose(self) -> tuple[Terms, float]:
        state, beta, slope = self.state, self.state.memory["beta"], self.state.memory["slope"]
        # The first-order change of the loss is taken to be that of the last iteration (Nocedal & Wright, section 3.5).
        step = state.step * state.slope / slope if state.step else 1 / sqrt(state.square)
        return ((-1.0, "gradient"), (beta, "heading")) if beta else ((-1.0, "gradient"),), step


class Steepest(Conjugate):
    """Nothing but the gradient's square."""

    registers, commit, restore = Directions.registers, Directions.commit, Directions.restore

    def survey(self) -> list[Command]:
        return [Dot("gradient", "gradient")]

    def learn(self, products: list[float]) -> None:
        (self.state.square,) = products
        self.state.memory = {"beta": 0.0, "slope": -self.state.square}


class GradientDescent(Smooth):
    """Gradient descent with line search."""

    kind: ClassVar[str] = "gradient_descent"

    def memory(self, state: State) -> Directions:
        return Steepest(state)


class ConjugateGradient(Smooth):
    """Nonlinear conjugate gradients, Polak-Ribiere+."""

    kind: ClassVar[str] = "conjugate_gradient"
    line: Wolfe = Wolfe(curvature=0.1)

    def memory(self, state: State) -> Directions:
        return Conjugate(state)
