"""Downpour SGD (Dean et al. 2012, section 4.1 and algorithm 7.1).

Where the paper is silent: step 0 both fetches and pushes, so pushes cover 1, n_push, n_push, ... gradients. What is pushed is the
sum of the accrued gradients, each the mean over its minibatch; a remainder is pushed at the end, so every computed gradient is
applied once. The local step (w = w - alpha g) is undone by the next fetch and left out where that comes before the next gradient.
With `overlap` a fetch takes effect one step later and the gradient accrues in a second buffer while the first one leaves.

Warmstart: replica 0 trains alone; the others join when it has made its steps or reached its accuracy. After the last of these steps
it pushes what it has accrued and waits until all of it is applied and the others have fetched: they begin on these steps exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from dbnet.checkpoint.parts import PartWriter
from dbnet.comm.channel import Channel, Message
from dbnet.comm.turns import IDLE, Turns
from dbnet.coordinator.coordinator import Coordinator, finish, manage
from dbnet.coordinator.orders import END, GO, Orders, most_shares
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.ranges import split
from dbnet.data.subsets import hand_out
from dbnet.methods.base import Method
from dbnet.methods.worker import attend, finished, report
from dbnet.network.replica import Replica
from dbnet.shards.local_store import Store
from dbnet.shards.server import _REPORT, drain
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox


class Downpour(Method):
    """Asynchronous stochastic gradient descent with a parameter server."""

    kind: ClassVar[str] = "downpour"

    def check(self, config: Config) -> None:
        stop = config.stop
        if stop.epochs is stop.steps is stop.seconds is stop.accuracy is None:
            raise UserError(f"stop.iterations is for batch methods; with method.kind = '{self.kind}' give stop.epochs or steps.")

    def work(self, replica: Replica, store: Store, orders: Orders, config: Config) -> Turns:
        yield from attend(replica, store, orders, GO)
        while not orders.has(END):
            yield from self.train(replica, store, orders, config)
            yield from store.settle()
            orders.meet()
            orders.note(done=1)
            yield from report(replica, store, orders, now=True)
            # What a lost replica leaves may still have to be trained on.
            yield from attend(replica, store, orders, END, lambda: not finished(replica, orders, config))
        store.close()

    def train(self, replica: Replica, store: Store, orders: Orders, config: Config) -> Turns:
        """Algorithm 7.1, the client, until it is to stop or has nothing left to train on."""
        method, rule = config.method, config.members()[2]
        alpha = rule.local_rate() if method.local_rate is None else method.local_rate
        # Since it trained last, if it did, others may have: its parameters are old.
        accrued, store.fetched = 0, False
        while not orders.stop and not finished(replica, orders, config):
            step = replica.steps
            first = not store.fetched
            if step % method.n_fetch == 0 or first:
                yield from store.fetch()
            if first:
                yield from report(replica, store, orders, now=True)
            store.accrued(first=accrued == 0)
            # A local step is of no use where other parameters come before the next gradient.
            lost = store.landing or (not store.overlaps and (step + 1) % method.n_fetch == 0)
            local = method.n_fetch > 1 and not lost
            replica.accrue(store.w, store.g, accrued, alpha if local else 0.0)
            accrued += 1
            if step % method.n_push == 0:
                yield from store.push(accrued, step)
                accrued = 0
            yield from store.arrive()
            if orders.alone and replica.steps == config.warmstart.steps:
                if accrued:
                    yield from store.push(accrued, step)
                    accrued = 0
                yield from let_join(replica, store, orders)
            yield from report(replica, store, orders)
            yield None
        if accrued:
            yield from store.push(accrued, replica.steps - 1)

    def serve(self, shard: Shard, inbox: Inbox | None, channel: Channel, clock: Callable[[], float]) -> Turns:
        next_report, draining, saver = 0.0, False, PartWriter(shard, channel, clock, inbox is None)
        while True:
            # The message first: after "drain" the rings must be seen empty once more.
            message = channel.receive()
            busy = drain(inbox, clock)
            # Before any answer: who hears that a pass has ended must have heard what was refused of it.
            if refused := shard.take_refused():
                channel.send(0, "refused", refused)
            busy = self.answer(shard, message, channel) or busy
            if message is not None:
                draining = draining or message.kind == "drain"
                if message.kind == "close" and inbox is not None:
                    channel.send(0, "closed", (message.content, inbox.close(message.content)))
                if message.kind == "checkpoint":
                    saver.begin(*message.content)
                if message.kind == "end":
                    break
            if clock() >= next_report or (draining and not busy):
                next_report = clock() + _REPORT
                events = shard.take_events()
                if len(events):
                    channel.send(0, "events", events)
            if draining and not busy:
                draining = False
                channel.send(0, "drained")
            busy = saver.advance() or busy
            yield None if busy else IDLE
        saver.close()
        while channel.pending():
            yield IDLE

    def answer(self, shard: Shard, message: Message | None, channel: Channel) -> bool:
        """Do what else a coordinator asks of its shards; return whether there was something to do."""
        return False

    def coordinate(self, pace: Coordinator) -> Turns:
        desk, roll = pace.desk, pace.roll
        roll.inherit = lambda lost, heirs: inherit(pace, lost, heirs)
        for replica, shares in enumerate(pace.first_shares):
            desk.give(replica, shares)
        pace.evaluate(0)
        if warming(pace):
            desk.go([0], alone=True)
            pace.display.say("Warmstart: replica 0 trains alone.")
            while warming(pace) and not pace.reached:
                yield from manage(pace)
            desk.go([r for r in roll.active if r])
            while not pace.reached and not all(r == 0 or pace.began(r) or desk.done(r) for r in roll.active):
                yield from manage(pace)
        desk.go(roll.active)
        while not pace.all_done:
            if pace.reached:
                desk.stop(pace.guard.stops)
            yield from manage(pace)
        yield from finish(pace)


def let_join(replica: Replica, store: Store, orders: Orders) -> Turns:
    """The warmstart's steps are made: go on when they are applied and the others have begun from there."""
    yield from store.confirm()
    while orders.alone and not orders.stop:
        yield from report(replica, store, orders, now=True)
        yield IDLE


def inherit(pace: Coordinator, lost: int, heirs: list[int]) -> None:
    """Hand on what a lost replica trained on, to a spare one in its place or to all that are left."""
    desk, seed, parts = pace.desk, pace.config.run.seed, pace.config.topology.replicas
    sizes = [part.size for part in split(pace.examples, parts)]
    # A spare one that took a place before is an heir like any other.
    takes_place = len(pace.roll.line(lost)) > 1
    made = int(pace.steps[lost]) + desk.made(lost) if takes_place else 0
    # Nobody can get more than there are: shares are cut as long as the last replica could take all of them.
    held = sum(len(desk.shares(r)) for r in range(desk.topology.copies) if r == lost or not pace.roll.handed_on(r))
    handed = hand_out(desk.shares(lost), len(heirs), seed, sizes.__getitem__, max(0, most_shares(desk.topology) - held))
    for heir, shares in zip(heirs, handed, strict=True):
        desk.give(heir, shares, made)
    if takes_place and not warming(pace):
        desk.go(heirs)


def warming(pace: Coordinator) -> bool:
    """Return whether replica 0 is still to train alone."""
    warm, score = pace.config.warmstart, pace.last_score
    if pace.desk.topology.replicas == 1 or 0 not in pace.roll.active or pace.desk.done(0):
        return False
    if warm.accuracy is not None and score is not None and score.test_accuracy >= warm.accuracy:
        return False
    return pace.made(0) < warm.steps or (warm.accuracy is not None and not warm.steps)
