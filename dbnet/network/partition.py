"""Who owns which units: a network cut over P partitions, what crosses the cuts, and what a step then costs.

Each layer's units are cut into a grid of boxes, rows by columns for an image layer, ranges for a dense one; partition p owns the
p-th box of every layer (the last ones own nothing where a grid has fewer than P boxes). What p must be sent before layer i is the
overlap of what its outputs need with what others own: every crossing value once to every partition that needs it. Backward is the
transpose.

The grids are the user's (`cut` of a layer), or those with the smallest predicted time: a shortest path through the layers, where a
grid costs its largest partition's arithmetic, and a pair of neighbouring grids the largest exchange, and a copy where the output of
one is no contiguous piece of the other's input. What a step takes on a machine is predicted closer (`commands.plan.step`), from
when each partition can go on. The last layer is cut so that each partition's units are neighbours, since a loss knows a
partition's units by the index of the first: an image into rows.
"""

from __future__ import annotations

from functools import cached_property
from math import prod
from typing import NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, Region, flatten, intersect, size_of, split
from dbnet.network.cost import Machine
from dbnet.network.layers.base import Shape
from dbnet.network.model import Model, contains, interior, shared_size

Boxes = list[Region]


class Crossing(NamedTuple):
    """Units in `boxes` (coordinates of the layer below) that `source` owns and `target` looks at."""

    source: int
    target: int
    boxes: tuple[Region, ...]

    @property
    def size(self) -> int:
        return sum(map(size_of, self.boxes))


class Load(NamedTuple):
    """What partitions do at one layer, per example.

    Attributes
    ----------
    flops, inner, copied
        [partitions] of one pass; those of them that need no other partition's values; values that it copies.
    source, target, values
        [messages] before the layer.
    """

    flops: np.ndarray
    inner: np.ndarray
    copied: np.ndarray
    source: np.ndarray
    target: np.ndarray
    values: np.ndarray


def cut_boxes(shape: Shape, grid: tuple[int, ...], partitions: int) -> Boxes:
    """Return the box of every partition for a grid of parts per axis; missing axes are not cut."""
    axes = [split(n, parts) for n, parts in zip(shape, (*grid, *(1 for _ in shape[len(grid) :])), strict=True)]
    counts = [len(axis) for axis in axes]
    boxes: Boxes = []
    for p in range(partitions):
        place, box = p, []
        for axis, count in zip(reversed(axes), reversed(counts), strict=True):
            place, i = divmod(place, count)
            box.append(axis[i])
        full = tuple(reversed(box))
        empty = place > 0 or not size_of(full)
        boxes.append(tuple(Range(0, 0) for _ in shape) if empty else full)
    return boxes


def grids(shape: Shape, partitions: int) -> list[tuple[int, ...]]:
    """Return the grids worth considering for a layer: units into P, or rows x columns with P boxes."""
    if len(shape) == 1:
        return [(partitions,)]
    return [(rows, partitions // rows) for rows in range(1, partitions + 1) if partitions % rows == 0]


def neighbours(shape: Shape, grid: tuple[int, ...], partitions: int) -> bool:
    """Return whether each box of a grid holds units that follow one another."""
    return all(len(flatten(box, shape)) <= 1 for box in cut_boxes(shape, grid, partitions))


class Cut:
    """A model cut over P partitions.

    Parameters
    ----------
    model
        The network.
    partitions
        P.
    batch
        Examples per step, for the cost.
    machine
        What the cost model assumes.
    given
        Whether the layers' own `cut` counts; not where a network is used on another number of ranks than it was made for.

    Attributes
    ----------
    boxes
        For each partition the boxes of the input (what its first layer needs) and of every layer's output.
    chosen
        Each layer's grid.
    """

    def __init__(self, model: Model, partitions: int, batch: int = 32, machine: Machine | None = None, given: bool = True) -> None:
        self.model, self.partitions, self.batch, self.machine = model, partitions, batch, machine or Machine()
        self.chosen = self._choose(given and partitions > 1)
        layers = [cut_boxes(shape, grid, partitions) for shape, grid in zip(model.shapes[1:], self.chosen, strict=True)]
        first = model.layers[0]
        inputs = [first.needs(model.shapes[0], layers[0][p]) for p in range(partitions)]
        self.boxes: list[Boxes] = [[inputs[p], *(layer[p] for layer in layers)] for p in range(partitions)]

    # --- what crosses -----------------------------------------------------------------------------------------------------------

    def messages(self, layer: int) -> list[Crossing]:
        """Return what must be sent before `layer` can run, in order of target and source; nothing for the first layer."""
        return self._messages[layer]

    @cached_property
    def _messages(self) -> list[list[Crossing]]:
        return [[], *(self._crossing(i, [b[i] for b in self.boxes], [b[i + 1] for b in self.boxes]) for i in self._later)]

    @property
    def _last(self) -> int:
        return len(self.model.layers) - 1

    @property
    def _later(self) -> range:
        return range(1, len(self.model.layers))

    def _crossing(self, layer: int, owned: Boxes, wanted: Boxes) -> list[Crossing]:
        kind, shape, out = self.model.layers[layer], self.model.shapes[layer], []
        lo, hi = np.moveaxis(np.array(owned), 2, 0)
        for target, box in enumerate(wanted):
            if not size_of(box):
                continue
            need = kind.needs(shape, box)
            first, end = np.array(need).T
            meets = (np.maximum(lo, first) < np.minimum(hi, end)).all(axis=1)
            for source in np.flatnonzero(meets).tolist():
                if source != target:
                    seen = kind.looks_at(shape, box, intersect(need, owned[source]))
                    out += [Crossing(source, target, tuple(seen))] if seen else []
        return out

    def crossing(self, layer: int) -> int:
        """Return the number of values that cross before `layer`, per example."""
        return sum(message.size for message in self.messages(layer))

    # --- what it costs ----------------------------------------------------------------------------------------------------------

    def compute_seconds(self, layer: int, boxes: Boxes) -> float:
        """Return the predicted time of a layer's three passes on its largest partition."""
        shape, kind = self.model.shapes[layer], self.model.layers[layer]
        passes = 3 if layer else 2
        return max(passes * kind.flops(shape, box) * self.batch for box in boxes) / self.machine.rate

    def exchange_seconds(self, messages: list[Crossing]) -> float:
        """Return the predicted time of one exchange, up and down, for the partition that moves most."""
        moved = np.zeros((2, self.partitions), int)
        for message in messages:
            moved[:, [message.source, message.target]] += [[1], [message.size]]
        return self._exchange_seconds(moved)

    def _exchange_seconds(self, moved: np.ndarray) -> float:
        """Return the predicted time of one exchange from each partition's messages and values [2, partitions]."""
        item = self.model.dtype.itemsize * self.batch
        return 2 * float((moved[0] * self.machine.latency + moved[1] * item / self.machine.bandwidth).max())

    def between_seconds(self, layer: int, owned: Boxes, wanted: Boxes) -> float:
        """Return the predicted time between two layers: the exchange, and copies where an output is no piece of the next input."""
        item = self.model.dtype.itemsize * self.batch
        copied = max(self._copied(layer, own, box) for own, box in zip(owned, wanted, strict=True))
        return self._exchange_seconds(self._moved(layer, owned, wanted)) + 2 * copied * item / self.machine.memory

    def _moved(self, layer: int, owned: Boxes, wanted: Boxes) -> np.ndarray:
        """Return each partition's messages and values before a layer [2, partitions]; large exchanges take long to list."""
        kind, shape = self.model.layers[layer], self.model.shapes[layer]
        needs = [kind.needs(shape, box) if size_of(box) else tuple(Range(0, 0) for _ in shape) for box in wanted]
        source, target = np.array(owned)[:, None], np.array(needs)[None]
        common = np.minimum(source[..., 1], target[..., 1]) - np.maximum(source[..., 0], target[..., 0])
        values = common.clip(0).prod(axis=-1) * ~np.eye(self.partitions, dtype=bool)
        gaps = [p for p, need in enumerate(needs) if size_of(need) and kind.looks_at(shape, wanted[p], need) != [need]]
        for p in gaps:
            for q in np.flatnonzero(values[:, p]).tolist():
                values[q, p] = sum(map(size_of, kind.looks_at(shape, wanted[p], intersect(needs[p], owned[q]))))
        return np.array([(each.sum(0) + each.sum(1)) for each in (values > 0, values)])

    def _copied(self, layer: int, own: Region, box: Region) -> int:
        """Return the values that one partition copies between two layers, where its output is no piece of its next input."""
        need = self.model.layers[layer].needs(self.model.shapes[layer], box)
        return 0 if contains(need, own) else size_of(intersect(need, own))

    @property
    def statistics(self) -> int:
        """Values per example that all partitions send in all, so that each has the loss's statistics of the others."""
        return self.partitions * (self.partitions - 1) * self.model.loss.width

    @property
    def shared(self) -> int:
        """Parameters whose gradient is summed over the partitions."""
        return shared_size(self.model) if self.partitions > 1 else 0

    def together_seconds(self, machine: Machine | None = None) -> float:
        """Return the predicted time of what all partitions do together: they gather the loss's statistics and sum gradients."""
        machine = machine or self.machine
        item, others = self.model.dtype.itemsize, self.partitions - 1
        rounds, sums = others.bit_length(), 2 * self.shared * item * others / self.partitions
        gathered = self.statistics / self.partitions * item * self.batch
        return rounds * machine.latency * (1 + 2 * bool(self.shared)) + (gathered + sums) / machine.bandwidth

    @property
    def seconds(self) -> float:
        """Predicted time of one step of the replica."""
        layers = [[boxes[i] for boxes in self.boxes] for i in range(len(self.model.layers) + 1)]
        compute = sum(self.compute_seconds(i, layers[i + 1]) for i in range(len(self.model.layers)))
        between = sum(self.between_seconds(i, layers[i], layers[i + 1]) for i in self._later)
        return compute + between + self.together_seconds()

    @cached_property
    def loads(self) -> list[Load]:
        """What each partition computes and moves, layer by layer."""
        out = []
        for i, kind in enumerate(self.model.layers):
            shape, wanted = self.model.shapes[i], [boxes[i + 1] for boxes in self.boxes]
            flops = [kind.flops(shape, box) for box in wanted]
            messages = self.messages(i)
            waits = {message.target for message in messages}
            insides = [interior(self.model, boxes, i)[0] if p in waits else None for p, boxes in enumerate(self.boxes)]
            inner = [kind.flops(shape, box) if box else 0 for box in insides]
            ends = [[message[end] for message in messages] for end in (0, 1)]
            copied = [self._copied(i, boxes[i], boxes[i + 1]) if i else 0 for boxes in self.boxes]
            arrays = (np.array(flops, float), np.array(inner, float), np.array(copied), *(np.array(end, int) for end in ends))
            out.append(Load(*arrays, np.array([message.size for message in messages], int)))
        return out

    # --- choosing ---------------------------------------------------------------------------------------------------------------

    def _choose(self, given: bool) -> list[tuple[int, ...]]:
        """Return the cheapest grid of each layer, by dynamic programming over the layers."""
        best: dict[tuple[int, ...], tuple[float, list[tuple[int, ...]]]] = {}
        for i, layer in enumerate(self.model.layers):
            shape, now = self.model.shapes[i + 1], {}
            for grid in [self._given(i)] if layer.cut and given else self._grids(i):
                boxes = cut_boxes(shape, grid, self.partitions)
                own, options = self.compute_seconds(i, boxes), []
                for cost, path in best.values():
                    below = cut_boxes(self.model.shapes[i], path[-1], self.partitions)
                    options.append((cost + own + self.between_seconds(i, below, boxes), path))
                cost, path = min(options, default=(own, []))
                now[grid] = (cost, [*path, grid])
            best = now
        return min(best.values())[1]

    def _grids(self, layer: int) -> list[tuple[int, ...]]:
        shape = self.model.shapes[layer + 1]
        return [g for g in grids(shape, self.partitions) if layer < self._last or neighbours(shape, g, self.partitions)]

    def _given(self, layer: int) -> tuple[int, ...]:
        grid, shape = self.model.layers[layer].cut, self.model.shapes[layer + 1]
        if len(grid) > len(shape) or min(grid) < 1 or prod(grid) > self.partitions:
            raise UserError(
                f"model.layers.{layer}.cut = {list(grid)} does not fit a layer of shape {'x'.join(map(str, shape))} and "
                f"{self.partitions} partitions; give at most {len(shape)} numbers whose product is at most {self.partitions}."
            )
        if layer == self._last and not neighbours(shape, grid, self.partitions):
            raise UserError(
                f"model.layers.{layer}.cut = {list(grid)} cuts the last layer into units that are not neighbours, of which no loss "
                f"can be computed; cut it into rows, [{prod(grid)}, 1]."
            )
        return grid
