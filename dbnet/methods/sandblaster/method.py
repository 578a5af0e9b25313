"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from dbnet.comm.channel import Channel, Message
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns
from dbnet.comm.window import Field
from dbnet.coordinator.coordinator import Coordinator, finish
from dbnet.coordinator.orders import END, GO, Orders
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data.file import DataFile, Examples
from dbnet.data.portions import Blocks, Reader
from dbnet.data.subsets import Share
from dbnet.methods.descent.base import minimize
from dbnet.methods.downpour import Downpour
from dbnet.methods.sandblaster.coordinator import Driver
from dbnet.methods.sandblaster.work_queue import LIMIT, task_fields
from dbnet.methods.sandblaster.worker import Worker, _kept
from dbnet.methods.worker import attend, report
from dbnet.network.parameters import FlatLayout
from dbnet.network.replica import Replica
from dbnet.shards.accrual import Accrual
from dbnet.shards.local_store import Store
from dbnet.shards.shard import Shard
from dbnet.shards.space import Registers


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

        def read(rows: Range) -> Examples:
            return data.read("train", np.arange(*rows), columns)

        return Reader(read, blocks, minibatch, data.scale, config.model.dtype, keep)

    def receiver(
        self, shard: Shard, layout: FlatLayout, config: Config, origins: Sequence[tuple[int, int]], saved: Callable[[], Registers]
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

    def coordinate(self, pace: Coordinator) -> Turns:
        driver = Driver(pace)
        pace.desk.go(pace.roll.active)
        yield from driver.evaluation()
        run = minimize(driver.space, driver.options, driver.state)
        yield from driver.drive(run)
        yield from driver.dismiss()
        yield from finish(pace)
