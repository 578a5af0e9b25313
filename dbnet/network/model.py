"""What is computed, without arrays: layers, shapes, the flat layout of the parameters, and what one partition uses of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from math import prod
from typing import NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, Region, flatten, intersect, shape_of, size_of, whole
from dbnet.network.layers.base import Layer, Parameter, Shape
from dbnet.network.losses.base import Loss
from dbnet.network.parameters.layout import FlatLayout


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
            arrays += [(f"{i}.{layer.kind}.{name}", p.shape, p.initial, p.decays) for name, p in own.items()]
        self.layout = FlatLayout(arrays)
        if prod(self.shapes[-1]) != outputs:
            raise UserError(
                f"The last layer has {prod(self.shapes[-1])} units but the data ask for {outputs}; set its units to {outputs}."
            )

    @cached_property
    def identity(self) -> str:
        """Twelve hexadecimal digits that two networks share if they are computed alike: layers, shapes, loss, type."""
        layers = [layer.model_dump(mode="json", exclude={"cut"}) for layer in self.layers]
        parts = [[layer.kind for layer in self.layers], layers, self.shapes, self.loss.kind, self.dtype.name]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def boxes(self) -> list[Region]:
        """Return the boxes of an uncut network: what the first layer needs of the input, and every layer, whole."""
        layers = [whole(shape) for shape in self.shapes[1:]]
        return [self.layers[0].needs(self.shapes[0], layers[0]), *layers]

    def columns(self, boxes: list[Region]) -> list[Range] | None:
        """Return the units of an example that the owner of these boxes needs, as flat ranges; None: all."""
        return None if boxes[0] == whole(self.shapes[0]) else flatten(boxes[0], self.shapes[0])


class Piece(NamedTuple):
    """A range of the global flat vector and where it starts in the partition's own."""

    range: Range
    at: int


def contains(need: Region, own: Region) -> bool:
    """Return whether the box `own` is a contiguous piece of an array that holds the box `need`."""
    if not size_of(own) or intersect(need, own) != own:
        return False
    inside = tuple(o.shift(-n.lo) for o, n in zip(own, need, strict=True))
    return len(flatten(inside, shape_of(need))) == 1


def interior(model: Model, boxes: list[Region], layer: int) -> tuple[Region | None, list[Region | None]]:
    """Return the part of a layer's box that needs only what the owner of these boxes has itself, and the rest as boxes.

    None stands for no such part, and for the whole box where it is the rest.
    """
    box, kind = boxes[layer + 1], model.layers[layer]
    if layer == 0 or not kind.parts or not size_of(box):
        return None, [None]

    own = boxes[layer]

    def inside(axis: int, i: int) -> bool:
        need = kind.needs(model.shapes[layer], (*box[:axis], Range(i, i + 1), *box[axis + 1 :]))[axis]
        return own[axis].lo <= need.lo and need.hi <= own[axis].hi

    inner, rest = list(box), []
    for axis in range(2):
        lo, hi = inner[axis]
        while lo < hi and not inside(axis, lo):
            lo += 1
        while hi > lo and not inside(axis, hi - 1):
            hi -= 1
        rest += [(*inner[:axis], Range(*ends), *inner[axis + 1 :]) for ends in ((inner[axis].lo, lo), (hi, inner[axis].hi))]
        inner[axis] = Range(lo, hi)
    need = kind.needs(model.shapes[layer], tuple(inner))
    if not size_of(tuple(inner)) or need != intersect(need, own):
        return None, [None]
    return tuple(inner), [part for part in rest if size_of(part)]


def shared_size(model: Model) -> int:
    """Return the number of parameters that all partitions share."""
    return sum(prod(p.shape) for layer in model.parameters for p in layer.values() if not p.axes)


class Footprint(NamedTuple):
    """What one partition uses of the global vector, in order.

    Attributes
    ----------
    used, pushed
        The ranges that it fetches, and those whose gradient it pushes.
    size
        Parameters in all.
    """

    used: list[Piece]
    pushed: list[Piece]
    size: int


def footprint(model: Model, boxes: list[Region], leads: bool) -> Footprint:
    """Return what the owner of these boxes uses.

    Parameters that all partitions share are pushed by the one that `leads`, since their gradient is summed over the replica first.
    """
    used: list[Piece] = []
    pushed: list[Piece] = []
    at, entries = 0, iter(model.layout.entries)
    for i in range(len(model.layers)):
        for parameter in model.parameters[i].values():
            entry = next(entries)
            for part in flatten(parameter.owned(boxes[i + 1]), parameter.shape):
                piece = Piece(part.shift(entry.offset), at)
                _join(used, piece)
                if parameter.axes or leads:
                    _join(pushed, piece)
                at += part.size
    return Footprint(used, pushed, at)


def _join(pieces: list[Piece], piece: Piece) -> None:
    """Append a piece, or lengthen the last one if it goes on there on both sides."""
    if pieces:
        last = pieces[-1]
        if last.range.hi == piece.range.lo and last.at + last.range.size == piece.at:
            pieces[-1] = Piece(Range(last.range.lo, piece.range.hi), last.at)
            return
    pieces.append(piece)
