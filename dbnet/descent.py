"""Batch methods over a Space: what they share, gradient descent and nonlinear conjugate gradients.

The coordinator's side of Sandblaster. A method is a generator: it yields a `Pass` when it needs loss and gradient at the register
params, expects the gradient in the register gradient, and is sent the loss; it returns the reason why it ended. So one code is
driven in one process (`solve`) or by a coordinator that waits on replicas. Between passes it sends rounds of commands to the space.

An iteration begins with one round: remember params and gradient as base and previous, set the direction, its slope, and params at
the first trial point. A trial that the loss alone rejects costs one more round, the next trial point. Any other costs one for its
slope, which brings all products that the next direction needs; so an iteration whose first step is accepted takes two rounds.

State that is saved while a Pass is outstanding belongs to base and previous, which are not changed before the next iteration. So
registers and state saved then, or after the end, continue the run as if it had not stopped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from math import isfinite, sqrt
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from dbnet.linesearch import Point, Wolfe, strong_wolfe
from dbnet.ranges import Range
from dbnet.registry import Member
from dbnet.space import Combine, Command, Copy, Create, Dot, Gram, LocalSpace, Space, Terms


class Pass(NamedTuple):
    """Request for loss and gradient at params.

    Attributes
    ----------
    examples
        None: all data. Otherwise the positions lo ... hi - 1 of an endless stream of examples (position modulo the data's size,
        reordered in every epoch or not); then loss and gradient are means over these examples.
    """

    examples: Range | None = None


Requests = Generator[Pass, float, str]


@dataclass
class State:
    """What the coordinator knows; the method keeps it up to date. `saved` goes to JSON, ``State(**saved)`` comes back.

    Attributes
    ----------
    iteration, passes
        Accepted iterations, and passes including those of an iteration under way.
    loss, change, square
        Loss at base, its last relative change, and the squared norm of the gradient.
    step, slope
        Step accepted last and the slope with which its search began; 0 after a restart.
    memory
        The scalars that the method remembers of earlier iterations.
    """

    iteration: int = 0
    passes: int = 0
    loss: float | None = None
    change: float | None = None
    square: float = 0.0
    step: float = 0.0
    slope: float = 0.0
    memory: dict[str, Any] = field(default_factory=dict)

    def saved(self) -> dict[str, Any]:
        return asdict(self)

    def accept(self, loss: float, step: float, slope: float) -> None:
        """Record an accepted iteration."""
        self.change = abs(self.loss - loss) / max(abs(self.loss), abs(loss), 1e-300)
        self.iteration, self.loss, self.step, self.slope = self.iteration + 1, loss, step, slope


class Memory(ABC):
    """What a method remembers of earlier iterations, as scalars in the state and vectors in registers.

    Attributes
    ----------
    registers
        Registers that the method needs beside params and gradient.
    commit, restore
        Commands that make the present point the origin of the next iteration; that return to the origin.
    """

    registers: tuple[str, ...] = ("direction", "base", "previous")
    commit: tuple[Command, ...] = (Copy("params", "base"), Copy("gradient", "previous"))
    restore: tuple[Command, ...] = (Copy("base", "params"), Copy("previous", "gradient"))

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    @abstractmethod
    def fresh(self) -> bool:
        """Whether nothing is remembered, so that the next direction is the steepest one."""

    @abstractmethod
    def forget(self) -> None:
        """Start again from the gradient alone."""

    @abstractmethod
    def survey(self) -> list[Command]:
        """Return the commands, the last one with products, that learn about a trial point before it is known to be accepted."""

    @abstractmethod
    def learn(self, products: list[float]) -> None:
        """Take over the products of the last survey: its point was accepted."""

    @abstractmethod
    def propose(self) -> tuple[Terms, float]:
        """Return the next direction as a linear combination of registers, and the first step to try."""


class Descent(Member):
    """Base of the batch methods' options.

    Parameters
    ----------
    iterations
        Largest number of iterations, those before a restart included.
    """

    family: ClassVar[str] = "descent"
    iterations: int = Field(default=100, ge=0)

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
        if not isfinite(state.loss):
            return "the loss is not finite"
        if sqrt(state.square) <= self.gradient_norm:
            return "gradient norm"
        if state.change is not None and state.change < self.loss_change:
            return "loss change"
        return "iterations" if state.iteration >= self.iterations else ""


class Smooth(FullBatch):
    """Base of the methods with a strong Wolfe line search.

    Parameters
    ----------
    line
        The conditions of the line search.
    """

    line: Wolfe = Wolfe()

    @abstractmethod
    def memory(self, state: State) -> Memory:
        """Return the memory that proposes the directions."""

    def steps(self, space: Space, state: State) -> Requests:
        memory = self.memory(state)
        yield from begin(space, state, memory)
        while not (reason := self.reason(state)):
            accepted = yield from _iterate(space, self.line, state, memory)
            if not accepted:
                if memory.fresh:
                    reason = "no decrease along the gradient"
                    break
                memory.forget()
        space.run(memory.commit)
        return reason


def evaluate(state: State, examples: Range | None = None) -> Generator[Pass, float, float]:
    """Ask for a pass; return its loss."""
    loss = yield Pass(examples)
    state.passes += 1
    return float(loss)


def begin(space: Space, state: State, memory: Memory) -> Generator[Pass, float, None]:
    """Evaluate the first point, or return to the point that the state belongs to."""
    space.run([Create(memory.registers)])
    if state.loss is not None:
        space.run(memory.restore)
        return
    state.loss = yield from evaluate(state)
    ((state.square,),) = space.run([Dot("gradient", "gradient")])
    memory.forget()


def _iterate(space: Space, line: Wolfe, state: State, memory: Memory) -> Generator[Pass, float, bool]:
    """Make one iteration; return whether a step was accepted. If not, params and gradient are as before."""
    terms, step = memory.propose()
    ((slope,),) = space.run([*memory.commit, Combine(terms, "direction"), Dot("gradient", "direction"), _move(step)])
    products: list[float] = []

    def survey() -> float:
        (value,), products[:] = space.run([Dot("gradient", "direction"), *memory.survey()])
        return value

    point = None
    if slope < 0:
        point = yield from _search(space, state, strong_wolfe(line, Point(0.0, state.loss, slope), step, survey))
    if point is None:
        space.run(memory.restore)
        return False
    memory.learn(products)
    state.accept(point.loss, point.step, slope)
    return True


def _search(space: Space, state: State, search: Generator[float, float, Point | None]) -> Generator[Pass, float, Point | None]:
    """Answer a line search; its first trial point is already in params."""
    next(search)
    while True:
        loss = yield from evaluate(state)
        try:
            space.run([_move(search.send(loss))])
        except StopIteration as end:
            return end.value


def _move(step: float) -> Command:
    return Combine(((1.0, "base"), (step, "direction")), "params")


class Conjugate(Memory):
    """The last direction and its factor: d = -g + beta d. Gradient descent is beta = 0.

    Polak-Ribiere+: beta = max(0, g . (g - g_previous) / |g_previous|^2), and 0 where d would not descend.
    """

    registers = (*Memory.registers, "heading")
    commit = (*Memory.commit, Copy("direction", "heading"))
    restore = (*Memory.restore, Copy("heading", "direction"))

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

    registers, commit, restore = Memory.registers, Memory.commit, Memory.restore

    def survey(self) -> list[Command]:
        return [Dot("gradient", "gradient")]

    def learn(self, products: list[float]) -> None:
        (self.state.square,) = products
        self.state.memory = {"beta": 0.0, "slope": -self.state.square}


class GradientDescent(Smooth):
    """Gradient descent with line search."""

    kind: ClassVar[str] = "gradient_descent"

    def memory(self, state: State) -> Memory:
        return Steepest(state)


class ConjugateGradient(Smooth):
    """Nonlinear conjugate gradients, Polak-Ribiere+."""

    kind: ClassVar[str] = "conjugate_gradient"
    line: Wolfe = Wolfe(curvature=0.1)

    def memory(self, state: State) -> Memory:
        return Conjugate(state)


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
    A generator that yields `Pass`, expects the loss, and returns the reason why it ended.
    """
    return options.steps(space, state if state is not None else State())


Objective = Callable[[Any, Any, Range | None], float]


def solve(space: LocalSpace, objective: Objective, options: Descent, state: State | None = None) -> str:
    """Minimize in this process; ``objective(params, gradient, examples)`` writes the gradient and returns the loss."""
    run = minimize(space, options, state)
    try:
        request = next(run)
        while True:
            request = run.send(objective(space.registers["params"], space.registers["gradient"], request.examples))
    except StopIteration as end:
        return end.value
