"""The window in simulated time: what is put changes its target's memory when it arrives, what is got is read there at that moment.

Transfers of one origin to one target between two flushes travel together: a request with what is put, an answer with what is got.
They leave at the first flush, to all targets at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dbnet.comm.simulated.clock import Player
from dbnet.comm.simulated.interconnect import Interconnect
from dbnet.comm.window import WindowLayout

_REQUEST = 32  # bytes that say what is wanted
# What has no contents where nothing is computed: bytes go over the wire all the same.
_CONTENTS = frozenset({"params", "ring"})


class SparseRing:
    """A shard's rings, [rows, slots, elements], of which a slice is held from its arrival until it is read.

    Parameters
    ----------
    shape, dtype
        Of the whole.
    hollow
        Whether slices have no contents.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, hollow: bool) -> None:
        self.shape, self._hollow = shape, hollow
        self._held: dict[tuple[int, int], np.ndarray] = {}
        self._nothing = np.broadcast_to(np.zeros((), dtype), shape[2:])

    def put(self, start: int, data: np.ndarray) -> None:
        """Take the slice whose first element is number `start` of the whole."""
        if not self._hollow:
            self._held[divmod(start // self.shape[2], self.shape[1])] = data.copy()

    def __getitem__(self, key: tuple[int, int, slice]) -> np.ndarray:
        """Return what lies in (row, slot), once; the key's third part says of how many elements."""
        return self._nothing[key[2]] if self._hollow else self._held.pop(key[:2])[key[2]]


class SimulatedMemory:
    """All ranks' window memory.

    Parameters
    ----------
    layouts
        Of every rank.
    hollow
        Whether parameters and gradients have no contents.
    """

    def __init__(self, layouts: Sequence[WindowLayout], hollow: bool = False) -> None:
        self.local: list[dict[str, np.ndarray | SparseRing]] = []
        self.hollow = _CONTENTS if hollow else frozenset()
        for layout in layouts:
            ring = layout.fields.get("ring")
            bare = WindowLayout([field for name, field in layout.fields.items() if name != "ring"])
            fields: dict[str, np.ndarray | SparseRing] = dict(bare.views(np.zeros(bare.nbytes, np.uint8)))
            if ring is not None:
                fields["ring"] = SparseRing(ring.shape, ring.dtype, hollow)
            self.local.append(fields)
        self.flat = [{n: x if isinstance(x, SparseRing) else x.reshape(-1) for n, x in fields.items()} for fields in self.local]


class _Operation(NamedTuple):
    puts: bool
    field: str
    array: np.ndarray
    start: int


class SimulatedWindow:
    """One rank's end of the window."""

    def __init__(self, memory: SimulatedMemory, wire: Interconnect, rank: int) -> None:
        self._memory, self._wire, self._rank = memory, wire, rank
        self.local = memory.local[rank]
        self._started: dict[int, list[_Operation]] = {}
        self._under_way: dict[int, _Transfer] = {}

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        self._started.setdefault(rank, []).append(_Operation(False, field, out, start))

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._started.setdefault(rank, []).append(_Operation(True, field, data, start))

    def flush(self, rank: int) -> None:
        wire = self._wire
        if self._started:
            later, started, self._started = 0.0, self._started, {}
            overhead = wire.overhead
            if self._rank in wire.time.cores:
                sizes = [(target, sum(one.array.nbytes for one in operations)) for target, operations in started.items()]
                wire.copy(self._rank, sizes, sum(map(len, started.values())))
                overhead = 0.0
            for target, operations in started.items():
                wire.operations += len(operations)
                later += overhead * len(operations)
                self._under_way[target] = transfer = _Transfer(self._memory, wire, self._rank, target, operations)
                wire.send(self._rank, target, transfer.there, transfer.arrive, later)
        transfer = self._under_way.pop(rank, None)
        if transfer is not None and not transfer.done:
            transfer.waiting = wire.time.player
            wire.time.switch()

    def sync(self) -> None:
        """There is one memory, and everything has its moment."""

    def blocked(self) -> None:
        """No call ever waits for a real rank."""

    def free(self) -> None:
        self.local = {}


class _Transfer:
    """What an origin has started towards one target."""

    def __init__(self, memory: SimulatedMemory, wire: Interconnect, origin: int, target: int, operations: list[_Operation]) -> None:
        self._memory, self._wire, self._origin, self._target, self._operations = memory, wire, origin, target, operations
        self.done, self.waiting = False, None
        self.there = self._back = _REQUEST
        for operation in operations:
            if operation.puts:
                self.there += operation.array.nbytes
            else:
                self._back += operation.array.nbytes

    waiting: Player | None

    def arrive(self) -> None:
        """At the target: what is put is there, what is got is read."""
        fields, hollow, changed = self._memory.flat[self._target], self._memory.hollow, False
        for puts, field, array, start in self._operations:
            changed = changed or puts
            if field in hollow:
                continue
            place = fields[field]
            if not puts:
                array.reshape(-1)[:] = place[start : start + array.size]
            elif isinstance(place, SparseRing):
                place.put(start, array)
            else:
                place[start : start + array.size] = array.reshape(-1)
        if changed:
            self._wire.time.notify(self._target)
        self._wire.send(self._target, self._origin, self._back, self._end)

    def _end(self) -> None:
        """At the origin again."""
        self.done = True
        if self.waiting is not None:
            self.waiting.go()
