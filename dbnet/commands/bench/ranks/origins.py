"""What hundreds of replicas cost their coordinator, and its program: rank 0 is the coordinator, the others are these in turns.

A replica here does nothing but what every one does beside its gradients: it reports, looks for orders, and gives signs of life,
each at the rate that belongs to so many. Rank 0 looks at all of them as in every round of a run, and changes an order of all now
and then.
"""

from __future__ import annotations

import sys
import time
from typing import Any, ClassVar

import numpy as np

from dbnet.comm import mpi
from dbnet.comm.channel import MpiChannel
from dbnet.comm.topology import Topology
from dbnet.comm.turns import IDLE, Turns, drive
from dbnet.comm.window import MpiWindow, WindowLayout
from dbnet.commands.bench.base import Bench, Row, on_ranks
from dbnet.coordinator.heartbeat import Heartbeat, HeartbeatWatch, heartbeat_fields, polling
from dbnet.coordinator.orders import MADE, POLL, OrderBook, Orders, coordinator_fields

_SECONDS, _BOUND, _ORDERS = 4.0, 20.0, 0.5
# So many processes that a replica's turn comes before its next report is due, also over TCP.
_REPLICAS, _RANKS = 500, 11
# Every rank as if on a host of its own; each MPI heeds its own words.
_TCP = {
    "MPIR_CVAR_NUM_CLIQUES": str(_RANKS),
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "FI_PROVIDER": "tcp",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,tcp",
    "OMPI_MCA_osc": "rdma",
}


class ManyReplicas(Bench):
    """A coordinator of 500 replicas that only report and look for orders: its share of a core, and how soon an order is seen."""

    kind: ClassVar[str] = "many_replicas"

    def rows(self, repeat: int) -> list[Row]:
        place, repeat = "dbnet.commands.bench.ranks.origins", min(repeat, 3)
        here = on_ranks("many_replicas", _RANKS, place, _REPLICAS, "shared memory", repeat)
        return here + (on_ranks("many_replicas", _RANKS, place, _REPLICAS, "TCP", repeat, environment=_TCP) if here else [])


def main(replicas: int, way: str, repeat: int) -> None:
    """Measure; `way` says what lies between the ranks, "TCP" or anything else."""
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        world = Topology(1, replicas)
        layouts = [WindowLayout([*coordinator_fields(world), *heartbeat_fields(world)]), *[WindowLayout(())] * (comm.size - 1)]
        window = MpiWindow(comm, layouts)
        rounds = [lead(comm, window, world, way) if comm.rank == 0 else follow(comm, window, world) for _ in range(repeat)]
        heard = comm.gather(rounds)
        if comm.rank == 0:
            report(f"{replicas} replicas, {way}", rounds, heard[1:])
        window.free()


def lead(comm: Any, window: MpiWindow, world: Topology, way: str) -> float:
    """Look at all replicas for some seconds; return this rank's processor seconds per second."""
    watch, book, clock = HeartbeatWatch(window, world, _BOUND), OrderBook(window, world), time.perf_counter
    servers = MpiChannel(comm)
    # What is loaded on first use.
    watch.look()
    comm.Barrier()
    began, end = time.process_time(), clock() + _SECONDS

    def rounds() -> Turns:
        due = clock() + _ORDERS
        while (now := clock()) < end:
            servers.receive()
            watch.look()
            book.status()
            if now >= due:
                window.local["order"][:, MADE] = time.perf_counter_ns()
                due = now + _ORDERS
            yield IDLE

    # Over several hosts the coordinator looks as often as ever, since its looks move transfers.
    drive(rounds(), 60.0, lazy=1e-3 if way == "TCP" else 2 * POLL)
    spent = time.process_time() - began
    # A barrier moves transfers, too.
    comm.Barrier()
    return spent / _SECONDS


def follow(comm: Any, window: MpiWindow, world: Topology) -> tuple[list[float], list[float]]:
    """Be some of the replicas in turns; return the seconds of reports, and those after which orders were seen."""
    mine, clock = range(comm.rank - 1, world.replicas, comm.size - 1), time.perf_counter
    origins = [Orders(window, world, r, clock, period=polling(world)) for r in mine]
    signs = [Heartbeat(window, world, world.origin_rank(r, 0), _BOUND, lambda: False) for r in mine]
    known = {id(one): one.made for one in origins}
    took, late = [], []
    comm.Barrier()
    end = clock() + _SECONDS
    while clock() < end:
        for one, sign in zip(origins, signs, strict=True):
            sign.beat()
            before, begin = one.status[0], clock()
            one.poll()
            if one.status[0] != before:
                took.append(clock() - begin)
            if one.made != known[id(one)]:
                # Of an order of the round before nobody knows when it would have been seen.
                if known[id(one)]:
                    late.append(1e-9 * (time.perf_counter_ns() - one.made))
                known[id(one)] = one.made
        # In place of gradients.
        time.sleep(1e-3)
    comm.Barrier()
    return took, late


def report(name: str, shares: list[float], heard: list[list[tuple[list[float], list[float]]]]) -> None:
    """Print the rows for the process that started this."""
    took = [float(np.median(np.concatenate([one[i][0] for one in heard]))) for i in range(len(shares))]
    late = [float(np.max(np.concatenate([one[i][1] for one in heard]))) for i in range(len(shares))]
    rate = [np.sum([len(one[i][0]) for one in heard]) / _SECONDS for i in range(len(shares))]
    for what, unit, scale, values in (
        ("coordinator", "% of a core", 100, shares),
        ("reports", "a second", 1, rate),
        ("a report, median", "us", 1e6, took),
        ("the slowest sight of an order", "ms", 1e3, late),
    ):
        print(f"row\t{name}: {what}\t{unit}\t{scale}\t\t\t{' '.join(f'{v:.6g}' for v in values)}\t", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
