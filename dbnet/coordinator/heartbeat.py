"""Signs of life, both halves, over the coordinator's window.

    pulse[rank]   a counter that goes up while the rank lives; 1 when it was asked by a signal to stop; 1 when it has left
    waits[rank]   what the rank waits for, in words; empty while it works
    age[rank]     written by the coordinator: seconds since the rank's counter changed

Every rank writes its own row and reads the coordinator's, whose third number says at the end that somebody was lost. A rank
whose counter stands still for the bound is lost; `membership` acts on it. Nobody is addressed for that, so a dead rank blocks
nobody; a rank that only slept reads in its order that it was given up. Time in which a rank itself did not run does not count
against others: a job that was stopped and continued as a whole goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from dbnet.comm.patience import Patience
from dbnet.comm.topology import Role, Topology
from dbnet.comm.window import Field, Window
from dbnet.coordinator.orders import LOST, ORDER, POLL
from dbnet.core.errors import Lost

PERIOD = 0.05
# Replicas up to which each polls its orders that often: more take turns, so that there are 2,500 polls a second at most.
_POLLING = 50
_TEXT = 96
BEAT, ASKED, LEFT = range(3)
ROW = 3


class GivenUp(Exception):
    """The coordinator has given up this rank's replica: it must leave."""


def polling(topology: Topology) -> float:
    """Return the seconds between two polls of a replica's orders."""
    return POLL * max(1.0, topology.copies / _POLLING)


def beating(topology: Topology, bound: float) -> float:
    """Return the seconds between two signs of life of a rank: many must not keep the coordinator busy with theirs."""
    return min(bound / 20, PERIOD * max(1.0, topology.size / 16))


def without_coordinator(name: str, bound: float) -> Lost:
    """Return what a rank of this name says that has not heard of the coordinator for so many seconds."""
    return Lost(
        f"{name}: the coordinator is lost, there was no sign of its life for {bound:g} s; go on from the newest checkpoint with "
        "--resume auto."
    )


def heartbeat_fields(topology: Topology) -> list[Field]:
    """Return more window fields of the coordinator."""
    n = topology.size
    return [Field("pulse", "int64", (n, ROW)), Field("waits", "uint8", (n, _TEXT)), Field("age", "float64", (n,))]


class Heartbeat:
    """The half of a shard or a replica's partition.

    Parameters
    ----------
    window, topology, rank
        The coordinator's window, who is where, and who this is.
    bound
        Seconds after which a coordinator without a sign of life is lost.
    asked
        Says whether a signal has asked this rank to stop.
    """

    def __init__(
        self, window: Window, topology: Topology, rank: int, bound: float, asked: Callable[[], bool],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._window, self._topology, self._rank, self._asked, self._clock = window, topology, rank, asked, clock
        self._period = beating(topology, bound)
        # The first to notice ends the job; one after the other they say it once.
        self._bound, self._late = bound, bound + 0.1 * min(rank, 20)
        self._replica = topology.place(rank)[0] if topology.role(rank) is Role.WORK else None
        self._row, self._home, self._order = np.zeros(ROW, np.int64), np.zeros(ROW, np.int64), np.zeros(ORDER, np.int64)
        self._last, self._heard, self._next, self._before = -1, clock(), -np.inf, clock()
        # A Put reads its array until the flush.
        self._said, self._words = "", _text("")

    def beat(self, reason: str = "") -> None:
        """Give a sign of life, if it is time.

        Raises
        ------
        GivenUp
            This rank's replica was given up.
        Lost
            The coordinator is lost.
        """
        now = self._clock()
        if now < self._next:
            return
        self._next = now + self._period
        self._row[BEAT] += 1
        self._row[ASKED] = self._asked()
        self._exchange(reason)
        if self._home[BEAT] != self._last or now - self._before > self._late / 4:
            self._last, self._heard = int(self._home[BEAT]), now
        self._before = now
        if self._order[LOST]:
            raise GivenUp
        if now - self._heard > self._late:
            raise without_coordinator(self._topology.name(self._rank), self._bound)

    def leave(self) -> bool:
        """Say that this rank needs nobody any more; return whether somebody was lost."""
        self._row[LEFT] = 1
        self._exchange("")
        return bool(self._home[LEFT])

    def _exchange(self, reason: str) -> None:
        window, rank = self._window, self._rank
        window.put(0, "pulse", self._row, rank * ROW)
        if reason != self._said:
            self._said, self._words = reason, _text(reason)
            window.put(0, "waits", self._words, rank * _TEXT)
        window.get(0, "pulse", self._home)
        if self._replica is not None:
            window.get(0, "order", self._order, self._replica * ORDER)
        window.flush(0)

    def graph(self) -> str:
        """Return who waits for whom, as the coordinator's window knows it."""
        n = self._topology.size
        pulse, ages, waits = np.zeros((n, ROW), np.int64), np.zeros(n), np.zeros((n, _TEXT), np.uint8)
        for name, out in (("pulse", pulse), ("age", ages), ("waits", waits)):
            self._window.get(0, name, out)
        self._window.flush(0)
        return _graph(self._topology, pulse, ages, waits)


class HeartbeatWatch:
    """The coordinator's half.

    Parameters
    ----------
    window, topology
        The coordinator's window, and who is where.
    bound
        Seconds after which a rank without a sign of life is lost.

    Attributes
    ----------
    period
        Seconds between two looks that are often enough.
    """

    def __init__(self, window: Window, topology: Topology, bound: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._window, self._topology, self.bound, self._clock = window, topology, bound, clock
        self.period = min(bound / 40, 2 * PERIOD)
        local = window.local
        self._pulse, self._waits, self._age = local["pulse"], local["waits"], local["age"]
        self._beats = np.full(topology.size, -1)
        self._heard, self._before = np.full(topology.size, clock()), clock()
        self._said = ""

    def look(self) -> list[int]:
        """Give the coordinator's own sign of life; return the ranks that are lost, whether known before or not."""
        self._window.sync()
        self._pulse[0, BEAT] += 1
        now = self._clock()
        if now - self._before > self.bound / 4:
            self._heard += now - self._before
        self._before = now
        beats = self._pulse[:, BEAT].copy()
        self._heard[beats != self._beats] = now
        self._beats = beats
        self._age[:] = now - self._heard
        return np.flatnonzero((self._age > self.bound) & (self._pulse[:, LEFT] == 0)).tolist()

    @property
    def asked(self) -> bool:
        """Whether a signal has asked any rank to stop."""
        return bool(self._pulse[:, ASKED].any())

    @property
    def heard(self) -> np.ndarray:
        """When each replica was heard of last, [copies]: that of its partitions which has been silent longest."""
        world = self._topology
        return self._heard[world.origin_rank(0, 0) :].reshape(world.copies, world.partitions).min(axis=1)

    @property
    def anybody_works(self) -> bool:
        """Whether any rank, the coordinator included, waits for nobody."""
        return not self._waits[:, 0].all()

    @property
    def anybody_silent(self) -> bool:
        """Whether any rank has given no sign of life for half as long as it may, and has not left."""
        return bool(((self._age > self.bound / 2) & (self._pulse[:, LEFT] == 0)).any())

    def left(self, rank: int) -> bool:
        """Return whether a rank has said that it needs nobody any more."""
        return bool(self._pulse[rank, LEFT])

    def tell(self) -> None:
        """Let all ranks know, when they leave, that somebody was lost: nobody may wait for everybody any more."""
        self._pulse[0, LEFT] = 1

    def say(self, reason: str) -> None:
        """Note what the coordinator waits for."""
        if reason != self._said:
            self._said, self._waits[0] = reason, _text(reason)

    def graph(self) -> str:
        """Return who waits for whom."""
        return _graph(self._topology, self._pulse, self._age, self._waits)


def _text(reason: str) -> np.ndarray:
    """Return words as the bytes of a field."""
    out = np.zeros(_TEXT, np.uint8)
    words = reason.encode()[:_TEXT]
    out[: len(words)] = np.frombuffer(words, np.uint8)
    return out


def _graph(topology: Topology, pulse: np.ndarray, ages: np.ndarray, waits: np.ndarray) -> str:
    lines = ["Who waits for whom:"]
    for rank in range(topology.size):
        reason = bytes(waits[rank]).rstrip(b"\0").decode(errors="replace")
        name = topology.name(rank)
        for subject in (name, "a replica"):
            reason = reason.removeprefix(f"{subject} ")
        state = "has left" if rank and pulse[rank, LEFT] else reason or "works"
        lines.append(f"  {name:<24} {state} (sign of life {ages[rank]:.1f} s ago)")
    return "\n".join(lines)


class Watchdog:
    """A thread that ends this rank when one of its MPI calls does not return: no other thread of it can notice.

    Parameters
    ----------
    window
        Whose `blocked` says since when a call waits for which rank.
    me, topology, bound
        Who this is, who is where, and the seconds that a call may take.
    end
        Called with the message.
    """

    def __init__(
        self, window: Window, me: str, topology: Topology, bound: float, end: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._window, self._me, self._topology, self._bound, self._end = window, me, topology, bound, end
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        patience, blocked = Patience(self._bound, self._clock), None
        while not self._stop.wait(self._bound / 8):
            before, blocked = blocked, self._window.blocked()
            if blocked is None or blocked != before:
                patience.begin()
            elif patience.over():
                self._end(
                    f"{self._me} waited {self._bound:g} s in vain for {self._topology.name(blocked[0])}: an MPI call to it does "
                    "not return. Look at its host and at the network; go on from the newest checkpoint with --resume auto."
                )
                return
