"""How a replica fetches and pushes while its schedule is recorded: no fetch is torn, and what it has read is written down.

A fetch reads how often each slice was changed, the parameters, and the numbers again; slices that changed meanwhile are read once
more, when nobody changes them. It does so in groups, for the shorter it takes the less has changed: mostly a replica fetches while
the shard applies what it has pushed, from its first element on as well. One look ends a group and begins the next. The clock of a
fetch is then what was really read, so the staleness of an update is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from struct import Struct
from sys import byteorder
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.turns import Turns, looking
from dbnet.core.kernels.vector import check_sum
from dbnet.network.model import Piece
from dbnet.shards.local_store import LocalStore
from dbnet.shards.push import Push
from dbnet.shards.routes import routes
from dbnet.shards.schedule.log import FETCH, PUSH, SNAPSHOT, PartLog
from dbnet.shards.schedule.slices import SlicePiece
from dbnet.shards.store import MOMENT, WindowStore

# Bytes that are read between two looks at how often they were changed: at most, at least, and in how many groups between that.
GROUP, SHORTEST, GROUPS = 4 << 20, 512 << 10, 8
_PUSH = Struct("<3q").pack
_SOON = 16  # looks after which an update that is under way is waited for


Move = tuple[int, int, slice]


class Look(NamedTuple):
    """Numbers to look at: whose, first piece, end, first piece there."""

    rank: int
    lo: int
    hi: int
    there: int


class ReadGroup(NamedTuple):
    """What is read between two looks.

    Attributes
    ----------
    looks
        Of each rank the numbers of its pieces.
    masks
        Of each look all bits, and the lowest ones, of those numbers whose pieces are fetched.
    ranks, moves
        From where what is fetched.
    """

    looks: list[Look]
    masks: list[tuple[int, int]]
    ranks: list[int]
    moves: list[Move]


class Numbers(NamedTuple):
    """How often each piece was changed: of all, and of each group those of each of its looks."""

    all: np.ndarray
    groups: list[list[np.ndarray]]


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
    base, counted
        Every shard's clock when the run began; whether it goes on with every change, and with nothing else.
    """

    def __init__(
        self, log: PartLog, used: Sequence[Piece], pieces: Sequence[Sequence[SlicePiece]], base: np.ndarray, counted: bool,
        *parts: Any,
    ) -> None:  # fmt: skip
        super().__init__(*parts)
        rings = parts[4]
        self._log, self._base, self._counted = log, base.tolist(), counted
        starts = np.cumsum([0, *(len(mine) for mine in pieces)]).tolist()
        self._own = []
        for route in self.routes:
            mine = [i for i, piece in enumerate(pieces[route.shard], starts[route.shard]) if piece.partition == self._partition]
            self._own.append((route.shard, mine[0], mine[-1] + 1))
        self._before = np.zeros(len(pieces), np.int64)
        # Nothing of a gradient leaves before it is pushed.
        self._alone = self._topology.partitions == 1 and not self.overlaps
        self._reads = [self._read_of(shard, piece, used, rings.ranges) for shard, mine in enumerate(pieces) for piece in mine]
        self._sizes = np.array([sum(place.stop - place.start for *_, place in moves) for moves in self._reads], np.int64)
        self._groups = self._plan_groups(starts)
        # A fetch under way has numbers of its own, as it has clocks.
        self._seen = {id(clocks): self._numbers(starts[-1]) for clocks in (self.clocks, self._landing)}
        self._snapped, self._now = self._numbers(starts[-1]), self._numbers(starts[-1])
        looks = _between([group.looks for group in self._groups])
        self._look = [
            self._window.getting([(rank, "version", self._now.all[a:b], at) for rank, a, b, at in some]) for some in looks
        ]
        buffers = ((self.w, self.clocks), (self._w2, self._landing))
        self._gets_of = {id(clocks): self._gets_by_group(w) for w, clocks in buffers}
        self.again = 0

    def _numbers(self, count: int) -> Numbers:
        """Return room for how often pieces were changed."""
        all_of = np.zeros(count, np.int64)
        return Numbers(all_of, [[all_of[look.lo : look.hi] for look in group.looks] for group in self._groups])

    def _gets_by_group(self, w: np.ndarray, whole: bool = False) -> list[Callable[[], None]]:
        """Return what gets each group into `w`."""
        return [self.moving(w, group.moves, whole) for group in self._groups]

    def _read_of(self, shard: int, piece: SlicePiece, used: Sequence[Piece], ranges: Sequence[Any]) -> list[Move]:
        """Return how what is used of a piece is fetched: rank, place there, place in `w`."""
        rank, lo = self._topology.shard_rank(shard), ranges[shard].lo
        return [
            (rank, piece.lo + target, slice(place, place + n))
            for route in routes(used, [piece.range.shift(lo)])
            for place, target, n in route.moves(0, route.size)
        ]

    def _plan_groups(self, starts: Sequence[int]) -> list[ReadGroup]:
        """Return what a fetch reads in turn: of each shard in each turn its part of a group, at least one piece."""
        groups: list[ReadGroup] = []
        size = min(GROUP, max(SHORTEST, self.w.nbytes // GROUPS))
        most = max(1, size // max(1, len(self.sources)) // self._item)
        for route in self.sources:
            rank, first, turn = self._topology.shard_rank(route.shard), starts[route.shard], 0
            lo, end = first, starts[route.shard + 1]
            while lo < end:
                hi, moves, room = lo, [], most
                while hi < end and (hi == lo or self._sizes[hi] <= room):
                    moves += self._reads[hi]
                    room -= self._sizes[hi]
                    hi += 1
                if turn == len(groups):
                    groups.append(ReadGroup([], [], [], []))
                if moves:
                    fetched = (self._sizes[lo:hi] > 0).astype(np.int64)
                    groups[turn].looks.append(Look(rank, lo, hi, lo - first))
                    groups[turn].masks.append((_number(-fetched), _number(fetched)))
                    groups[turn].ranks.append(rank)
                    groups[turn].moves.extend(_joined(moves))
                lo, turn = hi, turn + 1
        return [group for group in groups if group.moves]

    def fetch(self) -> Turns:
        yield from super().fetch()
        if self.landing:
            return
        if self._alone:
            self._log.hold(FETCH, self._seen[id(self.clocks)].all.tobytes())
        else:
            # Before anything computed from it leaves: other partitions' pushes may be applied though this one is killed.
            self._log.add(FETCH, self._seen[id(self.clocks)].all)

    def arrive(self) -> Turns:
        landing = self.landing
        yield from super().arrive()
        if landing:
            self._log.add(FETCH, self._seen[id(self.clocks)].all)

    def snapshot(self, out: np.ndarray) -> Turns:
        yield from super().snapshot(out)
        self._log.add(SNAPSHOT, self._snapped.all)

    def push(self, steps: int, step: int) -> Turns:
        # Whatever of this push is applied, its reading must be known, even if this replica is killed meanwhile.
        self._log.add(PUSH, _PUSH(self.number, steps, step))
        return super().push(steps, step)

    def close(self) -> None:
        super().close()
        self._log.close()

    def read(self, w: np.ndarray, clocks: np.ndarray, whole: bool = False) -> Turns:
        seen, began = self._seen.get(id(clocks), self._snapped), self._clock()
        for route, rank in () if self._counted else zip(self.routes, self._ranks, strict=True):
            self._window.get(rank, "clock", self._before[route.shard : route.shard + 1], self._partition)
        self._look[0]()
        gets = self._gets_of.get(id(clocks)) or self._gets_by_group(w, whole)
        for turn, (group, get, look) in enumerate(zip(self._groups, gets, self._look[1:], strict=True)):
            before, now = seen.groups[turn], self._now.groups[turn]
            for mine, found in zip(before, now, strict=True):
                mine[:] = found
            get()
            look()
            if _torn(before, now, group):
                yield from self._mend(w, seen, group, turn, whole)
            if self._clock() - began >= MOMENT:
                yield None
                began = self._clock()
                look()
        # Of its oldest piece.
        for shard, lo, hi in self._own:
            clocks[shard] = self._base[shard] + min(seen.all[lo:hi].tolist()) // 2
        if not self._counted:
            # Later where the clock went on without a change, as of a refused step.
            np.maximum(clocks, self._before, out=clocks)
        # Others may run between a fetch and the gradient computed from it.
        yield None

    def _mend(self, w: np.ndarray, seen: Numbers, group: ReadGroup, turn: int, whole: bool) -> Turns:
        """Read again what was not read as one version."""
        then, now, torn = seen.all.item, self._now.all.item, []
        for look in group.looks:
            both = (numbers[look.lo : look.hi].tolist() for numbers in (seen.all, self._now.all))
            found = zip(range(look.lo, look.hi), *both, strict=True)
            torn += [number for number, first, last in found if (first != last or first % 2) and self._reads[number]]
        tries = 0
        while torn:
            still = [number for number in torn if now(number) % 2 == 0]
            if still:
                self.again += len(still)
                for number in still:
                    seen.all[number] = now(number)
                self.moving(w, [move for number in still for move in self._reads[number]], whole)()
            else:
                # The shard may need this core, and may have been put off it in the middle of an update; mostly it is done at once.
                tries += 1
                late = tries > _SOON
                yield looking(f"a replica waits for shard {self._shard_of(torn[0], group)} to end an update") if late else None
            self._look[turn + 1]()
            torn = [number for number in torn if then(number) != now(number) or then(number) % 2]

    def _shard_of(self, number: int, group: ReadGroup) -> int:
        """Return whose piece it is."""
        return next(self._topology.shard_of(rank) for rank, lo, hi, *_ in group.looks if lo <= number < hi)


def _between(groups: Sequence[Sequence[Look]]) -> list[list[Look]]:
    """Return what to look at before the first group, between each and the next, and after the last."""
    out = []
    for ended, begun in pairwise([(), *groups, ()]):
        looks = {look.rank: look for look in ended}
        for look in begun:
            # Pieces between the two, which are not fetched, are looked at with them.
            looks[look.rank] = looks.get(look.rank, look)._replace(hi=look.hi)
        out.append(list(looks.values()))
    return out


def _torn(before: Sequence[np.ndarray], now: Sequence[np.ndarray], group: ReadGroup) -> bool:
    """Return whether some piece of a group was not read as one version."""
    for first, then, (fetched, odd) in zip(before, now, group.masks, strict=True):
        # As one number: nothing here is done for each piece.
        one = _number(first)
        if one & odd or (one ^ _number(then)) & fetched:
            return True
    return False


def _number(versions: np.ndarray) -> int:
    """Return the bits of int64 numbers as one."""
    return int.from_bytes(versions.tobytes(), byteorder)


def _joined(moves: Sequence[Move]) -> list[Move]:
    """Return the same moves, those that follow one another at both ends as one."""
    out: list[Move] = []
    for rank, there, here in moves:
        if out and there - out[-1][1] == here.start - out[-1][2].start and here.start == out[-1][2].stop:
            out[-1] = (rank, out[-1][1], slice(out[-1][2].start, here.stop))
        else:
            out.append((rank, there, here))
    return out


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

    def _note(self, kind: int) -> None:
        self._log.add(kind, np.concatenate([versions for _, versions in self._serving]))

    def fetch(self) -> Turns:
        yield from super().fetch()
        self._note(FETCH)

    def snapshot(self, out: np.ndarray) -> Turns:
        yield from super().snapshot(out)
        self._note(SNAPSHOT)

    def push(self, steps: int, step: int) -> Turns:
        self._log.add(PUSH, _PUSH(self.number, steps, step))
        yield from super().push(steps, step)

    def close(self) -> None:
        super().close()
        self._log.close()
