"""The geometry of a field that moves over an image: which inputs an output sees, and boxes inside boxes.

Output (r, c) sees the input rows r * stride - padding + i, 0 <= i < height of the field, and columns alike; what lies outside the
image is left out. Kernels read this from two small tables, so they know nothing of strides, padding, or where their box lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, Region, overlap, size_of
from dbnet.network.layers.base import Graph

Pair = tuple[int, int]
Slices = tuple[slice, slice, slice]


class Patches(NamedTuple):
    """A field that moves by `stride` over an image with `padding` around it, each as (vertical, horizontal)."""

    field: Pair
    stride: Pair
    padding: Pair

    @classmethod
    def of(cls, field: int | Pair, stride: int | Pair, padding: int | Pair) -> Patches:
        return cls(*((v, v) if isinstance(v, int) else v for v in (field, stride, padding)))

    @property
    def area(self) -> int:
        return self.field[0] * self.field[1]

    def positions(self, x: tuple[int, ...], kind: str) -> Pair:
        """Return how many rows and columns of outputs an image of shape `x` gives; raise UserError where it does not fit."""
        image_shape(x, kind)
        for field, stride, padding in zip(*self, strict=True):
            if field < 1 or stride < 1 or not 0 <= padding < field:
                raise UserError(
                    f"A '{kind}' layer has field {field}, stride {stride}, padding {padding}; use field >= 1, stride >= 1 and "
                    "0 <= padding < field."
                )
        rows, cols = ((n + 2 * p - f) // s + 1 for n, f, s, p in zip(x[:2], *self, strict=True))
        if rows < 1 or cols < 1:
            raise UserError(
                f"The field {self.field[0]} x {self.field[1]} of a '{kind}' layer is larger than its input of {x[0]} x {x[1]}; "
                "use a smaller field or more padding."
            )
        return rows, cols

    def needs(self, x: tuple[int, ...], out: Region, maps: Range) -> Region:
        """Return the box of inputs, clipped to the image, that the outputs in `out` see."""
        if size_of(out) == 0:
            return tuple(Range(0, 0) for _ in x)
        ends = zip(out[:2], x[:2], *self, strict=True)
        return (*(Range(max(0, o.lo * s - p), min(n, (o.hi - 1) * s - p + f)) for o, n, f, s, p in ends), maps)

    def looks_at(self, out: Region, within: Region) -> list[Region]:
        """Return the boxes that the outputs in `out` see of `within`; fields that are apart leave gaps."""
        axes = []
        for o, w, f, s, p in zip(out[:2], within[:2], *self, strict=True):
            fields = [Range(i * s - p, i * s - p + f) for i in range(o.lo, o.hi)] if s > f else [w]
            axes.append([seen for seen in (overlap(field, w) for field in fields) if seen.size])
        return [(rows, cols, *within[2:]) for rows in axes[0] for cols in axes[1]]

    def tables(self, x_shape: tuple[int, ...], x_box: Region, y_box: Region) -> tuple[np.ndarray, np.ndarray]:
        """Return per output row, and per output column, (first input at hand, its place in the field, number in the image)."""
        tables = []
        for n, x, y, f, s, p in zip(x_shape[:2], x_box[:2], y_box[:2], *self, strict=True):
            first = np.arange(y.lo, y.lo + y.size) * s - p
            lo, hi = np.maximum(first, 0), np.minimum(first + f, n)
            tables.append(np.ascontiguousarray(np.stack([lo - x.lo, lo - first, hi - lo], axis=1), dtype=np.int64))
        return tables[0], tables[1]

    @property
    def pads(self) -> list[int]:
        """The padding as ONNX writes it: top, left, bottom, right."""
        return [*self.padding, *self.padding]

    def gathered(self, graph: Graph, x: str, shape: tuple[int, ...], outside: float = 0.0) -> str:
        """Add the ONNX nodes that gather every output's field; return the name of [examples, rows, columns, area, maps].

        Parameters
        ----------
        outside
            The value of inputs outside the image.
        """
        tall, wide = (n + 2 * p for n, p in zip(shape[:2], self.padding, strict=True))
        if any(self.padding):
            x = graph.add("Pad", x, np.array([0, *self.padding, 0, 0, *self.padding, 0]), outside)
        rows, cols = (
            np.arange((n - f) // s + 1)[:, None] * s + np.arange(f)
            for n, f, s in zip((tall, wide), self.field, self.stride, strict=True)
        )
        index = rows[:, None, :, None] * wide + cols[None, :, None, :]
        pixels = graph.add("Reshape", x, np.array([0, tall * wide, shape[2]]))
        return graph.add("Gather", pixels, index.reshape(len(rows), len(cols), self.area), axis=1)


def image_shape(x: tuple[int, ...], kind: str) -> None:
    """Raise UserError unless `x` is (rows, columns, maps)."""
    if len(x) != 3:
        raise UserError(
            f"A '{kind}' layer works on images (rows, columns, maps), but its input has shape {x}; give the data as images, or "
            "move the layer before the first dense one."
        )


def selection(part: Region | None, box: Region) -> Slices:
    """Return the slices that select `part` (None: all) in an array that holds just the box `box`."""
    rows, cols, maps = (Range(p.lo - b.lo, p.hi - b.lo).slice for p, b in zip(part or box, box, strict=True))
    return rows, cols, maps


def bounds(box: Slices) -> tuple[int, int, int, int, int, int]:
    """Return the slices' ends as six numbers, for a kernel."""
    rows, cols, maps = box
    return rows.start, rows.stop, cols.start, cols.stop, maps.start, maps.stop


def runs(box: Slices, shape: tuple[int, ...]) -> Iterator[Slices]:
    """Cut a box of an array of this shape into boxes that are contiguous in memory."""
    rows, cols, maps = box
    whole_maps = maps.stop - maps.start == shape[2]
    if whole_maps and cols.stop - cols.start == shape[1]:
        yield box
        return
    for r in range(rows.start, rows.stop):
        row = slice(r, r + 1)
        if whole_maps:
            yield row, cols, maps
        else:
            yield from ((row, slice(c, c + 1), maps) for c in range(cols.start, cols.stop))
