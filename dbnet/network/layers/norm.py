"""Local contrast normalisation, subtractive then divisive (Jarrett et al. 2009; Le et al. 2012, "Building high-level features").

With w a Gaussian over rows and columns within `radius`, and means over all n maps,

    v(p, m) = x(p, m) - sum over q of w(p, q) mean over k of x(q, k)
    sigma(p) = sqrt(sum over q of w(p, q) mean over k of v(q, k)^2)
    y(p, m) = v(p, m) / max(floor, sigma(p))

The weights are normalised at every position over what lies inside the image, so a constant image gives v = 0 up to its border.
Jarrett et al. take the image's mean of sigma as the floor, which would tie every output to the whole image; here, as in Le et al.,
it is a fixed number, so that an output needs inputs within twice the radius only. Its gradient, with s = max(floor, sigma):

    e(p) = -sum over m of dy v / (2 sigma^3)  where sigma > floor, else 0
    dv(q, m) = dy / s + (2 / n) v(q, m) sum over p of w(p, q) e(p)
    dx(q, m) = dv(q, m) - sum over p of w(p, q) mean over k of dv(p, k)
"""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.jit import kernel
from dbnet.core.ranges import Range, Region, whole
from dbnet.network.layers.base import Cell, Graph, Layer, Shape
from dbnet.network.layers.patches import Patches, bounds, image_shape, selection

# Planes are [rows, cols, batch]. Tables as in `patches.Patches.tables`, with one row of weights per row of the table.


@kernel("T[:,:,:];T[:,:,:];T[:,:,:];i8[:,:];T[:,:];i8[:,:];T[:,:];i8;i8;i8;i8")
def blur(
    out: np.ndarray, mid: np.ndarray, plane: np.ndarray, rows: np.ndarray, row_w: np.ndarray, cols: np.ndarray, col_w: np.ndarray,
    r0: int, r1: int, c0: int, c1: int,
) -> None:  # fmt: skip
    """Compute out(p) = sum over q of w(p, q) plane(q), first along the columns of the plane, then along its rows."""
    if r1 <= r0 or c1 <= c0:
        return
    for r in range(r0, r1):
        top, _, tall = rows[r]
        for c in range(cols[c0, 0], cols[c1 - 1, 0] + cols[c1 - 1, 2]):
            mid[r, c] = 0
            for i in range(tall):
                w = row_w[r, i]
                for j in range(plane.shape[2]):
                    mid[r, c, j] += w * plane[top + i, c, j]
        for c in range(c0, c1):
            left, _, wide = cols[c]
            out[r, c] = 0
            for i in range(wide):
                w = col_w[c, i]
                for j in range(plane.shape[2]):
                    out[r, c, j] += w * mid[r, left + i, j]


@kernel("T[:,:,:];T[:,:,:];T[:,:,:];i8[:,:];T[:,:];i8[:,:];T[:,:]")
def blur_transposed(
    plane: np.ndarray, mid: np.ndarray, out: np.ndarray, rows: np.ndarray, row_w: np.ndarray, cols: np.ndarray, col_w: np.ndarray
) -> None:
    """Compute plane(q) = sum over p of w(p, q) out(p)."""
    plane[:] = 0
    mid[:] = 0
    for r in range(out.shape[0]):
        top, _, tall = rows[r]
        for c in range(out.shape[1]):
            left, _, wide = cols[c]
            for i in range(wide):
                w = col_w[c, i]
                for j in range(out.shape[2]):
                    mid[r, left + i, j] += w * out[r, c, j]
        for i in range(tall):
            w = row_w[r, i]
            for c in range(plane.shape[1]):
                for j in range(out.shape[2]):
                    plane[top + i, c, j] += w * mid[r, c, j]


@kernel("T[:,:,:];T[:,:,:,:];i8;i8;i8;i8")
def map_mean(plane: np.ndarray, x: np.ndarray, r0: int, r1: int, c0: int, c1: int) -> None:
    """Compute the mean of x over the maps."""
    scale = x.dtype.type(1 / max(1, x.shape[2]))
    for r in range(r0, r1):
        for c in range(c0, c1):
            plane[r, c] = 0
            for m in range(x.shape[2]):
                for j in range(x.shape[3]):
                    plane[r, c, j] += scale * x[r, c, m, j]


@kernel("T[:,:,:,:];T[:,:,:];T[:,:,:,:];T[:,:,:];i8;i8;i8;i8;i8;i8")
def subtract(
    v: np.ndarray, square: np.ndarray, x: np.ndarray, mean: np.ndarray, down: int, right: int, r0: int, r1: int, c0: int, c1: int
) -> None:
    """Compute v = x - mean and the mean over the maps of v squared; v[0, 0] lies at x[down, right]."""
    scale = x.dtype.type(1 / max(1, x.shape[2]))
    for r in range(r0, r1):
        for c in range(c0, c1):
            square[r, c] = 0
            for m in range(x.shape[2]):
                for j in range(x.shape[3]):
                    d = x[r + down, c + right, m, j] - mean[r, c, j]
                    v[r, c, m, j] = d
                    square[r, c, j] += scale * d * d


@kernel("T[:,:,:,:];T[:,:,:];T[:,:,:,:];f8;i8;i8;i8;i8;i8;i8;i8;i8;i8")
def divide(
    y: np.ndarray, variance: np.ndarray, v: np.ndarray, floor: float, down: int, right: int, first: int,
    r0: int, r1: int, c0: int, c1: int, m0: int, m1: int,
) -> None:  # fmt: skip
    """Compute y = v / max(floor, sigma); y[0, 0, 0] lies at v[down, right, first]."""
    least, one = y.dtype.type(floor), y.dtype.type(1)
    for r in range(r0, r1):
        for c in range(c0, c1):
            for m in range(m0, m1):
                for j in range(y.shape[3]):
                    s = one / max(least, sqrt(variance[r, c, j]))
                    y[r, c, m, j] = v[r + down, c + right, m + first, j] * s


@kernel("T[:,:,:,:];T[:,:,:];T[:,:,:,:];T[:,:,:];T[:,:,:,:];f8;i8;i8;i8;i8;i8", fast=True)
def divide_backward(
    dx: np.ndarray, e: np.ndarray, dy: np.ndarray, variance: np.ndarray, v: np.ndarray, floor: float,
    down: int, right: int, first: int, x_down: int, x_right: int,
) -> None:  # fmt: skip
    """Compute e, and dx = dy / max(floor, sigma), zero where there is no output."""
    least, half, zero = dy.dtype.type(floor), dy.dtype.type(-0.5), dy.dtype.type(0)
    dx[:] = 0
    for r in range(dy.shape[0]):
        for c in range(dy.shape[1]):
            e[r, c] = 0
            for m in range(dy.shape[2]):
                for j in range(dy.shape[3]):
                    e[r, c, j] += dy[r, c, m, j] * v[r + down, c + right, m + first, j]
                    dx[r + x_down, c + x_right, m + first, j] = dy[r, c, m, j] / max(least, sqrt(variance[r, c, j]))
            for j in range(dy.shape[3]):
                sigma = max(least, sqrt(variance[r, c, j]))
                e[r, c, j] = half * e[r, c, j] / (sigma * sigma * sigma) if sigma > least else zero


@kernel("T[:,:,:,:];T[:,:,:];T[:,:,:];T[:,:,:,:];i8;i8")
def variance_backward(dx: np.ndarray, mean: np.ndarray, square: np.ndarray, v: np.ndarray, down: int, right: int) -> None:
    """Add the way through sigma, (2 / n) v * square, to dx, which becomes dv; compute the mean of dv over the maps."""
    scale = dx.dtype.type(1 / max(1, dx.shape[2]))
    two = dx.dtype.type(2)
    for r in range(v.shape[0]):
        for c in range(v.shape[1]):
            mean[r, c] = 0
            for m in range(v.shape[2]):
                for j in range(v.shape[3]):
                    d = dx[r + down, c + right, m, j] + two * scale * v[r, c, m, j] * square[r, c, j]
                    dx[r + down, c + right, m, j] = d
                    mean[r, c, j] += scale * d


@kernel("T[:,:,:,:];T[:,:,:]")
def subtract_backward(dx: np.ndarray, plane: np.ndarray) -> None:
    for r in range(dx.shape[0]):
        for c in range(dx.shape[1]):
            for m in range(dx.shape[2]):
                for j in range(dx.shape[3]):
                    dx[r, c, m, j] -= plane[r, c, j]


class Norm(Layer):
    """Local contrast normalisation.

    Parameters
    ----------
    radius
        The Gaussian covers 2 * radius + 1 rows and columns.
    spread
        Its standard deviation in pixels (default: half the radius).
    floor
        The least divisor.
    """

    kind: ClassVar[str] = "norm"
    parts: ClassVar[bool] = True
    radius: int = Field(4, gt=0)
    spread: float | None = Field(None, gt=0)
    floor: float = Field(0.01, gt=0)

    @property
    def patches(self) -> Patches:
        return Patches.of(2 * self.radius + 1, 1, self.radius)

    def output_shape(self, x: Shape) -> Shape:
        image_shape(x, self.kind)
        return x

    def _centered(self, x: Shape, out: Region) -> Region:
        """Return the box of values v that the divisors in `out` need."""
        return self.patches.needs(x, out, Range(0, x[2]))

    def needs(self, x: Shape, out: Region) -> Region:
        return self._centered(x, self._centered(x, out))

    def _weights(self, table: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the weights of every row of a table, normalised over those inside the image."""
        distance = np.arange(-self.radius, self.radius + 1)
        gauss = np.exp(-(distance**2) / (2 * (self.spread or self.radius / 2) ** 2))
        weights = np.zeros((len(table), len(gauss)))
        for row, (_, place, n) in zip(weights, table, strict=True):
            row[:n] = gauss[place : place + n] / gauss[place : place + n].sum()
        return weights.astype(dtype)

    def scratch(self, c: Cell) -> dict[str, Any]:
        v_box = self._centered(c.x_shape, c.y_box)
        ready: dict[str, Any] = {"v": np.zeros((*(r.size for r in v_box), c.x.shape[3]), c.x.dtype)}
        boxes = {"x": c.x_box, "v": v_box, "y": c.y_box}
        for name, box in boxes.items():
            ready[f"plane {name}"] = np.zeros((box[0].size, box[1].size, c.x.shape[3]), c.x.dtype)
        for name, source, target in (("mean", c.x_box, v_box), ("variance", v_box, c.y_box)):
            tables = self.patches.tables(c.x_shape, source, target)
            ready[name] = tuple(a for table in tables for a in (table, self._weights(table, c.x.dtype)))
            ready[f"mid {name}"] = np.zeros((target[0].size, source[1].size, c.x.shape[3]), c.x.dtype)
        ready["v in x"] = tuple(v.lo - x.lo for v, x in zip(v_box[:2], c.x_box, strict=False))
        ready["y in v"] = tuple(y.lo - v.lo for y, v in zip(c.y_box, v_box, strict=True))
        ready["mean of v"], ready["variance of y"] = np.zeros_like(ready["plane v"]), np.zeros_like(ready["plane y"])
        return ready

    def forward(self, c: Cell, part: Region | None = None) -> None:
        if c.y.size == 0:
            return
        s = c.scratch
        box = bounds(selection(part, c.y_box))
        v_ends = _reach(s["variance"], box)
        x_ends = _reach(s["mean"], v_ends)
        map_mean(s["plane x"], c.x, *x_ends)
        blur(s["mean of v"], s["mid mean"], s["plane x"], *s["mean"], *v_ends)
        subtract(s["v"], s["plane v"], c.x, s["mean of v"], *s["v in x"], *v_ends)
        blur(s["variance of y"], s["mid variance"], s["plane v"], *s["variance"], *box[:4])
        divide(c.y, s["variance of y"], s["v"], self.floor, *s["y in v"], *box)

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        if c.dx is None or c.y.size == 0:
            return
        s = c.scratch
        x_offset = tuple(a + b for a, b in zip(s["v in x"], s["y in v"], strict=False))
        divide_backward(c.dx, s["plane y"], c.dy, s["variance of y"], s["v"], self.floor, *s["y in v"], *x_offset)
        blur_transposed(s["plane v"], s["mid variance"], s["plane y"], *s["variance"])
        variance_backward(c.dx, s["mean of v"], s["plane v"], s["v"], *s["v in x"])
        blur_transposed(s["plane x"], s["mid mean"], s["mean of v"], *s["mean"])
        subtract_backward(c.dx, s["plane x"])

    def flops(self, x: Shape, out: Region) -> int:
        positions = out[0].size * out[1].size
        return positions * (8 * (2 * self.radius + 1) + 7 * x[2])

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        # A blur is a product with a banded matrix on either side of the image, whose rows at its edges have weights of their own.
        down, right = (
            self._matrix(table, n) for table, n in zip(self.patches.tables(shape, whole(shape), whole(shape)), shape, strict=False)
        )

        def blurred(value: str) -> str:
            plane = graph.add("ReduceMean", value, np.array([3]), keepdims=0)
            plane = graph.add("MatMul", graph.add("MatMul", down, plane), right.T)
            return graph.add("Unsqueeze", plane, np.array([3]))

        v = graph.add("Sub", x, blurred(x))
        sigma = graph.add("Sqrt", blurred(graph.add("Mul", v, v)))
        return graph.add("Div", v, graph.add("Max", sigma, self.floor))

    def _matrix(self, table: np.ndarray, n: int) -> np.ndarray:
        """Return the weights of a table as a matrix [outputs, inputs]."""
        out = np.zeros((len(table), n))
        for row, weights, (first, _, count) in zip(out, self._weights(table, out.dtype), table, strict=True):
            row[first : first + count] = weights[:count]
        return out


def _reach(tables: tuple[np.ndarray, ...], ends: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return the ends of the rows and columns that the outputs r0:r1, c0:c1 are computed from."""
    found = []
    for table, lo, hi in ((tables[0], ends[0], ends[1]), (tables[2], ends[2], ends[3])):
        found += [int(table[lo, 0]), int(table[hi - 1, 0] + table[hi - 1, 2])] if hi > lo else [0, 0]
    return tuple(found)
