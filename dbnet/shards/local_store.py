"""Fetch and push in the process of the shards: a push is applied where the shards' memory is, without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbnet.comm.turns import Turns, Wait
from dbnet.core.kernels.vector import coarse, copy
from dbnet.shards.push import Counts, Intake, Push, Receiver
from dbnet.shards.store import WindowStore


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
    narrow
        Whether all is rounded as where it travels as bfloat16.
    """

    def __init__(
        self, flat: np.ndarray, shards: Sequence[Receiver], replica: int, share: bool, finite: bool = True, narrow: bool = False
    ) -> None:
        self._flat, self._replica = flat, replica
        # A shard without parameters is pushed nothing, as over MPI.
        self._shards = [shard for shard in shards if shard.range.size]
        self.w, self._narrow = flat if share and not narrow else flat.copy(), narrow
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
            (coarse if self._narrow else copy)(self._flat, self.w)
            self.counts.bytes_fetched += self.w.nbytes >> self._narrow
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
        if self._narrow:
            coarse(self.g, self.g)
        for index, (shard, fetched) in enumerate(zip(self._shards, self._oldest, strict=True)):
            self.give(index, Push(self._replica, 0, self.number, fetched, steps, step), self.g[shard.range.slice])
        self.number += 1
        self.counts.pushes += 1
        return
        yield

    def give(self, index: int, push: Push, g: np.ndarray) -> None:
        """Let the part of a push that is this shard's in there."""
        self.intakes[index].take(push, g, [(0, 0, g.size)], True, True)

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
