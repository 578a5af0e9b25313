"""OWL-QN: L-BFGS for a loss with an L1 penalty (Andrew & Gao 2007)."""

from __future__ import annotations

from collections.abc import Generator
from typing import ClassVar

from pydantic import Field

from dbnet.comm.turns import Wait
from dbnet.methods.descent.base import ACCEPTED, FullBatch, Pass, Requests, evaluate
from dbnet.methods.descent.history import History, State
from dbnet.methods.descent.linesearch import rounding
from dbnet.shards.space import Align, Combine, Create, Dot, Norm1, ProjectOrthant, PseudoGradient, Space


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

    def registers(self) -> tuple[str, ...]:
        return (*History(State(), self.history, self.curvature).registers, "pseudo", "moved")

    def steps(self, space: Space, state: State) -> Requests:
        memory = History(state, self.history, self.curvature, gradient="pseudo")
        yield from space.run([Create(self.registers())])
        pseudo = PseudoGradient(self.strength, self.mask, "pseudo")
        if state.loss is None:
            loss = yield from evaluate(state)
            (state.square,), (norm,) = yield from space.run([pseudo, Dot("pseudo", "pseudo"), Norm1("params", self.mask)])
            state.loss = loss + self.strength * norm
            memory.forget()
        else:
            yield from space.run([*memory.restore, pseudo])
        while not (reason := self.reason(state)):
            step, loss = yield from self._search(space, state, memory)
            if step:
                (products,) = yield from space.run([pseudo, *memory.survey()])
                memory.learn(products)
                state.accept(loss, step, 0.0)
                yield ACCEPTED
            elif memory.fresh:
                reason = "no decrease along the gradient"
                break
            else:
                memory.forget()
        yield from space.run(memory.commit)
        return reason

    def _search(self, space: Space, state: State, memory: History) -> Generator[Pass | Wait, float, tuple[float, float]]:
        """Halve the step until the loss decreases enough; return step and loss, or 0 with params and gradient as before."""
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
                break
            loss = (yield from evaluate(state, iterate="base")) + self.strength * norm
            if loss <= state.loss + self.decrease * predicted + slack:
                return step, loss
            step /= 2
        yield from space.run(memory.restore)
        return 0.0, state.loss
