"""What a batch method minimizes: registers that take commands, passes over the data, and someone who hears of iterates.

Who runs the method hands it a problem: a coordinator, whose passes are made by replicas and whose registers lie on shards, or a
function of vectors in this process (`solve`). Everything yields while others work, and its result comes by ``yield from``.

State that is saved while a pass is under way belongs to the registers base and previous, which are not changed before the next
iteration. So registers and state saved then, or after the end, continue the run as if it had not stopped, with the iterate in place
of params, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from dbnet.comm.turns import Turns
from dbnet.core.ranges import Range
from dbnet.methods.descent.history import State
from dbnet.shards.space import LocalSpace, Space


class Halted(Exception):
    """The run is to stop in the middle of a pass; methods let it through, so that their state stays that of the iterate."""


class Problem(Protocol):
    """What a batch method minimizes the loss of.

    Attributes
    ----------
    space
        Holds the registers params and gradient; the method creates the others.
    """

    space: Space

    def loss(self, examples: Range | None = None, iterate: str = "params") -> Turns[float]:
        """Make a pass: return the loss at the register params, and leave the gradient in the register gradient.

        Parameters
        ----------
        examples
            None: all data. Otherwise the positions lo ... hi - 1 of an endless stream of examples (position modulo the data's size,
            reordered in every epoch or not); then loss and gradient are means over these examples.
        iterate
            The register that holds the iterate: params, or base while params is a trial point.

        Raises
        ------
        Halted
            The run is to stop.
        """

    def accepted(self, state: State) -> Turns[str]:
        """Hear that params and gradient are those of a new iterate, which the state counts; return why to end here, or nothing."""


Objective = Callable[[Any, Any, Range | None], float]


class LocalProblem:
    """A problem in this process.

    Parameters
    ----------
    space
        The registers.
    objective
        ``objective(params, gradient, examples)`` writes the gradient and returns the loss.
    """

    def __init__(self, space: LocalSpace, objective: Objective) -> None:
        self.space, self.objective = space, objective

    def loss(self, examples: Range | None = None, iterate: str = "params") -> Turns[float]:
        return self.objective(self.space.registers["params"], self.space.registers["gradient"], examples)
        yield

    def accepted(self, state: State) -> Turns[str]:
        return ""
        yield
