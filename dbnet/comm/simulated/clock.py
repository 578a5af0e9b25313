"""Virtual seconds: every rank has a clock, and the one with the earliest goes next.

What happens is a heap of (time, rank, number, act, arguments): turns of ranks, arrivals of what was sent. Ties go by time, then
by rank, which is by role (coordinator, shards, replicas) and index, then by the order in which they came about. So nothing depends
on a wall clock, and a run is the same again to the bit.

A role runs in a greenlet (`player`), so it may wait in the middle of a function: `compute` while it computes, `switch` while a
transfer is under way. Where nothing of others can matter to a rank it goes on by itself (`ahead`), and what it sends takes its
place in the heap; before it looks at anything the others catch up (`sync`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from heapq import heappop, heappush
from itertools import count

from greenlet import getcurrent

from dbnet.comm.simulated.cores import Cores
from dbnet.comm.simulated.player import Player
from dbnet.comm.simulated.rest import Glances, Watch
from dbnet.comm.turns import Turns
from dbnet.core.errors import Lost


class VirtualTime:
    """The clocks of all ranks.

    Parameters
    ----------
    pause
        Longest pause of an idle rank, seconds; 0: it notices at once what arrives, and polls others every `player.SHORTEST`.
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
    settled
        Of some servers, by rank: says up to when a look finds nothing to do, unless something arrives.
    glances
        By rank the looks at its memory that are not made yet.
    rests
        Whether ranks rest, and looks and answers that nobody else can tell go without turns of their own; else all is played.
    """

    player: Player | None
    rests = True

    def __init__(self, pause: float = 1e-3, turn: float = 1e-6, deadline: float = 60.0, late: float = 0.0) -> None:
        self.pause, self.turn, self.deadline, self.late = pause, turn, deadline, late
        self.now, self.player = 0.0, None
        self.cores: dict[int, Cores] = {}
        self.watches: dict[int, Watch] = {}
        self.settled: dict[int, Callable[[], float]] = {}
        self.glances: defaultdict[int, Glances] = defaultdict(Glances)
        self._heap: list[tuple[float, int, int, Callable[..., object], tuple]] = []
        self._next = count(1).__next__
        self.living = 0
        self._players: dict[int, Player] = {}
        self._switch: Callable[[], object] = _nobody

    def __call__(self) -> float:
        return self.now

    @property
    def events(self) -> int:
        """How many turns and arrivals there were."""
        number = self._next()
        # To look at it counts nothing.
        self._next = count(number).__next__
        return number - 1

    def at(self, time: float, rank: int, act: Callable[..., object], *arguments: object) -> None:
        """Have `act` called at `time`, in the name of `rank`."""
        heappush(self._heap, (time, rank, self._next(), act, arguments))

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
        self._switch = getcurrent().switch
        for rank, role in roles.items():
            self._players[rank] = player = Player(self, rank, role, servers.get(rank, 0.0), name(rank))
            self.at(self.now, rank, player.go)
        self.living += len(roles)
        heap = self._heap
        while self.living:
            if not heap:
                waiting = "; ".join(p.reason for p in self._players.values() if p.reason)
                raise Lost(f"Everyone waits: {waiting or 'nobody says for what'}.")
            self.now, _, _, act, arguments = heappop(heap)
            act(*arguments)

    def join(self, player: Player) -> None:
        """Play another one, which is no rank, to its end: it is given its first turn by whoever has made it."""
        self._players[player.rank] = player
        self.living += 1

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
                heappush(heap, (self.now, rank, self._next(), player.go, ()))
                self._switch()
                return
        if player.glances:
            player.glances.before(self.now, player.rank)

    def compute(self, seconds: float) -> None:
        """Let the rank whose turn it is compute for so many seconds of a core, which may be a shared one."""
        self.player.looks = None
        if self.cores and (cores := self.cores.get(self.player.rank)) is not None:
            self.sync()
            cores.compute(seconds)
        else:
            self.elapse(seconds)

    def give_way(self) -> None:
        """Let others have the core of the rank whose turn it is, as a rank does after each piece of work (`turns.drive`)."""
        if self.cores and (cores := self.cores.get(self.player.rank)) is not None:
            cores.give_way()

    def switch(self) -> None:
        """Leave the turn to others, until somebody calls this player's `go`."""
        self._switch()

    def notify(self, rank: int, sender: int) -> None:
        """Let a rank know that something has arrived in its memory."""
        player = self._players.get(rank)
        if player is not None:
            player.notify(sender)


def _nobody() -> None:
    raise RuntimeError("Nobody has a turn before the roles are played.")
