"""Dropout: in training y = x m / (1 - rate) with m = 0 for a random fraction `rate` of the values; in evaluation y = x.

m is no stream of random numbers but a hash of (seed, step, layer, unit, column), and every replica has a seed of its own: whether a
unit is dropped depends neither on how the network is cut nor on the order of computation, and the backward pass computes it again
instead of keeping it. The hash chains a
32-bit mixing function (multiply and shift, as in the finalizer of MurmurHash3) over the words of these numbers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.jit import inline, kernel
from dbnet.core.ranges import Range, Region, flatten, size_of
from dbnet.network.layers.base import Cell, Graph, Layer, Shape


@inline
def mix(h: int) -> int:
    """Scramble 32 bits; products of 32 by 31 bits stay below 2^63."""
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    h = ((h ^ (h >> 15)) * 0x46AC8A4B) & 0xFFFFFFFF
    return h ^ (h >> 16)


@kernel("T[:,:];T[:,:];i8[:,:];f8;i8;i8;i8")
def drop(y: np.ndarray, x: np.ndarray, units: np.ndarray, rate: float, seed: int, step: int, layer: int) -> None:
    """Compute y = x m / (1 - rate); `units` holds (first row at hand, global index of that unit, number) of each run of units."""
    scale, zero = y.dtype.type(1 / (1 - rate)), y.dtype.type(0)
    limit = int(rate * 4294967296.0)
    word = 0xFFFFFFFF
    key = mix(mix(mix(mix(seed & word) ^ ((seed >> 32) & word)) ^ (step & word)) ^ ((step >> 32) & word))
    key = mix(key ^ (layer & word))
    for run in range(units.shape[0]):
        row, unit, n = units[run]
        for i in range(n):
            number = int(unit + i)
            low = mix(key ^ (number & word))
            high = mix(low ^ ((number >> 32) & word) ^ 0x5BD1E995)
            for j in range(y.shape[1]):
                # One word of the unit goes in before the column, the other after the first mixing.
                y[row + i, j] = x[row + i, j] * scale if mix(mix(low ^ j) ^ high) >= limit else zero


class Dropout(Layer):
    """Dropout layer, for input of any shape.

    Parameters
    ----------
    rate
        Fraction of values that is dropped, 0 <= rate < 1.
    """

    kind: ClassVar[str] = "dropout"
    rate: float = Field(ge=0, lt=1)

    @property
    def random(self) -> bool:
        return self.rate > 0

    def output_shape(self, x: Shape) -> Shape:
        return x

    def needs(self, x: Shape, out: Region) -> Region:
        return out if size_of(out) else tuple(Range(0, 0) for _ in x)

    def scratch(self, c: Cell) -> dict[str, Any]:
        ranges = flatten(c.y_box, c.y_shape)
        sizes = np.cumsum([0, *(r.size for r in ranges)])
        table = [(row, r.lo, r.size) for row, r in zip(sizes, ranges, strict=False)]
        return {"units": np.array(table, dtype=np.int64).reshape(-1, 3)}

    def forward(self, c: Cell, part: Region | None = None) -> None:
        self._apply(c, c.y, c.x)

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        if c.dx is not None:
            self._apply(c, c.dx, c.dy)

    def _apply(self, c: Cell, y: np.ndarray, x: np.ndarray) -> None:
        """Compute y from x; the same in both directions."""
        if c.training and self.rate:
            batch = y.shape[-1]
            drop(y.reshape(-1, batch), x.reshape(-1, batch), c.scratch["units"], self.rate, c.seed, c.step, c.layer)
        else:
            np.copyto(y, x)

    def flops(self, x: Shape, out: Region) -> int:
        return size_of(out)

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        return x
