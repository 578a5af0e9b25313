"""Whole steps of dense networks in one process, against PyTorch and against their bare matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np

from dbnet.commands.bench.apply import plain_two
from dbnet.commands.bench.base import Bench, Row, alternate, row
from dbnet.core.ranges import Range
from dbnet.data.batches import Batches
from dbnet.data.file import Examples
from dbnet.data.subsets import order
from dbnet.network.layers.dense import Dense
from dbnet.network.layers.gemm import Gemm
from dbnet.network.losses.softmax import Softmax
from dbnet.network.model import Model
from dbnet.network.replica import Replica
from dbnet.shards.local_store import LocalStore
from dbnet.shards.rules.base import Rule
from dbnet.shards.rules.sgd import Sgd
from dbnet.shards.shard import Shard

SPEECH = (440, 2560, 2560, 2560, 2560, 8192)


def dense_replica(sizes: Sequence[int], batch: int, examples: int, activation: str = "sigmoid") -> Replica:
    """Return a replica of a fully connected network on random data."""
    layers = [Dense(units=n, activation=activation) for n in sizes[1:-1]] + [Dense(units=sizes[-1])]
    model = Model(layers, Softmax(), (sizes[0],), sizes[-1], "float32")
    rng = np.random.default_rng(2)
    part = Examples(rng.standard_normal((examples, sizes[0]), np.float32), rng.integers(0, sizes[-1], examples))
    return Replica(model, Batches(part, batch, 1.0, model.dtype, order(1, 0, examples, Range(0, examples))), {}, 1)


def direct(replica: Replica, rule: Rule) -> Callable[[], None]:
    """Return one whole step of a replica in the process of its shard: fetch, gradient, push, update."""
    n = replica.model.layout.size
    flat = np.zeros(n, np.float32)
    replica.model.layout.draw(Range(0, n), 1, flat)
    shard = Shard(Range(0, n), rule, flat, np.zeros(1, np.int64), time.perf_counter)
    store = LocalStore(flat, [shard], 0, share=True)

    def step() -> None:
        for _ in store.fetch():
            raise AssertionError("a direct fetch never waits")
        store.accrued(first=True)
        replica.accrue(store.w, store.g, 0, 0.0)
        for _ in store.push(1, 0):
            raise AssertionError("a direct push never waits")
        shard.take_events()

    return step


def torch_step(sizes: Sequence[int], batch: int, rate: float) -> Callable[[], None] | None:
    """Return the same step in PyTorch, one thread; None where torch is missing."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    stack: list[torch.nn.Module] = []
    for n, m in pairwise(sizes[:-1]):
        stack += [torch.nn.Linear(n, m), torch.nn.Sigmoid()]
    network = torch.nn.Sequential(*stack, torch.nn.Linear(sizes[-2], sizes[-1]))
    loss, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.SGD(network.parameters(), lr=rate)
    x, y = torch.randn(4 * batch, sizes[0]), torch.randint(0, sizes[-1], (4 * batch,))
    turn = iter(range(10**9))

    def step() -> None:
        lo = next(turn) % 4 * batch
        optimizer.zero_grad()
        loss(network(x[lo : lo + batch]), y[lo : lo + batch]).backward()
        optimizer.step()

    return step


def bare_step(sizes: Sequence[int], batch: int) -> Callable[[], None]:
    """Return the matrix products of a step, and one memory pass over parameters and gradient; nothing else."""
    rng, products = np.random.default_rng(3), []
    total = sum((n + 1) * m for n, m in pairwise(sizes))
    w, g, at = rng.standard_normal(total, np.float32), np.zeros(total, np.float32), 0
    outputs = [rng.standard_normal((n, batch), np.float32) for n in sizes]
    for i, (n, m) in enumerate(pairwise(sizes)):
        weights, gradient = w[at : at + n * m].reshape(m, n), g[at : at + n * m].reshape(m, n)
        x, dy = outputs[i], outputs[i + 1]
        products.append(Gemm(weights, x, np.zeros_like(dy)))
        products.append(Gemm(dy, x, gradient, tb=True))
        if i:
            products.append(Gemm(weights, dy, np.zeros_like(x), ta=True))
        at += (n + 1) * m

    def step() -> None:
        for product in products:
            product()
        plain_two(w, g, 1e-9)

    return step


class Step(Bench):
    """The speech network of the paper (41,777,152 parameters), sgd, one process, against PyTorch and its bare products."""

    kind: ClassVar[str] = "step"

    def rows(self, repeat: int) -> list[Row]:
        rows = []
        for batch in (32, 100, 256):
            mine = direct(dense_replica(SPEECH, batch, 4 * batch), Sgd(rate=1e-3))
            other, bare = torch_step(SPEECH, batch, 1e-3), bare_step(SPEECH, batch)
            times = alternate(repeat, mine, bare, *([other] if other else []))
            name, torch_bar = f"speech network, batch {batch}", "<= 1.0" if batch == 100 else "<= 0.92"
            if other:
                rows.append(row("step", name, times[0], "PyTorch", times[2], torch_bar, 1e3, "ms"))
            rows.append(row("step", name, times[0], "bare products", times[1], "<= 1.12", 1e3, "ms"))
        return rows
