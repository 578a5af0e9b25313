"""Sandblaster: batch optimisation on the shards (Dean et al. 2012, section 4.2 and algorithm 7.2).

The coordinator runs a batch method, by default L-BFGS, without access to a vector: parameters, gradient and history are registers
on the shards. For each loss and gradient it hands out portions of the batch until all have a result (`tasks`); replicas fetch the
parameters once per pass, sum the gradients of a few portions and push the sums; shards add them up (`accrual`).

Where the paper is silent: a bundle of portions is pushed when the coordinator has accepted it, so a portion counts once whatever
backups, silence and return do. The loss is the mean over the batch, plus model.decay / 2 |w|^2 over the weights (not the biases),
which the shards add. The history's state is that of a pass under way, so a checkpoint is taken while one is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dbnet.accrual import Accrual
from dbnet.channel import Channel, Message
from dbnet.config import Config
from dbnet.data.base import DataFile, Part
from dbnet.descent.base import minimize
from dbnet.direct import Store
from dbnet.driver import Driver
from dbnet.errors import UserError
from dbnet.methods.downpour import Downpour, attend, finish, report
from dbnet.orders import END, GO, Orders
from dbnet.pace import Pace
from dbnet.parameters import Layout
from dbnet.portions import Blocks, Portion, Reader
from dbnet.ranges import Range
from dbnet.replica import Replica
from dbnet.shard import Shard
from dbnet.shares import Share
from dbnet.space import Registers
from dbnet.tasks import LIMIT, Task, Tasks, task_fields
from dbnet.topology import Topology
from dbnet.waiting import IDLE, Turns
from dbnet.window import Field


class Sandblaster(Downpour):
    """Batch methods with portions handed out by a coordinator that owns no vector."""

    kind: ClassVar[str] = "sandblaster"

    # --- what the run is built from -------------------------------------------------------------------------------------------

    def check(self, config: Config) -> None:
        if config.stop.steps is not None:
            raise UserError("stop.steps counts minibatches; with method.kind = 'sandblaster' give stop.iterations.")
        if config.warmstart.steps or config.warmstart.accuracy is not None:
            raise UserError("Sandblaster has no warmstart of its own; set run.start to a checkpoint of a Downpour run.")
        for i, layer in enumerate(config.members()[0]):
            if layer.random:
                raise UserError(
                    f"model.layers.{i} ({layer.kind}) draws random numbers at every step, but a batch method needs a loss that "
                    "stays the same; set its rate to 0, or train with method.kind = 'downpour'."
                )
        mask = config.descent.get("mask", "")
        if mask not in ("", "weights"):
            raise UserError(f"descent.mask = {mask!r} is no register; 'weights' is 1 on all weights and 0 on biases.")

    def vectors(self, config: Config) -> int:
        return 1 + len(config.batch_method().registers()) + bool(config.model.decay or config.descent.get("mask"))

    def copies(self, config: Config) -> int:
        """Besides parameters and gradient: the bundle that was offered, and a minibatch that is not full."""
        return 4 + 2 * config.method.overlap

    def batch(self, config: Config, examples: int) -> int:
        return max(1, min(config.method.minibatch, config.sandblaster.portion, examples))

    def kept(self, config: Config, examples: int, own: int) -> int:
        return min(examples, _kept(Blocks(config.sandblaster.portion, examples), config) * config.sandblaster.portion)

    def rule_state(self, config: Config) -> tuple[str, ...]:
        return ()

    def intervals(self, config: Config, examples: int) -> tuple[int, int]:
        table, minibatch = config.sandblaster, config.method.minibatch
        share = -(-examples // config.topology.replicas)
        return -(-share // minibatch), table.push_every * -(-table.portion // minibatch)

    def fields(self, topology: Topology) -> list[Field]:
        return task_fields(topology.copies)

    def decay(self, config: Config) -> float:
        """The shards add it: once per pass, whatever the portions are."""
        return 0.0

    def examples(self, data: DataFile, config: Config, shares: Sequence[Share], columns: list[Range] | None) -> Reader:
        blocks = Blocks(config.sandblaster.portion, data.sizes["train"])
        count = -(-blocks.examples // blocks.size)
        if count > LIMIT:
            raise UserError(f"sandblaster.portion = {blocks.size} makes {count} portions; {LIMIT} are the most.")
        minibatch = self.batch(config, blocks.examples)
        keep = _kept(blocks, config)

        def read(rows: Range) -> Part:
            return data.read("train", np.arange(*rows), columns)

        return Reader(read, blocks, minibatch, data.scale, config.model.dtype, keep)

    def receiver(
        self, shard: Shard, layout: Layout, config: Config, origins: Sequence[tuple[int, int]], saved: Callable[[], Registers]
    ) -> Accrual:
        shard.state.clear()
        masked = config.model.decay or config.descent.get("mask")
        constant = {"weights": layout.weights(shard.range, shard.params.dtype)} if masked else {}
        return Accrual(shard, origins, saved(), constant)

    # --- the replica ----------------------------------------------------------------------------------------------------------

    def work(self, replica: Replica, store: Store, orders: Orders, config: Config) -> Turns:
        yield from attend(replica, store, orders, GO)
        yield from Worker(replica, store, orders).work()
        yield from store.settle()
        orders.meet()
        orders.note(done=1)
        yield from report(replica, store, orders, now=True)
        yield from attend(replica, store, orders, END)
        replica.train.close()
        store.close()

    # --- the shard ------------------------------------------------------------------------------------------------------------

    def answer(self, shard: Any, message: Message | None, channel: Channel) -> bool:
        if message is not None and message.kind == "ask":
            shard.heed(message.content)
        return shard.advance(channel)

    # --- the coordinator ------------------------------------------------------------------------------------------------------

    def coordinate(self, pace: Pace) -> Turns:
        driver = Driver(pace)
        pace.desk.go(pace.roll.active)
        yield from driver.evaluation()
        run = minimize(driver.space, driver.options, driver.state)
        yield from driver.drive(run)
        yield from driver.dismiss()
        yield from finish(pace)


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


class Worker:
    """Computes the portions that one replica is given.

    The gradient accrues in `store.g`; a second buffer holds the bundle that was offered until the verdict.
    """

    def __init__(self, replica: Replica, store: Store, orders: Orders) -> None:
        self.replica, self.store, self.orders = replica, store, orders
        self.tasks = Tasks(orders.window, orders.replica, orders.clock, orders.link, orders.period)
        self._spare = np.zeros_like(store.g)
        self._batch: list[Portion] = []
        self._bundle, self._offered = Bundle(), Bundle()
        self._ends = False
        self.computed = self.dropped = 0

    def work(self) -> Turns:
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
                yield IDLE
            yield from self._report()
        self.dropped += self._bundle.count + self._offered.count
        yield from self._report()

    def _begin(self) -> Turns:
        """A new pass: what was not pushed comes too late. Fetch its parameters."""
        self.dropped += self._bundle.count + self._offered.count
        self._bundle, self._offered = Bundle(self.tasks.number), Bundle()
        self._batch = self.replica.train.blocks.portions(self.tasks.span)
        yield from self.store.fetch()
        yield from self.store.arrive()
        self.store.accrued(first=True)

    def _compute(self, task: Task) -> Turns:
        """Add the gradient of one portion to the bundle, unless a new pass begins meanwhile."""
        following, bundle = self.tasks.task(ahead=1), self._bundle
        self.replica.train.open(self._batch[task.portion], self.orders.beat)
        if following is not None:
            self.replica.train.prefetch(self._batch[following.portion].block)
        if not bundle.count:
            bundle = Bundle(task.number, task.index)
        loss, right, fresh = bundle.loss, bundle.right, not bundle.count
        while True:
            count, more, good = self.replica.accrue_share(self.store.w, self.store.g, fresh)
            if not count:
                break
            loss, right, fresh = loss + more, right + good, False
            yield None
            yield from self._report()
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
            yield IDLE
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

    def _report(self) -> Turns:
        self.orders.note(computed=self.computed, dropped=self.dropped)
        yield from report(self.replica, self.store, self.orders)
