"""Batch methods over a Space: what they share.

The coordinator's side of Sandblaster. A method is a generator: it yields a `Pass` when it needs loss and gradient at the register
params, expects the gradient in the register gradient, and is sent the loss; it yields `ACCEPTED` when params is a new iterate; it
returns the reason why it ended. Between passes it sends rounds of commands to the space, and hands through the space's waits. So
one code is driven in one process (`solve`) or by a coordinator that must go on serving while replicas and shards work.

An iteration begins with one round: remember params and gradient as base and previous, set the direction, its slope, and params at
the first trial point. A trial that the loss alone rejects costs one more round, the next trial point. Any other costs one for its
slope, which brings all products that the next direction needs; so an iteration whose first step is accepted takes two rounds.

State that is saved while a Pass is outstanding belongs to base and previous, which are not changed before the next iteration. So
registers and state saved then, or after the end, continue the run as if it had not stopped, with the iterate in place of params,
too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator
from math import isfinite, sqrt
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from dbnet.comm.turns import Wait
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.core.registry import Member
from dbnet.methods.descent.history import Directions, State
from dbnet.methods.descent.linesearch import Point, Search, Wolfe, strong_wolfe
from dbnet.shards.space import Combine, Command, Create, Dot, LocalSpace, Space


class Pass(NamedTuple):
    """Request for loss and gradient at params.

    Attributes
    ----------
    examples
        None: all data. Otherwise the positions lo ... hi - 1 of an endless stream of examples (position modulo the data's size,
        reordered in every epoch or not); then loss and gradient are means over these examples.
    iterate
        The register that holds the iterate: params, or base while params is a trial point.
    """

    examples: Range | None = None
    iterate: str = "params"


class Accepted(NamedTuple):
    """Notice that params and gradient are those of a new iterate, and that the state counts it."""


ACCEPTED = Accepted()
NOT_FINITE = "the loss is not finite"
Requests = Generator[Pass | Accepted | Wait, float, str]


class Descent(Member):
    """Base of the batch methods' options.

    Parameters
    ----------
    iterations
        Largest number of iterations, those before a restart included; None: any number.
    """

    family: ClassVar[str] = "methods.descent"
    iterations: int | None = Field(default=None, ge=0, le=1 << 53)

    def spent(self, state: State) -> bool:
        """Return whether the iterations are over."""
        return self.iterations is not None and state.iteration >= self.iterations

    def reads(self) -> tuple[str, ...]:
        """Return the names of registers that it reads and that somebody else fills."""
        return ()

    @abstractmethod
    def registers(self) -> tuple[str, ...]:
        """Return the registers that are needed beside params and gradient."""

    @abstractmethod
    def steps(self, space: Space, state: State) -> Requests:
        """Run the method."""


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
        """Return why to stop here, or nothing."""
        if state.ending or not isfinite(state.loss):
            return state.ending or NOT_FINITE
        if sqrt(state.square) <= self.gradient_norm:
            return "gradient norm"
        if state.change is not None and state.change < self.loss_change:
            return "loss change"
        return "iterations" if self.spent(state) else ""


class Smooth(FullBatch):
    """Base of the methods with a strong Wolfe line search.

    Parameters
    ----------
    line
        The conditions of the line search.
    """

    line: Wolfe = Wolfe()

    @abstractmethod
    def memory(self, state: State) -> Directions:
        """Return the memory that proposes the directions."""

    def registers(self) -> tuple[str, ...]:
        return self.memory(State()).registers

    def steps(self, space: Space, state: State) -> Requests:
        memory, line = self.memory(state), self.line.complete(space.dtype)
        yield from begin(space, state, memory)
        while not (reason := self.reason(state)):
            accepted = yield from _iterate(space, line, state, memory)
            if accepted:
                yield ACCEPTED
            elif memory.fresh:
                reason = "no decrease along the gradient"
                break
            else:
                memory.forget()
        yield from space.run(memory.commit)
        return reason


def evaluate(state: State, examples: Range | None = None, iterate: str = "params") -> Generator[Pass | Wait, float, float]:
    """Ask for a pass; return its loss."""
    loss = yield Pass(examples, iterate)
    state.passes += 1
    return float(loss)


def begin(space: Space, state: State, memory: Directions) -> Generator[Pass | Wait, float, None]:
    """Evaluate the first point, or return to the point that the state belongs to."""
    yield from space.run([Create(memory.registers)])
    if state.loss is not None:
        yield from space.run(memory.restore)
        return
    state.loss = yield from evaluate(state)
    ((state.square,),) = yield from space.run([Dot("gradient", "gradient")])
    memory.forget()


def _iterate(space: Space, line: Wolfe, state: State, memory: Directions) -> Generator[Pass | Wait, float, bool]:
    """Make one iteration; return whether a step was accepted. If not, params and gradient are as before."""
    terms, step = memory.propose()
    ((slope,),) = yield from space.run([*memory.commit, Combine(terms, "direction"), Dot("gradient", "direction"), _move(step)])
    point, products = None, []
    if slope < 0:
        search = strong_wolfe(line, Point(0.0, state.loss, slope), step)
        point, products = yield from _search(space, state, memory, search)
    if point is None:
        yield from space.run(memory.restore)
        return False
    memory.learn(products)
    state.accept(point.loss, point.step, slope)
    return True


def _search(
    space: Space, state: State, memory: Directions, search: Search
) -> Generator[Pass | Wait, float, tuple[Point | None, list[float]]]:
    """Answer a line search whose first trial point is already in params; return the products surveyed last, too."""
    products: list[float] = []
    try:
        step = next(search)
        while True:
            if step is None:
                (answer,), products = yield from space.run([Dot("gradient", "direction"), *memory.survey()])
            else:
                answer = yield from evaluate(state, iterate="base")
            step = search.send(answer)
            if step is not None:
                yield from space.run([_move(step)])
    except StopIteration as end:
        return end.value, products


def _move(step: float) -> Command:
    return Combine(((1.0, "base"), (step, "direction")), "params")


def minimize(space: Space, options: Descent, state: State | None = None) -> Requests:
    """Minimize the loss over the register params.

    Parameters
    ----------
    space
        Holds the registers params and gradient; the others are created in it.
    options
        The method.
    state
        Kept up to date for the caller. To continue a run: its saved state, with its registers in the space.

    Returns
    -------
    A generator that yields `Pass` and expects the loss, yields notices and waits, and returns the reason why it ended.
    """
    return options.steps(space, state if state is not None else State())


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
                f"The checkpoint was made with method.descent.{name} = {old.get(name)!r}, the run file says {mine.get(name)!r}; "
                "resume with the former, or start a new run from its parameters with run.start."
            )
    return State(**saved["state"])


Objective = Callable[[Any, Any, Range | None], float]


def solve(space: LocalSpace, objective: Objective, options: Descent, state: State | None = None) -> str:
    """Minimize in this process; ``objective(params, gradient, examples)`` writes the gradient and returns the loss."""
    run = minimize(space, options, state)
    try:
        request = next(run)
        while True:
            loss = None
            if isinstance(request, Pass):
                loss = objective(space.registers["params"], space.registers["gradient"], request.examples)
            request = run.send(loss)
    except StopIteration as end:
        return end.value
