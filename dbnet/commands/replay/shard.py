"""A shard's timeline: it takes slices, loses replicas and copies checkpoints in the order in which it did so.

A slice is changed only after all have read it that have read it in this version; whoever reads a later version waits for it. Real
time has ordered all of this once, so there always is somebody who can go on.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dbnet.checkpoint.format import CHUNK
from dbnet.comm.turns import Turns, Wait, give_way
from dbnet.commands.replay.outcome import Compared, Difference
from dbnet.core.kernels.vector import check_sum
from dbnet.run.setup import Setup
from dbnet.shards.push import Intake, Push, Receiver
from dbnet.shards.rules.base import Arrival
from dbnet.shards.schedule.log import CLOSE, COPY, END, SAVE, SAVED, TAKE, TAKES, LogEntry
from dbnet.shards.schedule.serving import CountingShard, digests
from dbnet.shards.schedule.slices import span
from dbnet.shards.shard import View


class Reading:
    """A fetch under way: how many pieces are still to be read."""

    def __init__(self, left: int) -> None:
        self.left = left


class ReplayedShard(CountingShard):
    """A shard that changes when all have read that are to.

    Parameters
    ----------
    index
        Which shard.
    due
        For each piece the versions that are read of it, in order, one for each reading.
    """

    def __init__(self, index: int, due: Sequence[np.ndarray], *parts: Any) -> None:
        super().__init__(*parts)
        self.index, self._due = index, due
        self._read = [0] * len(self.pieces)
        self._waiting: list[list[tuple[int, Callable[[], None], Reading]]] = [[] for _ in self.pieces]

    def read(self, number: int, version: int, copy: Callable[[], None], reading: Reading) -> None:
        """Have `copy` called when piece `number` has this version."""
        if version < self.versions[number] // 2:
            raise Difference(f"{self.place(number)}: version {version} is to be read, but it has been changed since")
        self._waiting[number].append((version, copy, reading))
        self._serve(number)

    def _serve(self, number: int) -> None:
        now, left = int(self.versions[number]) // 2, []
        for version, copy, reading in self._waiting[number]:
            if version == now:
                copy()
                self._read[number] += 1
                reading.left -= 1
            else:
                left.append((version, copy, reading))
        self._waiting[number] = left

    def keeps(self, reading: Reading | None) -> bool:
        """Return whether a fetch waits for a version of this shard."""
        return any(reading is other for waiting in self._waiting for _, _, other in waiting)

    def place(self, number: int) -> str:
        return f"shard {self.index}, slice {self.pieces[number].slice}"

    def change(self, number: int, view: View, g: np.ndarray, t: int, arrival: Arrival | None) -> None:
        wanted = int(np.searchsorted(self._due[number], self.versions[number] // 2, "right"))
        while self._read[number] < wanted:
            missing = wanted - self._read[number]
            give_way(Wait(f"{self.place(number)} is read in its version {self.versions[number] // 2} by {missing} more"))
        super().change(number, view, g, t, arrival)
        self._serve(number)


@dataclass
class Parcel:
    """A push that is being taken: what is known of it, the gradient, its next element for this shard; of what it is the sum."""

    push: Push
    g: np.ndarray
    at: int = 0
    about: str = ""


class Taker:
    """One shard's end of the pushes: it takes their slices as they were taken.

    Parameters
    ----------
    ready, index, receiver
        The run, which shard, and what takes pushes to it.
    compared
        What was compared.
    longest
        Elements of a slice; None: a push comes whole.

    Attributes
    ----------
    parcels
        Of each origin that pushes here the pushes that are not taken yet.
    """

    def __init__(self, ready: Setup, index: int, receiver: Receiver, compared: Compared, longest: int | None) -> None:
        self.index, self.receiver, self._compared = index, receiver, compared
        self._topology, self._longest, users = ready.topology, longest, ready.users[index]
        self._routes = {origin: ready.routes[origin][index] for origin in users}
        self._intakes = {origin: Intake(receiver, ready.config.guard.finite) for origin in users}
        self.parcels: dict[int, deque[Parcel]] = {origin: deque() for origin in users}
        self._newest: dict[int, Push] = {}

    def take(self, origin: int, check: int) -> Push | None:
        """Take the next slice of an origin, of which a push is there; return the push if with it the whole of it was applied."""
        parcel, route = self.parcels[origin][0], self._routes[origin]
        at, push = parcel.at, parcel.push
        n = route.size if self._longest is None else span(route, at, self._longest)
        g = parcel.g[route.slice(at, n)]
        if self._compared.exact and check_sum(g) != check:
            raise Difference(f"{self._where(parcel, at)}: another gradient was pushed")
        whole = self._intakes[origin].take(push, g, route.segments(at, n), at == 0, at + n == route.size)
        parcel.at += n
        if parcel.at == route.size:
            self.parcels[origin].popleft()
            self._newest[origin] = push
        return push if whole else None

    def unapplied(self, origin: int) -> list[int]:
        """Return the numbers of an origin's pushes that have changed nothing yet: not taken, or waiting for others' of a step."""
        newest, later = self._newest.get(origin), [parcel.push.number for parcel in self.parcels[origin]]
        held = newest is not None and self.receiver.clock[newest.partition] <= newest.fetched
        return [newest.number, *later] if held else later

    def _where(self, parcel: Parcel, at: int) -> str:
        push = parcel.push
        number, partition = self._slice(parcel, at), f" partition {push.partition}" if self._topology.partitions > 1 else ""
        return f"shard {self.index}, slice {number}, push {push.number}, replica {push.replica}{partition}, step {push.step}"

    def _slice(self, parcel: Parcel, at: int) -> int:
        """Return the how-manieth slice of its push begins at element `at`."""
        push, number, first = parcel.push, 0, 0
        route = self._routes[push.replica * self._topology.partitions + push.partition]
        while self._longest is not None and first < at:
            first, number = first + span(route, first, self._longest), number + 1
        return number


class Timeline(Taker):
    """What one shard did, in order.

    Parameters
    ----------
    entries
        What it has recorded.
    quota
        Updates after which it stops; None: at the record's end.
    parts
        What takes its pushes.

    Attributes
    ----------
    over, ended
        Whether all that was recorded has been played; whether that is the whole run.
    taken
        How many slices were taken.
    awaited
        The origin of which the next slice is to be taken, while it has not been pushed.
    """

    def __init__(self, entries: Sequence[LogEntry], quota: int | None, *parts: Any) -> None:
        super().__init__(*parts)
        self._quota, self._made, self._entries = quota, 0, entries
        self._saving: Iterator[None] = iter(())
        self._named, self._copied = "", {}
        self.ended, self.over, self.taken = False, False, 0
        self.awaited: int | None = None

    def run(self) -> Turns:
        """Play what was recorded."""
        for entry in self._entries:
            if entry.kind == TAKES:
                for origin, check in entry.array(TAKE).tolist():
                    if self._made == self._quota:
                        break
                    yield from self._take(origin, check)
                if self._made == self._quota:
                    break
            elif entry.kind == CLOSE:
                self._close(entry.value)
            elif entry.kind == SAVE:
                self._named, self._saving = entry.value, self._copies()
            elif entry.kind == COPY:
                next(self._saving, None)
            elif entry.kind == SAVED:
                compare(self._compared, self.index, f"checkpoint {self._named.split('.')[0]}", entry.value, self._copied)
                self._compared.part(self._named)
            elif entry.kind == END:
                compare(self._compared, self.index, "the end", entry.value, held(self.receiver))
                self.ended = True
        self.over = True

    def pending(self, origin: int) -> int:
        """Return how many slices of an origin wait, of pushes but the newest at least one."""
        return sum(
            1 if self._longest is None else -(-self._left(origin, parcel) // self._longest) for parcel in self.parcels[origin]
        )

    def _left(self, origin: int, parcel: Parcel) -> int:
        return self._routes[origin].size - parcel.at

    def _take(self, origin: int, check: int) -> Turns:
        parcels = self.parcels.get(origin)
        if parcels is None:
            raise Difference(f"shard {self.index}: it takes a slice of origin {origin}, which never pushes here")
        while not parcels:
            self.awaited = origin
            who = self._topology.name(self._topology.origin_rank(*divmod(origin, self._topology.partitions)))
            yield Wait(f"shard {self.index} waits for a push of {who}")
        self.awaited = None
        push = self.take(origin, check)
        if push is not None and push.steps > 0:
            self._made += 1
            self._compared.updates += 1
        self.taken += 1

    def _close(self, replica: int) -> None:
        for origin, parcels in self.parcels.items():
            if origin // self._topology.partitions == replica:
                parcels.clear()
        self.receiver.leave(replica)

    def _copies(self) -> Iterator[None]:
        """Copy what a checkpoint holds piece by piece, as `checkpoint.parts` does it."""
        registers, found = self.receiver.registers(), {}
        yield
        for name, register in registers.items():
            if not register.size:
                continue
            step, found[name] = max(1, CHUNK // register.itemsize), hashlib.sha256()
            for lo in range(0, register.size, step):
                found[name].update(register[lo : lo + step])
                yield
        self._copied = {
            "digests": {name: value.hexdigest() for name, value in found.items()}, "clock": self.receiver.clock.tolist()
        }  # fmt: skip
        yield


def held(receiver: Receiver) -> dict[str, Any]:
    """Return what is compared of what a shard holds now: SHA-256 of its registers, and its clock."""
    return {"digests": digests(receiver), "clock": receiver.clock.tolist()}


def compare(compared: Compared, shard: int, when: str, recorded: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise Difference where a shard holds something else than was recorded, and bits are compared."""
    if not compared.exact:
        return
    for name, digest in recorded["digests"].items():
        if found["digests"].get(name) != digest:
            raise Difference(f"{when}: '{name}' of shard {shard} is another")
    if recorded["clock"] != found["clock"]:
        raise Difference(f"{when}: the clock of shard {shard} is {found['clock']}, recorded was {recorded['clock']}")
