"""What ranks cost beside their kernels: real runs whose processor seconds are counted, and bare one-sided operations.

Runs of one replica and one shard, of networks from small to huge, on three ranks of one host. What a fetch and a push took in the
small and the large one gives the seconds of an operation and the bandwidth of a copy; what a shard took those of a slice and of a
byte; what is left of a step, beside kernels and turns, is `compute.step`. The huge one says what differs where no cache holds the
parameters. Two are made once more with all three ranks on one core, if the system lets them there: what they take longer, and how
often that core went from rank to rank. One-sided operations are then timed bare, within a host and from the first host to another
one. As a program of its own it writes what was found, as JSON: the way in which `dbnet calibrate` starts three ranks itself.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.comm import mpi
from dbnet.comm.communicators import crowded
from dbnet.comm.window import Field, MpiWindow, WindowLayout
from dbnet.commands.bench.ranks.job import Account, count_all
from dbnet.commands.bench.run import Training, tables
from dbnet.data import file
from dbnet.data.formats.random import Random
from dbnet.run import ranks, train
from dbnet.shards.server import Server
from dbnet.shards.store import Inbox

# A shard takes the small one in one slice, the large one in eight.
SMALL = Training("small", (64, 256, 10), 4000, 20, 20, {"kind": "adagrad", "rate": 0.01}, {})
LARGE = Training("large", (784, 1024, 1024, 10), 4000, 1, 20, {"kind": "adagrad", "rate": 0.001}, {})
MIDDLE = Training("middle", (784, 256, 10), 4000, 10, 50, {"kind": "adagrad", "rate": 0.001}, {})
HUGE = Training("huge", (440, 1024, 1024, 2048), 2560, 1, 32, {"kind": "adagrad", "rate": 0.001}, {})
RANKS = 3
_BULK, _TRIES, _LOOKS = 1 << 22, 200, 2000


def measure(comm: Any, within: Path | None = None) -> dict[str, Any]:
    """Return, on rank 0, what these ranks have measured: `runs`, `inside` and `between`, each None where that was not possible.

    Files of the runs are in a folder `within` another one while they are made; `shared` says why no runs shared one core.
    """
    hosts = comm.allgather(socket.gethostname())
    near = next((found for name in dict.fromkeys(hosts) if len(found := _ranks_of(hosts, name)) >= RANKS), [])[:RANKS]
    found: dict[str, Any] = {"hosts": len(set(hosts)), "runs": None, "shared": ""}
    if near:
        # Ranks that wait must not take the cores of those that measure.
        group = comm.Split(int(comm.rank in near), comm.rank)
        told = _runs(group, within) if comm.rank in near else None
        mpi.meet(comm)
        found["runs"], found["shared"] = next(one for one in comm.allgather(told) if one is not None)
    pairs = {"inside": next((r for r in range(1, comm.size) if hosts[r] == hosts[0]), None)}
    pairs["between"] = next((r for r in range(1, comm.size) if hosts[r] != hosts[0]), None)
    for name, other in pairs.items():
        found[name] = None if other is None else _bare(comm, other)
    return found


def _ranks_of(hosts: list[str], name: str) -> list[int]:
    return [rank for rank, host in enumerate(hosts) if host == name]


# --- real runs ----------------------------------------------------------------------------------------------------------------


def _runs(comm: Any, within: Path | None) -> tuple[dict[str, dict[str, Any]], str] | None:
    """Carry out the runs; the first rank returns what each took, by role, and why none was made on one core, if none was."""
    account, turns = Account(), [0]
    _count(account, turns)
    with tempfile.TemporaryDirectory(dir=within) if comm.rank == 0 else nullcontext() as mine:
        folder = Path(comm.bcast(mine))
        out = {network.name: _run(comm, network, folder, account, turns) for network in (SMALL, MIDDLE, LARGE, HUGE)}
        again = (SMALL._replace(epochs=8), MIDDLE)
        with one_core(comm) as why:
            if not why:
                out |= {f"{network.name}, one core": _run(comm, network, folder, account, turns) for network in again}
        if not why and not all(comm.allgather(crowded(comm))):
            with _always_crowded():
                out |= {f"{network.name}, crowded": _run(comm, network, folder, account, turns) for network in again}
        # Whoever is behind still writes there.
        mpi.meet(comm)
    return (out, why) if comm.rank == 0 else None


@contextmanager
def one_core(comm: Any) -> Iterator[str]:
    """Keep all ranks on one core meanwhile; give why that is not possible, the same on all ranks, or nothing."""
    mine = os.sched_getaffinity(0)
    everyone = comm.allgather(mine)
    if len(set.union(*everyone)) == 1:
        yield "ranks may use one core here, which they share in any case"
        return
    # One that all may use, if there is one.
    core, why = min(set.intersection(*everyone) or everyone[0]), ""
    try:
        os.sched_setaffinity(0, {core})
    except OSError as error:
        why = f"the system does not let all ranks onto one core ({error.strerror})"
    try:
        yield next(filter(None, comm.allgather(why)), "")
    finally:
        if not why:
            os.sched_setaffinity(0, mine)


@contextmanager
def _always_crowded() -> Iterator[None]:
    """Let ranks give way as if they were more than their cores."""
    before, ranks.crowded = ranks.crowded, lambda node: True
    try:
        yield
    finally:
        ranks.crowded = before


def _run(comm: Any, network: Training, folder: Path, account: Account, turns: list[int]) -> dict[str, Any]:
    """Carry out a run; the first rank returns what it took."""
    path = folder / f"{network.name}.h5"
    if comm.rank == 0:
        shape, classes = str(network.sizes[0]), network.sizes[-1]
        file.write(path, Random(shape=shape, classes=classes, train=network.examples, test=0).read(), True)
    mpi.meet(comm)
    before, turns[0], since = dict(account.spent), 0, len(_SWITCHES)
    train.execute(tables(network, path, folder, 1, 1), comm=comm, quiet=True)
    spent = {cause: seconds - before[cause] for cause, seconds in account.spent.items()}
    everyone = comm.gather({"spent": spent, "turns": turns[0], "switches": sum(_SWITCHES[since:])})
    steps = -(-network.examples // network.batch) * network.epochs
    parameters = sum((n + 1) * m for n, m in zip(network.sizes, network.sizes[1:], strict=False))
    return {"steps": steps, "bytes": 4 * parameters, "ranks": everyone, "sizes": network.sizes, "batch": network.batch}


# How often this rank has left its core, run by run.
_SWITCHES: list[int] = []


def _left() -> int:
    """Return how often this thread has left its core."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_nvcsw + used.ru_nivcsw


def _count(account: Account, turns: list[int]) -> None:
    """Put the account around everything that a run is made of, and count a shard's turns."""
    count_all(account)
    account.around(Inbox, "apply", "_take")
    played, serve = ranks.Rank.play, Server.run

    def play(rank: ranks.Rank, player: Any) -> None:
        account.turn("poll")
        before = _left()
        played(rank, player)
        _SWITCHES.append(_left() - before)
        account.turn("end")

    def counted(server: Server) -> Iterator[Any]:
        for wait in serve(server):
            turns[0] += 1
            yield wait

    ranks.Rank.play, Server.run = play, counted


# --- bare operations ----------------------------------------------------------------------------------------------------------


def _bare(comm: Any, other: int) -> dict[str, float]:
    """Time one-sided operations of rank 0 on another rank, which looks after MPI meanwhile; seconds, on every rank."""
    fields = [Field("word", "int64", (1,)), Field("bulk", "uint8", (_BULK,))]
    window = MpiWindow(comm, [WindowLayout(fields if rank == other else ()) for rank in range(comm.size)])
    word, bulk, found = np.ones(1, np.int64), np.ones(_BULK, np.uint8), {}

    def timed(field: str, data: np.ndarray, times: int) -> tuple[float, float]:
        starts, flushes = np.zeros((2, times))
        for i in range(times):
            begun = time.perf_counter()
            window.put(other, field, data)
            started = time.perf_counter()
            window.flush(other)
            starts[i], flushes[i] = started - begun, time.perf_counter() - started
        return float(np.quantile(starts, 0.25)), float(np.quantile(flushes, 0.25))

    if comm.rank == other:
        # As often as a shard does that has something to do.
        request = comm.Irecv(np.zeros(1, np.int64), 0)
        while not request.Test():
            time.sleep(2e-5)
    if comm.rank == 0:
        timed("word", word, 10)
        timed("bulk", bulk, 2)
        call, flush = timed("word", word, _TRIES)
        whole = sum(timed("bulk", bulk, max(5, _TRIES // 10)))
        found = {
            "call": call,
            "latency": flush / 2,
            "bandwidth": _BULK / max(whole - call - flush, 1e-9),
            "look": _look(comm, other),
        }
        comm.Send(np.zeros(1, np.int64), other)
    mpi.meet(comm)
    window.free()
    return comm.bcast(found)


def _look(comm: Any, other: int) -> float:
    """Return the seconds of a look for a message that is not there, as partitions look for each other's values."""
    request = comm.Recv_init(np.zeros(1, np.int64), other, 1)
    request.Start()
    began = time.thread_time()
    for _ in range(_LOOKS):
        request.Testall([request])
    seconds = time.thread_time() - began
    request.Cancel()
    request.Wait()
    request.Free()
    return seconds / _LOOKS


def main(out: str) -> None:
    """Measure, and write what was found."""
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        # Whoever started the ranks removes that folder, however they end.
        found = measure(comm, Path(out).parent)
        if comm.rank == 0:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
