"""Batch methods over a Problem: what they share.

The coordinator's side of Sandblaster. A method asks its problem for passes, and its problem's space for rounds of commands between
them; it tells the problem of each iterate, and returns why it ended. So one code runs in one process (`solve`) and on a coordinator
that must go on serving while replicas and shards work.

An iteration begins with one round: remember params and gradient as base and previous, set the direction, its slope, and params at
the first trial point. A trial that the loss alone rejects costs one more round, the next trial point. Any other costs one for its
slope, which brings all products that the next direction needs; so an iteration whose first step is accepted takes two rounds.
"""

from __future__ import annotations

from abc import abstractmethod
from math import isfinite, sqrt
from typing import Any, ClassVar

from pydantic import Field

from dbnet.comm.turns import Turns, result
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.core.registry import Member
from dbnet.methods.descent.history import Directions, State
from dbnet.methods.descent.linesearch import Point, Wolfe, strong_wolfe
from dbnet.methods.descent.problem import LocalProblem, Objective, Problem
from dbnet.shards.space import Combine, Command, Create, Dot, LocalSpace

NOT_FINITE = "the loss is not finite"


class Descent(Member):
    """Base of the batch methods' options.

    Parameters
    ----------
    iterations
        Largest number of iterations, those before a restart included; None: any number.
    """

    family: ClassVar[str] = "methods.descent"
    iterations: int | None = Field(default=None, ge=0, le=1 << 53)

    def reads(self) -> tuple[str, ...]:
        """Return the names of registers that it reads and that somebody else fills."""
        return ()

    @abstractmethod
    def memory(self, state: State) -> Directions:
        """Return the memory that proposes the directions."""

    def registers(self) -> tuple[str, ...]:
        """Return the registers that are needed beside params and gradient."""
        return self.memory(State()).registers

    def reason(self, state: State) -> str:
        """Return why to stop here, or nothing."""
        return "iterations" if self.iterations is not None and state.iteration >= self.iterations else ""

    @abstractmethod
    def minimize(self, problem: Problem, state: State) -> Turns[str]:
        """Minimize the loss over the register params.

        Parameters
        ----------
        problem
            What is minimized.
        state
            Kept up to date for the caller. To continue a run: its saved state, with its registers in the problem's space.

        Returns
        -------
        The reason why it ended.
        """


class FullBatch(Descent):
    """Base of the methods whose loss is that of all data.

    Parameters
    ----------
    gradient_norm
        Stop when the Euclidean norm of the gradient is at most this.
    loss_change
        Stop when the loss changed relatively by less than this.
    """

    gradient_norm: float = Field(default=1e-6, ge=0)
    loss_change: float = Field(default=1e-9, ge=0)

    def reason(self, state: State) -> str:
        if not isfinite(state.loss):
            return NOT_FINITE
        if sqrt(state.square) <= self.gradient_norm:
            return "gradient norm"
        if state.change is not None and state.change < self.loss_change:
            return "loss change"
        return super().reason(state)

    def minimize(self, problem: Problem, state: State) -> Turns[str]:
        space, memory, ending = problem.space, self.memory(state), ""
        yield from space.run([Create(memory.registers)])
        if state.loss is None:
            state.loss, state.square = yield from self.first(problem, state)
            memory.forget()
        else:
            yield from space.run(memory.restore)
        while not (ending := ending or self.reason(state)):
            if (yield from self.advance(problem, state, memory)):
                ending = yield from problem.accepted(state)
                continue
            yield from space.run(memory.restore)
            if memory.fresh:
                ending = "no decrease along the gradient"
            else:
                memory.forget()
        yield from space.run(memory.commit)
        return ending

    @abstractmethod
    def first(self, problem: Problem, state: State) -> Turns[tuple[float, float]]:
        """Evaluate the first point; return its loss and the square of its gradient."""

    @abstractmethod
    def advance(self, problem: Problem, state: State, memory: Directions) -> Turns[bool]:
        """Make one iteration; return whether a step was accepted. If not, params and gradient are to be restored."""


class Smooth(FullBatch):
    """Base of the methods with a strong Wolfe line search.

    Parameters
    ----------
    line
        The conditions of the line search.
    """

    line: Wolfe = Wolfe()

    def first(self, problem: Problem, state: State) -> Turns[tuple[float, float]]:
        loss = yield from evaluate(problem, state)
        ((square,),) = yield from problem.space.run([Dot("gradient", "gradient")])
        return loss, square

    def advance(self, problem: Problem, state: State, memory: Directions) -> Turns[bool]:
        terms, step = memory.propose()
        start = [*memory.commit, Combine(terms, "direction"), Dot("gradient", "direction"), move(step)]
        ((slope,),) = yield from problem.space.run(start)
        if not slope < 0:
            return False
        trial, line = Trial(problem, state, memory), self.line.complete(problem.space.dtype)
        point = yield from strong_wolfe(line, Point(0.0, state.loss, slope), step, trial.loss, trial.slope)
        if point is None:
            return False
        memory.learn(trial.products)
        state.accept(point.loss, point.step, slope)
        return True


class Trial:
    """The points base + step * direction that a line search tries; the first one is in params before it begins.

    Attributes
    ----------
    products
        What the memory is to learn of the point whose slope was asked for last.
    """

    def __init__(self, problem: Problem, state: State, memory: Directions) -> None:
        self.problem, self.state, self.memory = problem, state, memory
        self.products: list[float] = []
        self._first = True

    def loss(self, step: float) -> Turns[float]:
        """Move there, and return the loss."""
        if not self._first:
            yield from self.problem.space.run([move(step)])
        self._first = False
        return (yield from evaluate(self.problem, self.state, iterate="base"))

    def slope(self) -> Turns[float]:
        """Return the slope along the direction, and survey the point in the same round."""
        (slope,), self.products = yield from self.problem.space.run([Dot("gradient", "direction"), *self.memory.survey()])
        return slope


def move(step: float) -> Command:
    """Return the command that goes from base along the direction."""
    return Combine(((1.0, "base"), (step, "direction")), "params")


def evaluate(problem: Problem, state: State, examples: Range | None = None, iterate: str = "params") -> Turns[float]:
    """Make a pass and count it; return its loss."""
    loss = yield from problem.loss(examples, iterate)
    state.passes += 1
    return float(loss)


def resumed(saved: dict[str, Any], options: Descent) -> State:
    """Return the state to go on from: that of a checkpoint, {"descent": options, "state": state}, or a fresh one if it has none.

    Raises
    ------
    UserError
        It belongs to another method or another length of the history.
    """
    if "descent" not in saved:
        return State()
    mine, old = options.options(), saved["descent"]
    for name in ("kind", "history"):
        if mine.get(name) != old.get(name):
            raise UserError(
                f"The checkpoint was made with method.descent.{name} = {old.get(name)!r}, now it is {mine.get(name)!r}; "
                "resume with the former, or start a new run from its parameters with run.start."
            )
    return State(**saved["state"])


def solve(space: LocalSpace, objective: Objective, options: Descent, state: State | None = None) -> str:
    """Minimize in this process; ``objective(params, gradient, examples)`` writes the gradient and returns the loss."""
    return result(options.minimize(LocalProblem(space, objective), state if state is not None else State()))
