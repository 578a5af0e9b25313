"""When bytes arrive: latency and bandwidth within a host and between hosts, whose network cards their ranks share.

A transfer between hosts leaves when its host's card is free of those before, and comes in when the other one's is, first come first
served; with both free it arrives after latency + bytes / bandwidth. Packets (`PACKET` bytes or less) wait for no card: a card sends
them between those of long transfers.

Within a host the origin itself copies. Where ranks share cores that takes some of theirs (`copy`), and what is left is the latency.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

from dbnet.comm.simulated.clock import VirtualTime

PACKET = 4096


class Way(NamedTuple):
    """Seconds of a message of no bytes; bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, nbytes: int) -> float:
        return self.latency + nbytes / self.bandwidth


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
    sent
        Bytes between hosts so far.
    operations
        One-sided operations so far.
    """

    def __init__(self, time: VirtualTime, hosts: Sequence[int], inside: Way, between: Way, overhead: float = 0.0) -> None:
        self.time, self._hosts, self._inside, self._between, self.overhead = time, hosts, inside, between, overhead
        self._leaves: dict[int, float] = defaultdict(float)
        self._enters: dict[int, float] = defaultdict(float)
        self.sent = self.operations = 0

    def copy(self, source: int, moved: Iterable[tuple[int, int]], operations: int) -> None:
        """Let the rank whose turn it is, `source`, which shares its cores, start so many operations and copy (rank, bytes)."""
        here, hosts = self._hosts[source], self._hosts
        nbytes = sum(size for rank, size in moved if hosts[rank] == here)
        self.time.compute(operations * self.overhead + nbytes / self._inside.bandwidth)

    def send(self, source: int, target: int, nbytes: int, then: Callable[[], object], later: float = 0.0) -> None:
        """Have `then` called when `nbytes` bytes that leave `source` in `later` seconds are at `target`."""
        time, begin, here, there = self.time, self.time.now + later, self._hosts[source], self._hosts[target]
        if here == there:
            time.at(begin + self._inside.seconds(0 if source in time.cores else nbytes), source, then)
            return
        self.sent += nbytes
        if nbytes <= PACKET:
            time.at(begin + self._between.seconds(nbytes), source, then)
            return
        lasts = nbytes / self._between.bandwidth
        begin = max(begin, self._leaves[here])
        self._leaves[here] = begin + lasts
        time.at(begin + self._between.latency, source, partial(self._enter, there, lasts, source, then))

    def _enter(self, host: int, lasts: float, source: int, then: Callable[[], object]) -> None:
        """The first byte is there."""
        begin = max(self.time.now, self._enters[host])
        self._enters[host] = begin + lasts
        self.time.at(begin + lasts, source, then)
