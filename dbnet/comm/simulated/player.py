"""Players: a rank's role in a greenlet, and how it rests.

One that yields with nothing to do rests in pauses that double up to a bound, as under MPI a rank that waits (`turns.drive`). There
one that is idle lengthens them faster, and servers that share one host with all others rest until somebody rings (`window.Bells`),
at most 40 ms (a shard) or 80 ms (the coordinator); here they answer within the longest pause. A server, which looks at nothing but
its own memory, is woken by an arrival at the look that would have found it; another rank that says what it waits for rests likewise
(`rest`).
"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING

from greenlet import greenlet

from dbnet.comm.simulated.rest import Looks, Rest
from dbnet.comm.turns import Turns, Wait
from dbnet.core.errors import Lost

if TYPE_CHECKING:
    from dbnet.comm.simulated.clock import VirtualTime

SHORTEST = 2e-5  # seconds of a first pause
_LOOKS = 0.1  # seconds after which a server that nothing arrives at looks at its clock


class Player:
    """One rank: its role in a greenlet, and how it rests; `pause`: the longest between two looks, 0: as long as any."""

    def __init__(self, time: VirtualTime, rank: int, role: Turns, looks: float, name: str, pause: float = 0.0) -> None:
        self._time, self.rank, self._longest, self._name = time, rank, looks, name
        self._switch = greenlet(partial(self._play, role)).switch
        self.reason, self._since, self.done = "", 0.0, False
        self.glances, self._settled = time.glances[rank], time.settled.get(rank) if time.rests else None
        self._pause, self._most = SHORTEST, max(pause or time.pause, SHORTEST)
        # Of a server: since when it rests (None: it does not), when that was decided, until when if nothing arrives; whether
        # something arrived in its turn; how long it rests where nothing does.
        self._resting: float | None = None
        self._decided = self._until = 0.0
        self._news, self._looks = False, _LOOKS
        # Of others: what they did since their last pause, None: more than to look; the rest, None: they do not, and which one it
        # is; when it ends, as far as that is known.
        self.looks: Looks | None = None
        self._sleep: Rest | None = None
        self._rest, self._awakes = 0, inf
        # When one is asked whether its rest ends by itself.
        self._alarm = inf

    def go(self) -> None:
        """Take the turn."""
        time = self._time
        if self.glances:
            self.glances.before(time.now, self.rank)
        time.player = self
        self._switch()
        time.player = None

    def _play(self, role: Turns) -> None:
        time = self._time
        for wait in role:
            if wait is None:
                self._pause, self.reason, self.looks = SHORTEST, "", None
                if time.cores:
                    time.compute(time.turn)
                    time.give_way()
                elif self._settled is not None and not self._news and self._settled() > time.now + time.turn:
                    # What this look would find must arrive before.
                    self._rest_from(time.now + time.turn)
                elif self._longest:
                    time.elapse(time.turn)
                else:
                    # It looks at nothing but what it has got.
                    time.ahead(time.now + time.turn)
            else:
                self._idle(wait)
        if time.cores:
            time.rest()
        elif time.watches:
            time.tell()
        self.done = True
        time.living -= 1

    def _idle(self, wait: Wait) -> None:
        time = self._time
        if wait.reason != self.reason:
            self.reason, self._since = wait.reason, time.now
        elif self.reason and time.now - self._since > time.deadline:
            raise Lost(
                f"{self._name} waited {time.deadline:g} virtual seconds in vain: {wait.reason}. Raise run.deadline, or take a "
                "faster machine."
            )
        if self.rank in time.cores:
            # A look takes some of the cores that others wait for.
            time.elapse(self._longer())
            time.compute(time.turn)
        elif not self._longest:
            if wait.until is None or time.cores or not time.rests or not self._rests(wait.until):
                self.looks = Looks()
                time.elapse(self._longer())
        elif self._news:
            self._news, self._looks = False, _LOOKS
            time.elapse(self._longer() if time.pause else time.turn)
        else:
            self._rest_from(time.now)

    def _rest_from(self, at: float) -> None:
        """Rest since the look of a server at this moment, which finds nothing, until something arrives or it has rested long."""
        time = self._time
        if time.watches:
            time.tell()
        self._decided, self._resting, self._until = time.now, at, at + self._looks
        self._looks = min(2 * self._looks, self._longest)
        self._set_alarm(self._until)
        time.switch()

    def _longer(self) -> float:
        """Return how long to pause now; the next pause is longer."""
        pause = self._pause
        self._pause = min(2 * pause, self._most)
        return pause + self._time.late

    def notify(self, sender: int) -> None:
        """Something has arrived: it is found at the next look of a rank that would look after one pause after the other."""
        if self._resting is None:
            self._news = True
            return
        time, at = self._time, self._resting
        now, longest, late = time.now, time.pause, time.late
        if now < at or (self._decided < now == at and sender < self.rank):
            # The look that the rest was to begin with finds it.
            self._news = True
        elif longest:
            pause = self._pause
            while at < now and pause < longest:
                at += pause + late
                pause = 2 * pause if 2 * pause < longest else longest
            self._pause = pause
            if at < now:
                at += (whole := longest + late) * -(-(now - at) // whole)
        self._resting, self._looks = None, _LOOKS
        time.at(at if at > now else now, self.rank, self.go)

    def _set_alarm(self, at: float) -> None:
        """Ask at this moment whether the rest ends; an earlier alarm asks anew."""
        if at < self._alarm:
            self._alarm = at
            self._time.at(at, self.rank, self._ring, at)

    def _ring(self, at: float) -> None:
        if at != self._alarm:
            return
        self._alarm = inf
        if self._resting is not None:
            if self._until > at:
                self._set_alarm(self._until)
            else:
                # Nothing has arrived.
                self._resting = None
                self.go()
        elif (rest := self._sleep) is not None:
            if rest.until - rest.margin > at:
                self._set_alarm(rest.until - rest.margin)
            else:
                self._wake(*rest.end())

    # --- rests of those that look at others -----------------------------------------------------------------------------------

    def _rests(self, until: float) -> bool:
        """Sleep up to the look that must be made, if the last one says which that is; else return False at once."""
        time, looks = self._time, self.looks
        if looks is None or not looks.vain():
            return False
        until = min(until, self._since + time.deadline) if self.reason else until
        rest = Rest(looks, time.now, self._pause, self._most, time.late, until)
        if until - time.now < 2 * rest.margin:
            return False
        self._sleep, self._rest, self._awakes = rest, self._rest + 1, inf
        for part, target, place, start, out, _ in looks.read:
            time.watch(target).add(place, start, out.size, self, self._rest, part)
        self._set_alarm(rest.until - rest.margin)
        time.switch()
        self.looks = Looks()
        return True

    def changed(self, rest: int, part: int, moment: float, writer: int) -> None:
        """A word that it looks at was written."""
        if self._sleep is not None and rest == self._rest:
            self._wake(*self._sleep.end(self.rank, part, moment, writer))

    def _wake(self, at: float, pause: float) -> None:
        if at < self._awakes:
            self._awakes = at
            self._time.at(at, self.rank, self._awake, self._rest, at, pause)

    def _awake(self, rest: int, at: float, pause: float) -> None:
        """The look that must be made, unless an earlier one was found meanwhile."""
        if self._sleep is not None and (rest, at) == (self._rest, self._awakes):
            self._sleep, self._pause = None, pause
            self.go()
