"""What a replica sees in place of shards and coordinator: what it has fetched, and what it was told, as it was recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns, Wait
from dbnet.commands.replay.moment import Headway
from dbnet.commands.replay.outcome import Compared, Difference, Ended
from dbnet.commands.replay.shard import Parcel, Reading, ReplayedShard, Timeline
from dbnet.coordinator.orders import ORDER as COLUMNS
from dbnet.core.kernels.vector import coarse, copy
from dbnet.network.model import Footprint
from dbnet.shards.push import Counts, Push
from dbnet.shards.routes import Rings, routes
from dbnet.shards.schedule.log import END, EVALUATED, FETCH, FULL, NAMES, ORDER, PUSH, SHARE, SNAPSHOT, LogEntry


class Pages:
    """The entries of one rank, read one after another; `turned` counts them, `looks` those at orders."""

    def __init__(self, entries: Sequence[LogEntry], name: str) -> None:
        self._entries, self.name, self.turned = entries, name, 0
        self.looks = 0

    def peek(self) -> LogEntry:
        """Return the next entry; Ended where the record ends."""
        if self.turned == len(self._entries) or self._entries[self.turned].kind == FULL:
            raise Ended
        return self._entries[self.turned]

    def landing(self) -> LogEntry:
        """Return the entry of a fetch that was begun now; a push may have been noted before it took effect."""
        after = self._entries[self.turned : self.turned + 2]
        if not after or after[0].kind == FULL or (after[0].kind == PUSH and [entry.kind for entry in after[1:]] in ([], [FULL])):
            raise Ended
        if FETCH not in (entry.kind for entry in after):
            raise Difference(f"{self.name}: {NAMES[FETCH]} comes where {NAMES[after[0].kind]} was recorded")
        return next(entry for entry in after if entry.kind == FETCH)

    def next(self, kind: int) -> LogEntry:
        """Return the next entry, which must be of this kind."""
        entry = self.peek()
        if entry.kind != kind:
            raise Difference(f"{self.name}: {NAMES[kind]} comes where {NAMES[entry.kind]} was recorded")
        self.turned += 1
        return entry


class ReplayedWindow:
    """The coordinator's window as a replica saw it: orders at the looks at which they changed, shares; it checks evaluations."""

    def __init__(self, pages: Pages, compared: Compared) -> None:
        self._pages, self._compared = pages, compared
        self._order = np.zeros(COLUMNS, np.int64)
        self.local: dict[str, np.ndarray] = {}

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        if field == "share":
            out[:] = self._pages.next(SHARE).array("<i8")[1:]
            return
        self._pages.looks += 1
        entry = self._pages.peek()
        if entry.kind == ORDER:
            look, *row = entry.array("<i8").tolist()
            if look < self._pages.looks:
                raise Difference(f"{self._pages.name}: an order was to be seen at look {look}, this is look {self._pages.looks}")
            if look == self._pages.looks:
                self._pages.next(ORDER)
                self._order[:] = row
        out[:] = self._order

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        if field != "report":
            return
        recorded, found = self._pages.next(EVALUATED).array("<f8"), data[1:]
        if self._compared.exact and recorded.tobytes() != found.tobytes():
            raise Difference(f"{self._pages.name}: an evaluation gives {found.tolist()}, recorded was {recorded.tolist()}")
        self._compared.scores.append((self._pages.name, recorded.tolist(), found.tolist()))

    def flush(self, rank: int) -> None:
        """Nothing is ever under way here."""

    def wake(self, rank: int) -> None:
        """Nobody rests."""

    def sync(self) -> None:
        """Nobody else writes."""

    def blocked(self) -> None:
        """No call ever waits here."""

    def free(self) -> None:
        self.local = {}


class ReplayedStore:
    """Fetch and push as recorded: each piece is read in the version that was read.

    Parameters
    ----------
    pages
        What was recorded.
    shards, timelines
        All shards, and who takes pushes to them.
    topology, origin, mine
        Who this is, and what it uses of the flat vector.
    rings, base
        Types, and slices that may wait at a shard; every shard's clock when the run began.
    overlap
        Whether a fetch takes effect one step later.
    """

    def __init__(
        self, pages: Pages, shards: Sequence[ReplayedShard], timelines: Sequence[Timeline], topology: Topology,
        origin: tuple[int, int], mine: Footprint, rings: Rings, base: np.ndarray, overlap: bool,
    ) -> None:  # fmt: skip
        self._pages, self._shards, self._timelines, (self._replica, self._partition) = pages, shards, timelines, origin
        self._origin, self._base, self._rings = origin[0] * topology.partitions + origin[1], base, rings
        self._reads = reads(mine, shards)
        self._ways = routes(mine.pushed, [shard.range for shard in shards])
        self._starts = np.cumsum([0, *(len(shard.pieces) for shard in shards)])
        self.w, self.g = np.zeros(mine.size, rings.dtype), np.zeros(mine.size, rings.dtype)
        self._w2 = np.zeros(mine.size, rings.dtype) if overlap else self.w
        self.clocks, self._landed = np.zeros((2, len(shards)), np.int64)
        self._oldest = self.clocks
        self.counts, self.number = Counts(), 0
        self.fetched, self.overlaps, self.landing = False, overlap, False
        self._fetching: Reading | None = None
        self.reading: Reading | None = None
        self.headway: Headway | None = None

    def resume(self, number: int) -> None:
        """Go on counting pushes from `number`."""
        self.number = number

    def fetch(self) -> Turns:
        self.counts.fetches += 1
        first, self.fetched = not self.fetched, True
        if not self.overlaps or first:
            yield from self._await(self._begin(self._pages.next(FETCH), self.w, self.clocks))
            return
        self.landing = True
        try:
            self._fetching = self._begin(self._pages.landing(), self._w2, self._landed)
        except Ended:
            # It may still have pushed before this fetch would have taken effect.
            self._fetching = None

    def arrive(self) -> Turns:
        if not self.landing:
            return
        if self._fetching is None:
            raise Ended
        self._pages.next(FETCH)
        yield from self._await(self._fetching)
        self.w, self._w2, self.landing = self._w2, self.w, False
        self.clocks, self._landed = self._landed, self.clocks

    settle = confirm = arrive

    def await_clock(self) -> Turns:
        """What is fetched next has been recorded, and comes when it is there."""
        yield from self.arrive()

    def snapshot(self, out: np.ndarray) -> Turns:
        yield from self._await(self._begin(self._pages.next(SNAPSHOT), out, self.clocks.copy(), whole=True))

    def accrued(self, first: bool) -> None:
        if first:
            self._oldest = self.clocks.copy()

    def applied(self) -> int:
        """Return the number of the first push of which not every shard has applied its part."""
        return min([self.number, *(n for way in self._ways for n in self._timelines[way.shard].unapplied(self._origin))])

    def push(self, steps: int, step: int) -> Turns:
        recorded = self._pages.next(PUSH).array("<i8").tolist()
        if recorded != [self.number, steps, step]:
            raise Difference(
                f"{self._pages.name}: push {self.number} with {steps} gradients at step {step} comes where push {recorded[0]} "
                f"with {recorded[1]} at step {recorded[2]} was recorded"
            )
        for way in self._ways:
            while self._timelines[way.shard].pending(self._origin) > self._rings.slots:
                yield Wait(f"{self._pages.name} waits for shard {way.shard} to take its push")
        g = self.g.copy()
        if self._rings.narrow:
            coarse(g, g)
        for way in self._ways:
            push = Push(self._replica, self._partition, self.number, int(self._oldest[way.shard]), steps, step)
            self._timelines[way.shard].parcels[self._origin].append(Parcel(push, g))
        if self.headway is not None:
            self.headway.mark(self.number)
        self.number += 1
        self.counts.pushes += 1

    def close(self) -> None:
        self._pages.next(END)

    def _begin(self, entry: LogEntry, w: np.ndarray, clocks: np.ndarray, whole: bool = False) -> Reading:
        put = coarse if self._rings.narrow and not whole else copy
        versions = entry.array("<i8") // 2
        reading = Reading(len(self._reads))
        for shard, number, moves in self._reads:
            version = int(versions[self._starts[shard] + number])
            self._shards[shard].read(number, version, _copying(put, self._shards[shard].params, w, moves), reading)
        for way in self._ways:
            lo = self._starts[way.shard]
            own = [i for i, piece in enumerate(self._shards[way.shard].pieces) if piece.partition == self._partition]
            clocks[way.shard] = self._base[way.shard] + versions[lo + np.array(own)].min()
        return reading

    def _await(self, reading: Reading) -> Turns:
        self.reading = reading
        while reading.left:
            yield Wait(f"{self._pages.name} waits for {reading.left} slices that it has read")


Moves = list[tuple[slice, slice]]


def reads(mine: Footprint, shards: Sequence[ReplayedShard]) -> list[tuple[int, int, Moves]]:
    """Return what a fetch reads: shard, piece, and for each stretch of it where it lies in the shard and in the own vector."""
    out = []
    for index, shard in enumerate(shards):
        for number, piece in enumerate(shard.pieces):
            moves = [
                (slice(piece.lo + target, piece.lo + target + n), slice(place, place + n))
                for route in routes(mine.used, [piece.range.shift(shard.range.lo)])
                for place, target, n in route.moves(0, route.size)
            ]
            if moves:
                out.append((index, number, moves))
    return out


def _copying(put: Callable[[np.ndarray, np.ndarray], None], params: np.ndarray, w: np.ndarray, moves: Moves) -> Callable[[], None]:
    def read() -> None:
        for there, here in moves:
            put(params[there], w[here])

    return read
