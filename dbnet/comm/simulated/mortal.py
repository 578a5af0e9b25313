"""Clocks of ranks that may die: a dead one takes no turn any more, whatever calls it.

What had left it by then arrives. A rank dies at its moment whether it computes, waits, sleeps, or has gone ahead of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any

from dbnet.comm.simulated.clock import VirtualTime
from dbnet.comm.simulated.player import Player
from dbnet.comm.turns import Turns


class MortalTime(VirtualTime):
    """The clocks of all ranks, of which some die.

    Parameters
    ----------
    ends
        When each rank dies, [ranks]; inf: never.
    parts
        What clocks are made of.

    Attributes
    ----------
    ends
        As given, and as `end` has changed it.
    dead
        Who has died before its role was over, in this order.
    died
        Called with each of them.
    """

    def __init__(self, ends: Sequence[float], *parts: Any) -> None:
        super().__init__(*parts)
        self.ends, self.dead = list(ends), []
        self.died: Callable[[int], None] = _nothing
        # A role that is thrown away would be run to its end once more.
        self._corpses: list[Callable[[], object]] = []

    def play(self, roles: Mapping[int, Turns], servers: Mapping[int, float], name: Callable[[int], str] = str) -> None:
        for rank in roles:
            if self.ends[rank] < inf:
                self.at(self.ends[rank], rank, self._die, rank)
        super().play(roles, servers, name)

    def end(self, rank: int) -> None:
        """Let a rank take no turn from now on."""
        if self.now < self.ends[rank]:
            self.ends[rank] = self.now
            self.at(self.now, rank, self._die, rank)

    def playing(self, rank: int) -> bool:
        """Return whether a rank lives and its role is not over."""
        return not self._players[rank].done

    def ahead(self, time: float) -> None:
        self.now = time
        # What moves a rank's data dies with it.
        if self.player is not None and time >= self.ends[self.player.rank % len(self.ends)]:
            self.sync()

    def _die(self, rank: int) -> None:
        if not self.playing(rank):
            return
        for number in (rank, len(self.ends) + rank):
            if number in self._players and self.playing(number):
                self._bury(self._players[number])
        self.dead.append(rank)
        self.died(rank)

    def _bury(self, player: Player) -> None:
        if player.rank in self.cores:
            self.player = player
            self.cores[player.rank].rest()
            self.player = None
        self._corpses.append(player._switch)
        player._switch, player.done, player.reason = _nothing, True, ""
        self.living -= 1


def _nothing(*_: int) -> None:
    """Nobody is there any more."""
