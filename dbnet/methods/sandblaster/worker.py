"""The replica's side of Sandblaster (algorithm 7.2): portions in, bundles of gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data.file import DataFile, Examples
from dbnet.data.portions import Blocks, Reader
from dbnet.data.subsets import Share
from dbnet.methods.sandblaster.tasks import LIMIT, POLL, Task, Tasks
from dbnet.methods.worker import Worker


def _kept(blocks: Blocks, config: Config) -> int:
    """Return the blocks that a replica keeps: twice its share, so that what moves between replicas does not push out what stays."""
    count = -(-blocks.examples // blocks.size)
    return max(2, 2 * -(-count // config.topology.replicas))


# --- the replica's side -------------------------------------------------------------------------------------------------------


class Bundle(NamedTuple):
    """Portions whose gradients were summed: the first task, how many, and what goes with the sum."""

    number: int = 0
    first: int = 0
    count: int = 0
    loss: float = 0.0
    right: int = 0


class SandblasterWorker(Worker):
    """Computes the portions that one replica is given.

    The gradient accrues in `store.g`; a second buffer holds the bundle that was offered until the verdict.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        store, orders = self.store, self.orders
        # However many replicas there are: only one that has nothing to do asks, and a pass waits for it.
        self.tasks = Tasks(orders.window, orders.replica, orders.clock, orders.link, min(orders.period, POLL))
        self._spare = np.zeros_like(store.g)
        self._batch = Range(0, 0)
        self._bundle, self._offered = Bundle(), Bundle()
        self._ends = False
        self.computed = self.dropped = 0

    @classmethod
    def intervals(cls, config: Config, examples: int) -> tuple[int, int]:
        method = config.method
        share = -(-examples // config.topology.replicas)
        return -(-share // method.minibatch), method.push_every * -(-method.portion // method.minibatch)

    @classmethod
    def examples(cls, data: DataFile, config: Config, shares: Sequence[Share], columns: list[Range] | None) -> Reader:
        blocks = Blocks(config.method.portion, data.sizes["train"])
        count = -(-blocks.examples // blocks.size)
        if count > LIMIT:
            raise UserError(f"method.portion = {blocks.size} makes {count} portions; {LIMIT} are the most.")

        def read(rows: Range) -> Examples:
            return data.read("train", np.arange(*rows), columns)

        batch = cls.batch(config, blocks.examples)
        return Reader(read, blocks, batch, data.scale, config.model.dtype, _kept(blocks, config))

    @classmethod
    def batch(cls, config: Config, examples: int) -> int:
        return max(1, min(config.method.minibatch, config.method.portion, examples))

    @classmethod
    def kept(cls, config: Config, examples: int, own: int) -> int:
        return min(examples, _kept(Blocks(config.method.portion, examples), config) * config.method.portion)

    @classmethod
    def copies(cls, config: Config) -> int:
        """Besides parameters and gradient: the bundle that was offered, and a minibatch that is not full."""
        return 4 + 2 * config.method.overlap

    def train(self) -> Turns:
        """Algorithm 7.2, the replica: fetch once per pass, accrue the gradients of portions, push every few portions."""
        while not self.orders.stop:
            self.tasks.look()
            if self.tasks.number != self._bundle.number:
                yield from self._begin()
            elif self._offered.count and self.tasks.verdict is not None:
                yield from self._settle()
            elif self._bundle.count and (self._ends or self.tasks.task() is None):
                yield from self._offer()
            elif (task := self.tasks.task()) is not None:
                yield from self._compute(task)
            else:
                yield self.idle
            yield from self.report()
        self.dropped += self._bundle.count + self._offered.count
        yield from self.report()

    def _begin(self) -> Turns:
        """A new pass: what was not pushed comes too late. Fetch its parameters."""
        self.dropped += self._bundle.count + self._offered.count
        self._bundle, self._offered = Bundle(self.tasks.number), Bundle()
        self._batch = self.tasks.span
        yield from self.store.fetch()
        yield from self.store.arrive()
        self.store.accrued(first=True)

    def _compute(self, task: Task) -> Turns:
        """Add the gradient of one portion to the bundle, unless a new pass begins meanwhile."""
        following, bundle = self.tasks.task(ahead=1), self._bundle
        train = self.replica.train
        train.open(train.blocks.portion(self._batch, task.portion), self.orders.beat)
        if following is not None:
            train.prefetch(train.blocks.portion(self._batch, following.portion).block)
        if not bundle.count:
            bundle = Bundle(task.number, task.index)
        loss, right, fresh = bundle.loss, bundle.right, not bundle.count
        while True:
            count, more, good = self.replica.accrue_share(self.store.w, self.store.g, fresh)
            if not count:
                break
            loss, right, fresh = loss + more, right + good, False
            yield None
            yield from self.report()
            self.tasks.look(now=False)
            if self.tasks.number != bundle.number:
                return
            if self._offered.count and self.tasks.verdict is not None:
                # Not after the portion: a pass may wait for this push alone.
                yield from self._settle()
        self.computed += 1
        self.tasks.finish()
        self._bundle, self._ends = Bundle(bundle.number, bundle.first, bundle.count + 1, loss, right), task.ends

    def _offer(self) -> Turns:
        """Offer the bundle when the one before has its verdict."""
        if self.tasks.verdict is None:
            yield self.idle
            return
        bundle = self._bundle
        self.tasks.offer(bundle.first, bundle.loss, bundle.right)
        self._offered, self._bundle, self._ends = bundle, Bundle(bundle.number), False
        self.store.g, self._spare = self._spare, self.store.g

    def _settle(self) -> Turns:
        """Push the bundle that was offered, if it was accepted."""
        if self.tasks.verdict:
            self.store.g, self._spare = self._spare, self.store.g
            yield from self.store.push(self._offered.count, self.replica.steps - 1)
            self.store.g, self._spare = self._spare, self.store.g
        else:
            self.dropped += self._offered.count
        self._offered = Bundle()

    def note(self) -> None:
        super().note()
        self.orders.note(computed=self.computed, dropped=self.dropped)

    def close(self) -> None:
        self.replica.train.close()
        super().close()
