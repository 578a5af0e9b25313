"""Convolution: y = f(W x + b), the same filters W and biases b at every output position.

Output (r, c, m) is computed from the field of inputs at (r, c), all maps, with the weights W[m, :] ordered (row, column, map) of
the field; inputs outside the image count as zero. Every partition holds all parameters; their gradients are summed over outputs.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from dbnet.core.ranges import Region
from dbnet.network.layers.activations import ACTIVATIONS
from dbnet.network.layers.base import Cell, Graph, Parameter, Shape
from dbnet.network.layers.filters import batch_outside, filter_dx, filter_forward, shared_dW, turn
from dbnet.network.layers.local import Local
from dbnet.network.layers.patches import bounds, runs, selection


class Conv(Local):
    """Convolutional layer; its options are those of `local`."""

    kind: ClassVar[str] = "conv"

    def parameters(self, x: Shape) -> dict[str, Parameter]:
        patch = self.patches.area * x[2]
        how, spread = self.drawn(patch)
        return {"W": Parameter((self.maps, patch), 0, spread, True, how), "b": Parameter((self.maps,), 0)}

    def scratch(self, c: Cell) -> dict[str, Any]:
        rows, cols = self.patches.tables(c.x_shape, c.x_box, c.y_box)
        ready: dict[str, Any] = {"tables": (rows, cols, self.patches.field[1])}
        if c.dy is not None:
            ready["xt"] = batch_outside(c.x)
        return ready

    def bound(self, c: Cell) -> dict[str, Any]:
        return {"W": c.p["W"][c.y_box[2].slice].reshape(1, 1, c.y_box[2].size, -1 if c.y_box[2].size else 0)}

    def forward(self, c: Cell, part: Region | None = None) -> None:
        box = selection(part, c.y_box)
        filter_forward(c.y, c.scratch["W"], c.x, *c.scratch["tables"], *bounds(box))
        batch = c.y.shape[-1]
        b = c.p["b"][c.y_box[2].slice]
        for run in runs(box, c.y.shape):
            ACTIVATIONS[self.activation].forward(c.y[run].reshape(-1, batch), b[run[2]])

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        batch, own = c.y.shape[-1], c.y_box[2].slice
        if not accumulate:
            c.g["b"].fill(0)
        delta = ACTIVATIONS[self.activation].delta
        delta(c.y.reshape(-1, batch), c.dy.reshape(-1, batch), c.g["b"][own], True)
        if c.dx is not None:
            filter_dx(c.dx, c.scratch["W"], c.dy, *c.scratch["tables"])

    def backward_parameters(self, c: Cell, accumulate: bool) -> None:
        if not accumulate:
            c.g["W"].fill(0)
        turn(c.scratch["xt"], c.x)
        shared_dW(c.g["W"][c.y_box[2].slice], c.dy, c.scratch["xt"], c.x.shape[2], *c.scratch["tables"])

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        if graph.dtype == np.float64:
            # onnxruntime convolves float32 alone; gathered fields are multiplied with W in any type.
            return super().onnx(graph, x, shape, p)
        filters = graph.add("Reshape", p["W"], np.array([self.maps, *self.patches.field, shape[2]]))
        first, filters = (graph.add("Transpose", value, perm=[0, 3, 1, 2]) for value in (x, filters))
        sums = graph.add("Conv", first, filters, p["b"], strides=[*self.patches.stride], pads=self.patches.pads)
        return graph.add("Transpose", graph.add(self.activation.capitalize(), sums), perm=[0, 2, 3, 1])
