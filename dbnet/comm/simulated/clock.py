"""Virtual seconds: every rank has a clock, and the one with the earliest goes next.

What happens is a heap of (time, rank, number, act, arguments): turns of ranks, arrivals of what was sent. Ties go by time, then
by rank, which is by role (coordinator, shards, replicas) and index, then by the order in which they came about. So nothing depends
on a wall clock, and a run is the same again to the bit.

A role runs in a greenlet, so it may wait in the middle of a function: `compute` while it computes, `switch` while a transfer is
under way. Where nothing of others can matter to a rank it goes on by itself (`ahead`), and what it sends takes its place in the
heap; before it looks at anything the others catch up (`sync`).

One that yields with nothing to do rests in pauses that double up to a bound, as under MPI a rank that waits (`turns.drive`). There
one that is idle lengthens them faster, and servers that share one host with all others rest until somebody rings (`window.Bells`),
at most 40 ms (a shard) or 80 ms (the coordinator); here they answer within the longest pause. A server, which looks at nothing but
its own memory, is woken by an arrival at the look that would have found it; another rank that says what it waits for rests likewise
(`rest`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from heapq import heappop, heappush
from math import inf
from typing import Any

from greenlet import getcurrent, greenlet

from dbnet.comm.simulated.cores import Cores
from dbnet.comm.simulated.rest import Looks, Rest, Watch
from dbnet.comm.turns import Turns, Wait
from dbnet.core.errors import Lost

_SHORTEST = 2e-5
# When it is made, what makes it, of what.
Glance = tuple[float, Callable[[Any], object], Any]
_LOOKS = 0.1  # seconds after which a server that nothing arrives at looks at its clock


class VirtualTime:
    """The clocks of all ranks.

    Parameters
    ----------
    pause
        Longest pause of an idle rank, seconds; 0: it notices at once what arrives, and polls others every `_SHORTEST`.
    turn
        Seconds of a turn that says of no other cost; above 0, so that nobody takes turns for ever.
    deadline
        Seconds that one wait may last.
    late
        Seconds by which a pause is longer than it was meant to be.

    Attributes
    ----------
    now
        The clock of the rank whose turn it is.
    cores
        By rank, for those that have none of their own: the cores that they share.
    player
        The rank whose turn it is; None between turns.
    watches
        By rank the words of its memory that others wait for.
    glances
        By rank, and by who is to make it: a look at its memory that nobody else's turn depends on. It is made before the rank
        changes something at that moment or later, or when its maker wants it.
    rests
        Whether ranks rest at all; else every look is played.
    """

    player: Player | None
    rests = True

    def __init__(self, pause: float = 1e-3, turn: float = 1e-6, deadline: float = 60.0, late: float = 0.0) -> None:
        self.pause, self.turn, self.deadline, self.late = pause, turn, deadline, late
        self.now, self.player = 0.0, None
        self.cores: dict[int, Cores] = {}
        self.watches: dict[int, Watch] = {}
        self.glances: defaultdict[int, dict[int, Glance]] = defaultdict(dict)
        self._heap: list[tuple[float, int, int, Callable[..., object], tuple]] = []
        self._number = self.living = 0
        self._players: dict[int, Player] = {}
        self._hub: greenlet | None = None

    def __call__(self) -> float:
        return self.now

    @property
    def events(self) -> int:
        """How many turns and arrivals there were."""
        return self._number

    def at(self, time: float, rank: int, act: Callable[..., object], *arguments: object) -> None:
        """Have `act` called at `time`, in the name of `rank`."""
        self._number = number = self._number + 1
        heappush(self._heap, (time, rank, number, act, arguments))

    def play(self, roles: Mapping[int, Turns], servers: Mapping[int, float], name: Callable[[int], str] = str) -> None:
        """Play the roles of all ranks to their ends.

        Parameters
        ----------
        roles
            By rank.
        servers
            Those that look at nothing but their own memory and the clock, and the longest time from look to look.
        name
            Returns a rank's name.

        Raises
        ------
        Lost
            A rank waited longer than the deadline.
        """
        self._hub = getcurrent()
        for rank, role in roles.items():
            self._players[rank] = player = Player(self, rank, role, servers.get(rank, 0.0), name(rank))
            self.at(self.now, rank, player.go)
        self.living = len(roles)
        heap = self._heap
        while self.living:
            if not heap:
                waiting = "; ".join(p.reason for p in self._players.values() if p.reason)
                raise Lost(f"Everyone waits: {waiting or 'nobody says for what'}.")
            self.now, _, _, act, arguments = heappop(heap)
            act(*arguments)

    def elapse(self, seconds: float) -> None:
        """Let time pass for the rank whose turn it is."""
        if self.player is None:
            raise RuntimeError("Time passes only for a rank that is being played.")
        if self.cores:
            self.rest()
        elif self.watches:
            self.tell()
        self.now += seconds
        self.sync()

    def rest(self) -> None:
        """Let the rank whose turn it is leave its core, if it shares one."""
        cores = self.cores.get(self.player.rank)
        if cores is not None:
            self.sync()
            cores.rest()

    def quiet(self, seconds: float) -> bool:
        """Return whether nothing happens for so many seconds from now."""
        return not self._heap or self._heap[0][0] > self.now + seconds

    def tell(self) -> None:
        """Let others know of what the rank whose turn it is has changed in its own memory."""
        watch = self.watches.get(self.player.rank)
        if watch is not None:
            watch.check(self.now, self.player.rank)

    def watch(self, rank: int) -> Watch:
        """Return who waits for words of this rank's memory."""
        return self.watches.setdefault(rank, Watch())

    def ahead(self, time: float) -> None:
        """Go on at `time` with the rank whose turn it is: what others do until then cannot matter to what it does next."""
        self.now = time

    def sync(self) -> None:
        """Let everything happen that is earlier than the clock of the rank whose turn it is."""
        heap, player = self._heap, self.player
        if heap:
            first, rank = heap[0], player.rank
            if first[0] < self.now or (first[0] == self.now and first[1] <= rank):
                self.at(self.now, rank, player.go)
                self._hub.switch()
                return
        if player.glances:
            self.glance(player.rank, player.rank)

    def glance(self, rank: int, writer: int) -> None:
        """Have the looks made at a rank's memory that come before what `writer` does now."""
        now, glances = self.now, self.glances[rank]
        for maker, (at, read, what) in list(glances.items()):
            if at < now or (at == now and maker < writer):
                del glances[maker]
                read(what)

    def compute(self, seconds: float) -> None:
        """Let the rank whose turn it is compute for so many seconds of a core, which may be a shared one."""
        self.player.looks = None
        cores = self.cores.get(self.player.rank) if self.cores else None
        if cores is None:
            self.elapse(seconds)
        else:
            self.sync()
            cores.compute(seconds)

    def give_way(self) -> None:
        """Let others have the core of the rank whose turn it is, as a rank does after each piece of work (`turns.drive`)."""
        if self.cores and (cores := self.cores.get(self.player.rank)) is not None:
            cores.give_way()

    def switch(self) -> None:
        """Leave the turn to others, until somebody calls this player's `go`."""
        self._hub.switch()

    def notify(self, rank: int) -> None:
        """Let a rank know that something has arrived in its memory."""
        player = self._players.get(rank)
        if player is not None:
            player.notify()


class Player:
    """One rank: its role in a greenlet, and how it rests."""

    def __init__(self, time: VirtualTime, rank: int, role: Turns, looks: float, name: str) -> None:
        self._time, self.rank, self._longest, self._name = time, rank, looks, name
        self._switch = greenlet(partial(self._play, role)).switch
        self.reason, self._since, self.done = "", 0.0, False
        self.glances = time.glances[rank]
        self._pause = _SHORTEST
        # Of a server: since when it rests (None: it does not), until when if nothing arrives, whether something arrived in its
        # turn, how long it rests where nothing does.
        self._resting: float | None = None
        self._until, self._news, self._looks = 0.0, False, _LOOKS
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
            time.glance(self.rank, self.rank)
        time.player = self
        self._switch()
        time.player = None

    def _play(self, role: Turns) -> None:
        time = self._time
        for wait in role:
            if wait is None:
                self._pause, self.reason, self.looks = _SHORTEST, "", None
                if time.cores:
                    time.compute(time.turn)
                    time.give_way()
                elif self._longest:
                    time.elapse(time.turn)
                else:
                    # It looks at nothing but what it has got.
                    time.now += time.turn
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
            if time.watches:
                time.tell()
            self._resting, self._until = time.now, time.now + self._looks
            self._looks = min(2 * self._looks, self._longest)
            self._set_alarm(self._until)
            time.switch()

    def _longer(self) -> float:
        """Return how long to pause now; the next pause is longer."""
        pause = self._pause
        self._pause = min(2 * pause, max(self._time.pause, _SHORTEST))
        return pause + self._time.late

    def notify(self) -> None:
        """Something has arrived: it is found at the next look of a rank that would look after one pause after the other."""
        if self._resting is None:
            self._news = True
            return
        time, at = self._time, self._resting
        now, longest, late = time.now, time.pause, time.late
        if longest:
            while at < now and self._pause < longest:
                at += self._longer()
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
        rest = Rest(looks, time.now, self._pause, max(time.pause, _SHORTEST), time.late, until)
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
