"""Rests: a rank that finds nothing sleeps until what it looked at changes, and wakes at the very look that would find it.

An idle rank looks after one pause after the other. Where it says until when a look alone matters (`Wait.until`), and its last look
was nothing but Gets of a few words, each of the next ones is the same until one of these words changes. So none is played: the
words are watched, and when one is written the look is counted out that is the first to read it there. Times are those of
looks that were all played, to the bit; these looks are no operations that were moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbnet.core.jit import kernel

WORDS = 64  # the most that a look may read in one piece
_NEVER = -1


class Watch:
    """Words of one rank's memory that resting ranks wait for."""

    def __init__(self) -> None:
        # By the field's array: it, what stood there when it was looked at last, and for each word who waits for it.
        self.fields: dict[int, tuple[np.ndarray, np.ndarray, dict[int, dict[Any, tuple[int, int]]]]] = {}

    def add(self, place: np.ndarray, start: int, size: int, sleeper: Any, rest: int, part: int) -> None:
        """Have `sleeper` told of its `rest` when one of these words changes; they are read by this part of its look."""
        found = self.fields.get(id(place))
        if found is None:
            found = self.fields[id(place)] = (place, place.copy(), {})
        for word in range(start, start + size):
            found[2].setdefault(word, {})[sleeper] = rest, part

    def check(self, now: float, rank: int) -> None:
        """Tell of what `rank` has changed at this moment."""
        for key, (place, before, waiting) in list(self.fields.items()):
            for word in np.flatnonzero(place != before).tolist():
                before[word] = place[word]
                for sleeper, (rest, part) in waiting.pop(word, {}).items():
                    sleeper.changed(rest, part, now, rank)
            if not waiting:
                del self.fields[key]


class Glances(dict[Any, tuple[float, int, Callable[[Any], object], Any]]):
    """Looks at one rank's memory that are no turns of their own, by who makes them: moment, rank, what makes it, of what.

    Each is made before something there changes at its moment or later, or when its maker goes on.
    """

    def before(self, now: float, writer: int) -> None:
        """Make those that come before what `writer` does now."""
        for maker, (at, rank, read, what) in list(self.items()):
            if at < now or (at == now and rank < writer):
                del self[maker]
                read(what)


class Looks:
    """What a rank has done since its last pause: transfers of a few words from others, flush by flush."""

    def __init__(self) -> None:
        # Of each part, the transfers with one target: whether its flush begins with it; seconds until it is started, until the
        # request is there (two terms), until the answer is here (latency again, and this).
        self._first: list[bool] = []
        self._seconds: list[tuple[float, float, float, float]] = []
        # Part, target, field, first word, what was read there, and before.
        self.read: list[tuple[int, int, np.ndarray, int, np.ndarray, np.ndarray]] = []

    def add(self, first: bool, seconds: tuple[float, float, float, float], target: int, gets: list[tuple]) -> bool:
        """Add what was got of one target; return whether it can be watched."""
        part = len(self._first)
        self._first.append(first)
        self._seconds.append(seconds)
        for _, place, start, value in gets:
            if value.size > WORDS:
                return False
            self.read.append((part, target, place, start, value, value.copy()))
        return True

    def vain(self) -> bool:
        """Return whether nothing that was read was new, nor is now: only then the next look is the same."""
        return all(
            (out == before).all() and (place[start : start + out.size] == out.reshape(-1)).all()
            for _, _, place, start, out, before in self.read
        )

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the parts for `next_look`."""
        return np.array(self._first, np.int64), np.array(self._seconds, np.float64).reshape(-1, 4)


class Rest:
    """A rest that has begun.

    Parameters
    ----------
    looks
        The look that would be made again and again.
    now, pause, longest, late
        The clock; the next pause; the longest one; by how much each is longer than it was meant to be.
    until
        The first look that ends at this moment or later is made in any case.
    """

    def __init__(self, looks: Looks, now: float, pause: float, longest: float, late: float, until: float) -> None:
        self._state, self._longest, self._late = (now, pause), longest, late
        self.until, self._parts = until, looks.arrays()

    @property
    def margin(self) -> float:
        """More seconds than from look to look."""
        return 2 * (self._longest + self._late + float(self._parts[1].sum(axis=0) @ (1.0, 2.0, 1.0, 1.0)))

    def end(self, rank: int = 0, part: int = _NEVER, moment: float = 0.0, writer: int = 0) -> tuple[float, float]:
        """Return when the look is made that reads with this part what `writer` wrote at `moment`, and the pause after it.

        Without a part: the one that is made in any case.
        """
        return next_look(*self._state, self._longest, self._late, self.until, part, moment, int(rank >= writer), *self._parts)


@kernel("f8;f8;f8;f8;f8;i8;f8;i8;i8[:];f8[:,:]")
def next_look(
    now: float, pause: float, longest: float, late: float, until: float, part: int, moment: float, at_once: int,
    first: np.ndarray, seconds: np.ndarray,
) -> tuple[float, float]:  # fmt: skip
    """Return when the look begins that must be made, and the pause that follows; the sums are those of `SimulatedWindow.flush`."""
    while True:
        start = now + (pause + late)
        pause = min(2 * pause, longest)
        began = latest = start
        found = False
        for i in range(first.size):
            if first[i]:
                began = latest
            began += seconds[i, 0]
            at = began + seconds[i, 1] + seconds[i, 2]
            if i == part and (at > moment or (at_once and at == moment)):
                found = True
            latest = max(latest, at + seconds[i, 1] + seconds[i, 3])
        if found or latest >= until:
            return start, pause
        now = latest
