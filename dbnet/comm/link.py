"""How the partitions of one replica reach each other: point to point along a cut, and small collectives."""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from dbnet.comm.patience import Patience
from dbnet.comm.turns import Wait, give_way
from dbnet.core.errors import Lost

# How a rank that shares its core waits: looks one after the other, in all, and then seconds of sleep from look to look.
SPINS, PATIENCE, NAP = 64, 256, 5e-5


class Gone(Exception):
    """Another partition of this replica is gone: nothing is left to do here."""


class Link(Protocol):
    """How the partitions of one replica reach each other."""

    rank: int
    size: int

    def sender(self, buffer: np.ndarray, to: int, tag: int) -> Any: ...
    def receiver(self, buffer: np.ndarray, source: int, tag: int) -> Any: ...
    def start(self, transfers: Sequence[Any]) -> None: ...
    def wait(self, transfers: Sequence[Any]) -> None: ...
    def gather(self, mine: np.ndarray, everyone: np.ndarray) -> None: ...
    def total(self, mine: np.ndarray, total: np.ndarray) -> None: ...
    def share(self, values: np.ndarray) -> None: ...
    def meet(self) -> None: ...
    def close(self) -> None: ...


class MpiLink:
    """Persistent requests and non-blocking collectives on the replica's communicator, waited for with a deadline.

    Parameters
    ----------
    comm
        The replica's communicator.
    deadline
        Seconds that one wait may last.
    crowded
        Whether there are more ranks than cores: then a waiting rank soon sleeps, since who it waits for may need its core.
    beat, graph
        What else is due while one waits: a sign of life; who waits for whom, for a wait that was in vain.
    """

    def __init__(
        self, comm: Any, deadline: float, crowded: bool = False, beat: Callable[[str], None] = lambda reason: None,
        graph: Callable[[], str] = str,
    ) -> None:  # fmt: skip
        from mpi4py import MPI

        self._mpi, self._comm, self._bound = MPI, comm, Patience(deadline)
        self.rank, self.size = comm.rank, comm.size
        self._requests: list[Any] = []
        self._beat, self._graph = beat, graph
        self._patience = PATIENCE if crowded else 8192

    def sender(self, buffer: np.ndarray, to: int, tag: int) -> Any:
        return self._keep(self._comm.Send_init(buffer, to, tag))

    def receiver(self, buffer: np.ndarray, source: int, tag: int) -> Any:
        return self._keep(self._comm.Recv_init(buffer, source, tag))

    def _keep(self, request: Any) -> Any:
        self._requests.append(request)
        return request

    def start(self, transfers: Sequence[Any]) -> None:
        with self._together():
            self._mpi.Prequest.Startall(transfers)

    def wait(self, transfers: Sequence[Any]) -> None:
        self._poll(lambda: self._mpi.Request.Testall(transfers), "another partition's values")

    def gather(self, mine: np.ndarray, everyone: np.ndarray) -> None:
        self._collect(self._comm.Iallgather, (mine, everyone), "the other partitions' outputs")

    def total(self, mine: np.ndarray, total: np.ndarray) -> None:
        self._collect(self._comm.Iallreduce, (mine, total), "the other partitions' share of a gradient")

    def share(self, values: np.ndarray) -> None:
        self._collect(self._comm.Ibcast, (values, 0), "partition 0 of its replica to lead")

    def meet(self) -> None:
        self._collect(self._comm.Ibarrier, (), "all partitions to finish")

    def close(self) -> None:
        """Give back the persistent requests; the link is of no use afterwards."""
        while self._requests:
            self._requests.pop().Free()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """MPI that survives killed ranks raises where one of this communicator's is dead; the others wait for ever."""
        try:
            yield
        except self._mpi.Exception as error:
            raise Gone(str(error)) from None

    def _collect(self, begin: Callable[..., Any], arrays: Sequence[Any], what: str) -> None:
        with self._together():
            request = begin(*arrays)
        self._poll(request.Test, what)

    def _poll(self, done: Callable[[], bool], what: str) -> None:
        turns = 0
        self._bound.begin()
        with self._together():
            while not done():
                turns += 1
                if turns > SPINS:
                    os.sched_yield() if turns < self._patience else time.sleep(NAP)
                if turns % 1024 == 0:
                    self._patiently(what)

    def _patiently(self, what: str) -> None:
        """Give a sign of life; wait no longer than the deadline."""
        self._beat(f"waits for {what}")
        if self._bound.over():
            raise Lost(
                f"Partition {self.rank} waited {self._bound.bound:g} s in vain for {what}. Look for a rank that hangs, or raise "
                f"run.deadline.\n{self._graph()}".rstrip()
            )


class Wires:
    """What lies between the partitions of one replica within a process: for each way a queue of copies."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._queues: dict[tuple[int, int, Any], deque[np.ndarray]] = defaultdict(deque)

    def way(self, source: int, to: int, tag: Any) -> deque[np.ndarray]:
        return self._queues[source, to, tag]

    def send(self, source: int, to: int, tag: Any, values: np.ndarray) -> None:
        """Send a copy of `values`; of those that cannot change, themselves."""
        self.way(source, to, tag).append(values.copy() if values.flags.writeable else values)

    def take(self, source: int, to: int, tag: Any, what: str) -> np.ndarray:
        """Return the next values on a way; give way (`turns.give_way`) until they are there."""
        way = self.way(source, to, tag)
        while not way:
            give_way(Wait(f"partition {to} waits for {what}"))
        return way.popleft()


class LocalLink:
    """One partition's end over memory: what it sends and takes goes by `wires`.

    Parameters
    ----------
    wires
        Shared by the partitions of the replica.
    rank
        Which partition this is.
    """

    def __init__(self, wires: Wires, rank: int) -> None:
        self._wires, self.rank, self.size = wires, rank, wires.size

    def sender(self, buffer: np.ndarray, to: int, tag: int) -> tuple[bool, np.ndarray, int, int]:
        return True, buffer, to, tag

    def receiver(self, buffer: np.ndarray, source: int, tag: int) -> tuple[bool, np.ndarray, int, int]:
        return False, buffer, source, tag

    def start(self, transfers: Sequence[tuple[bool, np.ndarray, int, int]]) -> None:
        for sends, buffer, to, tag in transfers:
            if sends:
                self._wires.send(self.rank, to, tag, buffer)

    def wait(self, transfers: Sequence[tuple[bool, np.ndarray, int, int]]) -> None:
        for sends, buffer, source, tag in transfers:
            if not sends:
                values = self._wires.take(source, self.rank, tag, "another partition's values")
                # Where nothing is computed nothing can be written to.
                if buffer.flags.writeable:
                    buffer[...] = values

    def gather(self, mine: np.ndarray, everyone: np.ndarray) -> None:
        everyone[...] = self._all(mine, "the other partitions' outputs")

    def total(self, mine: np.ndarray, total: np.ndarray) -> None:
        total[...] = sum(self._all(mine, "the other partitions' share of a gradient"))

    def share(self, values: np.ndarray) -> None:
        # Partition 0 goes on, as under MPI.
        if self.rank:
            values[...] = self._wires.take(0, self.rank, "share", "partition 0 of its replica to lead")
        else:
            for other in range(1, self.size):
                self._wires.send(0, other, "share", values)

    def meet(self) -> None:
        self._all(np.zeros(0), "all partitions to finish")

    def close(self) -> None:
        """Memory needs no closing."""

    def _all(self, mine: np.ndarray, what: str) -> list[np.ndarray]:
        """Return what every partition has brought to this meeting, in their order."""
        for other in range(self.size):
            self._wires.send(self.rank, other, "all", mine)
        return [self._wires.take(other, self.rank, "all", what) for other in range(self.size)]
