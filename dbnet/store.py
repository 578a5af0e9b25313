"""Fetch and push: the protocol between replicas and shards, both halves, and its two ends.

Window of a shard: `params` (its range), `clock` (one counter per partition index), and for every origin o (one partition of one
replica) that uses some of its parameters a ring of `slots` slices, with `head[o]` written by the origin and `tail[o]` by the shard.
One writer and one reader per ring, so nothing is atomic:

    push    while more slices: if head - tail = slots, read tail (wait while the ring is full);
            Put slice and header into slot head mod slots, Flush; head + 1; Put head, Flush
    serve   while head[o] > tail[o]: apply slot tail mod slots; tail[o] + 1
    fetch   Get clock, Flush; Get parameters, Flush

A header is eight integers: push number, first element (counted in the origin's part of this shard), elements, last slice or not,
clock at the fetch, gradients accrued, 0, 0. The clock is read before the parameters, so a measured staleness is never too small.
Parameters may be read while they change: each number is some version, which Downpour allows.

`DirectStore` is the same interface without a window: a push is applied where the shard's memory is, without a copy.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dbnet.model import Piece
from dbnet.mover import Job, Mover
from dbnet.ranges import Range, overlap
from dbnet.shard import Push, Shard
from dbnet.topology import Topology
from dbnet.waiting import Turns, Wait
from dbnet.window import Field, Window

HEADER = 8


class Route(NamedTuple):
    """One origin's part of one shard.

    Attributes
    ----------
    shard
        Index of the shard.
    lo, hi
        The part of the origin's own vector that belongs to this shard; contiguous, since pieces are in order.
    starts, targets
        For each piece of it, its first element counted from `lo`, and where that lies in the shard.
    """

    shard: int
    lo: int
    hi: int
    starts: tuple[int, ...]
    targets: tuple[int, ...]

    def segments(self, first: int, n: int) -> list[tuple[int, int, int]]:
        """Return (element within the slice, place in the shard, length) for `n` elements from `first` on."""
        out, i, end = [], bisect_right(self.starts, first) - 1, first + n
        at = first
        while at < end:
            stop = min(end, self.starts[i + 1] if i + 1 < len(self.starts) else end)
            out.append((at - first, self.targets[i] + at - self.starts[i], stop - at))
            at, i = stop, i + 1
        return out


def routes(footprint: Sequence[Piece], shard_ranges: Sequence[Range]) -> list[Route]:
    """Return the routes of an origin to every shard that holds some of its footprint."""
    out = []
    for index, part in enumerate(shard_ranges):
        cut = [(overlap(piece.range, part), piece) for piece in footprint]
        cut = [(both, piece.at + both.lo - piece.range.lo) for both, piece in cut if both.size]
        if cut:
            lo = cut[0][1]
            hi = cut[-1][1] + cut[-1][0].size
            out.append(Route(index, lo, hi, tuple(at - lo for _, at in cut), tuple(both.lo - part.lo for both, _ in cut)))
    return out


def shard_fields(part: Range, dtype: np.dtype, topology: Topology, users: Sequence[int], slot: int, slots: int) -> list[Field]:
    """Return the window fields of a shard; `users` are the origins that have a ring there, `slot` is in bytes."""
    n, name = topology.origins, np.dtype(dtype).name
    return [
        Field("params", name, (part.size,)),
        Field("clock", "int64", (topology.partitions,)),
        Field("head", "int64", (n,)),
        Field("tail", "int64", (n,)),
        Field("header", "int64", (len(users), slots, HEADER)),
        Field("ring", name, (len(users), slots, elements(slot, dtype))),
    ]


def elements(slot: int, dtype: np.dtype) -> int:
    """Return the number of gradient values in a slice of `slot` bytes."""
    return max(1, slot // np.dtype(dtype).itemsize)


class Counts:
    """What went over the wire: fetches, pushes, bytes each way, seconds the replica waited for a ring."""

    def __init__(self) -> None:
        self.fetches = self.pushes = self.bytes_fetched = self.bytes_pushed = 0
        self.waited = 0.0


class WindowStore:
    """The replica's end over a window.

    Parameters
    ----------
    window, topology
        The window and who is where.
    origin
        (replica, partition) of this rank.
    footprint, size, dtype
        The ranges of the flat vector that this partition uses, and its own vector.
    shard_ranges, users
        Each shard's range and the origins that have a ring there.
    ring
        (bytes of a slice, slices of a ring).
    overlap
        Move data on a thread while the next gradient is computed.
    """

    def __init__(
        self, window: Window, topology: Topology, origin: tuple[int, int], footprint: Sequence[Piece], size: int, dtype: np.dtype,
        shard_ranges: Sequence[Range], users: Sequence[Sequence[int]], ring: tuple[int, int], overlap: bool = False,
    ) -> None:  # fmt: skip
        self._window, self._topology, (self._replica, self._partition) = window, topology, origin
        self.routes = routes(footprint, shard_ranges)
        self._origin = self._replica * topology.partitions + self._partition
        self._row = [users[route.shard].index(self._origin) for route in self.routes]
        self._slot, self._slots = elements(ring[0], dtype), ring[1]
        self.w, self.g = np.zeros(size, dtype), np.zeros(size, dtype)
        self._w2, self._g2 = (np.zeros(size, dtype), np.zeros(size, dtype)) if overlap else (self.w, self.g)
        self.clocks = np.zeros(len(self.routes), np.int64)
        self._landing = np.zeros(len(self.routes), np.int64)
        self._oldest: np.ndarray | None = None
        self._head, self._tail = np.zeros((2, len(self.routes), 1), np.int64)
        self._header = np.zeros((len(self.routes), HEADER), np.int64)
        self.counts, self.number = Counts(), 0
        self._mover = Mover() if overlap else None
        self._fetching: Job | None = None
        self._pushing: Job | None = None

    def resume(self, number: int) -> None:
        """Go on counting pushes from `number`."""
        self.number = number

    def fetch(self) -> Turns:
        """Fetch the parameters: into `w` now, or with overlap in the background, to take effect at `arrive`."""
        if self._mover is None or self.counts.fetches == 0:
            yield from self._read(self.w, self.clocks)
        else:
            self._fetching = self._mover.start(self._read(self._w2, self._landing))

    def arrive(self) -> Turns:
        """End the step: an overlapped fetch takes effect."""
        if self._fetching is not None:
            yield from self._fetching.wait("the parameters it is fetching")
            self._fetching = None
            self.w, self._w2 = self._w2, self.w
            self.clocks, self._landing = self._landing, self.clocks

    def snapshot(self, out: np.ndarray) -> Turns:
        """Fetch into `out` [size], for evaluation; training state stays as it is."""
        yield from self._read(out, np.zeros_like(self._landing))

    def accrued(self, first: bool) -> None:
        """Note that a gradient of the present parameters was added to `g`."""
        if first:
            self._oldest = self.clocks.copy()

    def push(self, steps: int) -> Turns:
        """Push `g`, the sum of `steps` gradients; afterwards `g` is free to be overwritten."""
        if self._pushing is not None:
            yield from self._pushing.wait("its last push to leave")
            self._pushing = None
        send = self._write(self.g, self.number, self._oldest.copy(), steps)
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
            rank = self._topology.shard_rank(route.shard)
            while self._tail[i, 0] < self._head[i, 0]:
                self._window.get(rank, "tail", self._tail[i], self._origin)
                self._window.flush(rank)
                yield Wait(f"a replica waits for shard {route.shard} to apply its push")

    def close(self) -> None:
        if self._mover is not None:
            self._mover.stop()

    def _read(self, w: np.ndarray, clocks: np.ndarray) -> Turns:
        window, ranks = self._window, [self._topology.shard_rank(route.shard) for route in self.routes]
        for i, rank in enumerate(ranks):
            window.get(rank, "clock", clocks[i : i + 1], self._partition)
        for rank in ranks:
            window.flush(rank)
        for route, rank in zip(self.routes, ranks, strict=True):
            for i, (start, target) in enumerate(zip(route.starts, route.targets, strict=True)):
                stop = route.starts[i + 1] if i + 1 < len(route.starts) else route.hi - route.lo
                window.get(rank, "params", w[route.lo + start : route.lo + stop], target)
        for rank in ranks:
            window.flush(rank)
        self.counts.fetches += 1
        self.counts.bytes_fetched += w.nbytes
        # Others may run between a fetch and the gradient computed from it.
        yield None

    def _write(self, g: np.ndarray, number: int, fetched: np.ndarray, steps: int) -> Turns:
        """Send all slices, shard by shard in turn, so that no shard waits until the others are served."""
        todo = [(i, route.lo) for i, route in enumerate(self.routes)]
        since = 0.0
        while todo:
            left = []
            for i, at in todo:
                end = self.routes[i].hi
                while at < end and self._room(i):
                    at = self._send_slice(i, g, at, (number, int(fetched[i]), steps))
                if at < end:
                    left.append((i, at))
            if left and left == todo:
                since = since or time.perf_counter()
                me = self._topology.name(self._topology.origin_rank(self._replica, self._partition))
                yield Wait(f"{me} waits for shard {self.routes[left[0][0]].shard} to make room in its ring")
            elif since:
                self.counts.waited += time.perf_counter() - since
                since = 0.0
            todo = left
        self.counts.waited += time.perf_counter() - since if since else 0.0
        self.counts.pushes += 1
        self.counts.bytes_pushed += g.nbytes

    def _room(self, i: int) -> bool:
        if self._head[i, 0] - self._tail[i, 0] < self._slots:
            return True
        rank = self._topology.shard_rank(self.routes[i].shard)
        self._window.get(rank, "tail", self._tail[i], self._origin)
        self._window.flush(rank)
        return bool(self._head[i, 0] - self._tail[i, 0] < self._slots)

    def _send_slice(self, i: int, g: np.ndarray, at: int, about: tuple[int, int, int]) -> int:
        route, window = self.routes[i], self._window
        rank, end = self._topology.shard_rank(route.shard), min(at + self._slot, route.hi)
        place = self._row[i] * self._slots + int(self._head[i, 0]) % self._slots
        number, fetched, steps = about
        self._header[i, :6] = (number, at - route.lo, end - at, end == route.hi, fetched, steps)
        window.put(rank, "header", self._header[i], place * HEADER)
        window.put(rank, "ring", g[at:end], place * self._slot)
        window.flush(rank)
        self._head[i] += 1
        window.put(rank, "head", self._head[i], self._origin)
        window.flush(rank)
        return end


class Inbox:
    """The shard's half: takes slices out of its rings, a limited number at a time, and applies them.

    Parameters
    ----------
    window
        This shard's end of the window.
    shard
        What the slices are applied to.
    topology, users, routes
        Who is where, which origins have a ring here, and each one's route to this shard.
    """

    def __init__(self, window: Window, shard: Shard, topology: Topology, users: Sequence[int], routes: Sequence[Route]) -> None:
        self._window, self._shard, self._topology = window, shard, topology
        self._users, self._routes, self._push = list(users), list(routes), [0] * len(users)
        local = window.local
        self._head, self._tail, self._headers, self._ring = (local[name] for name in ("head", "tail", "header", "ring"))

    def drain(self) -> bool:
        """Apply at most one slice of each origin; return whether there was any."""
        self._window.sync()
        busy = False
        for row, origin in enumerate(self._users):
            tail = int(self._tail[origin])
            if self._head[origin] != tail:
                self._apply(row, origin, tail % self._ring.shape[1])
                self._tail[origin] = tail + 1
                busy = True
        return busy

    def _apply(self, row: int, origin: int, slot: int) -> None:
        number, first, n, last, fetched, steps = (int(v) for v in self._headers[row, slot, :6])
        replica, partition = divmod(origin, self._topology.partitions)
        if first == 0:
            self._push[row] = self._shard.begin(partition)
        data = self._ring[row, slot]
        for start, target, length in self._routes[row].segments(first, n):
            self._shard.apply(target, data[start : start + length], self._push[row])
        if last:
            self._shard.finish(Push(replica, partition, number, fetched, steps))


class DirectStore:
    """The replica's end in the process of the shards.

    With n_fetch = 1 every gradient is computed right after a fetch, before anyone else runs, so `w` is the shards' own memory and
    a fetch copies nothing.

    Parameters
    ----------
    flat
        The whole parameter vector, of which the shards' parameters are slices.
    shards
        All shards.
    replica
        Index of this replica.
    share
        Whether `w` may be the shards' memory.
    """

    def __init__(self, flat: np.ndarray, shards: Sequence[Shard], replica: int, share: bool) -> None:
        self._flat, self._shards, self._replica = flat, shards, replica
        self.w = flat if share else flat.copy()
        self.g = np.zeros_like(flat)
        self.counts, self.number = Counts(), 0
        self._clocks = [0] * len(shards)
        self._oldest = self._clocks

    def resume(self, number: int) -> None:
        """Go on counting pushes from `number`."""
        self.number = number

    def fetch(self) -> Turns:
        self._clocks = [int(shard.clock[0]) for shard in self._shards]
        if self.w is not self._flat:
            self.w[:] = self._flat
            self.counts.bytes_fetched += self.w.nbytes
        self.counts.fetches += 1
        return
        yield

    def arrive(self) -> Turns:
        return
        yield

    def snapshot(self, out: np.ndarray) -> Turns:
        out[:] = self._flat
        return
        yield

    def accrued(self, first: bool) -> None:
        if first:
            self._oldest = self._clocks

    def push(self, steps: int) -> Turns:
        for shard, fetched in zip(self._shards, self._oldest, strict=True):
            shard.apply(0, self.g[shard.range.slice], shard.begin(0))
            shard.finish(Push(self._replica, 0, self.number, fetched, steps))
        self.number += 1
        self.counts.pushes += 1
        return
        yield

    def settle(self) -> Turns:
        return
        yield

    confirm = settle

    def close(self) -> None:
        """Nothing is under way here."""


Store = WindowStore | DirectStore
