"""On the ranks of one mpirun: window and channel alone, every rank checking what it sees: primitives.py FOLDER SIZE...

For every SIZE the first so many ranks do it; each leaves a mark in the folder, SIZE.RANK.
"""

import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from dbnet.comm import communicators, mpi
from dbnet.comm.channel import MpiChannel
from dbnet.comm.topology import Topology
from dbnet.comm.window import Field, MpiWindow, WindowLayout
from dbnet.core.errors import UserError


def window(comm: MPI.Comm) -> None:
    """Rank 0 and 1 give memory; all others put their own row, then read everything."""
    n, me = comm.size, comm.rank
    fields = [Field("odd", "int64", (3,)), Field("rows", "float32", (n, 5)), Field("none", "float64", (0,))]
    layouts = [WindowLayout(fields if rank < 2 else ()) for rank in range(n)]
    win = MpiWindow(comm, layouts)
    assert win.direct(comm, 60.0), "on one host shards and coordinator may rest"
    if me < 2:
        assert not any(view.any() for view in win.local.values()), "window memory starts with zeros"
        assert {name: view.shape for name, view in win.local.items()} == {"odd": (3,), "rows": (n, 5), "none": (0,)}
        win.local["odd"][:] = me + 7
    win.sync()
    comm.Barrier()
    if me >= 2:
        row = np.full(5, me, np.float32)
        for target in range(2):
            win.put(target, "rows", row, 5 * me)
            win.put(target, "none", np.zeros(0))
            win.flush(target)
            seen = np.zeros(2, np.int64)
            win.get(target, "odd", seen, 1)
            win.flush(target)
            assert seen.tolist() == [target + 7] * 2, seen
    comm.Barrier()
    win.sync()
    if me < 2:
        expected = np.repeat(np.arange(n), 5).reshape(n, 5)
        expected[:2] = 0
        assert np.array_equal(win.local["rows"], expected), win.local["rows"]
    comm.Barrier()
    win.free()
    assert win.local == {}


def room(comm: MPI.Comm) -> None:
    """A window that a host's shared memory cannot hold is refused before it is made, on every rank with the same sentence."""
    layouts = [WindowLayout([Field("big", "uint8", (1 << 20,))])] * comm.size
    mpi.shared_memory, before = lambda: (2 * comm.size << 20) - 1, mpi.shared_memory
    try:
        MpiWindow(comm, layouts)
    except UserError as error:
        said = comm.allgather(str(error))
        assert len(set(said)) == 1 and f"take {comm.size}.0 MiB of shared memory, but /dev/shm has" in said[0], said
    else:
        raise AssertionError("a window that does not fit was made")
    mpi.shared_memory = lambda: 2 * comm.size << 20
    MpiWindow(comm, layouts).free()
    mpi.shared_memory = before


def until(seconds: float, poll):
    """Poll for something that is not None; fail after a deadline."""
    end = time.monotonic() + seconds
    while (found := poll()) is None:
        assert time.monotonic() < end, "nothing came"
        time.sleep(1e-4)
    return found


def channel(comm: MPI.Comm) -> None:
    """Servers send each other small things and a large array; order is kept between two; replicas take no part."""
    comms = communicators.connect(comm, Topology(comm.size - 2, 1))
    if comms.servers is None:
        assert comms.replica.size == 1
        return
    assert comms.servers.rank == comm.rank
    end = MpiChannel(comms.servers)
    assert end.receive() is None
    comms.servers.Barrier()
    big = np.arange(300_000, dtype=np.float32)
    others = [rank for rank in range(comms.servers.size) if rank != comm.rank]
    for rank in others:
        end.send(rank, "small", comm.rank)
        end.send(rank, "big", ("params", 5, big + comm.rank))
        end.send(rank, "empty")
    got = [until(20, end.receive) for _ in range(3 * len(others))]
    for rank in others:
        mine = [message for message in got if message.source == rank]
        assert [message.kind for message in mine] == ["small", "big", "empty"]
        assert mine[0].content == rank and mine[2].content is None
        assert np.array_equal(mine[1].content[2], big + rank)
    until(20, lambda: None if end.pending() else True)
    assert end.receive() is None
    comms.servers.Barrier()


if __name__ == "__main__":
    world = mpi.world()
    with mpi.abort_on_error(world):
        for size in map(int, sys.argv[2:]):
            part = world.Split(world.rank < size, world.rank)
            if world.rank < size:
                window(part)
                room(part)
                channel(part)
                part.Barrier()
                (Path(sys.argv[1]) / f"{size}.{part.rank}").touch()
            part.Free()
        world.Barrier()
