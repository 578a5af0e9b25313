"""OWL-QN: L-BFGS for a loss with an L1 penalty (Andrew & Gao 2007)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dbnet.comm.turns import Turns
from dbnet.methods.descent.base import FullBatch, evaluate
from dbnet.methods.descent.history import Directions, History, State
from dbnet.methods.descent.linesearch import rounding
from dbnet.methods.descent.problem import Problem
from dbnet.shards.space import Align, Combine, Command, Dot, Norm1, ProjectOrthant, PseudoGradient


class OrthantHistory(History):
    """The pairs of L-BFGS; directions start from the pseudo-gradient, which is formed at each new point."""

    def __init__(self, state: State, length: int, curvature: float, pseudo: PseudoGradient) -> None:
        super().__init__(state, length, curvature, gradient="pseudo")
        self.pseudo = pseudo
        self.registers = (*self.registers, "pseudo", "moved")
        self.restore = (*self.restore, pseudo)

    def survey(self) -> list[Command]:
        return [self.pseudo, *super().survey()]


class OWLQN(FullBatch):
    """Orthant-wise L-BFGS for loss + strength * |params|_1 (Andrew & Gao 2007).

    The direction starts from the pseudo-gradient and keeps its signs; trial points are projected on the orthant that the
    iteration starts in; the step is halved until the decrease suffices.

    Parameters
    ----------
    strength
        Factor of the L1 norm.
    mask
        A register that is 1 where the penalty acts and 0 where it does not (biases); empty: it acts everywhere.
    history
        m, the number of pairs remembered.
    curvature
        A pair enters the history if s . y exceeds this share of |s| |y|.
    decrease
        Share of the linearly predicted decrease that a step must reach.
    trials
        Trial points per iteration.
    noise
        Relative rounding error of the loss: a rise of the loss by less is not seen as one. None: 8 epsilon of the parameters' type
        (1e-6 in float32, 2e-15 in float64).
    """

    kind: ClassVar[str] = "owlqn"
    strength: float = Field(gt=0)
    mask: str = ""
    history: int = Field(default=10, gt=0, le=1000)
    curvature: float = Field(default=1e-10, ge=0)
    decrease: float = Field(default=1e-4, gt=0, lt=1)
    trials: int = Field(default=30, gt=0)
    noise: float | None = Field(default=None, ge=0)

    def reads(self) -> tuple[str, ...]:
        return (self.mask,) if self.mask else ()

    @property
    def pseudo(self) -> PseudoGradient:
        """The command that forms the pseudo-gradient: the penalty has no gradient where a parameter is 0."""
        return PseudoGradient(self.strength, self.mask, "pseudo")

    def memory(self, state: State) -> Directions:
        return OrthantHistory(state, self.history, self.curvature, self.pseudo)

    def first(self, problem: Problem, state: State) -> Turns[tuple[float, float]]:
        loss = yield from evaluate(problem, state)
        (square,), (norm,) = yield from problem.space.run([self.pseudo, Dot("pseudo", "pseudo"), Norm1("params", self.mask)])
        return loss + self.strength * norm, square

    def advance(self, problem: Problem, state: State, memory: Directions) -> Turns[bool]:
        space = problem.space
        slack = (rounding(space.dtype) if self.noise is None else self.noise) * abs(state.loss)
        terms, step = memory.propose()
        start = [*memory.commit, Combine(terms, "direction"), Align("direction", "pseudo", self.mask)]
        for _ in range(self.trials):
            # Where the projection changed the step, the prediction follows the step that was made.
            moved = [
                ProjectOrthant(step, "direction", "pseudo", self.mask),
                Combine(((1.0, "params"), (-1.0, "base")), "moved"),
                Dot("pseudo", "moved"),
                Norm1("params", self.mask),
            ]
            (predicted,), (norm,) = yield from space.run([*start, *moved])
            start = []
            if not predicted < 0:
                return False
            loss = (yield from evaluate(problem, state, iterate="base")) + self.strength * norm
            if loss <= state.loss + self.decrease * predicted + slack:
                (products,) = yield from space.run(memory.survey())
                memory.learn(products)
                state.accept(loss, step, 0.0)
                return True
            step /= 2
        return False
