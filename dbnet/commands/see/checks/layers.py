"""What must hold of a layer: shapes, what it needs, arrays written in place, gradients, and that cut it equals itself uncut."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from dbnet.commands.see.checks.base import Broken, Checks, agrees, same, unwritten
from dbnet.commands.see.checks.partitioned import run
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, Region, relative, shape_of, whole
from dbnet.core.registry import make
from dbnet.network.layers.base import Cell, Layer, Parameter, Shape
from dbnet.network.model import Model

# Inputs that a layer is tried on: an image, and plain units.
SHAPES: tuple[Shape, ...] = ((9, 8, 2), (7,))
_BATCH, _CLASSES = 4, 3


def accepted(layer: Layer) -> list[Shape]:
    """Return the inputs that a layer takes; UserError, with its own sentence, where it takes none."""
    out, why = [], ""
    for shape in SHAPES:
        try:
            layer.output_shape(shape)
            out.append(shape)
        except UserError as error:
            why = str(error)
        except (TypeError, ValueError, IndexError) as error:
            why = f"output_shape fails with {type(error).__name__}: {error}"
    if not out:
        raise UserError(f"The layer {layer.kind} takes no input of shape {' or '.join(map(_words, SHAPES))} ({why}); give --input.")
    return out


def checks(layer: Layer, shape: Shape) -> Checks:
    """Return what must hold of a layer on inputs of this shape."""
    made = {"shapes": shapes, "needs": needs, "in place": in_place, "gradient": gradient, "accumulated": accumulated,
            "cut = uncut": cut, "float32": single}  # fmt: skip
    return {name: partial(look, layer, shape) for name, look in made.items()}


def cell_of(layer: Layer, shape: Shape, out: Region | None = None, dtype: str = "float64", start: float = 0.0) -> Cell:
    """Return a cell with random inputs, parameters and deltas; what is to be computed holds NaN, gradients `start`.

    Parameters
    ----------
    out
        The outputs that are computed, from the inputs that these need; default: all.
    """
    rng, y_shape = np.random.default_rng(5), layer.output_shape(shape)
    box = whole(y_shape) if out is None else out
    need = layer.needs(shape, box)
    x, dy = rng.standard_normal((*shape, _BATCH)), rng.standard_normal((*y_shape, _BATCH))
    cell = Cell(
        shape, y_shape, need, box, x[relative(need, whole(shape))].astype(dtype), np.full((*shape_of(box), _BATCH), np.nan, dtype),
        np.full((*shape_of(need), _BATCH), np.nan, dtype), dy[relative(box, whole(y_shape))].astype(dtype), step=5, seed=7,
    )  # fmt: skip
    for name, parameter in layer.parameters(shape).items():
        values, own = rng.standard_normal(parameter.shape), parameter.owned(box)
        cell.p[name] = np.ascontiguousarray(values[relative(own, whole(parameter.shape))], dtype)
        cell.g[name] = np.full(cell.p[name].shape, start, dtype)
    layer.prepare(cell)
    return cell


def shapes(layer: Layer, shape: Shape) -> str:
    """Shapes of outputs and parameters fit each other."""
    out = layer.output_shape(shape)
    if not isinstance(out, tuple) or not out or not all(isinstance(n, int | np.integer) and n > 0 for n in out):
        raise Broken(f"output_shape({shape}) returns {out!r}; return a tuple of whole numbers, like {shape}")
    found, count = layer.parameters(shape), 0
    if not isinstance(found, dict):
        raise Broken(f"parameters({shape}) returns {type(found).__name__}; return a dictionary of name: Parameter(shape, axes)")
    for name, parameter in found.items():
        if not isinstance(parameter, Parameter):
            raise Broken(f"parameters()['{name}'] is {type(parameter).__name__}; make it a dbnet.Parameter(shape, axes)")
        if parameter.shape[: parameter.axes] != tuple(out[: parameter.axes]):
            raise Broken(
                f"'{name}' has the shape {parameter.shape} and axes={parameter.axes}, so it must begin with the output's "
                f"{out[: parameter.axes]}; axes counts the leading axes that are units, 0 is shared by all"
            )
        count += int(np.prod(parameter.shape))
    return f"{_words(shape)} -> {_words(tuple(out))}, {count} parameters"


def needs(layer: Layer, shape: Shape) -> str:
    """Outputs are computed from what they need alone."""
    out, rng = layer.output_shape(shape), np.random.default_rng(8)
    full = cell_of(layer, shape)
    layer.forward(full)
    for box in _boxes(out):
        need = layer.needs(shape, box)
        if len(need) != len(shape) or not all(0 <= part.lo <= part.hi <= n for part, n in zip(need, shape, strict=True)):
            raise Broken(
                f"needs({shape}, {_box(box)}) returns {_box(need)}, which is no box within the input; cut it off at the border"
            )
        moved = cell_of(layer, shape)
        beyond = np.ones(moved.x.shape, bool)
        beyond[relative(need, whole(shape))] = False
        moved.x[beyond] += rng.standard_normal(int(beyond.sum()))
        layer.forward(moved)
        here = relative(box, whole(out))
        if not np.array_equal(moved.y[here], full.y[here]):
            raise Broken(
                f"outputs {_box(box)} change with inputs outside of needs(...) = {_box(need)}; return a box that holds all of them"
            )
    return "outputs are computed from what they need alone"


def in_place(layer: Layer, shape: Shape) -> str:
    """Results are written into the arrays that are there, all of them, and nothing else is changed."""
    c = cell_of(layer, shape, start=np.nan)
    arrays = {"c.x": c.x, "c.y": c.y, "c.dx": c.dx, "c.dy": c.dy, **{f"c.p['{n}']": a for n, a in c.p.items()},
              **{f"c.g['{n}']": a for n, a in c.g.items()}}  # fmt: skip
    kept = {name: array.copy() for name, array in arrays.items() if name == "c.x" or name.startswith("c.p")}
    layer.forward(c)
    _same_arrays(c, arrays, "forward")
    unwritten(c.y, "c.y", "let forward() write into it, every output: c.y[...] = ...")
    layer.backward(c, False)
    _same_arrays(c, arrays, "backward_inputs or backward_parameters")
    unwritten(c.dx, "c.dx", "let backward_inputs() write every input's share: c.dx[...] = ..., not c.dx += ...")
    for name, g in c.g.items():
        unwritten(g, f"c.g['{name}']", "without `accumulate` overwrite it: it may hold anything before")
    for name, before in kept.items():
        if not np.array_equal(before, arrays[name]):
            raise Broken(f"{name} is changed; others still read it: work on a copy that scratch() returns")
    y = c.y.copy()
    layer.forward(c)
    if not np.array_equal(y, c.y):
        raise Broken("forward() once more on the same inputs gives other outputs; draw from (c.seed, c.step, c.layer) alone")
    return f"y, dx{', gradients' if c.g else ''} written in place"


def _same_arrays(c: Cell, arrays: dict[str, Any], who: str) -> None:
    now = {"c.x": c.x, "c.y": c.y, "c.dx": c.dx, "c.dy": c.dy, **{f"c.p['{n}']": a for n, a in c.p.items()},
           **{f"c.g['{n}']": a for n, a in c.g.items()}}  # fmt: skip
    for name, array in arrays.items():
        if now.get(name) is not array:
            raise Broken(f"{who}() puts another array into {name}; write into the one that is there: {name}[...] = ...")


def gradient(layer: Layer, shape: Shape) -> str:
    """Gradients equal central differences of sum(dy * y), in float64."""
    c = cell_of(layer, shape)
    delta = c.dy.copy()

    def value() -> float:
        layer.forward(c)
        return float((delta * c.y).sum())

    value()
    layer.backward(c, False)
    found = {"c.dx": (c.x, c.dx.copy()), **{f"c.g['{name}']": (c.p[name], g.copy()) for name, g in c.g.items()}}
    worst = 0.0
    for name, (array, mine) in found.items():
        worst = max(worst, agrees(value, array, mine, name))
    return f"{worst:.0e} from differences in float64"


def accumulated(layer: Layer, shape: Shape) -> str:
    """With `accumulate` gradients are added to what is there."""
    once, twice = cell_of(layer, shape), cell_of(layer, shape, start=1.0)
    for cell, adds in ((once, False), (twice, True)):
        layer.forward(cell)
        layer.backward(cell, adds)
    for name, g in once.g.items():
        same(twice.g[name], g + 1.0, 1e-12, f"c.g['{name}'] with accumulate=True, which held 1; add to it (c.g['{name}'] += ...)")
    return "gradients are added where they are to be" if once.g else "no parameters"


def cut(layer: Layer, shape: Shape) -> str:
    """A network with this layer between two others, cut over several partitions, equals itself uncut."""
    below = {"kind": "local", "maps": shape[-1], "field": 1} if len(shape) == 3 else {"kind": "dense", "units": shape[0]}
    first, last = (make("network.layers", {**entry, **tanh}, "layer") for entry, tanh in ((below, {"activation": "tanh"}),
                   ({"kind": "dense", "units": _CLASSES}, {})))  # fmt: skip
    model = Model([first, layer, last], make("network.losses", {"kind": "softmax"}, "loss"), shape, _CLASSES, "float64")
    rng = np.random.default_rng(7)
    w, x = rng.standard_normal(model.layout.size), rng.standard_normal((*shape, _BATCH))
    target = rng.integers(0, _CLASSES, _BATCH)
    one = run(model, 1, _BATCH, w, x, target, _BATCH)
    for partitions in (2, 3, 4):
        many = run(model, partitions, _BATCH, w, x, target, _BATCH)
        same(many.y, one.y, 1e-10, f"outputs of the network on {partitions} partitions; see c.x_box, c.y_box: the boxes at hand")
        for name, g in model.layout.views(one.g).items():
            same(
                model.layout.views(many.g)[name],
                g,
                1e-10,
                f"gradient of '{name}' on {partitions} partitions (c.y_box is the own part)",
            )
    return "on 2, 3 and 4 partitions"


def single(layer: Layer, shape: Shape) -> str:
    """In float32 the same comes out, to its rounding."""
    exact, rough = cell_of(layer, shape), cell_of(layer, shape, dtype="float32")
    for cell in (exact, rough):
        layer.forward(cell)
        layer.backward(cell, False)
    pairs = {
        "c.y": (rough.y, exact.y),
        "c.dx": (rough.dx, exact.dx),
        **{f"c.g['{n}']": (rough.g[n], g) for n, g in exact.g.items()},
    }
    return f"{max(same(found, wanted, 1e-3, f'{name} in float32') for name, (found, wanted) in pairs.items()):.0e} from float64"


def _boxes(shape: Shape) -> list[Region]:
    """Return some boxes of a layer's units: halves along the first axes, a single unit."""
    out: list[Region] = []
    for axis in range(min(2, len(shape))):
        middle = shape[axis] // 2
        for ends in ((0, middle), (middle, shape[axis])):
            box = list(whole(shape))
            box[axis] = Range(*ends)
            if ends[0] < ends[1]:
                out.append(tuple(box))
    return [*out, tuple(Range(n - 1, n) for n in shape)]


def _words(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _box(box: Region) -> str:
    return "[" + ", ".join(f"{part.lo}:{part.hi}" for part in box) + "]"
