"""Cores that the ranks of a host share, as under a fair scheduler: each of n busy ranks goes at min(1, cores / n) of its speed.

While all have a core a rank's work ends at the moment at which it would alone, to the bit. While they have not, the host counts the
seconds of a core that each busy rank has got; a rank leaves when these have reached its own end. Whenever somebody comes or leaves
the next end has another moment, and the one that was planned before is void.
"""

from __future__ import annotations

from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dbnet.comm.simulated.clock import Player, VirtualTime


class Cores:
    """The cores of one host.

    Parameters
    ----------
    time
        The clocks.
    cores
        How many there are.
    """

    def __init__(self, time: VirtualTime, cores: int) -> None:
        self._time, self._cores = time, cores
        # By when each ends: in seconds of a core that every busy rank has got; while nobody is slowed down, in virtual time.
        self._busy: list[tuple[float, int, Player]] = []
        self._got = self._since = 0.0
        self._speed, self._planned = 1.0, 0

    def compute(self, seconds: float) -> None:
        """Let the rank whose turn it is have so many seconds of a core."""
        player = self._time.player
        self._count()
        # Before it comes: it may be the one who slows the others down.
        heappush(self._busy, (self._got + seconds, player.rank, player))
        self._plan()
        self._time.switch()

    def _count(self) -> None:
        """Count what every busy rank has got up to now."""
        now = self._time.now
        self._got = now if self._speed == 1.0 else self._got + (now - self._since) * self._speed
        self._since = now

    def _plan(self) -> None:
        """Plan the next end, with the speed from now on."""
        self._planned += 1
        busy, now = self._busy, self._time.now
        self._speed = min(1.0, self._cores / len(busy)) if busy else 1.0
        if self._speed == 1.0 and self._got != now:
            # Nobody is slowed down any more; all are shifted alike, so their order stays.
            busy[:] = [(now + (end - self._got), rank, player) for end, rank, player in busy]
            self._got = now
        if busy:
            end, rank, _ = busy[0]
            at = end if self._speed == 1.0 else now + (end - self._got) / self._speed
            self._time.at(max(at, now), rank, partial(self._leave, self._planned))

    def _leave(self, planned: int) -> None:
        """The end of somebody's work, unless the plan was changed."""
        if planned != self._planned:
            return
        self._count()
        _, _, player = heappop(self._busy)
        self._plan()
        player.go()
