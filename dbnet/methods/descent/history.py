"""What a batch method remembers: the coordinator's scalars, the registers that go with them, and L-BFGS without vectors.

The two-loop recursion only ever forms linear combinations of the basis s_1 ... s_k, y_1 ... y_k, g, and products of these. So the
coordinator keeps the Gram matrix of the basis and runs the recursion on coefficients; the shards form the combination once (Chen,
Wang & Zhou 2014). Per iteration only the products with the new s, y and g are new: one command.

The history is a ring of m + 1 pairs of registers. The spare pair takes s and y of a trial point, so a pair that is turned down
(its curvature s . y is not safely positive, or the trial point is not accepted) has overwritten nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

import numpy as np

from dbnet.shards.space import Combine, Command, Copy, Gram, Terms


@dataclass
class State:
    """What the coordinator knows; the method keeps it up to date. `saved` goes to JSON, ``State(**saved)`` comes back.

    Attributes
    ----------
    iteration, passes
        Accepted iterations, and passes including those of an iteration under way.
    examples
        Examples of these passes; the problem counts them.
    loss, change, square
        Loss at base, its last relative change, and the squared norm of the gradient.
    step, slope
        Step accepted last and the slope with which its search began; 0 after a restart.
    memory
        The scalars that the method remembers of earlier iterations.
    """

    iteration: int = 0
    passes: int = 0
    examples: int = 0
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


class Directions(ABC):
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


def direction(gram: np.ndarray) -> np.ndarray:
    """Return the coefficients of -H g in the basis s_1 ... s_k, y_1 ... y_k, g, oldest first, from the basis' Gram matrix."""
    k = len(gram) // 2
    c, alpha = np.zeros(2 * k + 1), np.zeros(k)
    c[-1] = -1.0
    for i in reversed(range(k)):
        alpha[i] = (c @ gram[i]) / gram[i, k + i]
        c[k + i] -= alpha[i]
    if k:
        c *= gram[k - 1, 2 * k - 1] / gram[2 * k - 1, 2 * k - 1]
    for i in range(k):
        c[i] += alpha[i] - (c @ gram[k + i]) / gram[i, k + i]
    return c


class History(Directions):
    """The last pairs s = params - base, y = gradient - previous, and the Gram matrix.

    Parameters
    ----------
    length
        m, the number of pairs.
    curvature
        A pair enters if s . y exceeds this share of |s| |y|.
    gradient
        The register that the direction starts from.
    """

    def __init__(self, state: State, length: int, curvature: float, gradient: str = "gradient") -> None:
        super().__init__(state)
        self.length, self.curvature, self.gradient = length, curvature, gradient
        ring = tuple(f"{letter}_{i}" for i in range(length + 1) for letter in "sy")
        self.registers = (*Directions.registers, *ring)

    @property
    def slots(self) -> list[int]:
        """The ring's places that hold a pair, oldest first."""
        return self.state.memory["slots"]

    @property
    def fresh(self) -> bool:
        return not self.slots

    @property
    def pair(self) -> tuple[str, str]:
        """The spare pair of registers."""
        spare = (self.slots[-1] + 1) % (self.length + 1) if self.slots else 0
        return f"s_{spare}", f"y_{spare}"

    def basis(self) -> list[str]:
        return [f"{letter}_{i}" for letter in "sy" for i in self.slots]

    def forget(self) -> None:
        self.state.memory = {"slots": [], "gram": [[self.state.square]]}
        self.state.step = 0.0

    def survey(self) -> list[Command]:
        new = (*self.pair, self.gradient)
        s = Combine(((1.0, "params"), (-1.0, "base")), new[0])
        y = Combine(((1.0, "gradient"), (-1.0, "previous")), new[1])
        return [s, y, Gram(new, (*self.basis(), *new))]

    def learn(self, products: list[float]) -> None:
        k = len(self.slots)
        new = np.reshape(products, (3, 2 * k + 3))
        # The whole Gram matrix in the order old s, old y, new s, new y, g; what is dropped is dropped by index.
        whole = np.zeros((2 * k + 3, 2 * k + 3))
        whole[: 2 * k, : 2 * k] = np.array(self.state.memory["gram"])[: 2 * k, : 2 * k]
        whole[2 * k :], whole[:, 2 * k :] = new, new.T
        s, y, g = 2 * k, 2 * k + 1, 2 * k + 2
        slots, old = self.slots, list(range(k))
        if whole[s, y] > self.curvature * sqrt(whole[s, s]) * sqrt(whole[y, y]):
            slots = [*slots, int(self.pair[0][2:])][-self.length :]
            old = old[-(self.length - 1) :] if self.length > 1 else []
            order = [*old, s, *(k + i for i in old), y, g]
        else:
            order = [*old, *(k + i for i in old), g]
        self.state.memory = {"slots": slots, "gram": whole[np.ix_(order, order)].tolist()}
        self.state.square = float(whole[g, g])

    def propose(self) -> tuple[Terms, float]:
        if self.fresh:
            return ((-1.0, self.gradient),), 1 / sqrt(self.state.square) if self.state.square else 1.0
        coefficients = direction(np.array(self.state.memory["gram"])).tolist()
        return tuple(zip(coefficients, [*self.basis(), self.gradient], strict=True)), 1.0
