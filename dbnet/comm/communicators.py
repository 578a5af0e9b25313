"""The only Split: world -> servers, replica, node; how many cores each rank may use, how the clocks of hosts differ.

They are made once and passed as values. After that no collective includes a replica's rank until the run has ended.

Servers (coordinator and shards) exchange messages, the partitions of one replica exchange values, ranks of one node share cores
and memory. Replicas and shards have no communicator in common but the world's, over which they share a window.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbnet.comm.topology import Role, Topology
from dbnet.core.errors import UserError


@dataclass(frozen=True)
class Communicators:
    """The communicators of one rank; `servers` and `replica` are None where the rank is not in them.

    Attributes
    ----------
    world
        All ranks, a duplicate of MPI's.
    servers
        Coordinator and shards; a server's rank in it equals its rank in the world.
    replica
        The partitions of one replica.
    node
        The ranks that share memory with this one.
    """

    world: Any
    servers: Any
    replica: Any
    node: Any


def connect(comm: Any, topology: Topology) -> Communicators:
    """Make all communicators; collective over `comm`."""
    from mpi4py import MPI

    role = topology.role(comm.rank)
    working = role is Role.WORK
    servers = comm.Split(MPI.UNDEFINED if working else 0, comm.rank)
    replica = comm.Split(topology.place(comm.rank)[0] if working else MPI.UNDEFINED, comm.rank)
    return Communicators(comm.Dup(), None if working else servers, replica if working else None, node_of(comm))


def node_of(comm: Any) -> Any:
    """Return the communicator of the ranks that share memory with this one; None without MPI."""
    if comm is None:
        return None
    from mpi4py import MPI

    return comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)


def crowded(node: Any) -> bool:
    """Return whether more ranks than cores share memory with this one."""
    return node is not None and node.size > len(os.sched_getaffinity(0))


def threads_for(comm: Any, computes: bool, asked: int | None) -> tuple[int, int]:
    """Return (threads of this rank's kernels, cores it may run on): as many as were `asked` for, or its share of its cores.

    Raises
    ------
    UserError
        There are not as many cores as threads were asked for.
    """
    share, cores = cores_for(comm, computes)
    if asked is not None and asked > cores:
        raise UserError(
            f"run.threads = {asked}, but a rank may run on {cores} {'core' if cores == 1 else 'cores'} here; make it at most "
            f"{cores}, or bind ranks to more cores."
        )
    return (share if asked is None else asked), cores


def cores_for(comm: Any, computes: bool) -> tuple[int, int]:
    """Return (threads this rank may use, cores it may run on): its cores, shared with the node's other computing ranks there."""
    mine = frozenset(os.sched_getaffinity(0))
    if comm is None:
        return len(mine), len(mine)
    others = comm.allgather((sorted(mine), computes))
    sharing = sum(1 for cores, computing in others if computing and mine & set(cores))
    return max(1, len(mine) // max(1, sharing)), len(mine)


_TRIPS = 16


def clock_offset(world: Any, node: Any) -> tuple[int, int]:
    """Return what is added to this host's clock to get that of rank 0's host, and by how much that may be wrong, both in ns.

    One rank of each other host asks rank 0 for the time, some times; the quickest answer counts, and is taken to have been given
    half-way. The ranks of one host share a clock. Collective over `world`.
    """
    first = node.bcast(world.rank)
    leaders = sorted({leader for leader in world.allgather(first) if leader})
    mine, found = np.zeros(1, np.int64), (0, 0)
    for leader in leaders if world.rank == 0 else ():
        for _ in range(_TRIPS):
            world.Recv(mine, leader)
            mine[0] = time.perf_counter_ns()
            world.Send(mine, leader)
    if world.rank == first and first:

        def ask() -> int:
            world.Send(mine, 0)
            world.Recv(mine, 0)
            return int(mine[0])

        found = compare_clocks(ask, time.perf_counter_ns)
    return node.bcast(found)


def compare_clocks(ask: Callable[[], int], now: Callable[[], int]) -> tuple[int, int]:
    """Return what is added to `now` to get the clock that `ask` reads, and by how much that may be wrong."""
    trips = []
    for _ in range(_TRIPS):
        begin, there, end = now(), ask(), now()
        trips.append((end - begin, there - (begin + end) // 2))
    quickest, offset = min(trips)
    return offset, quickest // 2 + 1
