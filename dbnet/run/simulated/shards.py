"""Shards in simulated time: a slice takes its seconds before it is applied; so do the commands of a batch method.

Replicas that push each gradient at once compute it in one place, and each push is a copy, of which the rings hold slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbnet.comm.channel import Channel
from dbnet.comm.simulated.clock import VirtualTime
from dbnet.comm.turns import Turns
from dbnet.core.ranges import Range
from dbnet.network.cost import Profile
from dbnet.shards.push import Receiver
from dbnet.shards.rules.base import Arrival, Rule
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox, WindowStore


class PacedInbox(Inbox):
    """Rings whose slices take virtual seconds.

    Parameters
    ----------
    time, profile
        The clocks, and what a slice costs.
    counted
        The origins of which something has arrived: of hundreds of rings few have something.
    parts
        What an inbox is made of.
    """

    def __init__(self, time: VirtualTime, profile: Profile, counted: set[int], *parts: Any) -> None:
        super().__init__(*parts)
        self._time, self._profile, self._counted = time, profile, counted
        self._item = self._window.local["params"].itemsize
        self._rows = {origin: row for row, origin in enumerate(self._users)}

    def drain(self) -> bool:
        counted, busy = self._counted, False
        if not counted:
            return False
        for origin in sorted(counted):
            row = self._rows[origin]
            busy = (not self._closed[row] and self._take(row, origin)) or busy
            if self._closed[row] or self._heads[origin] == self._tails[origin]:
                counted.discard(origin)
        return busy

    def apply(self, row: int, origin: int, slot: int, header: tuple[int, ...]) -> None:
        self._time.compute(self._profile.apply_seconds(header[2] * self._item))
        super().apply(row, origin, slot, header)


class HollowInbox(PacedInbox):
    """Rings of a dry run, whose slices have no contents."""

    def widened(self, g: np.ndarray) -> np.ndarray:
        return g


class HollowStore(WindowStore):
    """The replica's end in a dry run: bytes travel, and nothing is rounded."""

    def narrow(self, x: np.ndarray, out: np.ndarray) -> None:
        """There are no numbers."""

    widen = narrow


class SharingStore(WindowStore):
    """The replica's end where nobody else computes between a gradient and the beginning of its push, without overlap.

    Parameters
    ----------
    gradient
        Where all replicas compute, [size].
    parts
        What a store is made of.
    """

    def __init__(self, gradient: np.ndarray, *parts: Any) -> None:
        super().__init__(*parts)
        self.g = self._g2 = gradient
        # What is narrow lies in a buffer for one slice.
        self._window.lends = self._narrow is None

    def write(self, g: np.ndarray, number: int, fetched: np.ndarray, steps: tuple[int, int]) -> Turns:
        # A push waits for flushes and for room in rings, while others compute.
        yield from super().write(g.copy(), number, fetched, steps)


class PacedReceiver:
    """A batch method's shard, whose commands take virtual seconds; all else is the receiver's.

    Parameters
    ----------
    receiver, time, profile
        The shard, the clocks, and what a command costs.
    """

    def __init__(self, receiver: Receiver, time: VirtualTime, profile: Profile) -> None:
        self._receiver, self._time = receiver, time
        self._seconds = profile.apply_seconds(receiver.params.nbytes)

    def advance(self, channel: Channel) -> bool:
        busy = self._receiver.advance(channel)
        if busy:
            self._time.compute(self._seconds)
        return busy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._receiver, name)


class HollowShard(Shard):
    """A shard of a dry run: it counts what comes, and holds no register."""

    def __init__(self, part: Range, rule: Rule, params: np.ndarray, clock: np.ndarray, seconds: Callable[[], float]) -> None:
        super().__init__(Range(0, 0), rule, params, clock, seconds)
        self.range = part

    def apply(self, lo: int, g: np.ndarray, t: int, arrival: Arrival | None = None) -> None:
        """There are no numbers."""

    def registers(self) -> dict[str, np.ndarray]:
        return {}
