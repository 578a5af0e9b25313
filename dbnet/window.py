"""The only MPI window: named fields in the memory of targets, read and written by origins.

Every rank gives memory for the fields of its own layout (replicas give none); all ranks know all layouts, so an address is
(rank, field, first element). One `Win.Allocate`, one `Lock_all(NOCHECK)` for the window's life, `Flush` to complete: Lock/Unlock
per operation would wait for the target to enter MPI. `Memory` is the same interface within one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from operator import itemgetter
from threading import get_ident
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np


class Field(NamedTuple):
    """One array in a rank's window memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


_ALIGN = 64


class Layout:
    """Where each field of one rank lies, in bytes from the start of its window memory."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = {f.name: f for f in fields}
        self.offsets: dict[str, int] = {}
        self.nbytes = 0
        for field in fields:
            self.offsets[field.name] = self.nbytes
            self.nbytes += -(-field.nbytes // _ALIGN) * _ALIGN

    def views(self, memory: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields as arrays over the bytes of `memory`."""
        return {
            name: memory[self.offsets[name] : self.offsets[name] + f.nbytes].view(f.dtype).reshape(f.shape)
            for name, f in self.fields.items()
        }


class Window(Protocol):
    """One-sided access; `get` and `put` start a transfer that `flush` completes. Arrays must be contiguous."""

    local: dict[str, np.ndarray]

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None: ...
    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None: ...
    def flush(self, rank: int) -> None: ...
    def sync(self) -> None: ...
    def blocked(self) -> tuple[int, float] | None: ...
    def free(self) -> None: ...


class Memory:
    """All ranks' window memory within one process; every rank has its own end of it."""

    def __init__(self, layouts: Sequence[Layout], rank: int = 0, shared: list[dict[str, np.ndarray]] | None = None) -> None:
        self._all = shared if shared is not None else [layout.views(np.zeros(layout.nbytes, np.uint8)) for layout in layouts]
        self.local = self._all[rank]

    def at(self, rank: int) -> Memory:
        """Return the end that belongs to `rank`."""
        return Memory((), rank, self._all)

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        out.reshape(-1)[:] = self._all[rank][field].reshape(-1)[start : start + out.size]

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._all[rank][field].reshape(-1)[start : start + data.size] = data.reshape(-1)

    def flush(self, rank: int) -> None:
        """Nothing is ever under way here."""

    def sync(self) -> None:
        """There is one memory."""

    def blocked(self) -> None:
        """No call ever waits here."""

    def free(self) -> None:
        self._all.clear()
        self.local = {}


class MpiWindow:
    """The window over MPI; making and freeing it are collective over `comm`."""

    def __init__(self, comm: Any, layouts: Sequence[Layout]) -> None:
        from mpi4py import MPI

        self._byte = MPI.BYTE
        self._layouts = layouts
        # For each thread with a transfer under way: to whom, and since when.
        self._under_way: dict[int, tuple[int, float]] = {}
        mine = layouts[comm.rank]
        self._win = MPI.Win.Allocate(mine.nbytes, 1, comm=comm)
        memory = np.frombuffer(self._win.tomemory(), np.uint8) if mine.nbytes else np.zeros(0, np.uint8)
        memory[:] = 0
        self.local = mine.views(memory)
        comm.Barrier()
        self._win.Lock_all(MPI.MODE_NOCHECK)

    def _target(self, rank: int, field: str, data: np.ndarray, start: int) -> tuple[int, int, Any]:
        return (self._layouts[rank].offsets[field] + start * data.itemsize, data.nbytes, self._byte)

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        self._begin(rank)
        self._win.Get((out, out.nbytes, self._byte), rank, self._target(rank, field, out, start))

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._begin(rank)
        self._win.Put((data, data.nbytes, self._byte), rank, self._target(rank, field, data, start))

    def flush(self, rank: int) -> None:
        self._begin(rank)
        self._win.Flush(rank)
        self._under_way.pop(get_ident(), None)

    def _begin(self, rank: int) -> None:
        self._under_way[get_ident()] = (rank, perf_counter())

    def blocked(self) -> tuple[int, float] | None:
        """Return for which rank a transfer has been waiting longest, and since when."""
        return min(self._under_way.copy().values(), key=itemgetter(1), default=None)

    def sync(self) -> None:
        """Let this rank see what others wrote here, and let MPI progress."""
        self._win.Sync()

    def free(self) -> None:
        self.local = {}
        self._win.Unlock_all()
        self._win.Free()
