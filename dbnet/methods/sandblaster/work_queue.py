"""Who computes which portion of a pass, and whose result counts: the coordinator's half (the replica's: `tasks`).

Each example counts once. A bundle is accepted if it is of this pass and none of its portions was accepted before; so every portion
is accepted from one bundle. A pass ends when all portions are accepted and every shard has every accepted bundle. A replica that
falls silent between the verdict and its push makes the pass begin again under a new number; shards drop what carries an old one.
Tasks of a pass appear only after all shards have begun it, and parameters stay until it ends, so an accepted bundle was computed
from them. Portion by portion, what is computed is pushed or dropped, and what is pushed is applied, or dropped if its pass began
again.

Portions without a result go to the replica that had the same examples in the last pass, in their order; a replica that has none
left takes from the end of the longest queue. When none is left, free replicas get backup portions: those that another one has not
delivered yet. Portions whose replicas are all silent are handed out again in any case.

A turn looks at all replicas at once and goes through those alone that want something: there may be thousands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np

from dbnet.comm.window import Window
from dbnet.core.ranges import Range, split
from dbnet.data.portions import Portion
from dbnet.methods.sandblaster.tasks import DEPTH, bounds, finished, pack

COPIES = 2


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
        self._judged, self._mute = np.zeros(replicas, np.int64), np.zeros(replicas, bool)
        self.tally, self.number = Tally(), 0
        self.loss, self.right = 0.0, 0
        self._portions: list[Portion] = []
        self._reset()

    def _reset(self) -> None:
        n = len(self._portions)
        self._queues: list[deque[int]] = [deque() for _ in range(self.replicas)]
        self._given: list[list[int]] = [[] for _ in range(self.replicas)]
        self._holders: list[list[int]] = [[] for _ in range(n)]
        self._accepted, self._open = np.zeros(n, bool), n
        # Of each queue, and of all: portions left. Of each replica: tasks given, and computed as of the last turn.
        self._lengths, self._given_count, self._computed_count = np.zeros((3, self.replicas), np.int64)
        self._left = 0
        # Of each portion: how many of its holders live, whether one of them has computed it. Those that one more may compute, or
        # None: to be found.
        self._late: np.ndarray | None = None
        self._living, self._computed = np.zeros(n, np.int64), np.zeros(n, bool)
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
        self._lengths[:], self._left = [len(queue) for queue in self._queues], len(portions)

    @property
    def complete(self) -> bool:
        return not self._open

    def silent(self, replica: int, patience: float | None = None) -> bool:
        """Return whether a replica takes no part, or has given no sign of life for too long."""
        return replica in self.absent or self._clock() - self._alive_at[replica] > (
            self._patience if patience is None else patience
        )

    def hear(self, beats: np.ndarray) -> None:
        """Take the replicas' signs of life: numbers that change."""
        self._alive_at[beats != self._beats] = self._clock()
        self._beats = beats.copy()

    def _silent(self, patience: float) -> np.ndarray:
        """Return which replicas are silent, [replicas]."""
        silent = self._clock() - self._alive_at > patience
        silent[list(self.absent)] = True
        return silent

    def lost(self, patience: float) -> bool:
        """Return whether a replica is silent whose accepted bundles may never come."""
        return any(self.bundles[r] for r in np.flatnonzero(self._silent(patience)).tolist())

    def turn(self, busy: Collection[int] = ()) -> bool:
        """Judge offers and hand out tasks, not to `busy` replicas; return whether there was anything to do."""
        # Also orders the span of a pass before its tasks.
        self._window.sync()
        self._count()
        done = self._judge()
        # Who waits for a task, or, when no portion is left, for a backup.
        free = self._given_count - self._computed_count < (DEPTH if self._left else 1)
        free[[*busy, *self.absent]] = False
        self._late = None
        for replica in np.flatnonzero(free).tolist():
            if not self._left and not self._backups_wanted().size:
                break
            while not self.complete and (p := self._next(replica)) is not None:
                self._give(replica, p)
                done = True
        return done

    def _count(self) -> None:
        """Count what has been computed since the last turn, and who lives."""
        now = finished(self._window.local["finished"], self.number)
        for replica in np.flatnonzero(now != self._computed_count).tolist():
            self._computed[self._given[replica][self._computed_count[replica] : now[replica]]] = True
        self._computed_count = now
        silent = self._silent(self._patience)
        if (silent != self._mute).any():
            self._mute = silent
            self._living[:] = [sum(not silent[r] for r in holders) for holders in self._holders]

    # --- offers ---------------------------------------------------------------------------------------------------------------

    def _judge(self) -> bool:
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
        self._open -= len(mine)
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
            self._living[p] -= not self._mute[replica]
            self._computed[p] = any(p in self._given[r][: self._computed_count[r]] for r in self._holders[p])
            if not self._accepted[p] and not self._holders[p]:
                self._queues[replica].appendleft(p)
                self._lengths[replica] += 1
                self._left += 1

    # --- tasks ----------------------------------------------------------------------------------------------------------------

    def _next(self, replica: int) -> int | None:
        """Return the portion to give to a replica now, if any."""
        waiting = self._given_count[replica] - self._computed_count[replica]
        if waiting < DEPTH and self._left:
            own = self._lengths[replica] > 0
            source = replica if own else int(self._lengths.argmax())
            self._lengths[source] -= 1
            self._left -= 1
            return self._queues[source].popleft() if own else self._queues[source].pop()
        return self._backup(replica) if waiting == 0 and not self._left else None

    def _backup(self, replica: int) -> int | None:
        """Return the portion to be computed once more: held by few, not computed yet, given out long ago."""
        late = self._backups_wanted()
        order = 2 * self._living[late] + self._computed[late]
        while late.size:
            at = int(order.argmin())
            p = int(late[at])
            if replica not in self._holders[p]:
                self.tally.backups += 1
                return p
            late, order = np.delete(late, at), np.delete(order, at)
        return None

    def _backups_wanted(self) -> np.ndarray:
        """Return the portions that one more may compute."""
        if self._late is None:
            self._late = np.flatnonzero(~self._accepted & (self._living < (COPIES if self._backups else 1)))
        return self._late

    def _give(self, replica: int, p: int) -> None:
        given = self._given[replica]
        # Towards the end every portion is a bundle, so that little has to be computed again.
        ends = self._left < self._every * self.replicas or (len(given) + 1) % self._every == 0
        self._window.local["task"][replica, len(given) % DEPTH] = pack(self.number, len(given), p, ends)
        given.append(p)
        self._given_count[replica] += 1
        self._holders[p].append(replica)
        self._living[p] += not self._mute[replica]
        self._late = None
