"""TODO."""

from __future__ import annotations

from collections.abc import Callable

from dbnet.comm.turns import IDLE, Turns
from dbnet.coordinator.orders import END, GO, Orders
from dbnet.core.config import Config
from dbnet.network.replica import Replica
from dbnet.shards.local_store import Store

# --- the replica's side -------------------------------------------------------------------------------------------------------


def finished(replica: Replica, orders: Orders, config: Config) -> bool:
    """Return whether the replica has made its own part: its steps or its passes over its shares."""
    stop = config.stop
    by_steps = stop.steps is not None and replica.steps + orders.made >= stop.steps
    by_epochs = stop.epochs is not None and replica.train.cursor.epoch >= stop.epochs
    return by_steps or by_epochs or len(replica.train) == 0


def report(replica: Replica, store: Store, orders: Orders, now: bool = False) -> Turns:
    """Note how far the replica is; evaluate if that is asked for."""
    cursor, counts = replica.train.cursor, store.counts
    orders.note(
        steps=replica.steps, examples=replica.examples, loss=replica.loss, right=replica.right, pushes=store.number,
        fetches=counts.fetches, bytes_pushed=counts.bytes_pushed, bytes_fetched=counts.bytes_fetched, waited=counts.waited,
        epoch=cursor.epoch, position=cursor.position, taken=replica.train.taken,
    )  # fmt: skip
    orders.note_cursors(replica.train.cursors)
    if orders.suspect:
        replica.examine(store.w)
    if replica.trouble is not None:
        orders.note(**replica.trouble._asdict())
    orders.poll(now)
    if orders.evaluation_wanted:
        yield from store.snapshot(replica.snapshot)
        orders.copied()
        orders.report(replica.evaluate(replica.snapshot, orders.poll))
    while replica.train.taken < orders.given:
        replica.train.take(orders.share(replica.train.taken), orders.beat)


def attend(replica: Replica, store: Store, orders: Orders, flag: int, more: Callable[[], bool] = lambda: False) -> Turns:
    """Wait for GO or END, evaluating whenever that is asked for; for END only until there is more to train on."""
    while not orders.has(flag) and not orders.has(END) and not (flag == GO and orders.stop):
        if not orders.stop and more():
            orders.note(done=0)
            return
        yield from report(replica, store, orders, now=True)
        yield IDLE
