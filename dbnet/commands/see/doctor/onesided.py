"""MPI as dbnet uses it, tried on ranks that a launcher has started: one-sided operations from rank 0 to one rank of every kind.

The target obeys messages while the origin measures: it takes turns in MPI as an idle shard does, or computes without entering MPI,
or says what its memory holds. As a program of its own (`python -m dbnet.commands.see.doctor.onesided`) it prints what two ranks
have found, as JSON.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.comm import mpi
from dbnet.comm.patience import Limit
from dbnet.commands.see.doctor.base import BROKEN, OK, SLOW, Finding, looked

# What a window holds: a counter, sums, and what is moved.
_SUMS, _BULK = 64, 1 << 20
_COMMAND, _ANSWER = 71, 72
_BUSY, _PAUSE, _LIMIT = 0.1, 2e-4, 20.0
# The oldest libraries whose windows work (README).
_OLDEST = {"MPICH": (4, 1), "Open MPI": (5, 0)}


def findings(comm: Any) -> Iterator[Finding]:
    """Yield what rank 0 finds; all ranks must call it. Empty on the others."""
    limit = Limit(
        _LIMIT, lambda: mpi.stop_all(comm, f"MPI hangs: no answer within {_LIMIT:.0f} s; is a firewall between the hosts?")
    )
    names = comm.allgather((socket.gethostname(), sorted(os.sched_getaffinity(0)), time.time()))
    found: list[Finding] = []
    if comm.rank == 0:
        found += [*looked("MPI", library), *looked("threads", threads), *looked("pinning", lambda: pinning(names))]
        found += looked("clocks", lambda: clocks(names))
    if comm.size > 1:
        found += _pairs(comm, [name for name, *_ in names])
    limit.lift()
    yield from found


def library() -> Finding:
    """Name, version and ABI of the library, and whether it is new enough."""
    import mpi4py
    from mpi4py import MPI

    vendor, version = MPI.get_vendor()
    module = Path(MPI.__file__).name.removeprefix("MPI.").split(".")[0]
    said = f"{mpi.library_version()}, MPI {'.'.join(map(str, MPI.Get_version()))}; mpi4py {mpi4py.__version__}, built for {module}"
    return judged(vendor, version[:2], said)


def judged(vendor: str, version: tuple[int, ...], said: str) -> Finding:
    """Return whether a library is one that is known to work."""
    oldest = _OLDEST.get(vendor)
    if oldest is not None and version < oldest:
        fix = f"its windows are not good enough: {vendor} {'.'.join(map(str, oldest))} or newer; 'jobs/install mpich' brings one"
        return Finding("MPI", BROKEN, said, fix)
    known = oldest is not None or vendor.startswith("Intel")
    return Finding("MPI", OK if known else SLOW, said, "nobody has tried this one; MPICH, Intel MPI and Open MPI are known to work")


def threads() -> Finding:
    """All threads of a rank must be allowed to call MPI."""
    from mpi4py import MPI

    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    level = levels.get(MPI.Query_thread(), "multiple")
    fix = "unset MPI4PY_RC_THREAD_LEVEL and MPI4PY_RC_THREADS, or use an MPI that is built with thread support"
    return Finding("threads", OK if level == "multiple" else BROKEN, f"level '{level}'", fix)


def pinning(names: list[tuple[str, list[int], float]]) -> Finding:
    """Ranks of one host should not share a core while others are idle."""
    said = []
    for host in dict.fromkeys(name for name, *_ in names):
        sets = [frozenset(cores) for name, cores, _ in names if name == host]
        used = frozenset().union(*sets)
        if len(sets) <= len(used):
            continue
        crowd = f"the {len(sets)} ranks on {host} share {len(used)} of its {os.cpu_count()} cores"
        if len(used) < (os.cpu_count() or 1):
            fix = "start with --bind-to none (Open MPI), or srun --cpu-bind=none; or ask for more cores"
            return Finding("pinning", SLOW, crowd, fix)
        said.append(crowd)
    each = sorted({len(cores) for _, cores, _ in names})
    several = f"{each[0]} to {each[-1]} cores" if len(each) > 1 else "1 core" if each == [1] else f"{each[0]} cores"
    return Finding("pinning", OK, "; ".join(said[:2]) or f"each rank may run on {several}")


def clocks(names: list[tuple[str, list[int], float]]) -> Finding | None:
    """The hosts' clocks should agree: rows of several hosts are compared."""
    hosts = {name: now for name, _, now in names}
    if len(hosts) < 2:
        return None
    apart = max(hosts.values()) - min(hosts.values())
    return Finding(
        "clocks", OK if apart < 1 else SLOW, f"hosts' clocks are within {max(apart, 0.01):.2f} s", "run chrony or ntpd on all hosts"
    )


def _pairs(comm: Any, names: list[str]) -> list[Finding]:
    """Try one-sided operations from rank 0 on a rank of its own host and on one of each other host, as many as ten."""
    from mpi4py import MPI

    first = {name: rank for rank, name in reversed(list(enumerate(names))) if rank}
    targets = [first[names[0]]] if names[0] in first else []
    targets += [rank for name, rank in first.items() if name != names[0]][:10]
    win = MPI.Win.Allocate(8 * (1 + _SUMS + _BULK), 1, comm=comm)
    memory = np.frombuffer(win.tomemory(), np.float64)
    memory[:] = 0
    unified = win.model == MPI.WIN_UNIFIED
    comm.Barrier()
    win.Lock_all(MPI.MODE_NOCHECK)
    found: list[Finding] = []
    if comm.rank:
        _obey(comm, win, memory)
    else:
        fix = "use MPICH or Open MPI on hosts whose network is cache-coherent"
        found.append(
            Finding("windows", OK if unified else BROKEN, "one copy of memory" if unified else "a second copy of memory", fix)
        )
        for rank in targets:
            near = names[rank] == names[0]
            where = "on this host" if near else f"to {names[rank]}"
            for subject, look in ((f"one-sided {where}", _moves), (f"progress {where}", _progresses)):
                found += looked(
                    subject, lambda look=look, rank=rank, subject=subject, near=near: look(comm, win, rank, subject, near)
                )
        for rank in range(1, comm.size):
            comm.send("end", rank, _COMMAND)
    mpi.meet(comm)
    win.Unlock_all()
    del memory
    win.Free()
    return found


def _obey(comm: Any, win: Any, memory: np.ndarray) -> None:
    """The target's side: what rank 0 says, until the end."""
    while True:
        if not comm.Iprobe(0, _COMMAND):
            time.sleep(_PAUSE)
            continue
        what = comm.recv(source=0, tag=_COMMAND)
        if what == "end":
            return
        if what == "show":
            win.Sync()
            comm.send((memory[0], memory[1 : 1 + _SUMS].copy(), float(memory[1 + _SUMS :].sum())), 0, _ANSWER)
        elif what == "compute":
            comm.send(None, 0, _ANSWER)
            end = time.perf_counter() + _BUSY
            while time.perf_counter() < end:
                pass


def _asked(comm: Any, rank: int, what: str) -> Any:
    comm.send(what, rank, _COMMAND)
    return comm.recv(source=rank, tag=_ANSWER)


def _time(work: Callable[[], None], repeat: int) -> float:
    """Return the seconds of the quickest of some repetitions."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _moves(comm: Any, win: Any, rank: int, subject: str, near: bool) -> Finding:
    """Put, Get, Accumulate and Fetch_and_op do what they say; how quick they are."""
    from mpi4py import MPI

    data, back, before = np.random.default_rng(rank).random(_BULK), np.zeros(_BULK), np.zeros(1)
    ones, one = np.ones(_SUMS), np.ones(1)
    far = (8 * (1 + _SUMS), _BULK, MPI.DOUBLE)

    def put() -> None:
        win.Put((data, MPI.DOUBLE), rank, far)
        win.Flush(rank)

    def get() -> None:
        win.Get((back, MPI.DOUBLE), rank, far)
        win.Flush(rank)

    def count() -> None:
        win.Fetch_and_op((one, MPI.DOUBLE), (before, MPI.DOUBLE), rank, 0, MPI.SUM)
        win.Flush(rank)

    for _ in range(2):
        win.Accumulate((ones, MPI.DOUBLE), rank, (8, _SUMS, MPI.DOUBLE), MPI.SUM)
    win.Flush(rank)
    small, up, down = _time(count, 20), _time(put, 3), _time(get, 3)
    counter, sums, total = _asked(comm, rank, "show")
    right = {
        "Put": abs(total - data.sum()) < 1e-6 * data.sum(),
        "Get": np.array_equal(back, data),
        "Accumulate": bool((sums == 2).all()),
        "Fetch_and_op": counter == 20 and before[0] == 19,
    }
    wrong = [name for name, true in right.items() if not true]
    if wrong:
        return Finding(
            subject, BROKEN, f"{', '.join(wrong)} gives wrong numbers", "use another MPI: 'jobs/install mpich' brings one"
        )
    said = (
        f"Put, Get, Accumulate, Fetch_and_op are right; Put {data.nbytes / up / 1e9:.1f}, Get {data.nbytes / down / 1e9:.1f} GB/s, "
        f"{1e6 * small:.0f} us for a small one"
    )
    slow, least = (100e-6, 1e9) if near else (4e-3, 5e7)
    fix = "ranks of one host should share memory: see 'shared memory', and whether more ranks than cores run here"
    if not near:
        fix = "over TCP set MPIR_CVAR_CH4_NETMOD=ofi FI_PROVIDER=tcp (MPICH); else see which network MPI has chosen"
    state = OK if small < slow and min(data.nbytes / up, data.nbytes / down) > least else SLOW
    return Finding(subject, state, said, fix)


def _progresses(comm: Any, win: Any, rank: int, subject: str, near: bool) -> Finding:
    """How long a Put and a Get wait for a target that computes for a while without entering MPI."""
    from mpi4py import MPI

    data = np.random.default_rng(1).random(1024)
    _asked(comm, rank, "compute")
    start = time.perf_counter()
    place = (8 * (1 + _SUMS), data.size, MPI.DOUBLE)
    win.Put((data, MPI.DOUBLE), rank, place)
    win.Flush(rank)
    win.Get((data, MPI.DOUBLE), rank, place)
    win.Flush(rank)
    took = time.perf_counter() - start
    if took < _BUSY / 2:
        return Finding(subject, OK, f"operations are done in {1e3 * took:.1f} ms while the target computes")
    said = f"operations wait until the target enters MPI ({1e3 * took:.0f} ms)"
    if near:
        return Finding(
            subject, SLOW, said, "this MPI moves nothing behind a computing rank; 'jobs/install mpich' brings one that does"
        )
    return Finding(subject, OK, f"{said}: so it is over TCP, and shards look every millisecond")


def main() -> None:
    """Print what is found on the ranks that a launcher has started."""
    comm = mpi.world()
    if comm is None:
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    with mpi.abort_on_error(comm):
        found = list(findings(comm))
        if comm.rank == 0:
            print("findings\t" + json.dumps(found), flush=True)


def read(text: str) -> list[Finding]:
    """Return what `main` has printed among other lines; nothing where it has not."""
    found = re.search(r"^findings\t(.*)$", text, re.MULTILINE)
    return [Finding(*row) for row in json.loads(found[1])] if found else []


if __name__ == "__main__":
    sys.exit(main())
