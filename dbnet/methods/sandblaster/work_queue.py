"""Who computes which portion of a pass, and whose result counts: both halves over the coordinator's window.

A pass has a number. Each replica r has a row, written by one side alone:

    task[r]      coordinator: the last two tasks given to r in this pass, each one word (pass, index, portion, whether a bundle
                 ends here); task i of a pass stands at i mod 2, so the next one is known while the present one is computed
    finished[r]  replica: one word (pass, tasks computed), so the coordinator knows when to give another
    offer[r]     replica: a bundle it has computed: pass, first task, number of tasks, loss, right answers
    offered[r]   replica: number of the offer, written when the offer stands; no new one before the verdict
    verdict[r]   coordinator: one word (number of the offer, accepted or not)
    span         coordinator: where the examples of the present pass begin and end, each one word (position, pass)

A word says everything about its matter, so nothing can be read half. A task of another pass than both words of `span` say is none:
that pass is over. A replica sums the gradients of the tasks of a bundle and offers it; only when it was accepted the bundle is
pushed to the shards.

Each example counts once. A bundle is accepted if it is of this pass and none of its portions was accepted before; so every portion
is accepted from one bundle. A pass ends when all portions are accepted and every shard has every accepted bundle. A replica that
falls silent between the verdict and its push makes the pass begin again under a new number; shards drop what carries an old one.
Tasks of a pass appear only after all shards have begun it, and parameters stay until it ends, so an accepted bundle was computed
from them. Portion by portion, what is computed is pushed or dropped, and what is pushed is applied, or dropped if its pass began
again.

Portions without a result go to the replica that had the same examples in the last pass, in their order; a replica that has none
left takes from the end of the longest queue. When none is left, free replicas get backup portions: those that another one has not
delivered yet. Portions whose replicas are all silent are handed out again in any case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dbnet.comm.link import Link
from dbnet.comm.window import Field, Window
from dbnet.core.ranges import Range, split
from dbnet.data.portions import Portion

DEPTH, COPIES, POLL = 2, 2, 0.02
_BITS = 20
LIMIT = 1 << _BITS  # portions in a pass


def pack(number: int, index: int, portion: int = 0, ends: bool = False) -> int:
    """Return a task's word; pass numbers start at 1, so that 0 is no task."""
    return (((number << _BITS | index) << _BITS) | portion) << 1 | ends


class Task(NamedTuple):
    """One portion to compute: the how-manieth of this replica in this pass, and whether its bundle ends here."""

    number: int
    index: int
    portion: int
    ends: bool


def unpack(word: int) -> Task:
    mask = LIMIT - 1
    return Task(word >> 2 * _BITS + 1, word >> _BITS + 1 & mask, word >> 1 & mask, bool(word & 1))


def bounds(number: int, span: Range) -> list[int]:
    """Return the two words of the positions of a pass; they hold the number's last bits."""
    return [position << _BITS | number & LIMIT - 1 for position in span]


def task_fields(replicas: int) -> list[Field]:
    """Return the window fields of the coordinator."""
    return [
        Field("task", "int64", (replicas, DEPTH)),
        Field("finished", "int64", (replicas,)),
        Field("offer", "float64", (replicas, 5)),
        Field("offered", "int64", (replicas,)),
        Field("verdict", "int64", (replicas,)),
        Field("span", "int64", (2,)),
    ]


class Tally:
    """Portions over the run: accepted, refused, and handed out as backups; passes that had to begin again."""

    def __init__(self) -> None:
        self.accepted = self.refused = self.backups = self.restarts = 0


class WorkQueue:
    """The coordinator's half.

    Parameters
    ----------
    window, replicas
        The coordinator's window and the number of replicas.
    push_every
        Portions of a bundle.
    backups
        Whether free replicas get portions that others have not delivered yet.
    patience
        Seconds without a sign of life after which a replica is silent.
    clock
        Seconds of the run.

    Attributes
    ----------
    absent
        Replicas that get no portions: lost ones, and spare ones that wait.
    accepted
        The bundles of this pass in the order in which they were accepted: replica, loss, portions.
    """

    def __init__(
        self, window: Window, replicas: int, push_every: int, backups: bool, patience: float, clock: Callable[[], float]
    ) -> None:
        self._window, self.replicas, self._every, self._backups = window, replicas, push_every, backups
        self._patience, self._clock = patience, clock
        self._beats, self._alive_at = np.zeros(replicas), np.full(replicas, clock())
        self._home: dict[int, int] = {}
        self.absent: set[int] = set()
        self._judged = np.zeros(replicas, np.int64)
        self.tally, self.number = Tally(), 0
        self.loss, self.right = 0.0, 0
        self._portions: list[Portion] = []
        self._reset()

    def _reset(self) -> None:
        n = len(self._portions)
        self._queues: list[deque[int]] = [deque() for _ in range(self.replicas)]
        self._given: list[list[int]] = [[] for _ in range(self.replicas)]
        self._holders: list[list[int]] = [[] for _ in range(n)]
        self._accepted = np.zeros(n, bool)
        self.accepted: list[tuple[int, float, list[int]]] = []
        self.bundles = [0] * self.replicas
        self.loss, self.right = 0.0, 0

    def open(self, number: int, span: Range, portions: Sequence[Portion]) -> None:
        """Begin a pass; the shards have begun it already."""
        self.number, self._portions = number, list(portions)
        self._reset()
        self._window.local["span"][:] = bounds(number, span)
        # A block that nobody had yet goes where its neighbors are.
        present = [r for r in range(self.replicas) if r not in self.absent] or [0]
        parts = split(len(portions), len(present))
        first = [r for r, part in zip(present, parts, strict=True) for _ in range(part.size)]
        for p, portion in enumerate(portions):
            home = self._home.get(portion.block, first[p])
            self._queues[first[p] if home in self.absent else home].append(p)

    @property
    def complete(self) -> bool:
        return bool(self._accepted.all())

    def silent(self, replica: int, patience: float | None = None) -> bool:
        """Return whether a replica takes no part, or has given no sign of life for too long."""
        return replica in self.absent or self._clock() - self._alive_at[replica] > (
            self._patience if patience is None else patience
        )

    def hear(self, beats: np.ndarray) -> None:
        """Take the replicas' signs of life: numbers that change."""
        self._alive_at[beats != self._beats] = self._clock()
        self._beats = beats.copy()

    def lost(self, patience: float) -> bool:
        """Return whether a replica is silent whose accepted bundles may never come."""
        return any(n and self.silent(r, patience) for r, n in enumerate(self.bundles))

    def turn(self, busy: Sequence[int] = ()) -> bool:
        """Judge offers and hand out tasks, not to `busy` replicas; return whether there was anything to do."""
        done = self._judge()
        for replica in range(self.replicas):
            while (
                replica not in busy and replica not in self.absent and not self.complete and (p := self._next(replica)) is not None
            ):
                self._give(replica, p)
                done = True
        return done

    # --- offers ---------------------------------------------------------------------------------------------------------------

    def _judge(self) -> bool:
        # Also orders the span of a pass before its tasks.
        self._window.sync()
        local, done = self._window.local, False
        offered = local["offered"].copy()
        for replica in np.flatnonzero(offered != self._judged).tolist():
            # An offer may be read only after its number, and be overwritten only after it was read.
            self._window.sync()
            number, first, count, loss, right = local["offer"][replica].tolist()
            valid = number == self.number and replica not in self.absent
            mine = self._given[replica][int(first) : int(first + count)] if valid else []
            accepted = bool(mine) and not self._accepted[mine].any()
            if accepted:
                self._accept(replica, mine, loss, int(right))
            else:
                self.tally.refused += int(count)
                self._give_back(replica, mine)
            self._judged[replica] = offered[replica]
            self._window.sync()
            local["verdict"][replica] = int(self._judged[replica]) << 1 | accepted
            done = True
        return done

    def _accept(self, replica: int, mine: list[int], loss: float, right: int) -> None:
        self._accepted[mine] = True
        self.accepted.append((replica, loss, mine))
        self.bundles[replica] += 1
        self.tally.accepted += len(mine)
        self.loss, self.right = self.loss + loss, self.right + right
        for p in mine:
            self._home[self._portions[p].block] = replica

    def _give_back(self, replica: int, mine: list[int]) -> None:
        """A refused bundle holds portions that nobody else may be computing."""
        for p in reversed(mine):
            self._holders[p].remove(replica)
            if not self._accepted[p] and not self._holders[p]:
                self._queues[replica].appendleft(p)

    # --- tasks ----------------------------------------------------------------------------------------------------------------

    def _finished(self, replica: int) -> int:
        word = unpack(int(self._window.local["finished"][replica]))
        return word.index if word.number == self.number else 0

    def _next(self, replica: int) -> int | None:
        """Return the portion to give to a replica now, if any."""
        waiting = len(self._given[replica]) - self._finished(replica)
        longest = max(self._queues, key=len)
        if waiting < DEPTH and longest:
            own = self._queues[replica]
            return own.popleft() if own else longest.pop()
        return self._backup(replica) if waiting == 0 and not longest else None

    def _backup(self, replica: int) -> int | None:
        """Return the portion to be computed once more: held by few, not computed yet, given out long ago."""
        best = None
        for p in np.flatnonzero(~self._accepted).tolist():
            holders = self._holders[p]
            living = sum(not self.silent(r) for r in holders)
            if replica in holders or living >= (COPIES if self._backups else 1):
                continue
            computed = any(p in self._given[r][: self._finished(r)] for r in holders)
            key = (living, computed, p)
            best = min(best, key) if best else key
        if best is None:
            return None
        self.tally.backups += 1
        return best[-1]

    def _give(self, replica: int, p: int) -> None:
        given = self._given[replica]
        left = sum(map(len, self._queues))
        # Towards the end every portion is a bundle, so that little has to be computed again.
        ends = left < self._every * self.replicas or (len(given) + 1) % self._every == 0
        self._window.local["task"][replica, len(given) % DEPTH] = pack(self.number, len(given), p, ends)
        given.append(p)
        self._holders[p].append(replica)


class Tasks:
    """A replica's half. Of a cut replica partition 0 reads and writes; the others do what it shares, in step.

    Parameters
    ----------
    window, replica, clock
        The coordinator's window, who this is, and the seconds of the run.
    link
        The replica's other partitions; None where there are none.
    period
        Seconds between looks that are not urgent.

    Attributes
    ----------
    number, span
        The newest pass that it knows, and the positions of its examples.
    index
        Its next task in this pass.
    """

    def __init__(
        self, window: Window, replica: int, clock: Callable[[], float], link: Link | None = None, period: float = POLL
    ) -> None:
        self._window, self._replica, self._clock, self._link, self._period = window, replica, clock, link, period
        self._leads = link is None or link.rank == 0
        self._seen = np.zeros(DEPTH + 3, np.int64)
        self._words, self._verdict = self._seen[:DEPTH], self._seen[DEPTH : DEPTH + 1]
        self._span = self._seen[DEPTH + 1 :]
        self._word, self._offered = np.zeros((2, 1), np.int64)
        self._offer = np.zeros(5)
        self._next = -np.inf
        self.number = self.index = 0
        self.span = Range(0, 0)

    def look(self, now: bool = True) -> None:
        """Read tasks and verdict, if it is time or `now`; a new pass changes `number`."""
        if self._leads and (now or self._clock() >= self._next):
            self._next = self._clock() + self._period
            self._window.get(0, "task", self._words, self._replica * DEPTH)
            self._window.get(0, "verdict", self._verdict, self._replica)
            self._window.flush(0)
            if self._newest() > self.number:
                self._window.get(0, "span", self._span)
                self._window.flush(0)
        if self._link is not None:
            self._link.share(self._seen)
        newest, span = self._newest(), Range(*(word >> _BITS for word in self._span.tolist()))
        if newest > self.number and self._span.tolist() == bounds(newest, span):
            self.number, self.index, self.span = newest, 0, span

    def _newest(self) -> int:
        return max(unpack(int(word)).number for word in self._words)

    def task(self, ahead: int = 0) -> Task | None:
        """Return the next task, or the one after it, if it has been given."""
        index = self.index + ahead
        task = unpack(int(self._words[index % DEPTH]))
        return task if self.number and (task.number, task.index) == (self.number, index) else None

    def finish(self) -> None:
        """Say that the next task has been computed."""
        self.index += 1
        self._word[0] = pack(self.number, self.index)
        if not self._leads:
            return
        self._window.put(0, "finished", self._word, self._replica)
        self._window.flush(0)

    def offer(self, first: int, loss: float, right: int) -> None:
        """Offer a bundle: the tasks from `first` to the one computed last."""
        self._offer[:] = self.number, first, self.index - first, loss, right
        self._offered += 1
        if not self._leads:
            return
        self._window.put(0, "offer", self._offer, self._replica * self._offer.size)
        self._window.flush(0)
        self._window.put(0, "offered", self._offered, self._replica)
        self._window.flush(0)

    @property
    def verdict(self) -> bool | None:
        """Whether the last offer was accepted; None before it is judged."""
        number, accepted = divmod(int(self._verdict[0]), 2)
        return bool(accepted) if number == self._offered[0] else None
