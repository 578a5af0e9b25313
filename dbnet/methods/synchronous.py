"""Synchronous SGD: every step takes the gradients of all replicas, as one update with their mean.

Each shard sums what the replicas push in a step and applies the rule once, when everybody's gradient has come; a replica ends its
step when the clocks of the shards have passed those of its fetch. So R replicas with minibatches of b make the steps of one replica
with minibatches of R b, and nothing is ever stale. A replica that has made its part leaves with a push of nought gradients, and the
others' steps wait for it no more; one that is lost leaves, too; one that pushes again takes part again.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.jit import fence
from dbnet.core.kernels.vector import axpy, fill, scale
from dbnet.methods.downpour import Stochastic
from dbnet.methods.sgd import SingleWorker
from dbnet.methods.worker import Worker
from dbnet.shards.push import Push, Receiver, Receiving, Refusal
from dbnet.shards.rules.base import Arrival
from dbnet.shards.shard import Front, Shard


class SynchronousWorker(SingleWorker):
    """The replica's side: the steps of a single one, each over when the others' gradients have been applied, too."""

    def train(self) -> Turns:
        yield from super().train()
        self.store.g.fill(0)
        self.store.accrued(first=True)
        yield from self.store.push(0, self.replica.steps - 1)

    def applied(self) -> Turns:
        yield from self.store.await_clock()


class Collect(Front):
    """The shard's side: sums a step's gradients and applies their mean when all have come, for each partition index by itself."""

    def __init__(self, shard: Shard, receiving: Receiving) -> None:
        super().__init__(shard, receiving)
        self._sum = np.zeros_like(shard.params)
        replicas = receiving.config.topology.replicas
        self._taking = {p: {r for r, q in receiving.origins if q == p and r < replicas} for _, p in receiving.origins}
        self._came: dict[int, dict[int, bool]] = {partition: {} for partition in self._taking}
        self._pieces: dict[int, set[tuple[int, int]]] = {partition: set() for partition in self._taking}

    @classmethod
    def vectors(cls, config: Config) -> int:
        """The rule's, and the sum of a step's gradients."""
        return Shard.vectors(config) + 1

    def begin(self, partition: int, fetched: int = 0) -> int:
        return partition

    def apply(self, lo: int, g: np.ndarray, t: int, arrival: Arrival | None = None) -> None:
        axpy(1.0, g, self._sum[lo : lo + g.size])
        self._pieces[t].add((lo, g.size))

    def finish(self, push: Push) -> None:
        if push.steps:
            self.shard.record(push, int(self.clock[push.partition]))
            self._taking[push.partition].add(push.replica)
            self._came[push.partition][push.replica] = True
        else:
            self._taking[push.partition].discard(push.replica)
        self._step(push.partition)

    def refuse(self, refusal: Refusal) -> None:
        """The others must not wait for a gradient that was refused; its slices before the bad one stay in the sum."""
        super().refuse(refusal)
        self._came[refusal.push.partition][refusal.push.replica] = False
        self._step(refusal.push.partition)

    def leave(self, replica: int) -> None:
        for partition, taking in self._taking.items():
            taking.discard(replica)
            self._step(partition)

    def _step(self, partition: int) -> None:
        """Update if nobody is missing."""
        came = self._came[partition]
        if not came or self._taking[partition] - set(came):
            return
        whole = sum(came.values())
        for lo, n in self._pieces[partition]:
            here = slice(lo, lo + n)
            if whole:
                scale(self._sum[here], 1 / whole)
                self.shard.apply(lo, self._sum[here], int(self.clock[partition]) + 1, Arrival(0, -1, whole))
            fill(self._sum[here], 0.0)
        came.clear()
        # Who sees the clock sees the parameters.
        fence()
        self.clock[partition] += 1


class Synchronous(Stochastic):
    """Synchronous stochastic gradient descent over all replicas."""

    kind: ClassVar[str] = "synchronous"
    worker: ClassVar[type[Worker]] = SynchronousWorker
    receiver: ClassVar[type[Receiver]] = Collect

    def check(self, config: Config) -> None:
        super().check(config)
        if config.warmstart.steps or config.warmstart.accuracy is not None:
            given = [f"warmstart.{name}=" for name, value in config.warmstart if value]
            raise UserError(
                "Synchronous steps wait for all replicas, so none begins alone: leave the warmstart out "
                f"({' '.join(given)} on the command line), or use method.kind = 'downpour'."
            )
