"""A replica that obeys orders: it trains when it may, reports, evaluates when it is asked, takes more to train on, and leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dbnet.comm.turns import Turns, Wait
from dbnet.coordinator.orders import END, GO, POLL, Orders
from dbnet.core.config import Config
from dbnet.core.ranges import Range
from dbnet.data.batches import Batches
from dbnet.data.file import DataFile
from dbnet.data.portions import Reader
from dbnet.data.subsets import Share, Shares, order
from dbnet.network.replica import Replica
from dbnet.shards.local_store import Store


class Worker:
    """One partition of one replica; a subclass trains.

    Parameters
    ----------
    replica
        Gradients and evaluations.
    store
        Fetch and push.
    orders
        What the coordinator says, and what it is told.
    config
        The run.
    factor
        What the rate is multiplied with at an update of the shards, by its number.

    Attributes
    ----------
    place
        Whose share it was given first, when the run began or as a spare one: the replica in whose place it trains.
    """

    def __init__(
        self, replica: Replica, store: Store, orders: Orders, config: Config, factor: Callable[[float], float] = lambda t: 1.0
    ) -> None:
        self.replica, self.store, self.orders, self.config, self.factor = replica, store, orders, config, factor
        self.place: int | None = orders.replica if orders.replica < config.topology.replicas else None

    @classmethod
    def examples(cls, data: DataFile, config: Config, shares: Sequence[Share], columns: list[Range] | None) -> Shares | Reader:
        """Return what a replica trains on, of each example the units `columns`; here: its shares, in memory."""
        seed, parts = config.run.seed, config.topology.replicas
        batch = cls.batch(config, data.sizes["train"])

        def load(share: Share) -> Batches:
            rows, part = data.subset(share.subset, parts, seed), Range(share.lo, share.hi)
            examples = data.read("train", rows[part.slice], columns)
            return Batches(examples, batch, data.scale, config.model.dtype, order(seed, share.subset, len(rows), part))

        return Shares(load, batch, shares)

    @classmethod
    def intervals(cls, config: Config, examples: int) -> tuple[int, int]:
        """Return the steps of a replica from fetch to fetch and from push to push, with `examples` to train on."""
        return 1, 1

    @classmethod
    def steps_locally(cls, config: Config) -> bool:
        """Return whether a replica changes its own parameters between two fetches."""
        return False

    @classmethod
    def accrues(cls, config: Config) -> bool:
        """Return whether a gradient may wait for something before its push begins, so that its place must be the replica's own."""
        return True

    @classmethod
    def batch(cls, config: Config, examples: int) -> int:
        """Return the columns of a replica's minibatch, with `examples` to train on in all."""
        return max(1, min(config.method.minibatch, -(-examples // config.topology.replicas)))

    @classmethod
    def kept(cls, config: Config, examples: int, own: int) -> int:
        """Return how many examples of `examples` a replica holds in memory whose share is `own`."""
        return own

    @classmethod
    def copies(cls, config: Config) -> int:
        """Return how many vectors of its parameters a partition holds, without the one that it evaluates."""
        return 2 + 2 * config.method.overlap

    def train(self) -> Turns:
        """Train until it is to stop, or has nothing left to train on."""
        raise NotImplementedError

    def run(self) -> Turns:
        yield from self.attend(GO)
        while not self.orders.has(END):
            yield from self.train()
            yield from self.store.settle()
            self.orders.meet()
            self.orders.note(done=1)
            yield from self.report(now=True)
            self.orders.window.wake(0)
            # What a lost replica leaves may still have to be trained on.
            yield from self.attend(END, more=lambda: not self.finished)
        self.close()

    def close(self) -> None:
        """Leave nothing under way."""
        self.store.close()

    @property
    def finished(self) -> bool:
        """Whether the replica has made its own part: its steps or its passes over its shares."""
        stop, replica = self.config.stop, self.replica
        by_steps = stop.steps is not None and replica.steps + self.orders.made >= stop.steps
        by_epochs = stop.epochs is not None and replica.train.cursor.epoch >= stop.epochs
        return by_steps or by_epochs or len(replica.train) == 0

    def report(self, now: bool = False) -> Turns:
        """Tell how far the replica is, if it is time; evaluate if that is asked for."""
        replica, orders = self.replica, self.orders
        if orders.suspect:
            replica.examine(self.store.w)
        orders.poll(now, self.note)
        if orders.evaluation_wanted:
            yield from self.store.snapshot(replica.snapshot)
            orders.copied()
            orders.report(replica.evaluate(replica.snapshot, orders.poll))
        while replica.train.taken < orders.given:
            share = orders.share(replica.train.taken)
            self.place = share.subset if self.place is None else self.place
            replica.train.take(share, orders.beat)

    def note(self) -> None:
        """Note how far the replica is."""
        replica, orders, cursor, counts = self.replica, self.orders, self.replica.train.cursor, self.store.counts
        orders.note(
            steps=replica.steps, examples=replica.examples, loss=replica.loss, right=replica.right, pushes=self.store.number,
            fetches=counts.fetches, bytes_pushed=counts.bytes_pushed, bytes_fetched=counts.bytes_fetched, waited=counts.waited,
            epoch=cursor.epoch, position=cursor.position, taken=replica.train.taken,
        )  # fmt: skip
        orders.note_cursors(replica.train.cursors)
        if replica.trouble is not None:
            orders.note(**replica.trouble._asdict())

    @property
    def idle(self) -> Wait:
        """What one says that has nothing to do: it only looks up to its next exchange with the coordinator."""
        return Wait("", self.orders.due)

    def attend(self, flag: int, more: Callable[[], bool] = lambda: False) -> Turns:
        """Wait for GO or END, evaluating whenever that is asked for; for END only until there is more to train on."""
        orders = self.orders
        while not orders.has(flag) and not orders.has(END) and not (flag == GO and orders.stop):
            if not orders.stop and more():
                orders.note(done=0)
                return
            # Hundreds that wait must not keep the coordinator busy.
            yield from self.report(now=orders.period <= POLL)
            yield self.idle
