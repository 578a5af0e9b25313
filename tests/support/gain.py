"""A user's own layer: y = gain * x, one learned gain per unit."""

from typing import ClassVar

import numpy as np

from dbnet import Layer, Parameter, kernel
from dbnet.core.ranges import Region
from dbnet.network.layers.base import Cell, Graph, Shape


@kernel("T[:,:];T[:,:];T[:]")
def scale(y, x, gain):
    for u in range(y.shape[0]):
        for j in range(y.shape[1]):
            y[u, j] = gain[u] * x[u, j]


class Gain(Layer):
    """Multiplies every unit by a learned number."""

    kind: ClassVar[str] = "gain"

    def output_shape(self, x: Shape) -> Shape:
        return x

    def parameters(self, x: Shape) -> dict[str, Parameter]:
        return {"gain": Parameter(x, axes=len(x), spread=1.0)}

    def needs(self, x: Shape, out: Region) -> Region:
        return out

    def forward(self, c: Cell, part: Region | None = None) -> None:
        batch = c.x.shape[-1]
        scale(c.y.reshape(-1, batch), c.x.reshape(-1, batch), c.p["gain"].reshape(-1))

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        batch, gain = c.x.shape[-1], c.p["gain"].reshape(-1)
        if not accumulate:
            c.g["gain"].fill(0)
        c.g["gain"] += np.einsum("...j,...j->...", c.dy, c.x)
        if c.dx is not None:
            scale(c.dx.reshape(-1, batch), c.dy.reshape(-1, batch), gain)

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        return graph.add("Mul", x, p["gain"])
