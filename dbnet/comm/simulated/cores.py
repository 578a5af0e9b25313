"""Cores that the ranks of a host share, as Linux lets them: each has a core to itself until it sleeps, gives way or is displaced.

A rank that wakes takes an idle core, the one it had before if that is idle; else it displaces whoever has that core at once,
unless it has had more than its share (measured on Linux 6.18: beside a busy rank it is mostly as punctual as on an idle core). A
rank that gives way (`sched_yield`) goes behind those that wait there (measured: for the rest of one's work and all of the
other's), and so does one that has had the core for a slice while others wait. A core that becomes idle takes a rank that waits for
another one. Who is next: of those that have had no more than the mean the one whose slice ends first (EEVDF, Stoica and Abdel-
Wahab 1995). Whoever comes back to a core that another rank has had takes `switch` seconds longer, since its data and addresses are
to be found again; after a sleep that is part of what its looks take. Then it has the core for twice that before one that wakes
displaces it, or many that look for work now and then could keep it from getting on at all.

A rank whose core nobody else wants ends at the moment at which it would alone, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

# Seconds after which Linux looks again whether ranks that compute are spread over the cores (2 ms, 16 times where they are busy).
_BALANCE = 0.032


class _Player(Protocol):
    """A rank as its cores know it (`clock.Player`)."""

    rank: int

    def go(self) -> None: ...


class _Time(Protocol):
    """The clocks as cores need them (`clock.VirtualTime`)."""

    now: float
    player: _Player | None

    def at(self, time: float, rank: int, act: Callable[..., object], *arguments: object) -> None: ...

    def quiet(self, seconds: float) -> bool: ...

    def switch(self) -> None: ...


class _Core:
    """One core: who has it, who waits for it, who had it last; `begun`: when whoever has it came; `kept`: until when it stays."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.holder: _Seat | None = None
        self.last: _Seat | None = None
        self.waiting: list[_Seat] = []
        self.begun = self.kept = self.mean = self.balanced = 0.0
        # The newest plan for its next event.
        self.plan = 0


class _Seat:
    """One rank: the core that it has, waits for or had last, and what it is to get.

    `had` are seconds of a core, comparable among those of one core; when it has had `due` others come first. `left` are the seconds
    of its work; `end` is when they end, if it has the core; `watched`: whether an arrival ends its work (`Cores.watch`);
    `woken`: it has slept, and had no core since.
    """

    def __init__(self, player: _Player) -> None:
        self.player = player
        self.core: _Core | None = None
        self.had = self.due = self.left = self.end = self.counted = 0.0
        self.awake = self.watched = self.woken = False
        self.queued = 0

    @property
    def order(self) -> tuple[float, int]:
        """By which it comes before others: the end of its slice, then who has waited longer."""
        return self.due, self.queued


class Cores:
    """The cores of one host.

    Parameters
    ----------
    time
        The clocks.
    cores
        How many there are.
    switch
        Seconds that a rank takes longer when it comes back to its work after another rank.
    slice
        Seconds after which a rank leaves its core to those that wait for it.
    """

    def __init__(self, time: _Time, cores: int, switch: float = 0.0, slice: float = 4e-3) -> None:
        self._time, self._switch, self._slice = time, switch, slice
        self._cores = [_Core(number) for number in range(cores)]
        self._seats: dict[int, _Seat] = {}
        self._queued = 0

    def compute(self, seconds: float) -> None:
        """Let the rank whose turn it is have so many seconds of a core."""
        self._work(self._mine(), seconds)

    def watch(self, seconds: float) -> None:
        """The same, but `arrived` ends it: the rank looks for something all the while."""
        seat = self._mine()
        seat.watched = True
        self._work(seat, seconds)
        seat.watched = False

    def arrived(self, player: _Player) -> None:
        """What a rank watches for has come: it has seen it when it has a core."""
        seat = self._seats.get(player.rank)
        if seat is None or not seat.watched:
            return
        seat.watched = False
        if seat.core.holder is seat:
            seat.end = self._time.now
            self._plan(seat.core)
        else:
            seat.left = 0.0

    def give_way(self) -> bool:
        """Let those that wait for the core of the rank whose turn it is have it first; return whether there were any."""
        seat = self._mine()
        core = seat.core
        if not seat.awake or core.holder is not seat or not core.waiting:
            return False
        self._count(core)
        seat.had, seat.due, seat.left = seat.due, seat.due + self._slice, 0.0
        self._leave(core, seat)
        self._time.switch()
        return True

    def near(self, player: _Player) -> None:
        """Let one that sleeps, and is woken by the rank whose turn it is, wake on that one's core if fewer want that."""
        seat, there = self._seats.get(player.rank), self._mine().core
        if seat is None or seat.awake or there is None or len(there.waiting) >= len(seat.core.waiting):
            return
        self._mean(there), self._mean(seat.core)
        self._move(seat, seat.core, there)
        seat.core = there

    def rest(self) -> None:
        """The rank whose turn it is sleeps, and leaves its core."""
        seat = self._seats.get(self._time.player.rank)
        if seat is None or not seat.awake:
            return
        core = seat.core
        if core.holder is seat:
            self._count(core)
            self._mean(core)
            seat.awake = False
            self._next(core)
        else:
            self._mean(core)
            seat.awake = False
            core.waiting.remove(seat)

    def _mine(self) -> _Seat:
        player = self._time.player
        seat = self._seats.get(player.rank)
        if seat is None:
            seat = self._seats[player.rank] = _Seat(player)
        return seat

    def _work(self, seat: _Seat, seconds: float) -> None:
        time, core = self._time, seat.core
        seat.left = seconds
        if not seat.awake:
            self._wake(seat)
        elif core.holder is seat:
            self._count(core)
            if not core.waiting and time.quiet(seconds):
                # Nothing happens meanwhile.
                time.now += seconds
                return
            seat.end = time.now + seconds
            self._consider(core)
        time.switch()

    def _wake(self, seat: _Seat) -> None:
        """Find a core for a rank that has slept."""
        before, cores = seat.core, self._cores
        core = before if before is not None and before.holder is None else next((c for c in cores if c.holder is None), before)
        if core is None:
            core = min(cores, key=lambda c: (len(c.waiting), c.number))
        if core.holder is not None:
            self._count(core)
        mean = self._mean(core)
        # What it missed while it slept is made good up to a slice.
        seat.had = max(seat.had - (mean if before is core or before is None else self._mean(before)), -self._slice) + mean
        if core.holder is None:
            seat.had = max(seat.had, mean)
        seat.due, seat.awake, seat.woken, seat.core = seat.had + self._slice, True, True, core
        holder = core.holder
        if holder is None:
            self._start(core, seat)
            return
        self._queue(core, seat)
        # One that has a core and computes nothing is about to: it is looked at then.
        if holder.end > self._time.now:
            self._consider(core, seat)

    def _consider(self, core: _Core, seat: _Seat | None = None) -> None:
        """Let a rank that has woken (`seat` or the first one) displace the holder if it has had no more than its share."""
        if seat is None:
            seat = self._first(core)
        fair = seat is not None and self._time.now >= core.kept and seat.had <= min(self._mean(core), core.holder.had)
        if fair:
            self._take(core, seat, core.holder)
        else:
            self._plan(core)

    @staticmethod
    def _first(core: _Core) -> _Seat | None:
        """Return who comes first of those that have woken and wait for a core."""
        return min((other for other in core.waiting if other.woken), key=_order, default=None)

    def _take(self, core: _Core, seat: _Seat, holder: _Seat) -> None:
        """Let `seat`, which waits, have the core in the place of `holder`."""
        holder.left = max(0.0, holder.end - self._time.now)
        self._queue(core, holder)
        core.waiting.remove(seat)
        self._start(core, seat)

    def _start(self, core: _Core, seat: _Seat) -> None:
        """Let a rank have a core from now on."""
        now = self._time.now
        core.kept = now
        if core.last is not seat and not seat.woken:
            seat.left += self._switch
            core.kept += 2 * self._switch
        core.holder = core.last = seat
        seat.woken = False
        core.begun = seat.counted = now
        seat.core, seat.end = core, now + seat.left
        self._plan(core)

    def _leave(self, core: _Core, seat: _Seat) -> None:
        """Let others have a core before its holder; now and then that goes to another core which fewer want."""
        now, there = self._time.now, min(self._cores, key=lambda c: (len(c.waiting), c.number))
        if len(there.waiting) < len(core.waiting) and now - core.balanced >= _BALANCE:
            core.balanced = there.balanced = now
            self._mean(core)
            seat.core = there
            self._move(seat, core, there)
            self._queue(there, seat)
            self._plan(there)
        else:
            self._queue(core, seat)
        self._next(core)

    def _next(self, core: _Core) -> None:
        """Let another rank have a core whose holder leaves it; an idle one takes somebody who waits for another one."""
        core.holder = None
        core.plan += 1
        source = core
        if not core.waiting:
            source = max(self._cores, key=lambda c: (len(c.waiting), -c.number))
            if not source.waiting:
                return
        mean = self._mean(source)
        fair = [seat for seat in source.waiting if seat.had <= mean]
        seat = min(fair or source.waiting, key=_order)
        source.waiting.remove(seat)
        if source is not core:
            self._move(seat, source, core)
        self._start(core, seat)

    def _queue(self, core: _Core, seat: _Seat) -> None:
        self._queued += 1
        seat.queued = self._queued
        core.waiting.append(seat)

    @staticmethod
    def _move(seat: _Seat, source: _Core, target: _Core) -> None:
        """Keep what a rank had beside the mean of those where it was."""
        shift = target.mean - source.mean
        seat.had, seat.due = seat.had + shift, seat.due + shift

    def _mean(self, core: _Core) -> float:
        """Return what the ranks that have or want a core have had in the mean; of an idle one what it was last."""
        n, total = len(core.waiting), sum(seat.had for seat in core.waiting)
        if core.holder is not None:
            n, total = n + 1, total + core.holder.had
        if n:
            core.mean = total / n
        return core.mean

    def _count(self, core: _Core) -> None:
        """Count what the holder of a core has had up to now."""
        seat, now = core.holder, self._time.now
        if now > seat.counted:
            seat.had += now - seat.counted
            seat.counted = now

    def _plan(self, core: _Core) -> None:
        """Plan when something happens next at a core: its holder's work ends, or its slice, if somebody waits."""
        core.plan += 1
        seat, now = core.holder, self._time.now
        at = seat.end
        if core.waiting and core.begun + self._slice < at:
            at = core.begun + self._slice
        if now < core.kept < at and self._first(core) is not None:
            at = core.kept
        self._time.at(max(at, now), seat.player.rank, partial(self._happens, core, core.plan))

    def _happens(self, core: _Core, plan: int) -> None:
        if plan != core.plan:
            return
        seat = core.holder
        self._count(core)
        if self._time.now >= seat.end:
            core.plan += 1
            seat.left = 0.0
            seat.player.go()
            return
        if self._time.now < core.begun + self._slice:
            self._consider(core)
            return
        seat.left, seat.due = seat.end - self._time.now, seat.had + self._slice
        self._leave(core, seat)


def _order(seat: _Seat) -> tuple[float, int]:
    return seat.order
