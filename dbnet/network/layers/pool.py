"""Pooling: each map's maximum, average or root of the sum of squares over a field.

    max:      y = max x            dx += dy at the first input, in order of rows and columns, that equals y
    average:  y = sum x / area     dx += dy / area
    l2:       y = sqrt(eps + sum x^2)   dx += dy x / y,   eps = 1e-12, so that dx is 0 where all x are 0

Inputs outside the image count as zero, and the area is that of the whole field; the maximum leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from dbnet.core.jit import kernel
from dbnet.core.ranges import Region, size_of
from dbnet.network.layers.base import Cell, Graph, Layer, Shape
from dbnet.network.layers.patches import Pair, Patches, bounds, selection

EPS = 1e-12
# Kernels see [rows, cols, maps * batch]; u0:u1 are the maps and batch together.
_FORWARD = "T[:,:,:];T[:,:,:];i8[:,:];i8[:,:];i8;i8;i8;i8;i8;i8;i8"
_BACKWARD = "T[:,:,:];T[:,:,:];T[:,:,:];T[:,:,:];i8[:,:];i8[:,:];i8"


@kernel(_FORWARD)
def max_forward(
    y: np.ndarray, x: np.ndarray, rows: np.ndarray, cols: np.ndarray, area: int,
    r0: int, r1: int, c0: int, c1: int, u0: int, u1: int,
) -> None:  # fmt: skip
    for r in range(r0, r1):
        top, _, tall = rows[r]
        for c in range(c0, c1):
            left, _, wide = cols[c]
            out = y[r, c, u0:u1]
            out[:] = x[top, left, u0:u1]
            for k in range(1, tall * wide):
                seen = x[top + k // wide, left + k % wide, u0:u1]
                for u in range(out.size):
                    # So that a NaN stays one, wherever it is; without a branch, so that it vectorises.
                    out[u] = seen[u] if (seen[u] > out[u]) | (seen[u] != seen[u]) else out[u]


@kernel(_FORWARD)
def average_forward(
    y: np.ndarray, x: np.ndarray, rows: np.ndarray, cols: np.ndarray, area: int,
    r0: int, r1: int, c0: int, c1: int, u0: int, u1: int,
) -> None:  # fmt: skip
    scale = y.dtype.type(1 / area)
    for r in range(r0, r1):
        top, _, tall = rows[r]
        for c in range(c0, c1):
            left, _, wide = cols[c]
            out = y[r, c, u0:u1]
            out[:] = 0
            for k in range(tall * wide):
                seen = x[top + k // wide, left + k % wide, u0:u1]
                for u in range(out.size):
                    out[u] += seen[u]
            for u in range(out.size):
                out[u] *= scale


@kernel(_FORWARD)
def l2_forward(
    y: np.ndarray, x: np.ndarray, rows: np.ndarray, cols: np.ndarray, area: int,
    r0: int, r1: int, c0: int, c1: int, u0: int, u1: int,
) -> None:  # fmt: skip
    eps = y.dtype.type(EPS)
    for r in range(r0, r1):
        top, _, tall = rows[r]
        for c in range(c0, c1):
            left, _, wide = cols[c]
            out = y[r, c, u0:u1]
            out[:] = eps
            for k in range(tall * wide):
                seen = x[top + k // wide, left + k % wide, u0:u1]
                for u in range(out.size):
                    out[u] += seen[u] * seen[u]
            for u in range(out.size):
                out[u] = sqrt(out[u])


@kernel(_BACKWARD)
def max_backward(
    dx: np.ndarray, x: np.ndarray, dy: np.ndarray, y: np.ndarray, rows: np.ndarray, cols: np.ndarray, area: int
) -> None:
    zero = y.dtype.type(0)
    dx[:] = 0
    for r in range(y.shape[0]):
        top, _, tall = rows[r]
        for c in range(y.shape[1]):
            left, _, wide = cols[c]
            for k in range(tall * wide):
                i, j = top + k // wide, left + k % wide
                # dy is used up by the first input that equals the maximum.
                for u in range(y.shape[2]):
                    d = dy[r, c, u]
                    taken = d if x[i, j, u] == y[r, c, u] else zero
                    dx[i, j, u] += taken
                    dy[r, c, u] = d - taken


@kernel(_BACKWARD)
def average_backward(
    dx: np.ndarray, x: np.ndarray, dy: np.ndarray, y: np.ndarray, rows: np.ndarray, cols: np.ndarray, area: int
) -> None:
    scale = y.dtype.type(1 / area)
    dx[:] = 0
    for r in range(y.shape[0]):
        top, _, tall = rows[r]
        for c in range(y.shape[1]):
            left, _, wide = cols[c]
            for k in range(tall * wide):
                i, j = top + k // wide, left + k % wide
                for u in range(y.shape[2]):
                    dx[i, j, u] += dy[r, c, u] * scale


@kernel(_BACKWARD)
def l2_backward(
    dx: np.ndarray, x: np.ndarray, dy: np.ndarray, y: np.ndarray, rows: np.ndarray, cols: np.ndarray, area: int
) -> None:
    dx[:] = 0
    for r in range(y.shape[0]):
        top, _, tall = rows[r]
        for c in range(y.shape[1]):
            left, _, wide = cols[c]
            for u in range(y.shape[2]):
                dy[r, c, u] /= y[r, c, u]
            for k in range(tall * wide):
                i, j = top + k // wide, left + k % wide
                for u in range(y.shape[2]):
                    dx[i, j, u] += dy[r, c, u] * x[i, j, u]


class Kernels(NamedTuple):
    """The two kernels of a way to pool."""

    forward: Callable[..., None]
    backward: Callable[..., None]


KERNELS = {
    "max": Kernels(max_forward, max_backward),
    "average": Kernels(average_forward, average_backward),
    "l2": Kernels(l2_forward, l2_backward),
}


class Pool(Layer):
    """Pooling layer, every map by itself.

    Parameters
    ----------
    over
        max, average or l2.
    field
        Height and width of what an output sees; one number or [vertical, horizontal].
    stride
        How far apart outputs look (default: the field); one number or [vertical, horizontal].
    padding
        Rows and columns around the image; one number or [vertical, horizontal].
    """

    kind: ClassVar[str] = "pool"
    parts: ClassVar[bool] = True
    over: Literal["max", "average", "l2"] = "max"
    field: int | Pair = 2
    stride: int | Pair | None = None
    padding: int | Pair = 0

    @property
    def patches(self) -> Patches:
        return Patches.of(self.field, self.field if self.stride is None else self.stride, self.padding)

    def output_shape(self, x: Shape) -> Shape:
        rows, cols = self.patches.positions(x, self.kind)
        return (rows, cols, x[2])

    def needs(self, x: Shape, out: Region) -> Region:
        return self.patches.needs(x, out, out[2])

    def looks_at(self, x: Shape, out: Region, within: Region) -> list[Region]:
        return self.patches.looks_at(out, within)

    def scratch(self, c: Cell) -> dict[str, Any]:
        return {"tables": (*self.patches.tables(c.x_shape, c.x_box, c.y_box), self.patches.area)}

    def forward(self, c: Cell, part: Region | None = None) -> None:
        if not c.y.size:
            return
        batch = c.y.shape[-1]
        *ends, m0, m1 = bounds(selection(part, c.y_box))
        KERNELS[self.over].forward(_flat(c.y), _flat(c.x), *c.scratch["tables"], *ends, m0 * batch, m1 * batch)

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        if c.dx is not None and c.y.size:
            KERNELS[self.over].backward(_flat(c.dx), _flat(c.x), _flat(c.dy), _flat(c.y), *c.scratch["tables"])

    def flops(self, x: Shape, out: Region) -> int:
        return self.patches.area * size_of(out)

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        if self.over == "l2":
            x = graph.add("Mul", x, x)
        if graph.dtype == np.float64:
            # onnxruntime averages float32 alone; gathered fields are reduced in any type.
            fields = self.patches.gathered(graph, x, shape, -np.inf if self.over == "max" else 0.0)
            y = graph.add("ReduceMax" if self.over == "max" else "ReduceMean", fields, np.array([3]), keepdims=0)
        else:
            image, options = graph.add("Transpose", x, perm=[0, 3, 1, 2]), {"count_include_pad": 1} if self.over != "max" else {}
            options |= {"kernel_shape": [*self.patches.field], "strides": [*self.patches.stride], "pads": self.patches.pads}
            y = graph.add("MaxPool" if self.over == "max" else "AveragePool", image, **options)
            y = graph.add("Transpose", y, perm=[0, 2, 3, 1])
        return graph.add("Sqrt", graph.add("Add", graph.add("Mul", y, self.patches.area), EPS)) if self.over == "l2" else y


def _flat(array: np.ndarray) -> np.ndarray:
    """Return a view with maps and batch as one axis."""
    return array.reshape(*array.shape[:2], array.shape[2] * array.shape[3])
