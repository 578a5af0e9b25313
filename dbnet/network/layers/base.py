"""What a layer is: shapes, connectivity, kernels. It holds options and no arrays, so one value serves any number of partitions.

Units are boxes: (units,) for a dense layer, (rows, columns, maps) for an image layer; arrays are [units..., batch], the batch
innermost. A layer says which box of inputs a box of outputs `needs`; cutting a network, its messages and its footprint on the
parameter vector follow from that alone. A partition holds the box of outputs that it owns and the box of inputs that these need.

The mathematics of a layer is three kernels' work: y from x, then from dy the gradient of the parameters and dx.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.core.ranges import Region, whole
from dbnet.core.registry import Member
from dbnet.network.parameters.layout import Drawn

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One array of a layer's parameters.

    Attributes
    ----------
    shape
        Its global shape; the leading `axes` axes are the layer's output units, so that a unit's parameters are contiguous.
    axes
        Number of leading axes that are unit axes; 0 means shared by all units (held by every partition).
    spread, how
        Initial values are uniform in [-spread, spread], normal with the standard deviation spread, or constant, all spread; 0 means
        zeros.
    decays
        Whether weight decay acts on it.
    """

    shape: Shape
    axes: int
    spread: float = 0.0
    decays: bool = False
    how: Literal["uniform", "normal", "constant"] = "uniform"

    @property
    def initial(self) -> Drawn:
        """What its initial values are drawn from."""
        return Drawn(self.how, self.spread)

    def owned(self, units: Region) -> Region:
        """Return the box of this array that the owner of the output box `units` uses."""
        return (*units[: self.axes], *whole(self.shape[self.axes :])) if self.axes else whole(self.shape)


@dataclass
class Cell:
    """One layer in place on one partition: the boxes it works on and the arrays it was given.

    Attributes
    ----------
    x_shape, y_shape
        Global shapes of input and output.
    x_box, y_box
        The input units at hand and the output units owned, in global coordinates.
    x, y, dx, dy
        Activations and deltas, [box..., batch]; `dx` is None where nobody needs it (the first layer).
    p, g
        Parameters and their gradient by name, views into the partition's flat vectors.
    scratch
        The arrays that `Layer.scratch` asked for, and what `Layer.bound` keeps ready over the parameters.
    training, step, seed, layer
        For layers that behave differently in training or draw random numbers: each replica has its own seed; `layer` is the place
        in the network.
    """

    x_shape: Shape
    y_shape: Shape
    x_box: Region
    y_box: Region
    x: np.ndarray
    y: np.ndarray
    dx: np.ndarray | None = None
    dy: np.ndarray | None = None
    p: dict[str, np.ndarray] = field(default_factory=dict)
    g: dict[str, np.ndarray] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)
    training: bool = True
    step: int = 0
    seed: int = 0
    layer: int = 0


class Graph:
    """The nodes of an ONNX graph, in order; a layer adds its own (`Layer.onnx`).

    Parameters
    ----------
    dtype
        Of the network.

    Attributes
    ----------
    nodes
        (operator, names of its inputs, name of its output, attributes) of each.
    constants
        Arrays that the nodes use besides the parameters, by name.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.nodes: list[tuple[str, list[str], str, dict[str, Any]]] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operator: str, *inputs: str | np.ndarray | float, **attributes: Any) -> str:
        """Add a node; return the name of its output.

        Parameters
        ----------
        operator
            Of ONNX's standard set, for example "MatMul".
        inputs
            Names of values and parameters; arrays (of integers, int64), and numbers, which are taken in the network's type.
        """
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        self.nodes.append((operator, names, f"{operator}.{len(self.nodes)}", attributes))
        return self.nodes[-1][2]

    def _constant(self, value: np.ndarray | float) -> str:
        array = np.asarray(value)
        name = f"constant.{len(self.constants)}"
        self.constants[name] = array.astype(np.int64 if isinstance(value, np.ndarray) and array.dtype.kind == "i" else self.dtype)
        return name


class Layer(Member):
    """Base of all layers; a subclass declares its options as fields and overrides what differs.

    Attributes
    ----------
    parts
        Whether `forward` can compute a part of its box, so that a partition computes its interior while borders are in flight.
    cut
        How the layer's units are cut over a replica's partitions.
    """

    family: ClassVar[str] = "network.layers"
    parts: ClassVar[bool] = False
    cut: tuple[int, ...] | None = Field(
        default=None,
        description="parts per axis of the units, (rows, columns) or (units), the last layer's (rows, 1); default: chosen by cost",
    )

    @property
    def random(self) -> bool:
        """Whether its output is drawn anew at every step of training, so that the loss is no function of the parameters alone."""
        return False

    def output_shape(self, x: Shape) -> Shape:
        """Return the shape of the output for an input of shape `x`; raise UserError where it does not fit."""
        raise NotImplementedError

    def parameters(self, x: Shape) -> dict[str, Parameter]:
        """Return the layer's parameters for an input of shape `x`, in the order of the flat vector."""
        return {}

    def needs(self, x: Shape, out: Region) -> Region:
        """Return the box of inputs that the outputs in `out` are computed from; here: all."""
        return whole(x)

    def looks_at(self, x: Shape, out: Region, within: Region) -> list[Region]:
        """Return what the outputs in `out` look at of `within`, a box of what they need, as boxes; here: all of it."""
        return [within]

    def scratch(self, cell: Cell) -> dict[str, Any]:
        """Return the working arrays and index tables of this layer on this partition.

        They are shared by all vectors of parameters and gradients that the network is used with, so `cell` has none here.
        """
        return {}

    def bound(self, cell: Cell) -> dict[str, Any]:
        """Return what is kept ready over this cell's own parameters and gradients (views, products), and no memory of its own."""
        return {}

    def prepare(self, cell: Cell, arrays: dict[str, Any] | None = None) -> None:
        """Complete a cell, with the working arrays of another one of the same network, or with new ones."""
        cell.scratch = {**(self.scratch(cell) if arrays is None else arrays), **self.bound(cell)}

    def forward(self, c: Cell, part: Region | None = None) -> None:
        """Compute c.y, or only the box `part` of it, from c.x and c.p; a part is asked for only where `parts` is true."""
        raise NotImplementedError

    def backward_inputs(self, c: Cell, accumulate: bool) -> None:
        """Compute c.dx from c.dy, unless it is None; c.dy may be used as working space.

        c.dx is overwritten with this partition's share of the input's delta. Gradients of parameters may be computed here as well.
        """
        raise NotImplementedError

    def backward_parameters(self, c: Cell, accumulate: bool) -> None:
        """Compute c.g, while c.dx is on its way to other partitions; add to c.g if `accumulate`, else overwrite it."""

    def backward(self, c: Cell, accumulate: bool) -> None:
        """Both halves."""
        self.backward_inputs(c, accumulate)
        self.backward_parameters(c, accumulate)

    def flops(self, x: Shape, out: Region) -> int:
        """Return the multiplications and additions of one example's forward pass for the outputs in `out`."""
        return 0

    def onnx(self, graph: Graph, x: str, shape: Shape, p: dict[str, str]) -> str:
        """Add the ONNX nodes of evaluation to `graph`; return the name of the output, [examples, *output_shape].

        Parameters
        ----------
        x, shape
            Name of the input, [examples, *shape].
        p
            Names of the layer's parameters, which have their own shapes.
        """
        raise UserError(
            f"A '{self.kind}' layer has no ONNX nodes; give its class a method onnx(graph, x, shape, p), as in README, or export "
            "to .safetensors or .npz."
        )
