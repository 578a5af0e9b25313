"""Two ranks for the benchmark `partitions`: in turns, both compute one cut gradient, then rank 0 computes the uncut one alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from dbnet.comm import mpi
from dbnet.comm.link import MpiLink
from dbnet.commands.bench.step import SPEECH
from dbnet.core import jit
from dbnet.network.exchange import Exchange
from dbnet.network.layers.dense import Dense
from dbnet.network.layers.local import Local
from dbnet.network.layers.norm import Norm
from dbnet.network.layers.pool import Pool
from dbnet.network.losses.logistic import Logistic
from dbnet.network.losses.softmax import Softmax
from dbnet.network.model import Model
from dbnet.network.network import Network
from dbnet.network.partition import Cut


def models() -> list[tuple[str, Model, int, float]]:
    """Return name, model, batch and the wanted gain of each network."""
    stage = (Local(maps=8, field=10), Pool(over="l2", field=5, stride=1), Norm(radius=2))
    images = Model((*stage, Local(maps=8, field=10), Dense(units=100)), Logistic(), (64, 64, 3), 100, "float32")
    dense = [Dense(units=n, activation="sigmoid") for n in SPEECH[1:-1]]
    speech = Model((*dense, Dense(units=SPEECH[-1])), Softmax(), (SPEECH[0],), SPEECH[-1], "float32")
    return [("local image network, batch 32", images, 32, 1.7), ("speech network, batch 256", speech, 256, 1.4)]


def gradient(network: Network, target: np.ndarray) -> Any:
    """Return a function that computes one gradient of random parameters."""
    rng = np.random.default_rng(4)
    w, g = rng.uniform(-0.02, 0.02, network.size).astype(np.float32), np.zeros(network.size, np.float32)
    network.x[:] = rng.standard_normal(network.x.shape)
    return lambda: network.loss_and_gradient(w, g, target, network.batch, False)


def main(repeat: int) -> None:
    comm = mpi.world()
    threadpool_limits(limits=1, user_api="blas")
    jit.set_threads(1)
    with mpi.abort_on_error(comm):
        for turn in range(comm.size):
            if turn == comm.rank:
                jit.warm("float32")
            comm.Barrier()
        for name, model, batch, gain in models():
            measure(comm, name, model, batch, gain, repeat)


def measure(comm: Any, name: str, model: Model, batch: int, gain: float, repeat: int) -> None:
    """Time one network, cut and uncut, and print its rows."""
    target = np.random.default_rng(5).integers(0, int(np.prod(model.shapes[-1])), batch)
    cut, link = Cut(model, comm.size, batch), MpiLink(comm.Dup(), 120.0)
    network = Network(model, batch, cut.boxes[comm.rank])
    exchange = Exchange(link, cut, network)
    together = gradient(network, target)
    alone = gradient(Network(model, batch), target) if comm.rank == 0 else None
    both: list[float] = []
    single: list[float] = []
    waits: list[float] = []
    for i in range(repeat + 1):
        comm.Barrier()
        before, start = exchange.waited, time.perf_counter()
        together()
        link.meet()
        took = time.perf_counter() - start
        comm.Barrier()
        start = time.perf_counter()
        if alone is not None:
            alone()
        if i:
            both.append(took)
            waits.append(exchange.waited - before)
            single.append(time.perf_counter() - start)
    link.close()
    split = comm.gather((min(both), float(np.median(waits)), exchange.values // (repeat + 1)))
    if comm.rank == 0:
        report(name, "ms", 1e3, "one partition", f"<= {1 / gain:.3f}", both, single)
        for rank, (step, waited, values) in enumerate(split):
            report(f"  partition {rank}: kernels and packing", "ms", 1e3, "", "", [max(step - waited, 0.0)], [])
            report(f"  partition {rank}: waiting ({values} values sent each)", "ms", 1e3, "", "", [waited], [])


def report(name: str, unit: str, scale: float, against: str, bar: str, mine: Sequence[float], other: Sequence[float]) -> None:
    """Print one figure for the process that started this."""
    lists = (" ".join(f"{t:.6g}" for t in times) for times in (mine, other))
    print("row\t" + "\t".join([name, unit, str(scale), against, bar, *lists]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
