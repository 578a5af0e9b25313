"""What stands in the coordinator's window about the portions of a pass, and the replica's half of it.

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
pushed to the shards. The coordinator's half: `work_queue`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dbnet.comm.link import Link
from dbnet.comm.window import Field, Window
from dbnet.core.ranges import Range

DEPTH, POLL = 2, 0.02
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


def finished(words: np.ndarray, number: int) -> np.ndarray:
    """Return the tasks of a pass that each replica has computed, by their words, [replicas]."""
    return np.where(words >> 2 * _BITS + 1 == number, words >> _BITS + 1 & LIMIT - 1, 0)


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
        self._window.wake(0)

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
        self._window.wake(0)

    @property
    def verdict(self) -> bool | None:
        """Whether the last offer was accepted; None before it is judged."""
        number, accepted = divmod(int(self._verdict[0]), 2)
        return bool(accepted) if number == self._offered[0] else None
