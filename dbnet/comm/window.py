"""The only MPI window: named fields in the memory of targets, read and written by origins.

Every rank gives memory for the fields of its own layout (replicas give none); all ranks know all layouts, so an address is
(rank, field, first element). One `Win.Allocate`, one `Lock_all(NOCHECK)` for the window's life, `Flush` to complete: Lock/Unlock
per operation would wait for the target to enter MPI. `Memory` is the same interface within one process.

What is relied on: the unified memory model; `Flush`, after which a Put lies in the target's memory before anything that its origin
puts there later; and at the target `sync` between two accesses to its own memory whose order matters, such as a counter and what
it counts. `sync` is `MPI_Win_sync` and a barrier of our own, since in MPICH and in Open MPI's component for one host that call is a
full memory barrier, but in Open MPI's component for several hosts it only lets MPI progress.

A target that rests looks into its memory now and then. `wake` lets it look at once, where all ranks are on one host (`Bells`). It
may rest only where transfers need no look of its own, which `direct` finds out.
"""

from __future__ import annotations

import secrets
import select
import socket
import time
from collections.abc import Callable, Sequence
from math import prod
from operator import itemgetter
from threading import get_ident
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

from dbnet.comm.mpi import require_model, require_room, require_threads
from dbnet.core.jit import fence

_HEARD = 64  # rings that are heard at once, more than the system lets wait
# Trying out a window: bytes of a long transfer, pause between two looks, what is put last.
_BULK, _PAUSE, _LAST = 1 << 20, 5e-4, 3


class Field(NamedTuple):
    """One array in a rank's window memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


_ALIGN = 64


class WindowLayout:
    """Where each field of one rank lies, in bytes from the start of its window memory."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = {f.name: f for f in fields}
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for field in fields:
            self.offsets[field.name] = self.nbytes
            self.nbytes += -(-field.nbytes // _ALIGN) * _ALIGN

    def views(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields as arrays over the bytes of `memory`."""
        return {
            name: memory[self.offsets[name] : self.offsets[name] + f.nbytes].view(f.dtype).reshape(f.shape)
            for name, f in self.fields.items()
        }


Get = tuple[int, str, np.ndarray, int]
Post = Callable[[int, np.ndarray, int], None]


class Window(Protocol):
    """One-sided access; `get` and `put` start a transfer that `flush` completes. Arrays must be contiguous.

    What is moved again and again is said once: `getting` and `posting` return what moves it.
    """

    local: dict[str, np.ndarray]

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None: ...
    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None: ...
    def flush(self, rank: int) -> None: ...
    def wake(self, rank: int) -> None: ...
    def sync(self) -> None: ...
    def blocked(self) -> tuple[int, float] | None: ...
    def free(self) -> None: ...

    def getting(self, gets: Sequence[Get]) -> Callable[[], None]:
        """Return what gets each of these (rank, field, out, start), and waits for all."""

        def get() -> None:
            for one in gets:
                self.get(*one)
            for rank in dict.fromkeys(rank for rank, *_ in gets):
                self.flush(rank)

        return get

    def posting(self, rank: int, header: tuple[str, np.ndarray], ring: str, counter: tuple[str, np.ndarray, int]) -> Post:
        """Return what puts a header, at its place, and a slice, at its own, and when they lie there the counter, one higher."""
        (field, words), (name, number, at) = header, counter

        def post(start: int, data: np.ndarray, place: int) -> None:
            self.put(rank, field, words, start)
            self.put(rank, ring, data, place)
            self.flush(rank)
            number[0] += 1
            self.put(rank, name, number, at)
            self.flush(rank)

        return post


class LocalWindow(Window):
    """All ranks' window memory within one process; every rank has its own end of it."""

    def __init__(self, layouts: Sequence[WindowLayout], rank: int = 0, shared: list[dict[str, np.ndarray]] | None = None) -> None:
        self._all = shared if shared is not None else [layout.views(np.zeros(layout.nbytes, np.uint8)) for layout in layouts]
        self.local = self._all[rank]

    def at(self, rank: int) -> LocalWindow:
        """Return the end that belongs to `rank`."""
        return LocalWindow((), rank, self._all)

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        out.reshape(-1)[:] = self._all[rank][field].reshape(-1)[start : start + out.size]

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._all[rank][field].reshape(-1)[start : start + data.size] = data.reshape(-1)

    def flush(self, rank: int) -> None:
        """Nothing is ever under way here."""

    def wake(self, rank: int) -> None:
        """Nobody rests."""

    def sync(self) -> None:
        """There is one memory, and roles take turns."""

    def blocked(self) -> None:
        """No call ever waits here."""

    def free(self) -> None:
        self._all.clear()
        self.local = {}


class Bells:
    """How the ranks of one host wake each other: each rests on a socket, to which others send an empty datagram.

    That says no more than that there may be something. What was flushed before it is seen after it; a message may come later, so
    its sender rings again (`MpiChannel`). A rank that has gone has no socket, so nobody waits for it. Any user of the host may send
    to the socket, which costs a look.

    Parameters
    ----------
    comm, node
        All ranks, which make this together; those that share memory with this one.

    Attributes
    ----------
    everywhere
        Whether every rank can wake every other; where not, nobody is woken.
    """

    def __init__(self, comm: Any, node: Any) -> None:
        # An abstract name leaves no file behind. What the system chooses is used again, and may be another job's elsewhere.
        name = f"\0dbnet-{secrets.token_hex(8)}"
        self._socket, self._poll = _datagrams(lambda end: end.bind(name)), select.poll()
        if self._socket is not None:
            self._poll.register(self._socket, select.POLLIN)
        names = node.allgather((comm.rank, None if self._socket is None else self._socket.getsockname()))
        self._names = dict(names)
        # Each way is a socket of its own: rings that busy ranks leave unheard take room of none but those to themselves.
        self._ways: dict[int, socket.socket | None] = {}
        # Ranks that share memory may yet see other sockets than each other.
        reached = self.ring(names[(node.rank + 1) % node.size][0])
        self.everywhere = all(comm.allgather(reached and node.size == comm.size))
        if not self.everywhere:
            self.close()

    def ring(self, rank: int) -> bool:
        """Wake a rank, if it rests on this host; return whether that was sent."""
        if self._socket is None or (name := self._names.get(rank)) is None:
            return False
        # Anew where there was none: a process that had no file left then may have one now.
        way = self._ways[rank] = self._ways.get(rank) or _datagrams(lambda end: end.connect(name))
        try:
            return way is not None and way.send(b"") == 0
        except OSError:
            # A ring is but a hint: it must end no push. Mostly the other has gone, or has not yet heard what it was sent before;
            # where the system wants memory it looks after its rest.
            return False

    def rest(self, seconds: float) -> None:
        """Rest until somebody rings, or has rung since the last time, but no longer than so many seconds, in milliseconds."""
        if self._socket is None or not self._poll.poll(1e3 * seconds):
            return
        # Whoever sends without end does not keep this rank from looking.
        for _ in range(_HEARD):
            try:
                self._socket.recv(1)
            except OSError:
                return

    def close(self) -> None:
        """Wake nobody any more."""
        for end in (self._socket, *self._ways.values()):
            if end is not None:
                end.close()
        self._socket, self._names, self._ways = None, {}, {}


def _datagrams(begin: Callable[[socket.socket], None]) -> socket.socket | None:
    """Return a socket that `begin` has bound to a name or connected with one; None where the system gives none."""
    try:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    except OSError:
        return None
    try:
        made.setblocking(False)
        begin(made)
    except OSError:
        made.close()
        return None
    return made


class MpiWindow(Window):
    """The window over MPI; making and freeing it are collective over `comm`. With `bells` origins can wake targets.

    Raises
    ------
    UserError
        On all ranks: MPI gives what cannot be worked with, or a host has too little shared memory.
    """

    def __init__(self, comm: Any, layouts: Sequence[WindowLayout], bells: Bells | None = None) -> None:
        from mpi4py import MPI

        self._byte, self._bells = MPI.BYTE, bells
        self._layouts = layouts
        # For each thread with a transfer under way: to whom, and since when.
        self._under_way: dict[int, tuple[int, float]] = {}
        mine = layouts[comm.rank]
        require_threads(MPI.Query_thread(), MPI)
        require_room(comm, [layout.nbytes for layout in layouts], MPI.COMM_TYPE_SHARED)
        self._win = MPI.Win.Allocate(mine.nbytes, 1, comm=comm)
        require_model(self._win.model, MPI)
        memory = np.frombuffer(self._win.tomemory(), np.uint8) if mine.nbytes else np.zeros(0, np.uint8)
        memory[:] = 0
        self._memory, self.local = memory, mine.views(memory)
        comm.Barrier()
        self._win.Lock_all(MPI.MODE_NOCHECK)

    def direct(self, comm: Any, seconds: float = 1.0) -> bool:
        """Return whether transfers come to an end while their targets do not call MPI; collective, before fields are used.

        It is tried out, since MPI does not say: the last rank puts into all others' memory, and these look for so many seconds.
        """
        others = [rank for rank in range(comm.size - 1) if self._layouts[rank].nbytes]
        seen, nothing = True, np.zeros(0, np.uint8)
        if comm.rank == comm.size - 1:
            for rank in others:
                comm.Recv(nothing, rank)
            for rank in others:
                self._reach(rank)
        elif comm.rank in others:
            # From here on this rank keeps away from MPI.
            comm.Send(nothing, comm.size - 1)
            end = time.monotonic() + seconds
            while not (seen := self._memory[0] == _LAST) and time.monotonic() < end:
                time.sleep(_PAUSE)
        comm.Barrier()
        self._memory[:_BULK] = 0
        self.sync()
        return all(comm.allgather(bool(seen)))

    def _reach(self, rank: int) -> None:
        """Put and get, few bytes and many; at last another number in front, which shows that all before has come to an end."""
        long = np.full(min(self._layouts[rank].nbytes, _BULK), 1, np.uint8)
        for data in (long, long[:1]):
            for move in (self._win.Put, self._win.Get):
                move((data, data.nbytes, self._byte), rank, (0, data.nbytes, self._byte))
                self._win.Flush(rank)
        long[0] = _LAST
        self._win.Put((long, 1, self._byte), rank, (0, 1, self._byte))
        self._win.Flush(rank)

    def _target(self, rank: int, field: str, data: np.ndarray, start: int) -> tuple[int, int, Any]:
        return (self._layouts[rank].offsets[field] + start * data.itemsize, data.nbytes, self._byte)

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        self._begin(rank)
        self._win.Get((out, out.nbytes, self._byte), rank, self._target(rank, field, out, start))

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._begin(rank)
        self._win.Put((data, data.nbytes, self._byte), rank, self._target(rank, field, data, start))

    def flush(self, rank: int) -> None:
        self._begin(rank)
        self._win.Flush(rank)
        self._under_way.pop(get_ident(), None)

    def _begin(self, rank: int) -> None:
        self._under_way[get_ident()] = (rank, perf_counter())

    def blocked(self) -> tuple[int, float] | None:
        """Return for which rank a transfer has been waiting longest, and since when."""
        return min(self._under_way.copy().values(), key=itemgetter(1), default=None)

    def wake(self, rank: int) -> None:
        """Let a target look at once at what lies in its memory."""
        if self._bells is not None:
            self._bells.ring(rank)

    def sync(self) -> None:
        """Order what this rank reads and writes here before and after it, see above; let it see what others wrote."""
        self._win.Sync()
        fence()

    def free(self) -> None:
        self.local, self._memory = {}, np.zeros(0, np.uint8)
        self._win.Unlock_all()
        self._win.Free()
        if self._bells is not None:
            self._bells.close()
