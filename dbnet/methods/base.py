"""What a method is: three role classes and its options."""

from __future__ import annotations

from typing import ClassVar

from dbnet.coordinator.coordinator import Coordinator
from dbnet.core.config import Config
from dbnet.core.registry import Member
from dbnet.methods.worker import Worker
from dbnet.shards.push import Receiver
from dbnet.shards.shard import Shard


class Method(Member):
    """How a network is trained: base of all methods.

    Attributes
    ----------
    worker
        What a replica does.
    receiver
        What a shard does with a push: here the rule, on arrival.
    coordinator
        Who is asked for what, and when it ends.
    """

    family: ClassVar[str] = "methods"
    worker: ClassVar[type[Worker]]
    receiver: ClassVar[type[Receiver]] = Shard
    coordinator: ClassVar[type[Coordinator]]

    def check(self, config: Config) -> None:
        """Raise UserError where the run file asks for what the method cannot do."""
