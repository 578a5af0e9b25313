"""How a run ends when somebody was lost, over messages that MPI moves only while their sender calls it."""

from __future__ import annotations

from leading import Led

from dbnet.comm.channel import Mailboxes, Message
from dbnet.comm.topology import Topology
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.orders import coordinator_fields
from dbnet.core.config import Config
from dbnet.methods.downpour import DownpourCoordinator
from dbnet.network.parameters.layout import FlatLayout

WORLD = Topology(shards=2, replicas=2)


class Eager:
    """One end of a channel whose messages count as sent at once, and move when their sender receives."""

    def __init__(self, boxes: Mailboxes, rank: int) -> None:
        self._end, self._held = boxes.at(rank), list[tuple[int, str, object]]()

    def send(self, rank: int, kind: str, content: object = None) -> None:
        self._held.append((rank, kind, content))

    def receive(self) -> Message | None:
        while self._held:
            self._end.send(*self._held.pop(0))
        return self._end.receive()

    def pending(self) -> bool:
        return False


def test_after_a_loss_the_coordinator_listens_until_the_shards_have_left() -> None:
    layers = [{"kind": "dense", "units": 1}]
    config = Config.model_validate({"data": {"path": "none"}, "model": {"layers": layers}, "stop": {"epochs": 1}})
    boxes = Mailboxes(1 + WORLD.shards)
    window = LocalWindow([WindowLayout(coordinator_fields(WORLD)), *[WindowLayout(())] * (WORLD.size - 1)])
    led = Led(DownpourCoordinator, config, 10, window.at(0), WORLD, Eager(boxes, 0), lambda: 0.0, FlatLayout([]))
    shards = {1 + shard: Eager(boxes, 1 + shard) for shard in range(WORLD.shards)}
    led.losses.asked, led.checkpoints.begin = True, lambda *_: None
    led.losses.lose(1)
    led.losses.leave(WORLD.origin_rank(0, 0))
    ending = led.coordinator.finish()
    for _ in range(100):
        if next(ending, "over") == "over":
            return
        for rank, end in shards.items():
            match end.receive():
                case Message(kind="close", content=replica):
                    end.send(0, "closed", (replica, (0, 0)))
                case Message(kind="drain"):
                    end.send(0, "drained")
                case Message(kind="end"):
                    led.losses.leave(rank)
    raise AssertionError("the coordinator waits for shards that were never told to end")
