"""A batch method's whole world in one process over window memory: its roles take turns as a script says, and time is a number.

Stand-ins: `Ones` for a replica, whose gradients say which examples they came from; passes for a batch method. All else is real.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from leading import Led, Unwritten

from dbnet.comm.channel import Mailboxes
from dbnet.comm.topology import Topology
from dbnet.comm.turns import IDLE, Turns
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.orders import Orders, coordinator_fields
from dbnet.core import config
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.data.portions import Blocks, Portion
from dbnet.methods.sandblaster.coordinator import SandblasterCoordinator
from dbnet.methods.sandblaster.tasks import task_fields
from dbnet.methods.sandblaster.worker import SandblasterWorker
from dbnet.network.model import Footprint, Piece
from dbnet.network.parameters.layout import Drawn, FlatLayout
from dbnet.network.replica import Score
from dbnet.shards.accrual import Accrual
from dbnet.shards.push import Intake, Receiving
from dbnet.shards.routes import Rings, routes
from dbnet.shards.server import Server
from dbnet.shards.shard import Shard
from dbnet.shards.space import Fill
from dbnet.shards.store import Inbox, WindowStore


class Ones:
    """Stands for a replica: the gradient of example e is w[0] at place e and 0 elsewhere, its loss 1 + e."""

    taken, cursors = 0, ()

    def __init__(self, blocks: Blocks) -> None:
        self.blocks, self.train = blocks, self
        self.steps = self.examples = self.right = 0
        self.loss, self.trouble = 0.0, None
        self.cursor, self.snapshot = SimpleNamespace(epoch=0, position=0), np.zeros(blocks.examples)
        self._left: list[int] = []

    def open(self, portion: Portion, beat: Callable[[], None] = lambda: None) -> None:
        start = portion.block * self.blocks.size
        self._left = list(range(start + portion.lo, start + portion.hi))

    def prefetch(self, block: int) -> None:
        assert 0 <= block * self.blocks.size < self.blocks.examples

    def accrue_share(self, w: np.ndarray, g: np.ndarray, fresh: bool) -> tuple[int, float, int]:
        if not self._left:
            return 0, 0.0, 0
        if fresh:
            g[:] = 0
        e = self._left.pop(0)
        g[e] += w[0]
        self.steps += 1
        return 1, 1.0 + e, 1

    def evaluate(self, w: np.ndarray, beat: Callable[[], None]) -> Score:
        return Score(w[0], 0.0, 0.0, 0.0)


class BatchWorld:
    """A coordinator that makes passes, S shards and R replicas with one example per minibatch."""

    def __init__(
        self, examples: int, portion: int, shards: int, replicas: int, spans: list[Range], table: str = "", slot: int = 64
    ) -> None:
        self.now = 0.0
        self.config = config.build(
            {
                "data": {"path": "none"},
                "model": {"layers": [{"kind": "dense", "units": 1}]},
                "method": {
                    "kind": "sandblaster",
                    "minibatch": 1,
                    "slot": slot,
                    "slots": 2,
                    "portion": portion,
                    "patience": 1.0,
                    **dict(t.split("=") for t in table.split()),
                },
                "topology": {"shards": shards, "replicas": replicas},
                "stop": {"iterations": 1},
            }
        )
        world, dtype = Topology(shards, replicas), np.dtype("f8")
        self.ranges = world.shard_ranges(examples)
        footprint = [Piece(Range(0, examples), 0)]
        ways = {route.shard: route for route in routes(footprint, self.ranges)}
        users = [[o for o in range(replicas) if s in ways] for s in range(shards)]
        rings = Rings(self.ranges, users, dtype, slot, 2)
        layouts = [WindowLayout([*coordinator_fields(world), *task_fields(replicas)])]
        layouts += [WindowLayout(rings.fields(s, world)) for s in range(shards)]
        memory, boxes = LocalWindow([*layouts, *(WindowLayout(()) for _ in range(replicas))]), Mailboxes(1 + shards)
        names = FlatLayout([("0.dense.W", (examples,), Drawn("uniform", 1.0), True)])
        led = Led(SandblasterCoordinator, self.config, examples, memory, world, boxes.at(0), self.clock, names)
        self.coordinator, self.checkpoints, self.record, self.lose = led.coordinator, led.checkpoints, led.record, led.losses.lose
        self.accruals: list[Accrual] = []
        self.shards: list[Turns] = []
        for s, part in enumerate(self.ranges):
            end = memory.at(1 + s)
            shard = Shard(part, make("shards.rules", {"kind": "sgd"}, "rule"), end.local["params"], end.local["clock"], self.clock)
            self.accruals.append(Accrual(shard, Receiving(self.config, names, [(o, 0) for o in users[s]], dict)))
            intakes = [Intake(self.accruals[-1]) for _ in users[s]]
            inbox = Inbox(end, intakes, world, users[s], [ways[s]] * len(users[s]) if s in ways else [])
            server = Server(self.accruals[-1], inbox, boxes.at(1 + s), Unwritten(), self.clock, self.config.record)  # type: ignore
            self.shards.append(server.run())
        self.workers = [
            SandblasterWorker(
                Ones(Blocks(portion, examples)),  # type: ignore[arg-type]
                WindowStore(memory, world, (r, 0), Footprint(footprint, footprint, examples), rings),
                Orders(memory, world, r, self.clock),
                self.config,
            )
            for r in range(replicas)
        ]
        self.replicas = [w.train() for w in self.workers]
        self.results: list[tuple[float, np.ndarray]] = []
        self.leading = self.passes(spans)
        self.done = False

    def clock(self) -> float:
        return self.now

    def passes(self, spans: list[Range]) -> Turns:
        for k, span in enumerate(spans, start=1):
            yield from self.coordinator.space.run([Fill("params", k)])
            loss = yield from self.coordinator.loss(span)
            self.results.append((loss, np.concatenate([a.held["gradient"] for a in self.accruals])))
        self.coordinator.replicas.stop()
        self.done = True
        while True:
            self.coordinator.tick()
            self.coordinator.queue.turn()
            yield IDLE

    def move(self, role: int) -> None:
        """Advance the coordinator (0), a shard or a replica by one turn."""
        turns = [self.leading, *self.shards, *self.replicas]
        next(turns[role % len(turns)], None)

    def finish(self, replicas: Callable[[int], bool] = lambda turn: True) -> int:
        """Everyone in turn until all passes are made and all replicas have stopped; return the number of turns."""
        turn, alive = 0, set(range(len(self.replicas)))
        while not self.done or alive:
            turn += 1
            assert turn < 20000, "no end"
            self.now += 0.001
            for part in (self.leading, *self.shards):
                next(part)
            for r in sorted(alive):
                if next(self.replicas[r], "end") == "end":
                    alive.remove(r)
        for _ in range(50):
            self.move(0)
            for shard in self.shards:
                next(shard)
        return turn

    def check(self, spans: list[Range], examples: int) -> None:
        assert len(self.results) == len(spans)
        for k, ((loss, gradient), span) in enumerate(zip(self.results, spans, strict=True), start=1):
            seen = np.bincount(np.arange(span.lo, span.hi) % examples, minlength=examples)
            np.testing.assert_array_equal(gradient, seen * k * (1.0 / span.size))
            assert loss == seen @ (1.0 + np.arange(examples)) / span.size
        # What was computed was pushed or dropped; what was pushed was applied, or its pass began again.
        pushed = sum(w.computed - w.dropped for w in self.workers)
        tally = self.coordinator.queue.tally
        assert sum(w.computed for w in self.workers) >= tally.accepted - sum(w.dropped for w in self.workers)
        wanted = sum(len(self.workers[0].replica.blocks.portions(span)) for span in spans)
        assert pushed == wanted if not tally.restarts else pushed >= wanted
