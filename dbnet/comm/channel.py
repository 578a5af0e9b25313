"""Messages among coordinator and shards: small Python values and arrays, sent without waiting, received when they are there.

Replicas never take part. `Mailboxes` is the same within one process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, Protocol

from dbnet.comm.topology import Topology

_MOVING = 1e-3


class Message(NamedTuple):
    source: int
    kind: str
    content: Any


class Channel(Protocol):
    """One server's end."""

    def send(self, rank: int, kind: str, content: Any = None) -> None: ...
    def receive(self) -> Message | None: ...
    def pending(self) -> bool:
        """Whether something that was sent is still under way; what is comes on."""
        ...


class Mailboxes:
    """All servers' messages within one process."""

    def __init__(self, size: int) -> None:
        self._boxes: list[deque[Message]] = [deque() for _ in range(size)]

    def at(self, rank: int) -> _Box:
        """Return the end that belongs to `rank`."""
        return _Box(self._boxes, rank)


class _Box:
    def __init__(self, boxes: list[deque[Message]], rank: int) -> None:
        self._boxes, self._rank = boxes, rank

    def send(self, rank: int, kind: str, content: Any = None) -> None:
        self._boxes[rank].append(Message(self._rank, kind, content))

    def receive(self) -> Message | None:
        return self._boxes[self._rank].popleft() if self._boxes[self._rank] else None

    def pending(self) -> bool:
        """Whether something that was sent is still under way."""
        return False


class MpiChannel:
    """Non-blocking point-to-point messages on the servers' communicator; receiving also lets MPI progress.

    Whoever is woken when a message is sent may look before it is there: it may wait in its sender's queue until that one calls MPI
    again, and a long one is moved by both. So its receiver is woken once more at the sender's next look, and at each while it is
    still under way.

    Parameters
    ----------
    wake
        Lets a rank that rests look at once.
    patient
        Kinds of messages for which nobody is woken, unless MPI moves them no further without their receiver.
    """

    def __init__(self, comm: Any, wake: Callable[[int], None] = lambda rank: None, patient: Collection[str] = ()) -> None:
        self._comm, self._wake, self._patient = comm, wake, patient
        # Request, receiver, kind of what was under way at the last look.
        self._sent: list[tuple[Any, int, str]] = []

    def send(self, rank: int, kind: str, content: Any = None) -> None:
        self._sent.append((self._comm.isend(Message(self._comm.rank, kind, content), rank), rank, kind))
        if kind not in self._patient:
            self._wake(rank)

    def receive(self) -> Message | None:
        message = self._comm.improbe()
        self._look()
        return None if message is None else message.recv()

    def pending(self) -> bool:
        # What MPI calls sent may wait in its queue until its sender calls MPI again. A rank sends itself nothing: looking for that
        # moves everything, and asks nobody who may have left.
        self._comm.iprobe(self._comm.rank)
        self._look()
        return bool(self._sent)

    def rest(self, seconds: float, rest: Callable[[float], None]) -> None:
        """Rest by `rest` for so long, but for a millisecond while something is under way: only this rank's looks move it."""
        rest(min(seconds, _MOVING) if self.pending() else seconds)

    def _look(self) -> None:
        """After MPI has moved: forget what has gone, and wake whoever may have been woken too early."""
        sent, self._sent = self._sent, []
        for request, rank, kind in sent:
            gone = request.Test()
            if not gone:
                self._sent.append((request, rank, kind))
            if not gone or kind not in self._patient:
                self._wake(rank)


class Shards:
    """All shards, as the coordinator writes to them and hears from them."""

    def __init__(self, channel: Channel, topology: Topology) -> None:
        self.channel, self._topology = channel, topology

    def __len__(self) -> int:
        return self._topology.shards

    def tell(self, kind: str, content: Any = None) -> None:
        """Send every shard the same."""
        for shard in range(len(self)):
            self.channel.send(self._topology.shard_rank(shard), kind, content)

    def hear(self) -> Iterator[tuple[int, str, Any]]:
        """Yield what has come: shard, kind, content."""
        while (message := self.channel.receive()) is not None:
            yield self._topology.shard_of(message.source), message.kind, message.content
