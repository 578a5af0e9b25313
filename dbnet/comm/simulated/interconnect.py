"""When bytes arrive: latency and bandwidth within a host and between hosts, whose network cards their ranks share.

A transfer between hosts leaves when its host's card is free of those before, and comes in when the other one's is, first come first
served; with both free it arrives after latency + bytes / bandwidth. Packets (`PACKET` bytes or less) wait for no card: a card sends
them between those of long transfers.

Within a host the origin itself copies. Where ranks share cores that takes some of theirs (`copy`), and what is left is the latency.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dbnet.comm.simulated.clock import VirtualTime

PACKET = 4096


class Way(NamedTuple):
    """Seconds of a message of no bytes; bytes per second."""

    latency: float
    bandwidth: float


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
    overhead
        Seconds that starting an operation takes its rank.

    Attributes
    ----------
    hosts
        As given.
    crowded
        For each rank whether there are others on its host.
    sent
        Bytes between hosts so far.
    operations
        One-sided operations so far.
    """

    def __init__(self, time: VirtualTime, hosts: Sequence[int], inside: Way, between: Way, overhead: float = 0.0) -> None:
        self.time, self.hosts, self._inside, self._between, self.overhead = time, hosts, inside, between, overhead
        ranks = Counter(hosts)
        self.crowded = [ranks[host] > 1 for host in hosts]
        self._leaves: dict[int, float] = defaultdict(float)
        self._enters: dict[int, float] = defaultdict(float)
        self.sent = self.operations = 0

    def copy(self, source: int, moved: Iterable[tuple[int, int]], operations: int) -> None:
        """Let the rank whose turn it is, `source`, which shares its cores, start so many operations and copy (rank, bytes)."""
        here, hosts = self.hosts[source], self.hosts
        nbytes = sum(size for rank, size in moved if hosts[rank] == here)
        self.time.compute(operations * self.overhead + nbytes / self._inside.bandwidth)

    def send(self, source: int, target: int, nbytes: int, then: Callable[..., object], *arguments: object) -> None:
        """Have `then` called when `nbytes` bytes that leave `source` now are at `target`."""
        self.carry(source, target, nbytes, self.time.now, self._arrive, source, then, arguments)

    def _arrive(self, end: float, source: int, then: Callable[..., object], arguments: tuple) -> None:
        self.time.at(end, source, then, *arguments)

    def unqueued(self, source: int, target: int, nbytes: int) -> float | None:
        """Send bytes that wait for no card; return their seconds, or None where they wait for one."""
        if self.hosts[source] == self.hosts[target]:
            return self._inside.latency + (0.0 if source in self.time.cores else nbytes / self._inside.bandwidth)
        if nbytes > PACKET:
            return None
        self.sent += nbytes
        return self._between.latency + nbytes / self._between.bandwidth

    def carry(self, source: int, target: int, nbytes: int, begin: float, told: Callable[..., object], *arguments: object) -> None:
        """Have `told` called, with when `nbytes` bytes that leave `source` at `begin` are at `target`, as soon as that is known.

        What waits for cards must be sent in the order of its time, so that the first is served first.
        """
        seconds = self.unqueued(source, target, nbytes)
        if seconds is not None:
            told(begin + seconds, *arguments)
            return
        self.sent += nbytes
        here, there = self.hosts[source], self.hosts[target]
        lasts, free = nbytes / self._between.bandwidth, self._leaves[here]
        if free > begin:
            begin = free
        self._leaves[here] = begin + lasts
        self.time.at(begin + self._between.latency, source, self._enter, there, lasts, told, arguments)

    def _enter(self, host: int, lasts: float, told: Callable[..., object], arguments: tuple) -> None:
        """The first byte is there."""
        begin, free = self.time.now, self._enters[host]
        self._enters[host] = end = (free if free > begin else begin) + lasts
        told(end, *arguments)
