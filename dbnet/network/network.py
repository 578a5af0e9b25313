"""The network on one partition: the layers' cells over flat vectors of parameters and gradients.

A partition owns a box of units in each layer and holds the box of inputs that these need; an exchange brings what others own. With
one partition both boxes are the whole layer, the activations of one layer are the next one's input, and nothing is copied.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from dbnet.core.jit import kernel
from dbnet.core.ranges import Region, flatten, intersect, relative, shape_of, size_of
from dbnet.network.layers.base import Cell, Layer
from dbnet.network.model import Model, contains, footprint, interior, shared_size


@kernel("T[:];T[:];f8")
def add_decay(g: np.ndarray, w: np.ndarray, decay: float) -> None:
    d = g.dtype.type(decay)
    for i in range(g.size):
        g[i] += d * w[i]


def held(arrays: Any) -> int:
    """Return the bytes of the arrays in nested lists, tuples and dictionaries; views hold none of their own."""
    if isinstance(arrays, np.ndarray):
        return arrays.nbytes if arrays.base is None else 0
    if isinstance(arrays, dict):
        return sum(map(held, arrays.values()))
    return sum(map(held, arrays)) if isinstance(arrays, list | tuple) else 0


class Crossings(Protocol):
    """Brings crossing units to the partitions that need them, and their deltas back."""

    def crosses(self, layer: int) -> bool: ...
    def start_up(self, layer: int) -> None: ...
    def finish_up(self, layer: int) -> None: ...
    def start_down(self, layer: int) -> None: ...
    def finish_down(self, layer: int) -> None: ...
    def combine(self, stats: np.ndarray) -> np.ndarray: ...
    def total(self, share: np.ndarray) -> np.ndarray: ...


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

    Attributes
    ----------
    x
        The input at hand, [units, batch], to be filled before each step.
    stats
        The loss's statistics per example after `forward`.
    exchange
        Brings the crossing values; set by an `Exchange` that is made for this network, None where nothing crosses.
    share
        This partition's gradient of the parameters that all partitions share, before it is summed.
    """

    def __init__(self, model: Model, batch: int, boxes: list[Region] | None = None, training: bool = True) -> None:
        self.model, self.batch, self.training = model, batch, training
        self.boxes = model.boxes() if boxes is None else boxes
        self.exchange: Crossings | None = None
        self.size = footprint(model, self.boxes, True).size
        self._needs = [layer.needs(model.shapes[i], self.boxes[i + 1]) for i, layer in enumerate(model.layers)]
        self._y: list[np.ndarray] = []
        self._dy: list[np.ndarray | None] = []
        self._allocate()
        self.stats = np.zeros((model.loss.width, batch), model.dtype)
        self.share = np.zeros(0 if boxes is None else shared_size(model), model.dtype)
        own = flatten(self.boxes[-1], model.shapes[-1])
        # The index of this partition's first output unit; the others follow (`partition.Cut`).
        self._first = own[0].lo if own else 0
        self._parts = [interior(model, self.boxes, i) for i in range(len(model.layers))]
        self._scratch = [layer.scratch(self._cell(i, training)) for i, layer in enumerate(model.layers)]
        self._bound: dict[tuple[int, int], list[Cell]] = {}

    # --- arrays ---------------------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """Make the activations and deltas; an output lies inside the next layer's input where that leaves it contiguous."""
        dtype, last = self.model.dtype, len(self.model.layers) - 1

        def array(box: Region) -> np.ndarray:
            return np.zeros((*shape_of(box), self.batch), dtype)

        self._x = [array(need) for need in self._needs]
        self._dx = [array(need) if self.training and i else None for i, need in enumerate(self._needs)]
        self._joined = [i > 0 and contains(need, self.boxes[i]) for i, need in enumerate(self._needs)]
        for i in range(last + 1):
            own = self.boxes[i + 1]
            if i < last and self._joined[i + 1]:
                inside = relative(own, self._needs[i + 1])
                self._y.append(self._x[i + 1][inside])
                self._dy.append(self._dx[i + 1][inside] if self.training else None)
            else:
                self._y.append(array(own))
                self._dy.append(array(own) if self.training or i == last else None)
        self.x = self._x[0].reshape(-1, self.batch)

    @property
    def input_box(self) -> Region:
        """The inputs at hand."""
        return self._needs[0]

    def above(self, layer: int) -> tuple[np.ndarray, Region]:
        """Return the output of the layer below `layer` and its box."""
        return self._y[layer - 1], self.boxes[layer]

    def below(self, layer: int) -> tuple[np.ndarray, Region]:
        """Return the input of `layer` and its box."""
        return self._x[layer], self._needs[layer]

    def above_delta(self, layer: int) -> tuple[np.ndarray, Region]:
        """Return the delta of the output of the layer below `layer` and its box."""
        return self._dy[layer - 1], self.boxes[layer]

    def below_delta(self, layer: int) -> tuple[np.ndarray, Region]:
        """Return the delta of the input of `layer` and its box."""
        return self._dx[layer], self._needs[layer]

    def bind(self, w: np.ndarray, g: np.ndarray | None) -> list[Cell]:
        """Return the cells over a parameter vector and a gradient vector [size]; made once for each pair of vectors."""
        key = (w.ctypes.data, 0 if g is None else g.ctypes.data)
        if key in self._bound:
            return self._bound[key]
        cells, at, shared = [], 0, 0
        for i, layer in enumerate(self.model.layers):
            cell = self._cell(i, g is not None)
            for name, parameter in self.model.parameters[i].items():
                box = parameter.owned(self.boxes[i + 1])
                view = slice(at, at + size_of(box))
                cell.p[name] = w[view].reshape(shape_of(box))
                if g is not None and not parameter.axes and self.share.size:
                    cell.g[name] = self.share[shared : shared + size_of(box)].reshape(shape_of(box))
                    shared += size_of(box)
                elif g is not None:
                    cell.g[name] = g[view].reshape(shape_of(box))
                at = view.stop
            layer.prepare(cell, self._scratch[i])
            cells.append(cell)
        self._bound[key] = cells
        return cells

    def _cell(self, i: int, training: bool) -> Cell:
        """Return the cell of a layer, still without parameters."""
        return Cell(
            self.model.shapes[i], self.model.shapes[i + 1], self._needs[i], self.boxes[i + 1],
            self._x[i], self._y[i], self._dx[i], self._dy[i] if training else None, training=training, layer=i,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Return the bytes of all arrays here: activations, deltas, the layers' working arrays."""
        return held((self._x, self._dx, self._y, self._dy, self.stats, self.share, self._scratch))

    # --- passes ---------------------------------------------------------------------------------------------------------------

    def forward(self, w: np.ndarray, target: np.ndarray, g: np.ndarray | None = None, step: int = 0, seed: int = 0) -> list[Cell]:
        """Run `self.x` up to the loss; afterwards `self.stats` holds the combined statistics per example."""
        cells = self.bind(w, g)
        for i, (layer, cell) in enumerate(zip(self.model.layers, cells, strict=True)):
            cell.step, cell.seed = step, seed
            if i and not self._joined[i]:
                self._lift(i)
            if self.exchange is None or not i:
                layer.forward(cell)
            else:
                self._forward_exchanging(i, layer, cell)
        y, dy = self._output(cells)
        self.model.loss.reduce(y, target, self._first, self.stats, dy)
        parts = self.stats[None] if self.exchange is None else self.exchange.combine(self.stats)
        self.model.loss.combine(parts, self.stats)
        return cells

    def _forward_exchanging(self, i: int, layer: Layer, cell: Cell) -> None:
        """Compute the interior while the borders are in flight."""
        inner, rest = self._parts[i]
        self.exchange.start_up(i)
        if inner is not None and self.exchange.crosses(i):
            layer.forward(cell, inner)
            self.exchange.finish_up(i)
            for part in rest:
                layer.forward(cell, part)
        else:
            self.exchange.finish_up(i)
            layer.forward(cell)

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
        self.model.loss.delta(y, target, self._first, self.stats, count, dy)
        for i in reversed(range(len(cells))):
            layer, cell = self.model.layers[i], cells[i]
            adds = accumulate and not (self.share.size and self._shares(i))
            layer.backward_inputs(cell, adds)
            if i and self.exchange is not None:
                self.exchange.start_down(i)
            layer.backward_parameters(cell, adds)
            if i and not self._joined[i]:
                self._lower(i)
            if i and self.exchange is not None:
                self.exchange.finish_down(i)
        self._finish_gradient(w, g, accumulate)
        return self.model.loss.score(self.stats, target, count)

    def score(self, w: np.ndarray, target: np.ndarray, count: int) -> tuple[float, int]:
        """Return the summed loss and the number of right answers of the first `count` columns, without a gradient."""
        self.forward(w, target)
        return self.model.loss.score(self.stats, target, count)

    def _lift(self, layer: int) -> None:
        """Copy what this partition owns itself into the input of `layer`."""
        (y, own), (x, need) = self.above(layer), self.below(layer)
        both = intersect(own, need)
        x[relative(both, need)] = y[relative(both, own)]

    def _lower(self, layer: int) -> None:
        """Copy this partition's own share of the delta down; what nothing needs has none."""
        (dy, own), (dx, need) = self.above_delta(layer), self.below_delta(layer)
        both = intersect(own, need)
        if both != own:
            dy.fill(0)
        dy[relative(both, own)] = dx[relative(both, need)]

    def _finish_gradient(self, w: np.ndarray, g: np.ndarray, accumulate: bool) -> None:
        """Sum the gradient of shared parameters over the partitions, and add weight decay."""
        total = self.exchange.total(self.share) if self.share.size else self.share
        at = shared = 0
        for i in range(len(self.model.layers)):
            for parameter in self.model.parameters[i].values():
                size = size_of(parameter.owned(self.boxes[i + 1]))
                here = slice(at, at + size)
                if self.share.size and not parameter.axes:
                    if not accumulate:
                        g[here] = 0
                    g[here] += total[shared : shared + size]
                    shared += size
                if self.model.decay and parameter.decays:
                    add_decay(g[here], w[here], self.model.decay)
                at += size

    def _shares(self, layer: int) -> bool:
        return any(not parameter.axes for parameter in self.model.parameters[layer].values())

    def _output(self, cells: list[Cell]) -> tuple[np.ndarray, np.ndarray]:
        return cells[-1].y.reshape(-1, self.batch), self._dy[-1].reshape(-1, self.batch)
