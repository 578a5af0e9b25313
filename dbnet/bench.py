"""`dbnet bench`: kernels, fetch, push, apply and whole steps, each beside what it can at best be, and beside PyTorch.

Everything that is compared is measured in the same process run, in turns, so that a busy machine slows both; each figure is the
smallest of the repetitions, its spread (largest over smallest) is shown too. One thread, unless a row says otherwise. PyTorch rows
appear where torch can be imported. `wire` starts two ranks with the mpirun beside this Python.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from dbnet import jit, table
from dbnet.batches import Batches
from dbnet.data.base import Part
from dbnet.direct import DirectStore
from dbnet.errors import UserError, nearest
from dbnet.layers.dense import Dense
from dbnet.losses.softmax import Softmax
from dbnet.model import Model
from dbnet.ranges import Range
from dbnet.replica import Replica
from dbnet.rules.adagrad import Adagrad
from dbnet.rules.base import Rule
from dbnet.rules.sgd import Sgd
from dbnet.shard import Shard


class Row(NamedTuple):
    """One figure: what, dbnet's value, the value it is compared with, and the bar for their ratio.

    Attributes
    ----------
    value, other
        In `unit`; `other` is NaN where there is nothing to compare with.
    ratio, bar
        value / other for times (lower is better) or rates (higher is better), and the wanted bound, as text like '<= 1.0'.
    spread
        Largest over smallest repetition of `value`.
    """

    part: str
    name: str
    value: float
    unit: str
    against: str
    other: float
    ratio: float
    bar: str
    spread: float


def alternate(repeat: int, *functions: Callable[[], object]) -> list[np.ndarray]:
    """Time functions in turns; return each one's seconds, [repeat], after one unmeasured round."""
    out = np.zeros((repeat + 1, len(functions)))
    for i in range(repeat + 1):
        for j, function in enumerate(functions):
            start = time.perf_counter()
            function()
            out[i, j] = time.perf_counter() - start
    return list(out[1:].T)


def row(part: str, name: str, times: np.ndarray, against: str, other: np.ndarray | None, bar: str, scale: float, unit: str) -> Row:
    """Make a row of times; `scale` turns seconds into `unit`, or a positive amount into amount per second for '/s' units."""
    best, base = times.min(), np.nan if other is None else other.min()
    if unit.endswith("/s"):
        return Row(part, name, scale / best, unit, against, scale / base, base / best, bar, times.max() / best)
    return Row(part, name, best * scale, unit, against, base * scale, best / base, bar, times.max() / best)


# --- apply --------------------------------------------------------------------------------------------------------------------


@jit.kernel("T[:];T[:];T[:];f8")
def plain(w: np.ndarray, g: np.ndarray, h: np.ndarray, a: float) -> None:
    """Read three vectors and write two, like Adagrad, with next to no arithmetic."""
    s = w.dtype.type(a)
    for i in range(w.size):
        h[i] += g[i]
        w[i] += s * g[i]


@jit.kernel("T[:];T[:];f8")
def plain_two(w: np.ndarray, g: np.ndarray, a: float) -> None:
    """Read two vectors and write one, like sgd."""
    s = w.dtype.type(a)
    for i in range(w.size):
        w[i] += s * g[i]


def bench_apply(repeat: int) -> list[Row]:
    """A shard's update of 16 million parameters, in slices of 1 MiB as they come, against a plain loop over the same bytes."""
    n, rng = 1 << 24, np.random.default_rng(1)
    rows = []
    for rule, loop, streams in ((Adagrad(), plain, 5), (Sgd(), plain_two, 3)):
        shard = Shard(Range(0, n), rule, np.zeros(n, np.float32), np.zeros(1, np.int64), time.perf_counter)
        g, w, h = rng.standard_normal(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)

        def slices(shard: Shard = shard, g: np.ndarray = g) -> None:
            for lo in range(0, n, 1 << 18):
                shard.apply(lo, g[lo : lo + (1 << 18)], 1)

        def bare(
            w: np.ndarray = w, g: np.ndarray = g, h: np.ndarray = h, loop: Callable = loop, three: bool = streams == 5
        ) -> None:
            loop(w, g, h, 1e-9) if three else loop(w, g, 1e-9)

        mine, other = alternate(repeat, slices, bare)
        rows.append(
            row("apply", f"{rule.kind}, 16.8 M float32", mine, "plain loop", other, ">= 0.8", streams * 4 * n / 1e9, "GB/s")
        )
    return rows


# --- step ---------------------------------------------------------------------------------------------------------------------

SPEECH = (440, 2560, 2560, 2560, 2560, 8192)


def dense_replica(sizes: Sequence[int], batch: int, examples: int, activation: str = "sigmoid") -> Replica:
    """Return a replica of a fully connected network on random data."""
    layers = [Dense(units=n, activation=activation) for n in sizes[1:-1]] + [Dense(units=sizes[-1])]
    model = Model(layers, Softmax(), (sizes[0],), sizes[-1], "float32")
    rng = np.random.default_rng(2)
    part = Part(rng.standard_normal((examples, sizes[0]), np.float32), rng.integers(0, sizes[-1], examples))
    return Replica(model, Batches(part, batch, 1.0, model.dtype, (1, 0)), {}, 1)


def direct(replica: Replica, rule: Rule) -> Callable[[], None]:
    """Return one whole step of a replica in the process of its shard: fetch, gradient, push, update."""
    n = replica.model.layout.size
    flat = np.zeros(n, np.float32)
    replica.model.layout.draw(Range(0, n), 1, flat)
    shard = Shard(Range(0, n), rule, flat, np.zeros(1, np.int64), time.perf_counter)
    store = DirectStore(flat, [shard], 0, share=True)

    def step() -> None:
        for _ in store.fetch():
            raise AssertionError("a direct fetch never waits")
        store.accrued(first=True)
        replica.accrue(store.w, store.g, 0, 0.0)
        for _ in store.push(1):
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
    for n, m in zip(sizes[:-2], sizes[1:-1], strict=True):
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
    from dbnet.gemm import Gemm

    rng, products = np.random.default_rng(3), []
    total = sum((n + 1) * m for n, m in zip(sizes[:-1], sizes[1:], strict=True))
    w, g, at = rng.standard_normal(total, np.float32), np.zeros(total, np.float32), 0
    outputs = [rng.standard_normal((n, batch), np.float32) for n in sizes]
    for i, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
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


def bench_step(repeat: int, batches: Sequence[int] = (32, 100, 256)) -> list[Row]:
    """The speech network of the paper (41,777,152 parameters), sgd, in one process, against PyTorch and against its bare products."""
    rows = []
    for batch in batches:
        mine = direct(dense_replica(SPEECH, batch, 4 * batch), Sgd(rate=1e-3))
        other, bare = torch_step(SPEECH, batch, 1e-3), bare_step(SPEECH, batch)
        times = alternate(repeat, mine, bare, *([other] if other else []))
        name, torch_bar = f"speech network, batch {batch}", "<= 1.0" if batch == 100 else "<= 0.92"
        if other:
            rows.append(row("step", name, times[0], "PyTorch", times[2], torch_bar, 1e3, "ms"))
        rows.append(row("step", name, times[0], "bare products", times[1], "<= 1.12", 1e3, "ms"))
    return rows


# --- overhead -----------------------------------------------------------------------------------------------------------------


def bench_overhead(repeat: int) -> list[Row]:
    """A step of the digits network, and the part of it that is no kernel: Python, book-keeping, the store."""
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
    rows.append(Row("overhead", "everything that is no kernel", rest, "us", "bound", 150.0, rest / 150, "<= 1.0", rows[0].spread))
    return rows


def kernel_calls(replica: Replica) -> list[tuple[Callable, tuple]]:
    """Return every kernel call of one step of a dense network, with its arguments ready."""
    from dbnet import losses
    from dbnet.activations import ACTIVATIONS
    from dbnet.batches import gather
    from dbnet.losses import base, softmax
    from dbnet.rules.adagrad import adagrad

    assert losses
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


# --- wire ---------------------------------------------------------------------------------------------------------------------


def bench_wire(repeat: int) -> list[Row]:
    """Push and fetch of 42 million parameters between two ranks, against bare Put and Get; runs mpirun and reads its rows."""
    launcher = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if launcher is None:
        print("wire: left out, there is no mpirun on this machine")
        return []
    command = [launcher, "-n", "2", sys.executable, "-m", "dbnet.bench_wire", str(repeat)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise UserError(f"'{' '.join(command)}' failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    rows = []
    for line in done.stdout.splitlines():
        if line.startswith("row\t"):
            name, amount, against, bar, mine, other = line.split("\t")[1:]
            times = [np.array([float(t) for t in text.split()]) for text in (mine, other)]
            rows.append(row("wire", name, times[0], against, times[1], bar, float(amount) / 1e9, "GB/s"))
    return rows


PARTS: dict[str, Callable[[int], list[Row]]] = {
    "apply": bench_apply,
    "overhead": bench_overhead,
    "wire": bench_wire,
    "step": bench_step,
}


def run(parts: Sequence[str], out: Path, repeat: int) -> None:
    """Measure the named parts (none: all), print the figures as a table and store them in an HDF5 file."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"'{part}' is not a part of the benchmark{nearest(part, PARTS)}; parts are {', '.join(PARTS)}.")
    threadpool_limits(limits=1, user_api="blas")
    jit.set_threads(1)
    jit.warm("float32")
    rows: list[Row] = []
    for name in parts or PARTS:
        print(f"{name}: {PARTS[name].__doc__.splitlines()[0]}", flush=True)
        rows += PARTS[name](repeat)
        show(rows[-len(rows) :], name)
    table.write(out, "bench", [r._asdict() for r in rows])
    print(f"Figures stored in {out}")


def show(rows: Sequence[Row], part: str) -> None:
    """Print one part's rows."""
    for r in rows:
        if r.part == part:
            verdict = "" if not r.bar else ("   ok" if _holds(r) else "   MISSED")
            compared = "" if r.other != r.other else f"{r.against:<18} {r.other:>9.4g}   ratio {r.ratio:6.3f}"
            print(f"  {r.name:<42} {r.value:>9.4g} {r.unit:<5} {compared}  {r.bar:<8}{verdict}   spread {r.spread:.2f}", flush=True)


def _holds(r: Row) -> bool:
    sign, bound = r.bar.split()
    return r.ratio <= float(bound) if sign == "<=" else r.ratio >= float(bound)
