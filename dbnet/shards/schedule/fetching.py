"""How a replica fetches and pushes while its schedule is recorded: no fetch is torn, and what it has read is written down.

A fetch reads how often each slice was changed, the parameters, and the numbers again; slices that changed meanwhile are read once
more. The clock of a fetch is then what was really read, so the staleness of an update is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.core.vector import check_sum
from dbnet.network.model import Piece
from dbnet.shards.local_store import LocalStore
from dbnet.shards.push import Push
from dbnet.shards.routes import routes
from dbnet.shards.schedule.log import FETCH, PUSH, SNAPSHOT, PartLog
from dbnet.shards.schedule.slices import SlicePiece
from dbnet.shards.store import MOMENT, WindowStore


class Versions:
    """Writes down what was read: of each slice how many changes it had, as a difference from what was written last."""

    def __init__(self, log: PartLog, size: int) -> None:
        self._log, self._last = log, np.zeros(size, np.int64)

    def add(self, kind: int, versions: np.ndarray) -> None:
        self._log.add(kind, (versions // 2 - self._last).astype("<i4"))
        self._last[:] = versions // 2


class RecordingStore(WindowStore):
    """The replica's end over a window.

    Parameters
    ----------
    log
        This rank's part of the record.
    used
        What this partition uses of the flat vector.
    pieces
        Of every shard the pieces of its slices.
    base
        Every shard's clock when the run began.
    """

    def __init__(
        self, log: PartLog, used: Sequence[Piece], pieces: Sequence[Sequence[SlicePiece]], base: np.ndarray, *parts: Any
    ) -> None:
        super().__init__(*parts)
        rings = parts[4]
        self._log, self._base = log, base
        self._starts = np.cumsum([0, *(len(mine) for mine in pieces)])
        own = [[i for i, piece in enumerate(mine) if piece.partition == self._partition] for mine in pieces]
        self._own = [(route.shard, self._starts[route.shard] + np.array(own[route.shard])) for route in self.routes]
        size = int(self._starts[-1])
        # A fetch under way has numbers of its own, as it has clocks.
        self._seen = {id(self.clocks): np.zeros(size, np.int64), id(self._landing): np.zeros(size, np.int64)}
        self._snapped, self._now = np.zeros((2, size), np.int64)
        self._before = np.zeros(len(pieces), np.int64)
        self._versions = Versions(log, size)
        self._reads = [self._read_of(shard, piece, used, rings.ranges) for shard, mine in enumerate(pieces) for piece in mine]
        self.again = 0

    def _read_of(self, shard: int, piece: SlicePiece, used: Sequence[Piece], ranges: Sequence[Any]) -> list[tuple]:
        """Return how what is used of a piece is fetched: rank, place there, place in `w`."""
        rank, lo = self._topology.shard_rank(shard), ranges[shard].lo
        return [
            (rank, piece.lo + target, slice(place, place + n))
            for route in routes(used, [piece.range.shift(lo)])
            for place, target, n in route.moves(0, route.size)
        ]

    def fetch(self) -> Turns:
        yield from super().fetch()
        if not self.landing:
            self._note(FETCH, self._seen[id(self.clocks)])

    def arrive(self) -> Turns:
        landing = self.landing
        yield from super().arrive()
        if landing:
            self._note(FETCH, self._seen[id(self.clocks)])

    def snapshot(self, out: np.ndarray) -> Turns:
        yield from super().snapshot(out)
        self._note(SNAPSHOT, self._snapped)

    def _note(self, kind: int, versions: np.ndarray) -> None:
        self._versions.add(kind, versions)
        # What is computed from it goes to the replica's other partitions, whose pushes may be applied though this one is killed.
        if self._topology.partitions > 1:
            self._log.flush()

    def push(self, steps: int, step: int) -> Turns:
        # Whatever of this push is applied, its reading must be known, even if this replica is killed meanwhile.
        self._log.add(PUSH, np.array([self.number, steps, step], "<i8"))
        self._log.flush()
        yield from super().push(steps, step)

    def close(self) -> None:
        super().close()
        self._log.close()

    def read(self, w: np.ndarray, clocks: np.ndarray, whole: bool = False) -> Turns:
        seen, began = self._seen.get(id(clocks), self._snapped), self._clock()
        ranks = [self._topology.shard_rank(route.shard) for route in self.sources]
        for shard, _ in self._own:
            self._window.get(self._topology.shard_rank(shard), "clock", self._before[shard : shard + 1], self._partition)
        self._count(seen)
        for moves in self._moves:
            self.move(w, moves, ranks, whole)
            if self._clock() - began >= MOMENT:
                yield None
                began = self._clock()
        torn = self._torn(seen, np.ones(len(seen), bool))
        while torn.any():
            self.again += int(torn.sum())
            self._count(self._now)
            seen[torn] = self._now[torn]
            self.move(w, [move for number in np.flatnonzero(torn) for move in self._reads[number]], ranks, whole)
            torn = self._torn(seen, torn)
            if torn.any() and self._clock() - began >= MOMENT:
                yield None
                began = self._clock()
        self._set_clocks(clocks, seen)
        # Others may run between a fetch and the gradient computed from it.
        yield None

    def _torn(self, seen: np.ndarray, of: np.ndarray) -> np.ndarray:
        """Return which of these pieces were not read as one version."""
        self._count(self._now)
        return of & ((seen != self._now) | (seen % 2 == 1))

    def _count(self, out: np.ndarray) -> None:
        """Read how often each piece of every shard that is used was changed."""
        for route in self.sources:
            lo, hi = self._starts[route.shard : route.shard + 2]
            self._window.get(self._topology.shard_rank(route.shard), "version", out[lo:hi])
        for route in self.sources:
            self._window.flush(self._topology.shard_rank(route.shard))

    def _set_clocks(self, clocks: np.ndarray, seen: np.ndarray) -> None:
        """The clock of what was read is that of its oldest slice; later where it went on without a change, as of a refused step."""
        for shard, own in self._own:
            clocks[shard] = max(self._before[shard], self._base[shard] + seen[own].min() // 2)


class TakingLocalStore(LocalStore):
    """The replica's end in the process of the shards: it writes down for each that it takes a push, as one slice.

    Parameters
    ----------
    logs, by_pass
        Every shard's part of the record; whether what was not computed in the present pass is dropped, and need not be known.
    """

    def __init__(self, logs: Sequence[PartLog], by_pass: bool, *parts: Any) -> None:
        super().__init__(*parts)
        self._by_pass = by_pass
        self._logs = [log for log, shard in zip(logs, parts[1], strict=True) if shard.range.size]

    def give(self, index: int, push: Push, g: np.ndarray) -> None:
        if not self._by_pass or push.fetched == self._shards[index].clock[0]:
            self._logs[index].take(self._replica, check_sum(g))
        super().give(index, push, g)


class RecordingLocalStore(TakingLocalStore):
    """The same where parameters change between a fetch and the next.

    Parameters
    ----------
    log
        This replica's part of the record.
    serving
        Of every shard its part of the record, and how often its slices were changed.
    """

    def __init__(self, log: PartLog, serving: Sequence[tuple[PartLog, np.ndarray]], *parts: Any) -> None:
        super().__init__([mine for mine, _ in serving], False, *parts)
        self._log, self._serving = log, serving
        self._versions = Versions(log, sum(versions.size for _, versions in serving))

    def _note(self, kind: int) -> None:
        self._versions.add(kind, np.concatenate([versions for _, versions in self._serving]))

    def fetch(self) -> Turns:
        yield from super().fetch()
        self._note(FETCH)

    def snapshot(self, out: np.ndarray) -> Turns:
        yield from super().snapshot(out)
        self._note(SNAPSHOT)

    def push(self, steps: int, step: int) -> Turns:
        self._log.add(PUSH, np.array([self.number, steps, step], "<i8"))
        self._log.flush()
        yield from super().push(steps, step)

    def close(self) -> None:
        super().close()
        self._log.close()
