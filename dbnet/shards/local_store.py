"""Fetch and push in the process of the shards: a push is applied where the shards' memory is, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbnet.comm.turns import Turns, Wait
from dbnet.shards.push import Intake, Push, Receiver
from dbnet.shards.store import Counts, WindowStore


class LocalStore:
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
    finite
        Whether pushes with NaN or Inf are refused.
    """

    def __init__(self, flat: np.ndarray, shards: Sequence[Receiver], replica: int, share: bool, finite: bool = True) -> None:
        self._flat, self._replica = flat, replica
        # A shard without parameters is pushed nothing, as over MPI.
        self._shards = [shard for shard in shards if shard.range.size]
        self.w = flat if share else flat.copy()
        self.g = np.zeros_like(flat)
        self.counts, self.number = Counts(), 0
        self.fetched = self.overlaps = self.landing = False
        self._clocks = [0] * len(self._shards)
        self._oldest = self._clocks
        self.intakes = [Intake(shard, finite) for shard in self._shards]

    def resume(self, number: int) -> None:
        """Go on counting pushes from `number`."""
        self.number = number

    def fetch(self) -> Turns:
        self._clocks = [int(shard.clock[0]) for shard in self._shards]
        if self.w is not self._flat:
            self.w[:] = self._flat
            self.counts.bytes_fetched += self.w.nbytes
        self.counts.fetches += 1
        self.fetched = True
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

    def push(self, steps: int, step: int) -> Turns:
        for shard, intake, fetched in zip(self._shards, self.intakes, self._oldest, strict=True):
            push = Push(self._replica, 0, self.number, fetched, steps, step)
            intake.take(push, self.g[shard.range.slice], [(0, 0, shard.range.size)], True, True)
        self.number += 1
        self.counts.pushes += 1
        return
        yield

    def settle(self) -> Turns:
        return
        yield

    confirm = settle

    def await_clock(self) -> Turns:
        for index, (shard, fetched) in enumerate(zip(self._shards, self._clocks, strict=True)):
            while int(shard.clock[0]) <= fetched:
                yield Wait(f"a replica waits at shard {index} for the others' gradients")

    def close(self) -> None:
        """Nothing is under way here."""


Store = WindowStore | LocalStore
