"""What a method is: one function per role, each a generator that yields when other ranks may run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from dbnet.comm.channel import Channel
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns
from dbnet.comm.window import Field
from dbnet.coordinator.coordinator import Coordinator
from dbnet.coordinator.orders import Orders
from dbnet.core.config import Config
from dbnet.core.ranges import Range
from dbnet.core.registry import Member
from dbnet.data.batches import Batches
from dbnet.data.file import DataFile
from dbnet.data.portions import Reader
from dbnet.data.subsets import Share, Shares, order
from dbnet.network.parameters import FlatLayout
from dbnet.network.replica import Replica
from dbnet.shards.local_store import Store
from dbnet.shards.shard import Shard
from dbnet.shards.space import Registers
from dbnet.shards.store import Inbox


class Method(Member):
    """Base of all methods."""

    family: ClassVar[str] = "methods"

    def check(self, config: Config) -> None:
        """Raise UserError where the run file asks for what the method cannot do."""

    def decay(self, config: Config) -> float:
        """Return the decay that the replicas add to their gradients."""
        return config.model.decay

    def vectors(self, config: Config) -> int:
        """Return how many registers a shard holds beside the parameters."""
        return len(self.rule_state(config))

    def copies(self, config: Config) -> int:
        """Return how many vectors of its parameters a partition holds, without the one that it evaluates."""
        method = config.method
        return 2 + 2 * method.overlap + (method.n_push > 1 and method.n_fetch > 1)

    def batch(self, config: Config, examples: int) -> int:
        """Return the columns of a replica's minibatch, with `examples` to train on in all."""
        return max(1, min(config.method.minibatch, -(-examples // config.topology.replicas)))

    def kept(self, config: Config, examples: int, own: int) -> int:
        """Return how many examples of `examples` a replica holds in memory whose share is `own`."""
        return own

    def rule_state(self, config: Config) -> tuple[str, ...]:
        """Return the registers of the update rule that a checkpoint must hold."""
        return config.members()[2].state

    def intervals(self, config: Config, examples: int) -> tuple[int, int]:
        """Return the steps of a replica from fetch to fetch and from push to push, with `examples` to train on."""
        return config.method.n_fetch, config.method.n_push

    def fields(self, topology: Topology) -> list[Field]:
        """Return more window fields of the coordinator."""
        return []

    def examples(self, data: DataFile, config: Config, shares: Sequence[Share], columns: list[Range] | None) -> Shares | Reader:
        """Return what a replica trains on, of each example the units `columns`; here: its shares, in memory."""
        seed, parts = config.run.seed, config.topology.replicas
        batch = self.batch(config, data.sizes["train"])

        def load(share: Share) -> Batches:
            rows, part = data.subset(share.subset, parts, seed), Range(share.lo, share.hi)
            examples = data.read("train", rows[part.slice], columns)
            return Batches(examples, batch, data.scale, config.model.dtype, order(seed, share.subset, len(rows), part))

        return Shares(load, batch, shares)

    def receiver(
        self, shard: Shard, layout: FlatLayout, config: Config, origins: Sequence[tuple[int, int]], saved: Callable[[], Registers]
    ) -> Any:
        """Return what takes the pushes at a shard; here: the shard.

        Parameters
        ----------
        origins
            The (replica, partition) pairs that push to it.
        saved
            Reads the registers that a checkpoint holds beside the shard's own.
        """
        return shard

    def work(self, replica: Replica, store: Store, orders: Orders, config: Config) -> Turns:
        """Run one partition of one replica."""
        raise NotImplementedError

    def serve(self, shard: Shard, inbox: Inbox | None, channel: Channel, clock: Callable[[], float]) -> Turns:
        """Run one shard; `inbox` is None where pushes are applied directly."""
        raise NotImplementedError

    def coordinate(self, pace: Coordinator) -> Turns:
        """Run the coordinator."""
        raise NotImplementedError
