"""How a run ends when somebody was lost, over messages as some MPI libraries move them: late, and refused beside a dead rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from leading import Led, Unwritten

from dbnet.comm.channel import Mailboxes, Message
from dbnet.comm.topology import Topology
from dbnet.comm.turns import BESIDE, IDLE
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.orders import Orders, coordinator_fields
from dbnet.core.config import Config, RecordTable
from dbnet.methods.downpour import DownpourCoordinator
from dbnet.network.parameters.layout import FlatLayout
from dbnet.network.replica import Score
from dbnet.shards.server import NoInbox, Server

WORLD = Topology(shards=2, replicas=2)


class Slow:
    """One end of a channel whose messages count as sent at once, yet one moves each time its sender calls."""

    def __init__(self, boxes: Mailboxes, rank: int, left: Callable[[], bool]) -> None:
        self._end, self._held, self._left = boxes.at(rank), list[tuple[int, str, object]](), left

    def send(self, rank: int, kind: str, content: object = None) -> None:
        self._held.append((rank, kind, content))

    def receive(self) -> Message | None:
        assert not self._left(), "whoever looks for messages of anybody when one has left is refused"
        self.pending()
        return self._end.receive()

    def pending(self) -> bool:
        if self._held:
            self._end.send(*self._held.pop(0))
        return False


def test_after_a_loss_the_shards_are_told_to_end_and_nobody_is_asked_who_may_have_left() -> None:
    layers = [{"kind": "dense", "units": 1}]
    config = Config.model_validate({"data": {"path": "none"}, "model": {"layers": layers}, "stop": {"epochs": 1}})
    boxes, gone = Mailboxes(1 + WORLD.shards), set[int]()
    window = LocalWindow([WindowLayout(coordinator_fields(WORLD)), *[WindowLayout(())] * (WORLD.size - 1)])
    channel = Slow(boxes, 0, lambda: bool(gone))
    led = Led(DownpourCoordinator, config, 10, window.at(0), WORLD, channel, lambda: 0.0, FlatLayout([]))
    shards = {1 + shard: Slow(boxes, 1 + shard, lambda: False) for shard in range(WORLD.shards)}
    led.losses.asked, led.checkpoints.begin = True, lambda *_: None
    led.losses.lose(1)
    led.losses.leave(WORLD.origin_rank(0, 0))
    ending = led.coordinator.finish()
    for _ in range(100):
        if next(ending, "over") == "over":
            assert gone == set(shards)
            return
        for rank in [rank for rank in shards if rank not in gone]:
            end = shards[rank]
            match end.receive():
                case Message(kind="close", content=replica):
                    end.send(0, "closed", (replica, (0, 0)))
                case Message(kind="drain"):
                    end.send(0, "drained")
                case Message(kind="end", content=broken):
                    assert broken
                    led.losses.leave(rank)
                    gone.add(rank)
    raise AssertionError("the coordinator waits for shards that were never told to end")


def test_a_shard_rests_when_nothing_is_left_to_do() -> None:
    told, left, now = list[Message](), [False], itertools.count(0.0, 6e-4)
    channel: Any = SimpleNamespace(receive=lambda: told.pop() if told else None, send=lambda *_: None)
    receiver: Any = SimpleNamespace(
        heeds=lambda: {"ask": lambda _: None}, take_refused=dict, advance=lambda channel: False, take_events=list
    )
    inbox, saver = SimpleNamespace(drain=lambda: left[0]), SimpleNamespace(busy=False, advance=lambda: False)
    server = Server(receiver, inbox, channel, saver, now.__next__, RecordTable())  # type: ignore[arg-type]
    turns = server.run()
    assert next(turns) is IDLE and server.settled() > 0
    saver.busy = True
    assert next(turns) is BESIDE and server.settled() < 0, "a thread writes its part of a checkpoint"
    saver.busy, left[0] = False, True
    assert next(turns) is None and server.settled() < 0, "there may be more in the rings than a millisecond's work"
    left[0] = False
    told.append(Message(0, "ask", None))
    assert next(turns) is IDLE and server.settled() < 0, "there may be another message"
    assert next(turns) is IDLE and server.settled() > 0


@pytest.mark.parametrize("broken", [False, True])
def test_a_shard_leaves_its_last_messages_behind_only_where_somebody_was_lost(broken: bool) -> None:
    told, taken = [Message(0, "end", broken)], [False]
    channel: Any = SimpleNamespace(receive=lambda: told.pop() if told else None, pending=lambda: not taken[0])
    receiver: Any = SimpleNamespace(heeds=dict, take_refused=dict)
    saver: Any = Unwritten()
    saver.begin, saver.close = None, lambda: None
    turns = Server(receiver, NoInbox(), channel, saver, lambda: 0.0, RecordTable()).run()
    if not broken:
        assert "take its last messages" in next(turns).reason and next(turns).reason
        taken[0] = True
    assert next(turns, "over") == "over"


def test_an_evaluation_that_the_end_overtakes_stands_where_it_was_asked_for() -> None:
    layers = [{"kind": "dense", "units": 1}]
    tables = {"data": {"path": "none"}, "model": {"layers": layers}, "stop": {"epochs": 1}, "evaluate": {"epochs": 0.5}}
    window = LocalWindow([WindowLayout(coordinator_fields(WORLD)), *[WindowLayout(())] * (WORLD.size - 1)])
    now, places, shown = [0.0], list[tuple[float, ...]](), list[tuple[float, float]]()
    channel = Mailboxes(1 + WORLD.shards).at(0)
    led = Led(DownpourCoordinator, Config.model_validate(tables), 10, window.at(0), WORLD, channel, lambda: now[0], FlatLayout([]))
    led.record.evaluation = lambda seconds, replica, steps, epochs, *_: places.append((seconds, steps, epochs))
    led.record.progress, led.record.staleness = lambda rows: None, None
    led.display.row = lambda seconds, epochs, steps, loss, staleness, score: shown.append((epochs, score))
    replicas = [Orders(window.at(WORLD.origin_rank(r, 0)), WORLD, r, lambda: now[0], period=0) for r in range(WORLD.replicas)]
    run = led.coordinator.run()

    def hear(**status: float) -> None:
        """Have both replicas report this, the coordinator act, and the replicas see what it says."""
        for orders in replicas:
            orders.note(**status)
            orders.poll()
        next(run)
        for orders in replicas:
            orders.poll()
        now[0] += 1

    def evaluate(orders: Orders) -> None:
        assert orders.evaluation_wanted
        orders.copied()
        orders.report(Score(1.0, 0.5, 1.0, 0.5))

    hear()
    evaluate(replicas[0])
    hear(steps=1, examples=1)
    hear(steps=4, examples=4)
    evaluate(replicas[1])
    hear(steps=5, examples=5, epoch=1, done=1)
    assert places == [(1, 2, 0.2), (2, 8, 0.8)]
    assert [(epochs, score) for epochs, score in shown if score] == [(0.2, Score(1.0, 0.5, 1.0, 0.5))]
    assert not any(orders.evaluation_wanted for orders in replicas)


def test_a_run_that_is_over_is_not_evaluated_before_the_last_gradients_are_applied() -> None:
    """Its time is over: what is due now is what follows when all is applied."""
    layers, times = [{"kind": "dense", "units": 1}], {"stop": {"seconds": 5.0}, "evaluate": {"seconds": 2.0}}
    config = Config.model_validate({"data": {"path": "none"}, "model": {"layers": layers}, **times})
    window, now = LocalWindow([WindowLayout(coordinator_fields(WORLD)), *[WindowLayout(())] * (WORLD.size - 1)]), [0.0]
    channel = Mailboxes(1 + WORLD.shards).at(0)
    led = Led(DownpourCoordinator, config, 10, window.at(0), WORLD, channel, lambda: now[0], FlatLayout([]))
    replicas = [Orders(window.at(WORLD.origin_rank(r, 0)), WORLD, r, lambda: now[0], period=0) for r in range(WORLD.replicas)]
    run, asked = led.coordinator.run(), []
    for second in range(9):
        now[0] = float(second)
        next(run)
        for orders in replicas:
            orders.poll()
            if orders.evaluation_wanted:
                asked.append(second)
                orders.copied()
                orders.report(Score(1.0, 0.5, 1.0, 0.5))
    assert asked == [0, 3] and all(orders.stop for orders in replicas)
