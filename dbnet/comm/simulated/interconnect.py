"""When bytes arrive: latency and bandwidth within a host and between hosts, whose network cards their ranks share.

A transfer between hosts leaves when its host's card is free of those before, and comes in when the other one's is, first come first
served; with both free it arrives after latency + bytes / bandwidth. Packets (`PACKET` bytes or less) wait for no card: a card sends
them between those of long transfers.

Within a host the origin itself copies. Where ranks share cores that takes some of theirs (`copy`), and what is left is the latency.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from dbnet.comm.simulated.clock import VirtualTime

PACKET = 4096


class Way(NamedTuple):
    """Seconds of a message of no bytes; bytes per second."""

    latency: float
    bandwidth: float


class Hop(NamedTuple):
    """From one rank to another: latency, bandwidth, and the most bytes that wait for no card."""

    latency: float
    bandwidth: float
    most: float


class Interconnect:
    """What lies between ranks.

    Parameters
    ----------
    time
        The clocks.
    hosts
        On which host each rank is.
    inside, between
        The way within a host, and from one to another.
    overhead, look
        Seconds that starting an operation takes its rank; and a look for another partition's values, where ranks share cores.
    cards
        By host, of those that have more than one network card: how many. They are as fast together.

    Attributes
    ----------
    hosts
        As given.
    crowded
        For each rank whether there are others on its host.
    visited
        Ranks whose host's cards take in other things than what they ask for.
    sent
        Bytes between hosts so far.
    operations
        One-sided operations so far.
    """

    def __init__(
        self, time: VirtualTime, hosts: Sequence[int], inside: Way, between: Way, overhead: float = 0.0, look: float = 1e-6,
        cards: Mapping[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.look = look
        self.time, self.hosts, self._inside, self._between, self.overhead = time, hosts, inside, between, overhead
        cards = cards or {}
        self._card = {host: between.bandwidth * cards.get(host, 1) for host in hosts}
        ranks = Counter(hosts)
        self.crowded = [ranks[host] > 1 for host in hosts]
        self.visited = {rank for rank, crowded in enumerate(self.crowded) if crowded}
        self._leaves: dict[int, float] = defaultdict(float)
        self._enters: dict[int, float] = defaultdict(float)
        self.sent = self.operations = 0

    def copy(self, source: int, moved: Iterable[tuple[int, int]], operations: int) -> None:
        """Let the rank whose turn it is, `source`, which shares its cores, start so many operations and copy (rank, bytes)."""
        here, hosts = self.hosts[source], self.hosts
        nbytes = sum(size for rank, size in moved if hosts[rank] == here)
        self.time.compute(operations * self.overhead + nbytes / self._inside.bandwidth)

    def hop(self, source: int, target: int) -> Hop:
        """Return what lies between two ranks."""
        if self.hosts[source] != self.hosts[target]:
            return Hop(self._between.latency, self._between.bandwidth, PACKET)
        # Who shares its cores copies with them.
        return Hop(self._inside.latency, inf if source in self.time.cores else self._inside.bandwidth, inf)

    def send(self, source: int, target: int, nbytes: int, then: Callable[..., object], *arguments: object) -> None:
        """Have `then` called when `nbytes` bytes that leave `source` now are at `target`."""
        latency, bandwidth, most = self.hop(source, target)
        if nbytes > most:
            self.queue(source, target, nbytes, self.time.now, self._arrive, source, then, arguments)
            return
        self.sent += nbytes if most == PACKET else 0
        self.time.at(self.time.now + latency + nbytes / bandwidth, source, then, *arguments)

    def _arrive(self, end: float, source: int, then: Callable[..., object], arguments: tuple) -> None:
        self.time.at(end, source, then, *arguments)

    def queue(self, source: int, target: int, nbytes: int, begin: float, told: Callable[..., object], *arguments: object) -> None:
        """Send what waits for cards; `told` is called with when it is at `target`, as soon as that is known.

        It must be sent in the order of `begin`, so that the first is served first.
        """
        at, _, _, lasts = self.leave(source, nbytes, begin)
        self.time.at(at, source, self._enter, self.hosts[target], nbytes, at + lasts, told, arguments)

    def leave(self, source: int, nbytes: int, begin: float) -> tuple[float, int, int, float]:
        """Send what waits for the cards of its host; return when its first byte is there, and `source`, bytes, seconds."""
        self.sent += nbytes
        here = self.hosts[source]
        lasts, free = nbytes / self._card[here], self._leaves[here]
        if free > begin:
            begin = free
        self._leaves[here] = begin + lasts
        return begin + self._between.latency, source, nbytes, lasts

    def enter(self, target: int, left: list[tuple[float, int, int, float]]) -> float:
        """Return when all that has left for a rank that is not `visited` is there."""
        there, latest = self.hosts[target], 0.0
        free, card = self._enters[there], self._card[there]
        for begin, _, nbytes, lasts in sorted(left):
            free = (free if free > begin else begin) + nbytes / card
            latest = max(latest, free, begin + lasts)
        self._enters[there] = free
        return latest

    def _enter(self, host: int, nbytes: int, last: float, told: Callable[..., object], arguments: tuple) -> None:
        """The first byte is there; the last one comes at `last`, or when the cards here have taken them all."""
        begin, free = self.time.now, self._enters[host]
        self._enters[host] = end = (free if free > begin else begin) + nbytes / self._card[host]
        told(end if end > last else last, *arguments)
