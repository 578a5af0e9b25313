"""What a method is: one function per role, each a generator that yields when other ranks may run."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from dbnet.channel import Channel
from dbnet.config import Config
from dbnet.direct import Store
from dbnet.orders import Orders
from dbnet.pace import Pace
from dbnet.registry import Member
from dbnet.replica import Replica
from dbnet.shard import Shard
from dbnet.store import Inbox
from dbnet.waiting import Turns


class Method(Member):
    """Base of all methods."""

    family: ClassVar[str] = "methods"

    def check(self, config: Config) -> None:
        """Raise UserError where the run file asks for what the method cannot do."""

    def work(self, replica: Replica, store: Store, orders: Orders, config: Config) -> Turns:
        """Run one partition of one replica."""
        raise NotImplementedError

    def serve(self, shard: Shard, inbox: Inbox | None, channel: Channel, clock: Callable[[], float]) -> Turns:
        """Run one shard; `inbox` is None where pushes are applied directly."""
        raise NotImplementedError

    def coordinate(self, pace: Pace) -> Turns:
        """Run the coordinator."""
        raise NotImplementedError
