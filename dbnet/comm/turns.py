"""How ranks give way: every role is a generator that yields when others may run.

A role yields None after a piece of work, `IDLE` when it has nothing to do (`BESIDE`: a thread of its own has), and a `Wait` when it
cannot go on until another rank acts. So does whatever it calls that takes turns; results come by ``yield from``. With MPI each rank
drives its own generator (`drive`): it gives a sign of life at every yield, backs off while idle and gives up a wait after the
deadline, naming who waits for whom. Within one process all roles take turns (`take_turns`), always in the same order, and what
recurs falls due by a count of turns (`Rounds`) and by no clock, so a run can be repeated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from math import inf
from typing import NamedTuple, TypeVar

from greenlet import getcurrent, greenlet

from dbnet.comm.patience import Patience
from dbnet.core.errors import Lost


class Wait(NamedTuple):
    """Who waits for what, in words; IDLE has none.

    `until`: who says it does nothing but look up to this moment of the run, and looks for nothing but what it has just looked at.
    """

    reason: str
    until: float | None = None


IDLE = Wait("")
# Of one that has nothing to do itself, but a thread that will: it must look again soon, and cannot rest until somebody wakes it.
BESIDE = Wait("", 0.0)


def looking(reason: str) -> Wait:
    """Return the wait of one that looks in vain at what others hold, and does nothing else."""
    return Wait(reason, inf)


T = TypeVar("T")
# `Turns[float]` returns a number, `Turns` nothing.
Turns = Generator[Wait | None, None, T]
# Seconds of a pause: at first, where somebody is waited for, and as a part of how long there has been nothing to do.
_SHORTEST, _LONGEST, _PART = 2e-5, 1e-3, 1 / 16
# From one pause to the next of a rank that is idle, and of one that waits; the pause in place of which who can be woken rests.
_IDLER, _WAITING, _SOON = 4, 2, 1e-3


def _nothing(reason: str) -> None:
    """Nobody wants a sign of life."""


def drive(
    role: Turns, deadline: float, crowded: bool = False, clock: Callable[[], float] = time.perf_counter,
    beat: Callable[[str], None] = _nothing, graph: Callable[[], str] = str, lazy: float = _LONGEST,
    rest: Callable[[float], None] | None = None,
) -> None:  # fmt: skip
    """Run one rank's role to its end.

    Parameters
    ----------
    deadline
        Seconds that one wait may last.
    crowded
        Whether there are more ranks than cores: then a rank lets others run after each piece of work, or a replica would fill its
        rings in one of the system's time slices while the shard that is to empty them waits for the core.
    beat
        Called at every yield with the reason of the present wait, or nothing.
    graph
        Returns who waits for whom in the whole run.
    lazy
        Seconds between two looks of a rank that is idle, after a while: each look costs some 50 us of a core.
    rest
        Pauses for so many seconds, or until somebody wakes this rank, which then rests for `lazy` as soon as it has been idle for
        half a millisecond; None: nobody can wake it.

    Raises
    ------
    Lost
        A wait lasted longer; the message says who waits for whom.
    """
    pause, idle, reason, patience = _SHORTEST, 0.0, "", Patience(deadline, clock)
    for wait in role:
        beat(wait.reason if wait is not None else "")
        if wait is None:
            pause, idle, reason = _SHORTEST, 0.0, ""
            if crowded:
                os.sched_yield()
            continue
        if wait.reason != reason:
            # Whoever is idle meanwhile waits for nothing: the same reason afterwards is another wait.
            reason = wait.reason
            patience.begin()
        elif reason and patience.over():
            found = f"\n{words}" if (words := graph()) else ""
            advice = "Look for a rank that hangs, or raise run.deadline."
            raise Lost(f"Waited {deadline:g} s in vain: {wait.reason}. {advice}{found}")
        # Not a synchronisation: an idle rank must not burn the core that a computing one needs, yet answer soon.
        if rest is not None and not reason and pause >= _SOON and wait is not BESIDE:
            rest(lazy)
            continue
        time.sleep(pause)
        idle += pause
        pause = min(_WAITING * pause, _LONGEST) if reason else min(_IDLER * pause, max(_LONGEST, min(lazy, _PART * idle)))


class Rounds:
    """What takes the place of a clock in one process: every round of turns counts as so many `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self.number = seconds, 0

    def __call__(self) -> float:
        return self.number * self._seconds


def take_turns(roles: Iterable[Turns], rounds: Rounds | None = None) -> None:
    """Run all roles in one process until the last has ended; Lost when every one of them waits for another.

    A role yields, or gives way in the middle of a function that it has called.
    """
    alive, rounds = [greenlet(partial(_play, role)) for role in roles], rounds or Rounds(0.0)
    while alive:
        rounds.number += 1
        waits: list[Wait] = []
        for role in list(alive):
            wait = role.switch()
            if role.dead:
                alive.remove(role)
            elif wait is not None and wait.reason:
                waits.append(wait)
        if waits and len(waits) == len(alive):
            raise Lost(f"Everyone waits: {'; '.join(w.reason for w in waits)}.")


def result(turns: Turns[T]) -> T:
    """Run what waits for nobody to its end; return its result."""
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return end.value


def give_way(wait: Wait | None) -> None:
    """Let others run, as if the role whose turn it is had yielded; only where `take_turns` plays it."""
    getcurrent().parent.switch(wait)


def _play(role: Turns) -> None:
    for wait in role:
        give_way(wait)
