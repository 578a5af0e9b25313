"""Fetch and push: the protocol between replicas and shards, both halves, and its two ends.

Window of a shard: `params` (its range), `clock` (one counter per partition index), and for every origin o (one partition of one
replica) that uses some of its parameters a ring of `slots` slices, with `head[o]` written by the origin and `tail[o]` by the shard.
One writer and one reader per ring, so nothing is atomic:

    push    while more slices: if head - tail = slots, read tail (wait while the ring is full);
            Put slice and header into slot head mod slots, Flush; head + 1; Put head, Flush
    serve   while head[o] > tail[o]: apply slot tail mod slots; tail[o] + 1
    fetch   Get clock, Flush; Get parameters, Flush

A header is eight integers: push number, first element (counted in the origin's part of this shard), elements, last slice or not,
clock at the fetch, gradients accrued, the replica's step, 0. The clock is read before the parameters, and written after them, so a
measured staleness is never too small. Parameters may be read while they change: each number is some version, which Downpour allows.

With `Rings.narrow` half the bytes travel, as bfloat16: an origin rounds its gradient slice by slice, the shard widens a slice
before it applies it; `rounded` beside `params` holds these rounded, and is what a fetch gets. The shard's own parameters stay
float32, so that small updates add up. What is evaluated is `params` itself, as a checkpoint holds it.

The shard orders what it does by `Window.sync`: between head and slot, slot and tail, parameters and clock. What is fetched comes
in pieces of `PIECE` bytes, since some MPI cannot move 2 GiB at once. Between pieces, and between slices of a push, the replica
gives way when `MOMENT` seconds are over: a long transfer must not look like a dead replica.

`local_store.LocalStore` is the same interface in the process of the shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from struct import Struct

import numpy as np

from dbnet.comm.threads import Mover
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns, looking
from dbnet.comm.window import Window
from dbnet.core.kernels.vector import narrow, widen
from dbnet.network.model import Footprint
from dbnet.shards.push import Counts, Intake, Push
from dbnet.shards.routes import HEADER, Rings, Route, routes

_WORDS = Struct("=7q")  # of a header: all but the last
PIECE, MOMENT, EARLY = 256 << 20, 0.05, 1 << 16


class WindowStore:
    """The replica's end over a window.

    Parameters
    ----------
    window, topology
        The window and who is where.
    origin
        (replica, partition) of this rank.
    footprint, rings
        What this partition uses of the flat vector; the shards' ranges and rings.
    overlap, clock, mover
        Move data beside while the next gradient is computed; seconds, by which long transfers give way; makes what moves data.
    """

    def __init__(
        self, window: Window, topology: Topology, origin: tuple[int, int], footprint: Footprint, rings: Rings,
        overlap: bool = False, clock: Callable[[], float] = time.perf_counter, mover: Callable[[], Mover] = Mover,
    ) -> None:  # fmt: skip
        self._clock, self._window, self._topology, (self._replica, self._partition) = clock, window, topology, origin
        self.sources, self.routes = routes(footprint.used, rings.ranges), routes(footprint.pushed, rings.ranges)
        size, dtype, self._item = footprint.size, rings.dtype, rings.wire.itemsize
        self._origin = self._replica * topology.partitions + self._partition
        self._row = [rings.users[route.shard].index(self._origin) for route in self.routes]
        self._slot, self._slots = rings.elements, rings.slots
        self._moves = self._plan_moves(max(1, PIECE // max(1, len(self.sources)) // dtype.itemsize))
        # What is narrow lies here on its way: all that is fetched, a slice of what is pushed.
        self._narrow = (np.zeros(size, rings.wire), np.zeros(self._slot, rings.wire)) if rings.narrow else None
        self.w, self.g = np.zeros(size, dtype), np.zeros(size, dtype)
        self._w2, self._g2 = (np.zeros(size, dtype), np.zeros(size, dtype)) if overlap else (self.w, self.g)
        self.clocks, self._landing = np.zeros((2, len(rings.ranges)), np.int64)
        self._oldest: np.ndarray | None = None
        # Numbers of each ring as they travel, and as they are read and written here.
        counters, headers = np.zeros((2, len(self.routes), 1), np.int64), np.zeros((len(self.routes), HEADER), np.int64)
        (heads, tails), (self._heads, self._tails) = map(list, counters), map(memoryview, counters)
        self._header_bytes, self._ranks = memoryview(headers).cast("B"), [topology.shard_rank(way.shard) for way in self.routes]
        self._rings = list(zip(self._ranks, headers, heads, tails, strict=True))
        self._slices = [route.slices(self._slot) for route in self.routes]
        self.counts, self.number, self.fetched, self.overlaps = Counts(), 0, False, overlap
        self._mover = mover() if overlap else None
        self._fetching = self._pushing = None
        self._prepare()

    def _prepare(self) -> None:
        """Say once what is moved again and again; what gets parameters goes by the clocks that are read before them."""
        window, me = self._window, self._origin
        self._post = [window.posting(rank, ("header", h), "ring", ("head", n, me)) for rank, h, n, _ in self._rings]
        self._look_at_tail = [window.getting([(rank, "tail", n, me)]) for rank, _, _, n in self._rings]
        buffers = [(self.w, self.clocks), (self._w2, self._landing)][: 1 + self.overlaps]
        self._ready = {id(clocks): self._gets(w, clocks) for w, clocks in buffers}

    def resume(self, number: int) -> None:
        """Go on counting pushes from `number`."""
        self.number = number

    def fetch(self) -> Turns:
        """Fetch the parameters: into `w` now, or with overlap in the background, to take effect at `arrive`."""
        self.counts.fetches += 1
        self.counts.bytes_fetched += self.w.size * self._item
        first, self.fetched = not self.fetched, True
        if self._mover is None or first:
            yield from self.read(self.w, self.clocks)
        else:
            self._fetching = self._mover.start(self.read(self._w2, self._landing))

    @property
    def beside(self) -> bool:
        """Whether who asks moves data while the replica computes."""
        return self._mover is not None and self._mover.here

    @property
    def landing(self) -> bool:
        """Whether a fetch is under way whose parameters will replace the present ones."""
        return self._fetching is not None

    def arrive(self) -> Turns:
        """End the step: an overlapped fetch takes effect."""
        if self._fetching is not None:
            yield from self._fetching.wait("the parameters it is fetching")
            self._fetching = None
            self.w, self._w2 = self._w2, self.w
            self.clocks, self._landing = self._landing, self.clocks

    def snapshot(self, out: np.ndarray) -> Turns:
        """Fetch into `out` [size], for evaluation; training state stays as it is."""
        yield from self.read(out, np.zeros_like(self._landing), True)

    def accrued(self, first: bool) -> None:
        """Note that a gradient of the present parameters was added to `g`."""
        if first:
            self._oldest = self.clocks.copy()

    def push(self, steps: int, step: int) -> Turns:
        """Push `g`, the sum of `steps` gradients, the newest of step `step`; afterwards `g` is free to be overwritten."""
        if self._pushing is not None:
            yield from self._pushing.wait("its last push to leave")
            self._pushing = None
        send = self.write(self.g, self.number, self._oldest.copy(), (steps, step))
        self.number += 1
        if self._mover is None:
            yield from send
        else:
            self._pushing = self._mover.start(send)
            self.g, self._g2 = self._g2, self.g

    def settle(self) -> Turns:
        """Wait until everything that was pushed has left and every transfer has ended."""
        yield from self.arrive()
        if self._pushing is not None:
            yield from self._pushing.wait("its last push to leave")
            self._pushing = None

    def confirm(self) -> Turns:
        """Wait until the shards have applied everything that was pushed."""
        yield from self.settle()
        for i, route in enumerate(self.routes):
            while self._tails[i, 0] < self._heads[i, 0]:
                self._look_at_tail[i]()
                yield looking(f"a replica waits for shard {route.shard} to apply its push")

    def await_clock(self) -> Turns:
        """Wait until every shard that was pushed to has made an update since the parameters were fetched."""
        yield from self.settle()
        now = np.zeros(1, np.int64)
        for route, rank in zip(self.routes, self._ranks, strict=True):
            look = self._window.getting([(rank, "clock", now, self._partition)])
            look()
            while now[0] <= self.clocks[route.shard]:
                yield looking(f"a replica waits at shard {route.shard} for the others' gradients")
                look()

    def close(self) -> None:
        if self._mover is not None:
            self._mover.stop()

    def _plan_moves(self, most: int) -> list[list[tuple[int, int, slice]]]:
        """Return what a fetch gets, up to `most` elements of each shard in a round: rank, place there, place in `w`."""
        rounds = []
        for first in range(0, max((route.size for route in self.sources), default=1), most):
            found = [(self._topology.shard_rank(r.shard), move) for r in self.sources for move in r.moves(first, most)]
            rounds.append([(rank, target, slice(place, place + n)) for rank, (place, target, n) in found])
        return rounds

    def _gets(self, w: np.ndarray, clocks: np.ndarray, whole: bool = False) -> list[Callable[[], None]]:
        """Return what gets the clocks, and what gets each round of parameters."""
        looks = [(self._topology.shard_rank(i), "clock", clocks[i : i + 1], self._partition) for i, *_ in self.sources]
        return [self._window.getting(looks), *(self.moving(w, moves, whole) for moves in self._moves)]

    def read(self, w: np.ndarray, clocks: np.ndarray, whole: bool = False) -> Turns:
        """Get the parameters into `w`, and before them the clocks; `whole`: unrounded, whatever travels else."""
        look, *rounds = self._ready.get(id(clocks)) or self._gets(w, clocks, whole)
        look()
        began = self._clock()
        for get in rounds:
            get()
            # Others may run between a fetch and the gradient computed from it.
            if get is rounds[-1] or self._clock() - began >= MOMENT:
                yield None
                began = self._clock()

    def moving(self, w: np.ndarray, moves: Sequence[tuple[int, int, slice]], whole: bool) -> Callable[[], None]:
        """Return what gets pieces (rank, place there, place in `w`)."""
        rounded = self._narrow is not None and not whole
        field, landing = ("rounded", self._narrow[0]) if rounded else ("params", w)
        get = self._window.getting([(rank, field, landing[place], target) for rank, target, place in moves])

        def move() -> None:
            get()
            for _, _, place in moves:
                self.widen(landing[place], w[place])

        return move if rounded else get

    narrow, widen = staticmethod(narrow), staticmethod(widen)

    def write(self, g: np.ndarray, number: int, fetched: np.ndarray, steps: tuple[int, int]) -> Turns:
        """Send all slices, shard by shard in turn, so that no shard waits until the others are served."""
        todo = [(i, 0) for i in range(len(self.routes))]
        since, began = 0.0, self._clock()
        while todo:
            left = []
            for i, at in todo:
                end = self.routes[i].size
                while at < end and self._room(i):
                    at = self._send_slice(i, g, at, (number, int(fetched[self.routes[i].shard]), *steps))
                    if self._clock() - began >= MOMENT:
                        break
                if at < end:
                    left.append((i, at))
            if left and left == todo:
                since = since or self._clock()
                me = self._topology.name(self._topology.origin_rank(self._replica, self._partition))
                yield looking(f"{me} waits for shard {self.routes[left[0][0]].shard} to make room in its ring")
                began = self._clock()
            elif since or (left and self._clock() - began >= MOMENT):
                self.counts.waited += self._clock() - since if since else 0.0
                since = 0.0
                yield None
                began = self._clock()
            todo = left
        self.counts.waited += self._clock() - since if since else 0.0
        self.counts.pushes += 1
        self.counts.bytes_pushed += g.size * self._item

    def _room(self, i: int) -> bool:
        if self._heads[i, 0] - self._tails[i, 0] == self._slots:
            self._look_at_tail[i]()
        return self._heads[i, 0] - self._tails[i, 0] < self._slots

    def _send_slice(self, i: int, g: np.ndarray, at: int, about: tuple[int, int, int, int]) -> int:
        rank, head = self._ranks[i], self._heads[i, 0]
        here = self._slices[i][at]
        end = at + here.stop - here.start
        place = self._row[i] * self._slots + head % self._slots
        last = end == self.routes[i].size
        _WORDS.pack_into(self._header_bytes, 8 * HEADER * i, about[0], at, end - at, last, *about[1:])
        data = g[here]
        if self._narrow is not None:
            data = self._narrow[1][: end - at]
            self.narrow(g[here], data)
        self._post[i](place * HEADER, data, place * self._slot)
        # A shard that rests is woken by a first slice that takes it long; by the last, and a full ring, it must have seen all.
        if (not at and data.nbytes >= EARLY) or last or head + 1 - self._tails[i, 0] == self._slots:
            self._window.wake(rank)
        return end


class Inbox:
    """The shard's half: takes slices out of its rings, a limited number at a time, and applies them.

    Parameters
    ----------
    window, topology, users, routes
        This shard's end of the window, who is where, which origins have a ring here, and each one's route to this shard.
    intakes
        One for each of these origins.
    """

    def __init__(
        self, window: Window, intakes: Sequence[Intake], topology: Topology, users: Sequence[int], routes: Sequence[Route]
    ) -> None:
        self._window, self._topology, self.intakes, self._users, self._routes = window, topology, intakes, list(users), list(routes)
        self._applied, self._closed = [0] * len(users), [False] * len(users)
        self.head, self.tail, headers, self._ring = (window.local[name] for name in ("head", "tail", "header", "ring"))
        # Quicker than the arrays themselves, of which every number is an object first.
        self._heads, self._tails, self._clock = map(memoryview, (self.head, self.tail, window.local["clock"]))
        self._headers, self._slots = headers.reshape(-1).view(np.uint8).data, headers.shape[1]
        self._whose = [divmod(origin, topology.partitions) for origin in users]
        self._wide = np.zeros(self._ring.shape[2], window.local["params"].dtype) if "rounded" in window.local else None

    def drain(self) -> bool:
        """Apply at most one slice of each origin; return whether there was any."""
        self._window.sync()
        busy = False
        for row, origin in enumerate(self._users):
            if not self._closed[row]:
                busy = self._take(row, origin) or busy
        return busy

    def _take(self, row: int, origin: int) -> bool:
        tail = self._tails[origin]
        if self._heads[origin] == tail:
            return False
        # What the head counts may be read only after the head, and be overwritten only after it was read.
        self._window.sync()
        place = row * self._slots + tail % self._slots
        self.apply(row, origin, tail % self._slots, _WORDS.unpack_from(self._headers, 8 * HEADER * place))
        self._window.sync()
        self._tails[origin] = tail + 1
        return True

    def close(self, replica: int) -> tuple[int, int] | None:
        """Apply what is complete in the rings of a lost replica and take nothing more from it, even if it only slept.

        Return how many of its gradients were applied here, of its partition with the fewest and of that with the most; None if it
        has no ring here.
        """
        counts = []
        for row, origin in enumerate(self._users):
            if origin // self._topology.partitions == replica:
                while not self._closed[row] and self._take(row, origin):
                    pass
                self._closed[row] = True
                counts.append(self._applied[row])
        return (min(counts), max(counts)) if counts else None

    def apply(self, row: int, origin: int, slot: int, header: tuple[int, ...]) -> None:
        """Let in the slice in this slot of a ring."""
        (number, first, n, last, fetched, steps, step), (replica, partition) = header, self._whose[row]
        # A clock that was read while it changed, byte by byte, may be one that never was.
        fetched = min(max(fetched, 0), self._clock[partition])
        push = Push(replica, partition, number, fetched, steps, step)
        pieces = self._routes[row].segments(first, n)
        g = self.widened(self._ring[row, slot, :n])
        if self.intakes[row].take(push, g, pieces, first == 0, bool(last), self._window.sync):
            self._applied[row] += steps

    def widened(self, g: np.ndarray) -> np.ndarray:
        """Return a slice as it lies in a ring in the type of the parameters."""
        if self._wide is None:
            return g
        widen(g, self._wide[: g.size])
        return self._wide[: g.size]
