"""Dense layer: y = f(W x + b), every output unit connected to every input unit.

Forward: Y = W X, then bias and activation in one pass. Backward: dY becomes the delta of the sum in one pass that also gives db;
then dW = dY X' and dX = W' dY. Three matrix products, which add to an accrued gradient by themselves (beta = 1).
"""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

from pydantic import Field

from dbnet.core.ranges import Region, size_of
from dbnet.network.layers.activations import ACTIVATIONS, Activation
from dbnet.network.layers.base import Cell, Graph, Layer, Parameter, Shape
from dbnet.network.layers.gemm import Gemm
from dbnet.network.parameters.initializers.base import AnyInitializer


class Dense(Layer):
    """Fully connected layer.

    Parameters
    ----------
    units
        Number of output units.
    activation
        identity, sigmoid, tanh or relu.
    init
        What the weights are drawn from.
    """

    kind: ClassVar[str] = "dense"
    units: int = Field(gt=0)
    activation: Activation = "identity"
    init: AnyInitializer = Field(default="by_activation", validate_default=True)

    def output_shape(self, x: Shape) -> Shape:
        return (self.units,)

    def parameters(self, x: Shape) -> dict[str, Parameter]:
        n = prod(x)
        how, spread = self.init.drawn(n, self.units, self.activation)
        return {"W": Parameter((self.units, n), 1, spread, True, how), "b": Parameter((self.units,), 1)}

    def bound(self, c: Cell) -> dict[str, Any]:
        x = c.x.reshape(-1, c.x.shape[-1])
        ready = {"y": Gemm(c.p["W"], x, c.y)}
        if c.dy is not None:
            ready["dW"] = Gemm(c.dy, x, c.g["W"], tb=True)
            if c.dx is not None:
                ready["dx"] = Gemm(c.p["W"], c.dy, c.dx.reshape(x.shape), ta=True)
        return ready

    def forward(self, c: Cell, part: Region | None = None) -> None:
        c.scratch["y"]()
        ACTIVATIONS[self.activation].forward(c.y, c.p["b"])

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        ACTIVATIONS[self.activation].delta(c.y, c.dy, c.g["b"], accumulate)
        if c.dx is not None:
            c.scratch["dx"]()

    def backward_parameters(self, c: Cell, accumulate: bool) -> None:
        c.scratch["dW"](accumulate)

    def flops(self, x: Shape, out: Region) -> int:
        return 2 * prod(x) * size_of(out)

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        sums = graph.add("Gemm", graph.add("Flatten", x, axis=1), p["W"], p["b"], transB=1)
        return graph.add(self.activation.capitalize(), sums)
