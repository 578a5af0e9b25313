"""The network on one partition: the layers' cells over flat vectors of parameters and gradients.

`Model` is the description (layers, shapes, the flat layout) and holds no array. `Network` holds the activations of one partition:
the box of units that it owns in each layer, the box of inputs that these need, and the ranges of the flat vector that they use.
With one partition both boxes are the whole layer, the activations of one layer are the next one's input, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Protocol

import numpy as np

from dbnet.errors import UserError
from dbnet.jit import kernel
from dbnet.layers.base import Cell, Layer, Parameter, Shape
from dbnet.losses.base import Loss
from dbnet.parameters import Layout
from dbnet.ranges import Range, Region, flatten, shape_of, size_of, whole


@kernel("T[:];T[:];f8")
def add_decay(g: np.ndarray, w: np.ndarray, decay: float) -> None:
    d = g.dtype.type(decay)
    for i in range(g.size):
        g[i] += d * w[i]


class Model:
    """What is computed, without arrays.

    Parameters
    ----------
    layers, loss
        Members of the families.
    input_shape
        Shape of one example.
    outputs
        Output units that the data ask for.
    dtype
        "float32" or "float64".
    decay
        Weight decay: decay/2 sum w^2 over all weights (not biases) is added to the loss.
    """

    def __init__(
        self, layers: Sequence[Layer], loss: Loss, input_shape: Shape, outputs: int, dtype: str, decay: float = 0.0
    ) -> None:
        self.layers, self.loss, self.decay = tuple(layers), loss, decay
        self.dtype = np.dtype(dtype)
        self.shapes: list[Shape] = [input_shape]
        arrays = []
        self.parameters: list[dict[str, Parameter]] = []
        for i, layer in enumerate(self.layers):
            self.shapes.append(layer.output_shape(self.shapes[-1]))
            own = layer.parameters(self.shapes[-2])
            self.parameters.append(own)
            arrays += [(f"{i}.{layer.kind}.{name}", p.shape, p.spread, p.decays) for name, p in own.items()]
        self.layout = Layout(arrays)
        if prod(self.shapes[-1]) != outputs:
            raise UserError(
                f"The last layer has {prod(self.shapes[-1])} units but the data ask for {outputs}; set its units to {outputs}."
            )

    def boxes(self) -> list[Region]:
        """Return the boxes of an uncut network: the input and every layer, whole."""
        return [whole(shape) for shape in self.shapes]


class Piece(NamedTuple):
    """A range of the global flat vector and where it starts in the partition's own."""

    range: Range
    at: int


class Exchange(Protocol):
    """Brings crossing units to the partitions that need them, and their deltas back."""

    def up(self, layer: int) -> None: ...
    def down(self, layer: int) -> None: ...
    def combine(self, stats: np.ndarray) -> np.ndarray: ...


class Network:
    """The cells of one partition.

    Parameters
    ----------
    model
        The description.
    batch
        Columns of all activations.
    boxes
        For the input and every layer the box of units owned by this partition; None: an uncut network.
    training
        Whether deltas are needed.
    exchange
        Brings the crossing values; None where nothing crosses.
    """

    def __init__(
        self, model: Model, batch: int, boxes: list[Region] | None = None, training: bool = True, exchange: Exchange | None = None
    ) -> None:
        self.model, self.batch, self.training, self.exchange = model, batch, training, exchange
        self.boxes = model.boxes() if boxes is None else boxes
        self.footprint, self.size = footprint(model, self.boxes)
        self._x, self._y, self._dx, self._dy = [], [], [], []
        self._allocate()
        self.stats = np.zeros((model.loss.width, batch), model.dtype)
        self._bound: dict[tuple[int, int], list[Cell]] = {}
        self._targets: np.ndarray | None = None

    def _allocate(self) -> None:
        """Make the activations and deltas; a layer's output is the next one's input where they are the same box."""
        dtype, last = self.model.dtype, len(self.model.layers)

        def array(box: Region) -> np.ndarray:
            return np.zeros((*shape_of(box), self.batch), dtype)

        for i, layer in enumerate(self.model.layers):
            need = layer.needs(self.model.shapes[i], self.boxes[i + 1])
            same = i > 0 and need == self.boxes[i]
            self._x.append(self._y[-1] if same else array(need))
            self._y.append(array(self.boxes[i + 1]))
            if self.training and i > 0:
                self._dx.append(self._dy[-1] if same else array(need))
            else:
                self._dx.append(None)
            self._dy.append(array(self.boxes[i + 1]) if self.training or i == last - 1 else None)
        self.x = self._x[0].reshape(-1, self.batch)

    @staticmethod
    def nbytes(model: Model, batch: int, training: bool) -> int:
        """Return the bytes of the activations and deltas of an uncut network."""
        units = sum(prod(shape) for shape in model.shapes)
        deltas = sum(prod(shape) for shape in model.shapes[1:]) if training else prod(model.shapes[-1])
        return (units + deltas) * batch * model.dtype.itemsize

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> list[Cell]:
        """Return the cells over a parameter vector and a gradient vector [size]; made once for each pair of vectors."""
        key = (w.ctypes.data, 0 if g is None else g.ctypes.data)
        if key in self._bound:
            return self._bound[key]
        cells, at = [], 0
        for i, layer in enumerate(self.model.layers):
            cell = Cell(
                self.model.shapes[i], self.model.shapes[i + 1], layer.needs(self.model.shapes[i], self.boxes[i + 1]),
                self.boxes[i + 1], self._x[i], self._y[i], self._dx[i], self._dy[i] if g is not None else None,
            )  # fmt: skip
            for name, parameter in self.model.parameters[i].items():
                box = parameter.owned(self.boxes[i + 1])
                view = slice(at, at + size_of(box))
                cell.p[name] = w[view].reshape(shape_of(box))
                if g is not None:
                    cell.g[name] = g[view].reshape(shape_of(box))
                at = view.stop
            cell.training = g is not None
            cell.scratch = layer.scratch(cell)
            cells.append(cell)
        self._bound[key] = cells
        return cells

    def forward(self, w: np.ndarray, target: np.ndarray, g: np.ndarray | None = None, step: int = 0, seed: int = 0) -> list[Cell]:
        """Run `self.x` up to the loss; afterwards `self.stats` holds the combined statistics per example."""
        cells = self.bind(w, g)
        for i, (layer, cell) in enumerate(zip(self.model.layers, cells, strict=True)):
            cell.step, cell.seed = step, seed
            layer.forward(cell)
            if self.exchange and i + 1 < len(cells):
                self.exchange.up(i)
        y, dy = self._output(cells)
        self.model.loss.reduce(y, target, self._first(), self.stats, dy)
        parts = self.stats[None] if self.exchange is None else self.exchange.combine(self.stats)
        self.model.loss.combine(parts, self.stats)
        return cells

    def loss_and_gradient(
        self, w: np.ndarray, g: np.ndarray, target: np.ndarray, count: int, accumulate: bool, step: int = 0, seed: int = 0
    ) -> tuple[float, int]:
        """Compute the gradient of the mean loss of the first `count` columns of `self.x` into `g`, or add it to `g`.

        Returns
        -------
        The summed loss and the number of right answers.
        """
        cells = self.forward(w, target, g, step, seed)
        y, dy = self._output(cells)
        self.model.loss.delta(y, target, self._first(), self.stats, count, dy)
        for i in reversed(range(len(cells))):
            self.model.layers[i].backward(cells[i], accumulate)
            if self.exchange and i > 0:
                self.exchange.down(i)
            if self.model.decay:
                self._decay(i, cells[i])
        return self.model.loss.score(self.stats, target, count)

    def score(self, w: np.ndarray, target: np.ndarray, count: int) -> tuple[float, int]:
        """Return the summed loss and the number of right answers of the first `count` columns, without a gradient."""
        self.forward(w, target)
        return self.model.loss.score(self.stats, target, count)

    def _output(self, cells: list[Cell]) -> tuple[np.ndarray, np.ndarray]:
        return cells[-1].y.reshape(-1, self.batch), self._dy[-1].reshape(-1, self.batch)

    def _first(self) -> int:
        """Return the index of this partition's first output unit."""
        return self.boxes[-1][0].lo * prod(self.model.shapes[-1][1:])

    def _decay(self, index: int, cell: Cell) -> None:
        for name, parameter in self.model.parameters[index].items():
            if parameter.decays:
                add_decay(cell.g[name].reshape(-1), cell.p[name].reshape(-1), self.model.decay)


def footprint(model: Model, boxes: list[Region]) -> tuple[list[Piece], int]:
    """Return the ranges of the global vector that a partition uses, in order, neighbours merged, and their total."""
    pieces: list[Piece] = []
    at, entries = 0, iter(model.layout.entries)
    for i in range(len(model.layers)):
        for parameter in model.parameters[i].values():
            entry = next(entries)
            for part in flatten(parameter.owned(boxes[i + 1]), parameter.shape):
                part = part.shift(entry.offset)
                if pieces and pieces[-1].range.hi == part.lo:
                    pieces[-1] = Piece(Range(pieces[-1].range.lo, part.hi), pieces[-1].at)
                else:
                    pieces.append(Piece(part, at))
                at += part.size
    return pieces, at
