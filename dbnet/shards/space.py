"""Commands on named registers, and the spaces that carry them out.

A batch method runs in a coordinator that holds no vector. It sees registers by name (params, gradient, direction, s_0, ...) and
the scalars that commands return. A command is a small value; `perform` executes it on one range of the registers. Its scalars
are sums over elements, so the sum over the shards of what they return is the result for the whole vectors.

A round is one list of commands sent together and answered together; commands of a round run in their order. It is a generator that
yields while others carry it out: ``products = yield from space.run([...])``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.core.kernels import vector

Registers = dict[str, np.ndarray]
Terms = tuple[tuple[float, str], ...]  # coefficient and register


@dataclass(frozen=True)
class Command(ABC):
    """A small value: register names and scalars.

    Attributes
    ----------
    scalars
        How many scalars it returns.
    """

    @property
    def scalars(self) -> int:
        return 0

    @abstractmethod
    def apply(self, r: Registers) -> list[float] | None:
        """Execute on one range of the registers; return its share of the scalars, if there are any."""


@dataclass(frozen=True)
class Create(Command):
    """Make registers like params, filled with zeros; those that exist already are left as they are."""

    names: tuple[str, ...]

    def apply(self, r: Registers) -> None:
        for name in self.names:
            if name not in r:
                r[name] = np.zeros_like(r["params"])


@dataclass(frozen=True)
class Fill(Command):
    x: str
    value: float

    def apply(self, r: Registers) -> None:
        vector.fill(r[self.x], float(self.value))


@dataclass(frozen=True)
class Copy(Command):
    x: str
    to: str

    def apply(self, r: Registers) -> None:
        vector.copy(r[self.x], r[self.to])


@dataclass(frozen=True)
class Scale(Command):
    x: str
    a: float

    def apply(self, r: Registers) -> None:
        vector.scale(r[self.x], float(self.a))


@dataclass(frozen=True)
class Axpy(Command):
    """y += a x."""

    a: float
    x: str
    y: str

    def apply(self, r: Registers) -> None:
        vector.axpy(float(self.a), r[self.x], r[self.y])


@dataclass(frozen=True)
class Multiply(Command):
    """to = x * y, element by element."""

    x: str
    y: str
    to: str

    def apply(self, r: Registers) -> None:
        vector.multiply(r[self.x], r[self.y], r[self.to])


@dataclass(frozen=True)
class Combine(Command):
    """to = sum of coefficient * register; `to` may be one of the terms."""

    terms: Terms
    to: str

    def apply(self, r: Registers) -> None:
        if len(self.terms) == 2:
            (a, x), (b, y) = self.terms
            vector.linear(float(a), r[x], float(b), r[y], r[self.to])
        else:
            vector.combine([a for a, _ in self.terms], [r[x] for _, x in self.terms], r[self.to])


@dataclass(frozen=True)
class Gram(Command):
    """Return all products of a row register with a column register, row after row."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def scalars(self) -> int:
        return len(self.rows) * len(self.columns)

    def apply(self, r: Registers) -> list[float]:
        return vector.gram([r[x] for x in self.rows], [r[x] for x in self.columns]).ravel().tolist()


@dataclass(frozen=True)
class Dot(Command):
    x: str
    y: str
    scalars: ClassVar[int] = 1

    def apply(self, r: Registers) -> list[float]:
        return [vector.dot(r[self.x], r[self.y])]


@dataclass(frozen=True)
class Norm1(Command):
    """Return the sum of |x| where `mask` is 1; no mask means everywhere."""

    x: str
    mask: str = ""
    scalars: ClassVar[int] = 1

    def apply(self, r: Registers) -> list[float]:
        return [vector.norm1(r[self.x], _mask(r, self.mask))]


@dataclass(frozen=True)
class Decay(Command):
    """Add the gradient of strength/2 |x|^2, taken where `mask` is 1, to `gradient`; return that penalty."""

    strength: float
    x: str
    gradient: str
    mask: str
    scalars: ClassVar[int] = 1

    def apply(self, r: Registers) -> list[float]:
        square = vector.decay(float(self.strength), r[self.x], r[self.mask], r[self.gradient])
        return [self.strength / 2 * square]


@dataclass(frozen=True)
class PseudoGradient(Command):
    """to = the steepest element of the subdifferential of loss + strength |params|."""

    strength: float
    mask: str
    to: str

    def apply(self, r: Registers) -> None:
        vector.pseudo_gradient(r["params"], r["gradient"], float(self.strength), _mask(r, self.mask), r[self.to])


@dataclass(frozen=True)
class Align(Command):
    """Clear the elements of a direction that do not point against the pseudo-gradient."""

    direction: str
    pseudo: str
    mask: str = ""

    def apply(self, r: Registers) -> None:
        vector.align(r[self.direction], r[self.pseudo], _mask(r, self.mask))


@dataclass(frozen=True)
class ProjectOrthant(Command):
    """params = base + step * direction, projected on the orthant of base and the pseudo-gradient."""

    step: float
    direction: str
    pseudo: str
    mask: str = ""

    def apply(self, r: Registers) -> None:
        base, d, pseudo = r["base"], r[self.direction], r[self.pseudo]
        vector.project_orthant(base, float(self.step), d, pseudo, _mask(r, self.mask), r["params"])


def _mask(r: Registers, name: str) -> np.ndarray:
    return r[name] if name else r["params"][:0]


def perform(registers: Registers, command: Command) -> list[float]:
    """Execute a command on one range; return the range's share of its scalars.

    Raises
    ------
    KeyError
        A register was never created; the message names the command and the register.
    """
    try:
        return command.apply(registers) or []
    except KeyError as error:
        known = ", ".join(sorted(registers))
        raise KeyError(f"{type(command).__name__} uses register {error.args[0]!r}; there are only {known}") from None


class Space(ABC):
    """Named registers that are vectors of one length, wherever they lie.

    Attributes
    ----------
    rounds
        Number of rounds run so far.
    dtype
        Type of the registers.
    """

    def __init__(self, dtype: np.dtype | str = "float64") -> None:
        self.rounds, self.dtype = 0, np.dtype(dtype)

    def run(self, commands: Iterable[Command]) -> Turns[list[list[float]]]:
        """Run one round; return the scalars of those commands that have any, in order."""
        commands = list(commands)
        self.rounds += 1
        scalars = iter((yield from self.totals(commands)))
        return [[next(scalars) for _ in range(command.scalars)] for command in commands if command.scalars]

    @abstractmethod
    def totals(self, commands: Sequence[Command]) -> Turns[Sequence[float]]:
        """Execute the commands on all ranges in order; return all their scalars, each summed over the ranges in float64."""


class LocalSpace(Space):
    """Whole vectors in this process.

    Parameters
    ----------
    registers
        At least ``params`` and ``gradient``: contiguous vectors of one length and one type. They are used, not copied.
    """

    def __init__(self, registers: Registers) -> None:
        super().__init__(registers["params"].dtype)
        self.registers = registers

    def totals(self, commands: Sequence[Command]) -> Turns[list[float]]:
        return [scalar for command in commands for scalar in perform(self.registers, command)]
        yield
