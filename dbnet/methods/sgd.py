"""Stochastic gradient descent with one replica: the baseline that Downpour is compared with (Dean et al. 2012, figure 4).

Every step fetches, computes one gradient, pushes it, and waits until the shards have applied it; nothing is ever stale, and the
result equals a textbook loop to the bit for any number of shards.
"""

from __future__ import annotations

from typing import ClassVar

from dbnet.comm.turns import Turns
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.methods.downpour import Stochastic
from dbnet.methods.worker import Worker


class SingleWorker(Worker):
    """The one replica."""

    @classmethod
    def accrues(cls, config: Config) -> bool:
        return False

    def train(self) -> Turns:
        replica, store = self.replica, self.store
        while not self.orders.stop and not self.finished:
            yield from store.fetch()
            yield from store.arrive()
            store.accrued(first=True)
            replica.accrue(store.w, store.g, 0, 0.0)
            yield from store.push(1, replica.steps - 1)
            yield from self.applied()
            # All of a cut replica's pushes must be applied before any partition fetches again.
            self.orders.meet()
            yield from self.report()
            yield None

    def applied(self) -> Turns:
        """Wait until what was pushed has changed the parameters."""
        yield from self.store.confirm()


class Single(Stochastic):
    """Synchronous steps of a single replica."""

    kind: ClassVar[str] = "sgd"
    worker: ClassVar[type[Worker]] = SingleWorker

    def check(self, config: Config) -> None:
        super().check(config)
        if config.topology.replicas != 1:
            raise UserError("method.kind = 'sgd' trains one replica; set topology.replicas = 1, or method.kind = 'downpour'.")
