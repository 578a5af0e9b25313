"""What a step costs beside its kernels, for a network so small that only that matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from dbnet.commands.bench.base import Bench, Row, alternate, row
from dbnet.commands.bench.step import dense_replica, direct, torch_step
from dbnet.data.batches import gather
from dbnet.network.layers.activations import ACTIVATIONS
from dbnet.network.losses import base, softmax
from dbnet.network.replica import Replica
from dbnet.shards.rules.adagrad import Adagrad, adagrad


def kernel_calls(replica: Replica) -> list[tuple[Callable, tuple]]:
    """Return every kernel call of one step of a dense network, with its arguments ready."""
    network, train = replica.network, replica.train
    n = network.size
    w, g, h = (np.zeros(n, np.float32) for _ in range(3))
    cells, stats, last = network.bind(w, g), network.stats, replica.model.layers
    index = np.arange(train.batch)
    calls: list[tuple[Callable, tuple]] = [(gather, (train.part.x, index, train.batch, 1.0, network.x))]
    for layer, c in zip(last, cells, strict=True):
        calls += [(c.scratch["y"], ()), (ACTIVATIONS[layer.activation].forward, (c.y, c.p["b"]))]
    y, dy = cells[-1].y, cells[-1].dy
    calls += [
        (softmax.reduce, (y, train.target, 0, stats, dy)),
        (softmax.combine, (stats[None], stats)),
        (softmax.finish, (train.target, 0, stats, train.batch, dy)),
        (base.tally, (stats, train.target, train.batch)),
    ]
    for layer, c in reversed(list(zip(last, cells, strict=True))):
        calls += [(ACTIVATIONS[layer.activation].delta, (c.y, c.dy, c.g["b"], False)), (c.scratch["dW"], (False,))]
        calls += [(c.scratch["dx"], ())] if c.dx is not None else []
    return [*calls, (adagrad, (w, g, h, 0.05))]


class Overhead(Bench):
    """A step of the digits network, and the part of it that is no kernel: Python, book-keeping, the store."""

    kind: ClassVar[str] = "overhead"

    def rows(self, repeat: int) -> list[Row]:
        replica = dense_replica((64, 128, 10), 20, 2000)
        step = direct(replica, Adagrad(rate=0.05))
        step()
        kernels = kernel_calls(replica)

        def many(one: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                for _ in range(500):
                    one()

            return run

        def all_kernels() -> None:
            for function, arguments in kernels:
                function(*arguments)

        mine, bare = alternate(repeat, many(step), many(all_kernels))
        rows = [row("overhead", "digits network step, batch 20, Adagrad", mine, "its kernels alone", bare, "", 1e6 / 500, "us")]
        other = torch_step((64, 128, 10), 20, 0.05)
        if other is not None:
            mine, torch_times = alternate(repeat, many(step), many(other))
            rows.append(row("overhead", "digits network step, batch 20", mine, "PyTorch (sgd)", torch_times, "", 1e6 / 500, "us"))
        rest = rows[0].value - rows[0].other
        rows.append(
            Row("overhead", "everything that is no kernel", rest, "us", "bound", 150.0, rest / 150, "<= 1.0", rows[0].spread)
        )
        return rows
