"""Messages in simulated time: channels among coordinator and shards, links among the partitions of a replica."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from dbnet.comm.channel import Message
from dbnet.comm.link import NAP, PATIENCE, SPINS, Wires
from dbnet.comm.simulated.interconnect import Interconnect
from dbnet.comm.simulated.player import Player

_ENVELOPE = 128  # bytes of a message beside its arrays


def weight(content: Any) -> int:
    """Return about how many bytes a message is."""
    if isinstance(content, np.ndarray):
        return _ENVELOPE + content.nbytes
    if isinstance(content, list | tuple):
        return _ENVELOPE + sum(weight(part) for part in content if not isinstance(part, int | float | str))
    return _ENVELOPE


class InOrder(deque):
    """What has arrived on one way, in the order in which it was sent: as under MPI nothing overtakes, be it shorter."""

    def __init__(self) -> None:
        super().__init__()
        self._sent = self._came = 0
        self._early: dict[int, Any] = {}

    def number(self) -> int:
        """Return the number of what is sent now."""
        self._sent += 1
        return self._sent

    def arrive(self, number: int, what: Any) -> None:
        """Take in what has this number, and what has waited for it."""
        self._early[number] = what
        while self._came + 1 in self._early:
            self._came += 1
            self.append(self._early.pop(self._came))


class SimulatedMailboxes:
    """All servers' messages."""

    def __init__(self, size: int, wire: Interconnect) -> None:
        self.boxes: list[deque[Message]] = [deque() for _ in range(size)]
        self.wire = wire
        self.lines: defaultdict[tuple[int, int], InOrder] = defaultdict(InOrder)
        wire.visited.update(range(size))

    def at(self, rank: int) -> _Box:
        """Return the end that belongs to `rank`."""
        return _Box(self, rank)

    def deliver(self, rank: int, line: InOrder, number: int, message: Message) -> None:
        """A message is there."""
        line.arrive(number, message)
        if line:
            self.boxes[rank].extend(line)
            line.clear()
            self.wire.time.notify(rank, message.source)


class _Box:
    def __init__(self, boxes: SimulatedMailboxes, rank: int) -> None:
        self._boxes, self._rank, self._box = boxes, rank, boxes.boxes[rank]

    def send(self, rank: int, kind: str, content: Any = None) -> None:
        message = Message(self._rank, kind, content)
        line = self._boxes.lines[self._rank, rank]
        self._boxes.wire.send(self._rank, rank, weight(content), self._boxes.deliver, rank, line, line.number(), message)

    def receive(self) -> Message | None:
        return self._box.popleft() if self._box else None

    def pending(self) -> bool:
        """Whether somebody must wait for what it sent: what is under way arrives by itself."""
        return False


class SimulatedWires(Wires):
    """What lies between the partitions of one replica.

    Parameters
    ----------
    ranks
        The ranks of the partitions.
    wire
        What lies between ranks.
    """

    def __init__(self, ranks: Sequence[int], wire: Interconnect) -> None:
        super().__init__(len(ranks))
        self.ranks, self.wire = ranks, wire
        self._queues: defaultdict[tuple[int, int, Any], InOrder] = defaultdict(InOrder)
        if len(ranks) > 1:
            wire.visited.update(ranks)
        self.waiting: dict[int, tuple[InOrder, Player]] = {}

    def send(self, source: int, to: int, tag: Any, values: np.ndarray) -> None:
        self.wire.time.player.looks = None
        way = self.way(source, to, tag)
        copied = values.copy() if values.flags.writeable else values
        if source == to:
            self._deliver(to, way, way.number(), copied)
            return
        wire, me, other = self.wire, self.ranks[source], self.ranks[to]
        if me in wire.time.cores:
            wire.copy(me, [(other, values.nbytes)], 1)
        # What waits for a card is sent in its order.
        wire.time.sync()
        wire.send(me, other, values.nbytes, self._deliver, to, way, way.number(), copied)

    def _deliver(self, to: int, way: InOrder, number: int, values: np.ndarray) -> None:
        way.arrive(number, values)
        found = self.waiting.get(to)
        if way and found is not None and found[0] is way:
            del self.waiting[to]
            if self.ranks[to] in self.wire.time.cores:
                self.wire.time.cores[self.ranks[to]].arrived(found[1])
            else:
                found[1].go()

    def take(self, source: int, to: int, tag: Any, what: str) -> np.ndarray:
        way, time = self.way(source, to, tag), self.wire.time
        time.player.looks = None
        time.sync()
        if self.ranks[to] in time.cores:
            self._look(to, way)
        while not way:
            self.waiting[to] = (way, time.player)
            time.switch()
        return way.popleft()

    def _look(self, to: int, way: InOrder) -> None:
        """Look for values as `MpiLink` does where ranks share cores: look, give way in between, and then sleep in between."""
        time, player, look = self.wire.time, self.wire.time.player, self.wire.look
        cores, left = time.cores[player.rank], PATIENCE
        while not way and left > 0:
            begins = left > PATIENCE - SPINS
            if begins or not cores.give_way():
                # Nobody else wants the core: it looks until something comes.
                self.waiting[to] = (way, player)
                looks = SPINS if begins else left
                cores.watch(looks * look)
                self.waiting.pop(to, None)
                left -= looks
            else:
                left -= 1
                if not way:
                    time.compute(look)
        while not way:
            time.elapse(NAP + time.late)
            time.compute(look)
