"""Minibatches of a replica's subset, in a seeded order that a cursor can come back to.

The order is a function of the epoch, so a cursor is two integers: the epoch and the number of examples of it that are used.
Every example comes once per epoch; the last minibatch of an epoch is smaller, its unused columns repeat its first example and count
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.jit import kernel
from dbnet.data.file import Examples

# Examples are turned into columns tile by tile: whole cache lines are written, and a minibatch of 2^n columns is no slower.
_TILE = 16


@kernel("u1[:,:];i8[:];i8;f8;T[:,:]", "T[:,:];i8[:];i8;f8;T[:,:]")
def gather(data: np.ndarray, index: np.ndarray, count: int, scale: float, out: np.ndarray) -> None:
    s, units = out.dtype.type(scale), data.shape[1]
    for j0 in range(0, count, _TILE):
        j1 = min(j0 + _TILE, count)
        for u0 in range(0, units, _TILE):
            u1 = min(u0 + _TILE, units)
            for j in range(j0, j1):
                row = index[j]
                for u in range(u0, u1):
                    out[u, j] = s * out.dtype.type(data[row, u])


def bound(x: np.ndarray, data: np.ndarray, batch: int) -> np.ndarray:
    """Return the network's input `x` if examples of `data` fill it; the kernels trust that they do."""
    if x.ndim != 2 or x.shape != (data.shape[1], batch) or not x.flags.c_contiguous:
        raise ValueError(f"{batch} examples of {data.shape[1]} units do not fill an input of shape {x.shape}.")
    return x


def fitting(part: Examples, dtype: np.dtype, scale: float) -> np.ndarray:
    """Return x as the network takes it, but for the scale; UserError where a value is too large for its type."""
    if part.x.dtype == np.uint8:
        return part.x
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(part.x, dtype)
        if not isfinite(max(x.max(initial=0), -x.min(initial=0)) * x.dtype.type(scale)):
            bad = int(np.flatnonzero(~np.isfinite(x * x.dtype.type(scale)).all(axis=1))[0])
            largest = part.x[bad][np.abs(part.x[bad]).argmax()]
            raise UserError(
                f"Example {part.example(bad)} holds {largest:g}, which times the data's scale ({scale:g}) is beyond {x.dtype}; "
                "mend the data."
            )
    return x


class Cursor(NamedTuple):
    """Where a subset's reading stands."""

    epoch: int
    position: int


class Batches:
    """Fills a network's input, one minibatch after another.

    Parameters
    ----------
    part
        The examples in memory.
    batch
        Examples per minibatch.
    scale
        What x is multiplied with.
    dtype
        Floating-point type of the network.
    order
        Gives the order of an epoch; None keeps the order of the file (evaluation).
    """

    def __init__(
        self, part: Examples, batch: int, scale: float, dtype: np.dtype, order: Callable[[int], np.ndarray] | None
    ) -> None:
        self.batch, self.scale = batch, scale
        self._x = fitting(part, dtype, scale)
        # Not in the file's type as well.
        self.part = replace(part, x=self._x)
        self._vectors = part.y.ndim == 2
        self._y = part.y.astype(dtype, copy=False) if self._vectors else part.y
        self.target = np.zeros((part.y.shape[1], batch), dtype) if self._vectors else np.zeros(batch, np.int64)
        self._order_of = order
        self._order = np.arange(len(part))
        self._bound: np.ndarray | None = None
        self._index = self._order[:0]
        self.seek(Cursor(0, 0))

    def __len__(self) -> int:
        return len(self.part)

    def again(self) -> Batches:
        """Return the same examples, in memory once, for somebody else to go through from the first one on."""
        other = copy(self)
        other.target, other._bound = self.target.copy(), None
        other.seek(Cursor(0, 0))
        return other

    @property
    def cursor(self) -> Cursor:
        return Cursor(self._epoch, self._position)

    def seek(self, cursor: Cursor) -> None:
        """Go to a cursor; where it leaves nothing of its epoch, as a share may that was cut, to the next one."""
        self._epoch, self._position = cursor
        if self._position and self._position >= len(self.part):
            self._epoch, self._position = self._epoch + 1, 0
        self._shuffle()

    def _shuffle(self) -> None:
        if self._order_of is not None:
            self._order = self._order_of(self._epoch)
            if len(self._order) and not 0 <= self._order.min() <= self._order.max() < len(self.part):
                raise ValueError(f"The order of epoch {self._epoch} names examples beyond the {len(self.part)} that there are.")

    def next(self, x: np.ndarray) -> int:
        """Fill `x` [units, batch] and `self.target` with the next minibatch; return its number of examples."""
        if x is not self._bound:
            self._bound = bound(x, self._x, self.batch)
        lo = self._position
        self._index = index = self._order[lo : lo + self.batch]
        count = len(index)
        self.refill(x)
        if self._vectors:
            self.target[:, :count] = self._y[index].T
        else:
            np.take(self._y, index, out=self.target[:count])
        self._position += count
        if self._position >= len(self.part):
            self._epoch, self._position = self._epoch + 1, 0
            self._shuffle()
        return count

    def refill(self, x: np.ndarray) -> None:
        """Fill `x` [units, batch] with the minibatch that was filled last, whose labels are still in `self.target`."""
        count = len(self._index)
        gather(self._x, self._index, count, self.scale, x)
        x[:, count:] = x[:, :1]

    def example(self, column: int) -> int:
        """Return which example of the file stands in a column of the minibatch that was filled last."""
        row = int(self._index[column])
        return self.part.example(row)

    @property
    def filled(self) -> int:
        """Examples of that minibatch."""
        return len(self._index)
