"""Local filtering with unshared weights: y = f(W x + b), every output position with filters of its own.

Output (r, c, m) is computed from the field of inputs at (r, c), all maps, with the weights W[r, c, m, :] ordered (row, column, map)
of the field; inputs outside the image count as zero. This is the image layer of Le et al. 2012, "Building high-level features".
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.ranges import Range, Region, size_of
from dbnet.network.layers.activations import ACTIVATIONS, Activation
from dbnet.network.layers.base import Cell, Graph, Layer, Parameter, Shape
from dbnet.network.layers.filters import batch_outside, filter_dx, filter_forward, local_dW, turn
from dbnet.network.layers.patches import Pair, Patches, bounds, runs, selection
from dbnet.network.parameters.initializers.base import AnyInitializer
from dbnet.network.parameters.layout import Drawn


class Local(Layer):
    """Locally connected layer with unshared weights.

    Parameters
    ----------
    maps
        Number of outputs per position.
    field
        Height and width of what an output sees; one number or [vertical, horizontal].
    stride
        How far apart outputs look; one number or [vertical, horizontal].
    padding
        Rows and columns of zeros around the image; one number or [vertical, horizontal].
    activation
        identity, sigmoid, tanh or relu.
    init
        What the weights are drawn from.
    """

    kind: ClassVar[str] = "local"
    parts: ClassVar[bool] = True
    maps: int = Field(gt=0)
    field: int | Pair
    stride: int | Pair = 1
    padding: int | Pair = 0
    activation: Activation = "identity"
    init: AnyInitializer = Field(default="by_activation", validate_default=True)

    @property
    def patches(self) -> Patches:
        return Patches.of(self.field, self.stride, self.padding)

    def output_shape(self, x: Shape) -> Shape:
        return (*self.patches.positions(x, self.kind), self.maps)

    def parameters(self, x: Shape) -> dict[str, Parameter]:
        patch, y = self.patches.area * x[2], self.output_shape(x)
        how, spread = self.drawn(patch)
        return {"W": Parameter((*y, patch), 3, spread, True, how), "b": Parameter(y, 3)}

    def drawn(self, patch: int) -> Drawn:
        """Return what the weights are drawn from; `patch` inputs are seen by an output."""
        # An input is seen by as many outputs as the field has positions, per stride.
        fan_out = self.maps * self.patches.area / (self.patches.stride[0] * self.patches.stride[1])
        return self.init.drawn(patch, fan_out, self.activation)

    def needs(self, x: Shape, out: Region) -> Region:
        return self.patches.needs(x, out, Range(0, x[2]))

    def looks_at(self, x: Shape, out: Region, within: Region) -> list[Region]:
        return self.patches.looks_at(out, within)

    def scratch(self, c: Cell) -> dict[str, Any]:
        rows, cols = self.patches.tables(c.x_shape, c.x_box, c.y_box)
        ready: dict[str, Any] = {"tables": (rows, cols, self.patches.field[1])}
        if c.dy is not None:
            ready["xt"] = batch_outside(c.x)
        return ready

    def forward(self, c: Cell, part: Region | None = None) -> None:
        box = selection(part, c.y_box)
        filter_forward(c.y, c.p["W"], c.x, *c.scratch["tables"], *bounds(box))
        batch = c.y.shape[-1]
        for run in runs(box, c.y.shape):
            ACTIVATIONS[self.activation].forward(c.y[run].reshape(-1, batch), c.p["b"][run].reshape(-1))

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        batch = c.y.shape[-1]
        delta = ACTIVATIONS[self.activation].delta
        delta(c.y.reshape(-1, batch), c.dy.reshape(-1, batch), c.g["b"].reshape(-1), accumulate)
        if c.dx is not None:
            filter_dx(c.dx, c.p["W"], c.dy, *c.scratch["tables"])

    def backward_parameters(self, c: Cell, accumulate: bool) -> None:
        turn(c.scratch["xt"], c.x)
        local_dW(c.g["W"], c.dy, c.scratch["xt"], c.x.shape[2], *c.scratch["tables"], accumulate)

    def flops(self, x: Shape, out: Region) -> int:
        return 2 * self.patches.area * x[2] * size_of(out)

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        fields = graph.add("Reshape", self.patches.gathered(graph, x, shape), np.array([0, 0, 0, self.patches.area * shape[2]]))
        # A product per position, [maps, field] by [field, examples], so that W stays as it is stored.
        sums = graph.add("MatMul", p["W"], graph.add("Transpose", fields, perm=[1, 2, 3, 0]))
        return graph.add(self.activation.capitalize(), graph.add("Add", graph.add("Transpose", sums, perm=[3, 0, 1, 2]), p["b"]))
