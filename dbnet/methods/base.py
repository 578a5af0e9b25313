"""What a method is: its options, and three role classes: a worker, a receiver at the shards, a coordinator."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dbnet.coordinator.coordinator import Coordinator
from dbnet.core.config import COUNT, Config
from dbnet.core.registry import Member
from dbnet.methods.worker import Worker
from dbnet.network.replica import Clipping
from dbnet.shards.push import Receiver
from dbnet.shards.shard import Shard

# Bytes of a slice and slices of a ring: where there is room, and the least.
ROOMY, NARROW = (1 << 20, 8), (1 << 14, 4)


class Method(Member):
    """How a network is trained: base of all methods; a member's fields are the options of [method].

    Attributes
    ----------
    worker
        What a replica does.
    receiver
        What a shard does with a push: here the rule, on arrival.
    coordinator
        Who is asked for what, and when it ends.
    recorder
        Of a batch method: its coordinator where the schedule is recorded. Of others, None, all that decides is in orders, fetches
        and pushes.
    clipping
        Bounds of a minibatch's gradient: here none.
    narrow
        Whether pushes and fetches travel as bfloat16: here never.
    """

    family: ClassVar[str] = "methods"
    worker: ClassVar[type[Worker]]
    receiver: ClassVar[type[Receiver]] = Shard
    coordinator: ClassVar[type[Coordinator]]
    recorder: ClassVar[type[Coordinator] | None] = None
    clipping: ClassVar[Clipping] = Clipping()
    narrow: ClassVar[bool] = False
    minibatch: int = Field(default=32, gt=0, le=COUNT, description="examples per step")
    overlap: bool = Field(
        default=False, description="fetch and push on a thread of their own while the next gradient is computed (large networks)"
    )
    slot: int | None = Field(
        default=None, ge=64, le=1 << 30, description="bytes of a slice of a push; default: 1 MiB, less where method.rings wants it"
    )
    slots: int | None = Field(
        default=None, ge=2, le=1 << 16, description="slices in each ring, a full one makes the replica wait; default: 8, or then 4"
    )
    rings: int = Field(
        default=1 << 28, gt=0, le=COUNT, description="bytes that all rings of a shard may take together, if slices can be so small"
    )

    def ring(self, users: int, longest: int) -> tuple[int, int]:
        """Return the bytes of a slice and the slices of a ring, at a shard that `users` push to, `longest` bytes at most."""
        roomy = users * ROOMY[1] * min(ROOMY[0], longest) <= self.rings
        slots = self.slots or (ROOMY[1] if roomy else NARROW[1])
        # The largest power of two that fits.
        fitting = 1 << (self.rings // max(1, users * slots)).bit_length() >> 1
        slot = self.slot or (ROOMY[0] if roomy else max(NARROW[0], min(ROOMY[0], fitting)))
        return min(slot, longest), slots

    def check(self, config: Config) -> None:
        """Raise UserError where the configuration asks for what the method cannot do."""

    def updates(self, config: Config) -> float:
        """Return how many updates each shard makes while every replica makes one step."""
        return 1.0

    def doubts(self, config: Config, examples: int) -> list[str]:
        """Return what is allowed but seldom meant with so many training examples, in sentences."""
        subset = -(-examples // config.topology.replicas)
        if config.topology.replicas > examples or self.minibatch <= subset:
            return []
        return [
            f"method.minibatch = {self.minibatch} is more than the {subset} examples that a replica trains on: each step takes "
            f"these, as with method.minibatch = {subset}."
        ]

    def remedy(self, config: Config) -> str:
        """Return what helps where the parameters grow beyond all learning."""
        return f"lower rule.rate ({config.rule.rate:g})"
