"""Image layers against PyTorch: local filtering against unfold and batched products, the others against their own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from dbnet.commands.bench.base import Bench, Row, alternate, row
from dbnet.core.ranges import shape_of, whole
from dbnet.network.layers.base import Cell, Layer
from dbnet.network.layers.conv import Conv
from dbnet.network.layers.local import Local
from dbnet.network.layers.norm import Norm
from dbnet.network.layers.pool import Pool

# (maps, rows, columns) of the input, field, maps, batch
LOCAL = (((3, 100, 100), 10, 8, 16), ((3, 64, 64), 10, 8, 32), ((8, 32, 32), 10, 8, 32), ((8, 32, 32), 10, 36, 64))
CONV = (((3, 32, 32), 5, 32, 32), ((3, 32, 32), 5, 32, 100), ((32, 16, 16), 3, 32, 32), ((32, 14, 14), 5, 64, 100))


def cell(layer: Layer, x_shape: tuple[int, ...], batch: int) -> Cell:
    """Return a layer in place on one partition that owns all, with random values."""
    rng, y_shape = np.random.default_rng(1), layer.output_shape(x_shape)
    x, y, dy = (rng.uniform(-1, 1, (*shape, batch)).astype(np.float32) for shape in (x_shape, y_shape, y_shape))
    c = Cell(x_shape, y_shape, whole(x_shape), whole(y_shape), x, y, np.zeros_like(x), dy)
    for name, parameter in layer.parameters(x_shape).items():
        shape = shape_of(parameter.owned(c.y_box))
        c.p[name], c.g[name] = rng.uniform(-1, 1, shape).astype(np.float32), np.zeros(shape, np.float32)
    layer.prepare(c)
    return c


def torch_module() -> Any:
    """Return torch on one thread, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    return torch


def both_ways(layer: Layer, c: Cell) -> Callable[[], None]:
    """Return forward and backward of a layer."""

    def run() -> None:
        layer.forward(c)
        layer.backward(c, False)

    return run


class Layers(Bench):
    """Forward and backward of local, conv, pool and norm layers against PyTorch; a large sgemm as the machine's measure."""

    kind: ClassVar[str] = "layers"

    def rows(self, repeat: int) -> list[Row]:
        return [*self._local(repeat), *self._conv(repeat), *self._pool(repeat), *self._norm(repeat)]

    def _local(self, repeat: int) -> list[Row]:
        torch, rows, square = torch_module(), [], np.ones((1024, 1024), np.float32)
        for shape, field, maps, batch in LOCAL:
            layer, image = Local(maps=maps, field=field), (shape[1], shape[2], shape[0])
            c = cell(layer, image, batch)
            name = f"local {'x'.join(map(str, shape))} field {field} maps {maps} batch {batch}"
            mine, sgemm = alternate(repeat, lambda layer=layer, c=c: layer.forward(c), lambda: square @ square)
            work, rate = layer.flops(image, c.y_box) * batch / 1e9, 2 * 1024**3 / 1e9 / sgemm.min()
            value = work / mine.min()
            bar, spread = ">= 0.5" if batch >= 32 else "", mine.max() / mine.min()
            rows.append(Row("layers", f"{name}, forward", value, "GFLOP/s", "sgemm", rate, value / rate, bar, spread))
            if torch is not None:
                times = alternate(min(repeat, 3), both_ways(layer, c), _unfold(torch, shape, field, maps, batch))
                rows.append(row("layers", f"{name}, both", times[0], "PyTorch unfold + bmm", times[1], "<= 0.05", 1e3, "ms"))
        return rows

    def _conv(self, repeat: int) -> list[Row]:
        torch, rows = torch_module(), []
        if torch is None:
            return rows
        for shape, field, maps, batch in CONV:
            layer, image = Conv(maps=maps, field=field), (shape[1], shape[2], shape[0])
            c = cell(layer, image, batch)
            x = torch.randn(batch, *shape, requires_grad=True)
            w, b = torch.randn(maps, shape[0], field, field, requires_grad=True), torch.zeros(maps, requires_grad=True)
            dy = torch.randn(batch, maps, shape[1] - field + 1, shape[2] - field + 1)

            def other(torch: Any = torch, x: Any = x, w: Any = w, b: Any = b, dy: Any = dy) -> None:
                torch.nn.functional.conv2d(x, w, b).backward(dy)

            times = alternate(repeat, both_ways(layer, c), other)
            name = f"conv {'x'.join(map(str, shape))} field {field} maps {maps} batch {batch}, both"
            rows.append(row("layers", name, times[0], "PyTorch", times[1], "<= 1.0", 1e3, "ms"))
        return rows

    def _pool(self, repeat: int) -> list[Row]:
        torch, rows = torch_module(), []
        if torch is None:
            return rows
        functional = torch.nn.functional
        kinds = {"max": functional.max_pool2d, "average": functional.avg_pool2d, "l2": lambda x, n: functional.lp_pool2d(x, 2.0, n)}
        for over, function in kinds.items():
            layer = Pool(over=over, field=2)
            c, x, dy = cell(layer, (32, 32, 16), 32), torch.randn(32, 16, 32, 32, requires_grad=True), torch.randn(32, 16, 16, 16)
            times = alternate(repeat, both_ways(layer, c), lambda f=function, x=x, dy=dy: f(x, 2).backward(dy))
            rows.append(
                row("layers", f"pool {over} 16x32x32 field 2 batch 32, both", times[0], "PyTorch", times[1], "<= 1.0", 1e3, "ms")
            )
        return rows

    def _norm(self, repeat: int) -> list[Row]:
        """PyTorch has no such layer; what it is compared with writes the same formula with separable convolutions."""
        torch = torch_module()
        if torch is None:
            return []
        layer = Norm(radius=2)
        c, x = cell(layer, (32, 32, 8), 32), torch.randn(32, 8, 32, 32, requires_grad=True)
        line = torch.exp(-0.5 * torch.arange(-2.0, 3.0) ** 2)
        down, across = (line / line.sum()).reshape(1, 1, 5, 1), (line / line.sum()).reshape(1, 1, 1, 5)
        dy, conv = torch.randn(32, 8, 32, 32), torch.nn.functional.conv2d

        def blur(plane: Any) -> Any:
            return conv(conv(plane, down, padding=(2, 0)), across, padding=(0, 2))

        def other() -> None:
            v = x - blur(x.mean(1, keepdim=True))
            sigma = blur((v * v).mean(1, keepdim=True)).sqrt().clamp(min=0.01)
            (v / sigma).backward(dy)

        times = alternate(repeat, both_ways(layer, c), other)
        return [row("layers", "norm 8x32x32 radius 2 batch 32, both", times[0], "PyTorch conv2d", times[1], "<= 1.0", 1e3, "ms")]


def _unfold(torch: Any, shape: tuple[int, ...], field: int, maps: int, batch: int) -> Callable[[], None]:
    """Return local filtering in PyTorch, forward and backward."""
    channels, rows, cols = shape
    x, places = torch.randn(batch, *shape, requires_grad=True), (rows - field + 1) * (cols - field + 1)
    w, dy = torch.randn(places, maps, channels * field * field, requires_grad=True), torch.randn(places, maps, batch)
    return lambda: torch.bmm(w, torch.nn.functional.unfold(x, field).permute(2, 1, 0)).backward(dy)
