"""What moves a rank's data while it computes: a second activity of the rank, with a clock and a place on its cores of its own.

It is to virtual time what `threads.Mover` is to MPI: transfers run in the order in which they were started, it sleeps for
`threads.PAUSE` whenever one gives way, and the rank looks at one that it waits for as it looks there (`threads.Job.wait`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence

import numpy as np

from dbnet.comm.simulated.clock import VirtualTime
from dbnet.comm.simulated.interconnect import Interconnect
from dbnet.comm.simulated.memory import SimulatedMemory
from dbnet.comm.simulated.player import Player
from dbnet.comm.simulated.window import SimulatedWindow
from dbnet.comm.threads import PAUSE, Job, Mover
from dbnet.comm.turns import Turns
from dbnet.comm.window import Get, Post, Window


class VirtualMover(Mover):
    """Moves a rank's data while it computes.

    Parameters
    ----------
    time
        The clocks.
    number
        Its own among those of ranks: ties and cores go by it.
    name
        Its rank's.
    """

    def __init__(self, time: VirtualTime, number: int, name: str) -> None:
        self._time, self._queue, self._idle = time, deque[Job | None](), True
        self._last = None
        self._player = Player(time, number, self._turns(), 0.0, name, PAUSE)
        time.join(self._player)

    def start(self, work: Generator) -> Job:
        before = self._last if self._last is not None and not self._last.done.is_set() else None
        self._last = job = Job(work, before, Moment(self._time))
        self._give(job)
        return job

    @property
    def here(self) -> bool:
        return self._time.player is self._player

    def stop(self) -> None:
        self._give(None)

    def _give(self, job: Job | None) -> None:
        self._queue.append(job)
        if self._idle:
            self._idle, time = False, self._time
            cores = time.cores.get(self._player.rank)
            if cores is not None:
                time.sync()
                cores.near(self._player)
            time.at(time.now, self._player.rank, self._player.go)

    def _turns(self) -> Turns:
        time, queue = self._time, self._queue
        while (job := queue.popleft()) is not None:
            job.behind = None
            for wait in job.work:
                job.moved += wait is None
                if wait is None:
                    time.compute(time.turn)
                    time.elapse(PAUSE + time.late)
                else:
                    yield wait
            time.sync()
            job.done.set()
            if not queue:
                self._idle = True
                time.rest()
                time.switch()


class Moment:
    """What a thread's event is, in virtual time: it is set by one player and waited for by another."""

    def __init__(self, time: VirtualTime) -> None:
        self._time, self._set, self._waiting = time, False, None

    def set(self) -> None:
        self._set = True
        self._over()

    def is_set(self) -> bool:
        self._time.sync()
        return self._set

    def wait(self, timeout: float) -> bool:
        """Let the rank whose turn it is sleep until it is set, or so many seconds have passed; return whether it is set."""
        time = self._time
        if not self.is_set():
            time.rest()
            self._waiting = time.player
            time.at(time.now + timeout, time.player.rank, self._over)
            time.switch()
        return self._set

    def _over(self) -> None:
        """One wait is over; once it is set there is no other."""
        if self._waiting is not None:
            player, self._waiting = self._waiting, None
            self._time.at(self._time.now, player.rank, player.go)


class SharedWindow(Window):
    """The window of a rank whose data move beside it: each of the two has an end of its own.

    Parameters
    ----------
    memory, wire, rank
        As of the ends.
    """

    def __init__(self, memory: SimulatedMemory, wire: Interconnect, rank: int) -> None:
        self._time, self._parts = wire.time, (memory, wire, rank)
        self._ends: dict[int, SimulatedWindow] = {}

    def _end(self) -> SimulatedWindow:
        """Return the end of who asks."""
        number = self._time.player.rank
        found = self._ends.get(number)
        if found is None:
            found = self._ends[number] = SimulatedWindow(*self._parts)
        return found

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        self._end().get(rank, field, out, start)

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._end().put(rank, field, data, start)

    def flush(self, rank: int) -> None:
        self._end().flush(rank)

    def getting(self, gets: Sequence[Get]) -> Callable[[], None]:
        ready: dict[SimulatedWindow, Callable[[], None]] = {}

        def get() -> None:
            end = self._end()
            if end not in ready:
                ready[end] = end.getting(gets)
            ready[end]()

        return get

    def posting(self, rank: int, header: tuple[str, np.ndarray], ring: str, counter: tuple[str, np.ndarray, int]) -> Post:
        posts: dict[SimulatedWindow, Post] = {}

        def post(start: int, data: np.ndarray, place: int) -> None:
            end = self._end()
            if end not in posts:
                posts[end] = end.posting(rank, header, ring, counter)
            posts[end](start, data, place)

        return post

    def wake(self, rank: int) -> None:
        """What arrives wakes its target here."""
