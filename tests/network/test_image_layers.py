"""Image layers: gradients, cuts, honest needs, and PyTorch as the independent judge."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numba
import numpy as np
import pytest

from dbnet.core import jit
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, Region, relative, shape_of, size_of, split, whole
from dbnet.network.layers import conv as conv_module
from dbnet.network.layers import dropout as dropout_module
from dbnet.network.layers import filters
from dbnet.network.layers import local as local_module
from dbnet.network.layers import norm as norm_module
from dbnet.network.layers import pool as pool_module
from dbnet.network.layers.base import Cell, Layer
from dbnet.network.layers.conv import Conv
from dbnet.network.layers.dropout import Dropout, drop
from dbnet.network.layers.local import Local
from dbnet.network.layers.norm import Norm
from dbnet.network.layers.pool import Pool
from dbnet.network.losses.squared import Squared
from dbnet.network.model import Model
from dbnet.network.network import Network

LAYERS = [
    Local(maps=5, field=(3, 2), stride=(2, 1), padding=(1, 0), activation="tanh"),
    Local(maps=3, field=3, stride=1, padding=2, activation="sigmoid"),
    Local(maps=9, field=2, stride=3),
    Conv(maps=5, field=(3, 2), stride=(2, 1), padding=(2, 1), activation="tanh"),
    Conv(maps=4, field=4, padding=1, activation="sigmoid"),
    Conv(maps=11, field=2, stride=3),
    Pool(over="max", field=3, stride=2, padding=1),
    Pool(over="max", field=(2, 3)),
    Pool(over="average", field=3, stride=(1, 2), padding=2),
    Pool(over="l2", field=3, stride=2, padding=1),
    Pool(over="l2", field=1, stride=2),
    Norm(radius=1, floor=0.3),
    Norm(radius=2, spread=0.7, floor=0.2),
    Dropout(rate=0.4),
]
LINEAR = [layer for layer in LAYERS if not isinstance(layer, Norm) and getattr(layer, "over", "max") == "max"]
X_SHAPE, BATCH = (7, 9, 3), 19


def name_of(layer: Layer) -> str:
    return "-".join(str(v) for v in layer.options().values())


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    for dtype in ("float32", "float64"):
        jit.warm(dtype, lambda module: module.startswith("dbnet.network.layers"))


def arrays(layer: Layer, x_shape: tuple[int, ...], batch: int, dtype: str = "float64", integers: bool = False) -> dict[str, Any]:
    """Return random global arrays: the input, the output's delta, the parameters."""
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        values = rng.integers(-4, 5, shape) if integers else rng.uniform(-1, 1, shape)
        return np.ascontiguousarray(values, dtype=dtype)

    found = {"x": draw(*x_shape, batch), "dy": draw(*layer.output_shape(x_shape), batch)}
    return found | {name: draw(*p.shape) for name, p in layer.parameters(x_shape).items()}


def place(layer: Layer, x_shape: tuple[int, ...], values: dict[str, Any], y_box: Region | None = None) -> Cell:
    """Return the layer on the partition that owns `y_box`, with exactly the inputs that it needs."""
    y_shape = layer.output_shape(x_shape)
    y_box = whole(y_shape) if y_box is None else y_box
    x_box = layer.needs(x_shape, y_box)
    x = values["x"][relative(x_box, whole(x_shape))].copy()
    dy = values["dy"][relative(y_box, whole(y_shape))].copy()
    c = Cell(x_shape, y_shape, x_box, y_box, x, np.full_like(dy, np.nan), np.full_like(x, np.nan), dy, step=3, seed=11)
    for name, parameter in layer.parameters(x_shape).items():
        own = parameter.owned(y_box)
        c.p[name] = values[name][relative(own, whole(parameter.shape))].copy()
        c.g[name] = np.full_like(c.p[name], np.nan)
    layer.prepare(c)
    return c


def run(layer: Layer, c: Cell) -> Cell:
    layer.forward(c)
    layer.backward(c, False)
    return c


def input_delta(c: Cell) -> np.ndarray:
    """Return dx over the whole input; what no output needs has none."""
    dx = np.zeros((*c.x_shape, c.x.shape[-1]), c.dx.dtype)
    dx[relative(c.x_box, whole(c.x_shape))] = c.dx
    return dx


def cuts(shape: tuple[int, ...]) -> dict[str, list[Region]]:
    """Return ways to cut an output box: rows, columns, maps, a grid, and into more pieces than there are rows."""
    rows, cols, maps = shape
    return {
        "rows": [(r, Range(0, cols), Range(0, maps)) for r in split(rows, 3)],
        "columns": [(Range(0, rows), c, Range(0, maps)) for c in split(cols, 2)],
        "maps": [(Range(0, rows), Range(0, cols), m) for m in split(maps, 2)],
        "grid": list(product(split(rows, 2), split(cols, 2), split(maps, 2))),
        "empty": [(r, c, Range(0, maps)) for r, c in product(split(rows, rows + 2), split(cols, cols + 1))],
        "no maps": list(product([Range(0, rows)], [Range(0, cols)], split(maps, maps + 1))),
    }


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_gradient_is_that_of_the_output(layer: Layer) -> None:
    x_shape, batch = (5, 7, 2), 3
    values = arrays(layer, x_shape, batch)

    def objective() -> float:
        c = place(layer, x_shape, values)
        layer.forward(c)
        return float((c.y * values["dy"]).sum())

    c = run(layer, place(layer, x_shape, values))
    rng = np.random.default_rng(0)
    for name, gradient in {"x": input_delta(c), **c.g}.items():
        array, h = values[name].reshape(-1), 1e-6
        for i in rng.choice(array.size, min(array.size, 40), replace=False):
            before = array[i]
            array[i] = before + h
            up = objective()
            array[i] = before - h
            down = objective()
            array[i] = before
            assert gradient.reshape(-1)[i] == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-7), (name, i)


@pytest.mark.parametrize("cut", list(cuts((3, 3, 3))))
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_pieces_add_up_to_the_whole(layer: Layer, cut: str) -> None:
    exact = layer in LINEAR and getattr(layer, "activation", "identity") == "identity"
    values = arrays(layer, X_SHAPE, BATCH, integers=exact)
    one = run(layer, place(layer, X_SHAPE, values))
    dx = np.zeros_like(one.dx)
    g = {name: np.zeros_like(array) for name, array in one.g.items()}
    pieces = cuts(one.y_shape)[cut]
    assert sum(size_of(box) for box in pieces) == size_of(one.y_box)
    for box in pieces:
        c = run(layer, place(layer, X_SHAPE, values, box))
        assert np.array_equal(c.y, one.y[relative(box, one.y_box)])
        dx[relative(c.x_box, one.x_box)] += c.dx
        for name, parameter in layer.parameters(X_SHAPE).items():
            g[name][relative(parameter.owned(box), whole(parameter.shape))] += c.g[name]
    for mine, whole_ in [(dx, one.dx), *((g[name], one.g[name]) for name in g)]:
        if exact and not isinstance(layer, Dropout):
            assert np.array_equal(mine, whole_)
        else:
            np.testing.assert_allclose(mine, whole_, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if not isinstance(layer, Dropout)], ids=name_of)
def test_parts_of_the_forward_pass_are_the_forward_pass(layer: Any, dtype: str) -> None:
    values = arrays(layer, X_SHAPE, BATCH, dtype)
    for own in [None, *cuts(layer.output_shape(X_SHAPE))["grid"]]:
        at_once, by_parts = place(layer, X_SHAPE, values, own), place(layer, X_SHAPE, values, own)
        layer.forward(at_once)
        for way in cuts(shape_of(at_once.y_box)).values():
            by_parts.y[:] = np.nan
            for part in reversed(way):
                layer.forward(by_parts, tuple(r.shift(o.lo) for r, o in zip(part, by_parts.y_box, strict=True)))
            assert np.array_equal(by_parts.y, at_once.y)
        layer.backward(at_once, False)
        layer.backward(by_parts, False)
        assert np.array_equal(by_parts.dx, at_once.dx)


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_needs_is_honest_and_tight(layer: Layer) -> None:
    values = arrays(layer, X_SHAPE, 2)
    one = place(layer, X_SHAPE, values)
    layer.forward(one)
    for box in cuts(one.y_shape)["grid"]:
        x_box = layer.needs(X_SHAPE, box)
        outside = np.ones(X_SHAPE, bool)
        outside[relative(x_box, one.x_box)] = False
        moved = place(layer, X_SHAPE, values | {"x": np.where(outside[..., None], 1e3, values["x"])})
        layer.forward(moved)
        assert np.array_equal(moved.y[relative(box, one.y_box)], one.y[relative(box, one.y_box)])
        # Every face of the box matters: with it raised, some output of the box moves.
        for axis, side in product(range(3), (0, -1)):
            x = values["x"].copy()
            face = list(relative(x_box, one.x_box))
            edge = range(face[axis].start, face[axis].stop)[side]
            face[axis] = slice(edge, edge + 1)
            x[tuple(face)] += 5 * (1 + np.random.default_rng(axis).random(x[tuple(face)].shape))
            raised = place(layer, X_SHAPE, values | {"x": x})
            raised.training = moved.training = False
            layer.forward(raised)
            plain = replace(one, training=False, y=one.y.copy())
            layer.forward(plain)
            assert not np.array_equal(raised.y[relative(box, one.y_box)], plain.y[relative(box, one.y_box)])


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_accumulate_adds_and_dx_may_be_absent(layer: Layer) -> None:
    values = arrays(layer, X_SHAPE, 4)
    once, twice = place(layer, X_SHAPE, values), place(layer, X_SHAPE, values)
    run(layer, once)
    run(layer, twice)
    twice.dy, twice.dx = values["dy"].copy(), None
    layer.backward(twice, True)
    for name in once.g:
        np.testing.assert_allclose(twice.g[name], 2 * once.g[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if not isinstance(layer, Dropout)], ids=name_of)
def test_more_rows_and_columns_at_hand_than_needed_change_nothing(layer: Layer) -> None:
    values = arrays(layer, X_SHAPE, 4)
    box = cuts(layer.output_shape(X_SHAPE))["grid"][3]
    c = run(layer, place(layer, X_SHAPE, values, box))
    more = place(layer, X_SHAPE, values, box)
    more.x_box = (*whole(X_SHAPE)[:2], more.x_box[2])
    more.x = values["x"][relative(more.x_box, whole(X_SHAPE))].copy()
    more.dx = np.full_like(more.x, np.nan)
    layer.prepare(more)
    run(layer, more)
    assert np.array_equal(more.y, c.y) and np.array_equal(input_delta(more), input_delta(c))


def test_nothing_needs_nothing() -> None:
    for layer in LAYERS:
        assert size_of(layer.needs(X_SHAPE, (Range(2, 2), Range(0, 2), Range(0, 1)))) == 0


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_interpreted_is_compiled(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    values = arrays(layer, (5, 4, 2), 3)
    compiled = run(layer, place(layer, (5, 4, 2), values))
    for module in (filters, local_module, conv_module, norm_module, dropout_module):
        for name, value in list(vars(module).items()):
            if any(value is kernel for _, kernel in jit.KERNELS):
                monkeypatch.setattr(module, name, value.py_func)
    ways = {k: pool_module.Kernels(*(f.py_func for f in pair)) for k, pair in pool_module.KERNELS.items()}
    monkeypatch.setattr(pool_module, "KERNELS", ways)
    interpreted = run(layer, place(layer, (5, 4, 2), values))
    for a, b in [
        (compiled.y, interpreted.y),
        (compiled.dx, interpreted.dx),
        *zip(compiled.g.values(), interpreted.g.values(), strict=True),
    ]:
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


# --- against PyTorch ----------------------------------------------------------------------------------------------------------


def torch_module() -> Any:
    return pytest.importorskip("torch", reason="PyTorch is the independent judge of these layers")


def to_torch(x: np.ndarray) -> Any:
    """Return [row, column, map, batch] as PyTorch's [batch, map, row, column]."""
    return torch_module().tensor(np.ascontiguousarray(x.transpose(3, 2, 0, 1)), requires_grad=True)


def from_torch(x: Any) -> np.ndarray:
    return x.detach().numpy().transpose(2, 3, 1, 0)


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(("field", "stride", "padding", "batch"), [((5, 5), 1, 2, 32), ((3, 4), (2, 1), (1, 0), 7), (1, 2, 0, 33)])
def test_conv_agrees_with_torch(field: Any, stride: Any, padding: Any, batch: int) -> None:
    torch = torch_module()
    layer, x_shape = Conv(maps=13, field=field, stride=stride, padding=padding), (11, 12, 3)
    values = arrays(layer, x_shape, batch, "float32")
    c = run(layer, place(layer, x_shape, values))
    x = to_torch(values["x"])
    h, w = layer.patches.field
    kernel = torch.tensor(np.ascontiguousarray(values["W"].reshape(13, h, w, 3).transpose(0, 3, 1, 2)), requires_grad=True)
    b = torch.tensor(values["b"], requires_grad=True)
    y = torch.nn.functional.conv2d(x, kernel, b, stride, padding)
    y.backward(to_torch(values["dy"]).detach())
    close(c.y, from_torch(y))
    close(input_delta(c), from_torch(x.grad))
    close(c.g["W"], kernel.grad.numpy().transpose(0, 2, 3, 1).reshape(13, -1))
    close(c.g["b"], b.grad.numpy())


@pytest.mark.parametrize(("field", "stride", "padding", "batch"), [((3, 3), 1, 0, 16), ((2, 3), (2, 1), (1, 2), 5), (4, 3, 1, 35)])
def test_local_agrees_with_torch(field: Any, stride: Any, padding: Any, batch: int) -> None:
    torch = torch_module()
    layer, x_shape = Local(maps=7, field=field, stride=stride, padding=padding), (9, 10, 3)
    values = arrays(layer, x_shape, batch, "float32")
    c = run(layer, place(layer, x_shape, values))
    x = to_torch(values["x"])
    h, w = layer.patches.field
    rows, cols, maps = layer.output_shape(x_shape)
    kernel = torch.tensor(
        values["W"].reshape(rows * cols, maps, h, w, 3).transpose(0, 1, 4, 2, 3).reshape(rows * cols, maps, -1).copy()
    )
    kernel.requires_grad_()
    patches = torch.nn.functional.unfold(x, (h, w), padding=padding, stride=stride)
    y = torch.bmm(kernel, patches.permute(2, 1, 0))
    y.backward(torch.tensor(values["dy"].reshape(rows * cols, maps, batch)))
    close(c.y, y.detach().numpy().reshape(c.y.shape) + values["b"][..., None])
    close(input_delta(c), from_torch(x.grad))
    close(
        c.g["W"].reshape(rows * cols, maps, h, w, 3),
        kernel.grad.numpy().reshape(rows * cols, maps, 3, h, w).transpose(0, 1, 3, 4, 2),
    )
    close(c.g["b"], values["dy"].sum(-1))


@pytest.mark.parametrize("over", ["max", "average", "l2"])
@pytest.mark.parametrize(("field", "stride", "padding"), [(2, 2, 0), (3, 2, 1), ((2, 3), (1, 2), 0)])
def test_pool_agrees_with_torch(over: Any, field: Any, stride: Any, padding: Any) -> None:
    torch = torch_module()
    layer, x_shape = Pool(over=over, field=field, stride=stride, padding=padding), (9, 10, 3)
    values = arrays(layer, x_shape, 6, "float32")
    c = run(layer, place(layer, x_shape, values))
    x, f = to_torch(values["x"]), torch.nn.functional
    ways = {
        "max": lambda: f.max_pool2d(x, field, stride, padding),
        "average": lambda: f.avg_pool2d(x, field, stride, padding),
        "l2": lambda: (f.avg_pool2d(x**2, field, stride, padding) * layer.patches.area).sqrt(),
    }
    y = ways[over]()
    y.backward(to_torch(values["dy"]).detach())
    close(c.y, from_torch(y))
    close(input_delta(c), from_torch(x.grad))


# --- threads, declared types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if isinstance(layer, Local | Conv)], ids=name_of)
def test_result_does_not_depend_on_the_number_of_threads(layer: Layer) -> None:
    values = arrays(layer, X_SHAPE, BATCH, "float32")
    before = numba.get_num_threads()
    found = []
    for threads in (1, 2):
        jit.set_threads(threads)
        found.append(run(layer, place(layer, X_SHAPE, values)))
    jit.set_threads(before)
    one, two = found
    for a, b in [(one.y, two.y), (one.dx, two.dx), (one.g["W"], two.g["W"]), (one.g["b"], two.g["b"])]:
        assert np.array_equal(a, b)


def test_no_call_compiles_a_kernel_anew() -> None:
    for layer, dtype in product(LAYERS, ("float32", "float64")):
        run(layer, place(layer, X_SHAPE, arrays(layer, X_SHAPE, 4, dtype)))
    mine = {f"dbnet.network.layers.{name}" for name in [*(layer.kind for layer in LAYERS), "filters"]}
    kernels = [kernel for _, kernel in jit.KERNELS if kernel.py_func.__module__ in mine]
    assert len(kernels) > 10
    for kernel in kernels:
        assert len(kernel.signatures) == 2, kernel.py_func.__name__


# --- one by one ---------------------------------------------------------------------------------------------------------------


def test_max_gives_the_delta_to_the_first_of_equals() -> None:
    layer = Pool(over="max", field=2)
    c = run(layer, place(layer, (2, 2, 1), {"x": np.zeros((2, 2, 1, 1)), "dy": np.full((1, 1, 1, 1), 5.0)}))
    assert c.dx[..., 0, 0].tolist() == [[5, 0], [0, 0]]


@pytest.mark.parametrize("place_of_it", range(4))
def test_no_pool_loses_a_value_that_is_not_finite(place_of_it: int) -> None:
    for over in ("max", "average", "l2"):
        layer, x = Pool(over=over), np.arange(8.0).reshape(2, 2, 1, 2)
        x.reshape(4, 2)[place_of_it, 1] = np.nan
        c = place(layer, (2, 2, 1), {"x": x, "dy": np.ones((1, 1, 1, 2))})
        layer.forward(c)
        assert np.isnan(c.y).ravel().tolist() == [False, True], over


def test_norm_is_its_formula() -> None:
    layer, (rows, cols, maps) = Norm(radius=1, spread=1.0, floor=0.2), (4, 5, 2)
    x = np.random.default_rng(1).normal(size=(rows, cols, maps, 1))
    c = place(layer, (rows, cols, maps), {"x": x, "dy": np.zeros_like(x)})
    layer.forward(c)

    def local_mean(a: np.ndarray) -> np.ndarray:
        found = np.zeros((rows, cols, 1))
        for r, s in product(range(rows), range(cols)):
            near = [(i, j) for i, j in product(range(rows), range(cols)) if max(abs(i - r), abs(j - s)) <= 1]
            weights = np.array([np.exp(-((i - r) ** 2 + (j - s) ** 2) / 2) for i, j in near])
            found[r, s] = sum(w * a[i, j].mean(0) for w, (i, j) in zip(weights / weights.sum(), near, strict=True))
        return found[:, :, None]

    v = x - local_mean(x)
    np.testing.assert_allclose(c.y, v / np.maximum(0.2, np.sqrt(local_mean(v**2))), rtol=1e-12)


def test_norm_of_a_constant_image_is_zero() -> None:
    layer = Norm(radius=2)
    c = place(layer, (6, 6, 2), {"x": np.full((6, 6, 2, 3), 4.0), "dy": np.zeros((6, 6, 2, 3))})
    layer.forward(c)
    np.testing.assert_allclose(c.y, 0, atol=1e-12)


def test_dropout_keeps_the_mean_and_changes_with_seed_step_layer_unit_column() -> None:
    layer, shape = Dropout(rate=0.3), (40, 25, 2)
    values = {"x": np.ones((*shape, 50)), "dy": np.ones((*shape, 50))}
    c = run(layer, place(layer, shape, values))
    n = c.y.size
    kept = c.y != 0
    assert abs(kept.mean() - 0.7) < 4 * np.sqrt(0.21 / n)
    assert np.array_equal(c.dx, c.y) and np.allclose(c.y[kept], 1 / 0.7)
    flat = kept.reshape(-1, 50).astype(float) - 0.7
    others = [np.roll(flat, 1, 0), np.roll(flat, 1, 1), np.roll(flat, 50, 0)]
    for change in ({"step": 4}, {"seed": 12}, {"step": 3 + (1 << 32)}, {"seed": 11 + (1 << 32)}, {"layer": 1}):
        again = replace(c, y=np.empty_like(c.y), **change)
        layer.forward(again)
        others.append((again.y != 0).reshape(-1, 50).astype(float) - 0.7)
    for other in others:
        assert abs((flat * other).mean()) < 5 * 0.21 / np.sqrt(n)
    # No unit and no column stands out.
    assert abs(flat.mean(0)).max() < 5 * np.sqrt(0.21 / flat.shape[0]) and abs(flat.mean(1)).max() < 5 * np.sqrt(0.21 / 50)
    layer.forward(replace(c, training=False))
    assert np.array_equal(c.y, c.x)


def test_dropout_of_a_dense_layer() -> None:
    layer = Dropout(rate=0.5)
    values = {"x": np.ones((12, 9)), "dy": np.ones((12, 9))}
    one, piece = (place(layer, (12,), values, box) for box in (None, (Range(5, 9),)))
    layer.forward(one)
    layer.forward(piece)
    assert np.array_equal(piece.y, one.y[5:9])
    y = np.empty_like(one.y)
    drop.py_func(y, one.x, one.scratch["units"], 0.5, one.seed, one.step, one.layer)
    assert np.array_equal(y, one.y)


def test_dropout_layers_of_one_network_have_masks_of_their_own() -> None:
    """With one mask for both the mean would be 2."""
    model = Model([Dropout(rate=0.5), Dropout(rate=0.5)], Squared(), (10_000,), 10_000, "float64")
    network = Network(model, 4)
    network.x[:] = 1
    cells = network.forward(np.zeros(0), np.zeros((10_000, 4)), np.zeros(0), 3, 11)
    assert cells[1].y.mean() == pytest.approx(1, abs=5 * np.sqrt(3 / 40_000))


@pytest.mark.parametrize(
    ("layer", "x_shape", "words"),
    [
        (Local(maps=2, field=3), (12,), "works on images"),
        (Norm(), (12,), "works on images"),
        (Pool(), (4, 4), "works on images"),
        (Conv(maps=2, field=5), (4, 9, 1), "smaller field"),
        (Local(maps=2, field=3, padding=3), (9, 9, 1), "0 <= padding < field"),
        (Conv(maps=2, field=3, stride=0), (9, 9, 1), "stride >= 1"),
    ],
    ids=lambda value: value.kind if isinstance(value, Layer) else "",
)
def test_what_does_not_fit_is_said(layer: Layer, x_shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        layer.output_shape(x_shape)
