"""name -> (offset, shape) in the one flat parameter vector, and the initial values of any range of it.

Initial values do not depend on the topology: each array is drawn in fixed runs of 65536 numbers, each from its own Philox
counter keyed by (seed, array), so a shard draws just its own range and gets the same numbers as any other cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from dbnet.core.ranges import Range, overlap

_RUN = 1 << 16


class Drawn(NamedTuple):
    """What the initial values of an array are drawn from.

    Attributes
    ----------
    how
        uniform in -spread .. spread, normal with mean 0 and standard deviation spread, or constant, the value spread.
    spread
        0: all are 0.
    """

    how: Literal["uniform", "normal", "constant"]
    spread: float


@dataclass(frozen=True)
class Entry:
    """One named array in the flat vector."""

    name: str
    offset: int
    shape: tuple[int, ...]
    initial: Drawn
    decays: bool

    @property
    def range(self) -> Range:
        return Range(self.offset, self.offset + prod(self.shape))


class FlatLayout:
    """All arrays of a model, one after another in the flat vector.

    Parameters
    ----------
    arrays
        (name, shape, what its values are drawn from, decays) of each array, in order.
    """

    def __init__(self, arrays: Iterable[tuple[str, tuple[int, ...], Drawn, bool]]) -> None:
        self.entries: list[Entry] = []
        self.size = 0
        for name, shape, initial, decays in arrays:
            self.entries.append(Entry(name, self.size, tuple(shape), initial, decays))
            self.size += prod(shape)

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Return each array as a view into the flat vector [size]."""
        return {e.name: flat[e.range.slice].reshape(e.shape) for e in self.entries}

    def weights(self, part: Range, dtype: np.dtype) -> np.ndarray:
        """Return 1 where the flat range `part` holds weights, which decay, and 0 where it holds others, such as biases."""
        out = np.zeros(part.size, dtype)
        for entry in self.entries:
            mine = overlap(part, entry.range)
            if entry.decays and mine.size:
                out[mine.shift(-part.lo).slice] = 1
        return out

    def draw(self, part: Range, seed: int, out: np.ndarray) -> None:
        """Write the initial values of the flat range `part` into `out` [part.size]."""
        for index, entry in enumerate(self.entries):
            mine = overlap(part, entry.range)
            if not mine.size:
                continue
            target = out[mine.lo - part.lo : mine.hi - part.lo]
            how, spread = entry.initial
            if how == "constant" or spread == 0:
                target.fill(spread)
                continue
            lo, hi = mine.lo - entry.offset, mine.hi - entry.offset
            for run in range(lo // _RUN, -(-hi // _RUN)):
                source = np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, run, 0, 0]))
                numbers = source.standard_normal(_RUN) if how == "normal" else 2 * source.random(_RUN) - 1
                here = overlap(Range(lo, hi), Range(run * _RUN, (run + 1) * _RUN))
                target[here.lo - lo : here.hi - lo] = numbers[here.lo - run * _RUN : here.hi - run * _RUN] * spread
