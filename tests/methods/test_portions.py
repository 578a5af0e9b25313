"""Every example counts once: a whole world in one process over window memory, advanced by scripts with silence and return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import Late
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet.comm.channel import Mailboxes
from dbnet.comm.topology import Topology
from dbnet.comm.turns import IDLE, Turns, drive
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.coordinator import Coordinator, finish
from dbnet.coordinator.guard import Guard
from dbnet.coordinator.heartbeat import Heartbeat, HeartbeatWatch, heartbeat_fields
from dbnet.coordinator.orders import OrderBook, Orders, coordinator_fields
from dbnet.core import config
from dbnet.core.errors import Lost
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.data.file import Examples
from dbnet.data.portions import Blocks, Portion, Reader
from dbnet.methods.descent.base import Pass
from dbnet.methods.sandblaster.coordinator import Driver
from dbnet.methods.sandblaster.method import Sandblaster
from dbnet.methods.sandblaster.work_queue import Task, WorkQueue, pack, task_fields, unpack
from dbnet.methods.sandblaster.worker import Worker
from dbnet.network.model import Footprint, Piece
from dbnet.network.parameters import FlatLayout as Names
from dbnet.network.replica import Score
from dbnet.shards.accrual import Accrual
from dbnet.shards.push import Intake
from dbnet.shards.routes import routes
from dbnet.shards.shard import Shard
from dbnet.shards.space import Fill
from dbnet.shards.store import Inbox, Rings, WindowStore


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


class World:
    """A coordinator that makes passes, S shards and R replicas with one example per minibatch."""

    def __init__(
        self, examples: int, portion: int, shards: int, replicas: int, spans: list[Range], table: str = "", slot: int = 64
    ) -> None:
        self.now = 0.0
        self.config = config.build(
            {
                "data": {"path": "none"},
                "model": {"layers": [{"kind": "dense", "units": 1}]},
                "method": {"kind": "sandblaster", "minibatch": 1, "slot": slot, "slots": 2},
                "sandblaster": {"portion": portion, "patience": 1.0, **{k: v for k, v in [t.split("=") for t in table.split()]}},
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
        record = SimpleNamespace(
            trouble="", path="run.h5", events=lambda *_: None, refused=lambda *_: None, mean_staleness=0.0, progress=lambda *_: None
        )
        display = SimpleNamespace(say=lambda *_: None)
        guard = Guard(self.config, Names([("0.dense.W", (examples,), 1.0, True)]), record, display)  # type: ignore
        keeper = SimpleNamespace(advance=lambda: False, due=lambda steps: False, writing=False)
        self.pace = Coordinator(
            OrderBook(memory, world), boxes.at(0), record, display, self.config, examples, keeper, self.clock, guard,  # type: ignore
        )  # fmt: skip
        self.driver = Driver(self.pace)
        self.accruals, serving = [], []
        for s, part in enumerate(self.ranges):
            end = memory.at(1 + s)
            shard = Shard(part, make("shards.rules", {"kind": "sgd"}, "rule"), end.local["params"], end.local["clock"], self.clock)
            self.accruals.append(Accrual(shard, [(o, 0) for o in users[s]], {}, {}))
            intakes = [Intake(self.accruals[-1]) for _ in users[s]]
            inbox = Inbox(end, intakes, world, users[s], [ways[s]] * len(users[s]) if s in ways else [])
            serving.append(Sandblaster().serve(self.accruals[-1], inbox, boxes.at(1 + s), self.clock))
        self.workers = [
            Worker(
                Ones(Blocks(portion, examples)),  # type: ignore[arg-type]
                WindowStore(memory, world, (r, 0), Footprint(footprint, footprint, examples), rings),
                Orders(memory, world, r, self.clock),
            )
            for r in range(replicas)
        ]
        self.replicas, self.shards = [w.work() for w in self.workers], serving
        self.results: list[tuple[float, np.ndarray]] = []
        self.coordinator = self.passes(spans)
        self.done = False

    def clock(self) -> float:
        return self.now

    def passes(self, spans: list[Range]) -> Turns:
        for k, span in enumerate(spans, start=1):
            yield from self.driver.space.run([Fill("params", k)])
            loss = yield from self.driver.sum_up(Pass(span))
            self.results.append((loss, np.concatenate([a.vectors["gradient"] for a in self.accruals])))
        self.pace.desk.stop()
        self.done = True
        while True:
            self.pace.tick()
            self.driver.ledger.turn()
            yield IDLE

    def move(self, role: int) -> None:
        """Advance the coordinator (0), a shard or a replica by one turn."""
        turns = [self.coordinator, *self.shards, *self.replicas]
        next(turns[role % len(turns)], None)

    def finish(self, replicas: Callable[[int], bool] = lambda turn: True) -> int:
        """Everyone in turn until all passes are made and all replicas have stopped; return the number of turns."""
        turn, alive = 0, set(range(len(self.replicas)))
        while not self.done or alive:
            turn += 1
            assert turn < 20000, "no end"
            self.now += 0.001
            for part in (self.coordinator, *self.shards):
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
        tally = self.driver.ledger.tally
        assert sum(w.computed for w in self.workers) >= tally.accepted - sum(w.dropped for w in self.workers)
        wanted = sum(len(self.workers[0].replica.blocks.portions(span)) for span in spans)
        assert pushed == wanted if not tally.restarts else pushed >= wanted


@settings(max_examples=150, deadline=None)
@given(
    examples=st.integers(1, 24),
    portion=st.integers(1, 6),
    shards=st.integers(1, 3),
    replicas=st.integers(1, 4),
    push_every=st.integers(1, 4),
    backups=st.booleans(),
    passes=st.integers(1, 4),
    data=st.data(),
)
def test_every_example_counts_once(examples, portion, shards, replicas, push_every, backups, passes, data):
    """Random turns with jumps of the clock, so that replicas fall silent at any moment and come back."""
    draw = data.draw
    spans = []
    for _ in range(passes):
        lo = draw(st.integers(0, 2 * examples))
        spans.append(Range(0, examples) if draw(st.booleans()) else Range(lo, lo + draw(st.integers(1, examples))))
    world = World(examples, portion, shards, replicas, spans, f"push_every={push_every} backups={backups}")
    roles = 1 + shards + replicas
    # A stretch of turns in which some roles never move, then a jump of the clock.
    for _ in range(draw(st.integers(0, 8))):
        awake = draw(st.lists(st.integers(0, roles - 1), min_size=1, max_size=roles, unique=True))
        seed = draw(st.integers(0, 1 << 16))
        for role in np.random.default_rng(seed).choice(awake, draw(st.integers(1, 120))):
            world.now += 0.003
            world.move(int(role))
        world.now += draw(st.sampled_from([0.0, 0.0, 0.5, 2.0]))
    world.finish()
    world.check(spans, examples)


def silent_after(world: World, replica: int, when: Callable[[World], bool]) -> None:
    """Everyone in turn until `when`; then all but one replica until all passes are made; then it returns."""
    for turn in range(20000):
        if when(world):
            break
        world.now += 0.0002
        world.move(turn)
    else:
        pytest.fail("the moment never came")
    for _ in range(4000):
        if world.done:
            break
        world.now += 0.01
        for role in range(1 + len(world.shards) + len(world.replicas)):
            if role != 1 + len(world.shards) + replica:
                world.move(role)
    assert world.done, "the others wait for the silent replica"


MOMENTS = {
    "at once": lambda w: True,
    "computing": lambda w: w.workers[0].replica.steps == 3,
    "bundle full": lambda w: w.workers[0]._bundle.count == 2,
    "offered": lambda w: w.workers[0]._offered.count > 0,
    "second pass": lambda w: w.workers[0].tasks.number == 2 and w.workers[0]._bundle.count == 1,
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("backups", [True, False])
def test_a_silent_replica_is_replaced_and_may_return(moment, backups):
    spans = [Range(0, 48)] * 3
    world = World(48, 2, 2, 3, spans, f"push_every=3 backups={backups}")
    silent_after(world, 0, MOMENTS[moment])
    world.finish()
    world.check(spans, 48)


def test_silence_between_verdict_and_push_begins_the_pass_again():
    spans = [Range(0, 24)] * 2
    world = World(24, 1, 2, 3, spans, "push_every=2")
    silent_after(world, 0, lambda w: w.driver.ledger.bundles[0] == 1)
    assert world.driver.ledger.tally.restarts == 1
    world.finish()
    world.check(spans, 24)


def test_only_what_was_flushed_has_moved():
    """A transfer ends with its flush and no sooner, the newest first, and after each its target has a turn."""
    spans = [Range(0, 24)] * 3
    world = World(24, 2, 2, 3, spans, "push_every=2")
    for worker in world.workers:
        memory = worker.orders.window
        # An end for each, so that none profits by another's flush.
        worker.store._window, worker.orders.window, worker.tasks._window = (Late(memory, world.move) for _ in range(3))
    world.finish()
    world.check(spans, 24)
    assert world.driver.ledger.tally.restarts == 0


def test_half_a_bundle_is_taken_back():
    """The replica falls silent with some slices of a bundle in the gradient: the pass that began again is exact."""
    spans = [Range(0, 64)] * 2
    world = World(64, 8, 1, 2, spans, "push_every=2")
    # A slot holds 8 numbers and a ring 2 slots, so a bundle of 64 numbers takes several turns.
    silent_after(world, 0, lambda w: w.workers[0].store.counts.pushes == 0 and w.accruals[0].vectors["gradient"][:8].any())
    assert world.driver.ledger.tally.restarts == 1
    world.finish()
    world.check(spans, 64)
    assert world.accruals[0].dropped > 0, "the rest of the old bundle came and was dropped"


def test_a_task_of_a_pass_long_past_is_none():
    """A replica that slept looks again after each of many passes, of which it was given tasks in the first and the last alone."""
    examples, later = 24, [Range(k, k + 2) for k in range(1, 12)]
    for passes in (2, 5, 6, 11):
        spans = [Range(0, examples), *later[: passes - 1], Range(passes, passes + examples)]
        world = World(examples, 2, 1, 3, spans, "push_every=1 backups=False")
        # Replica 2 is given its last portions, sleeps while the others make the pass and the small ones that follow, and looks.
        asleep = len(world.shards) + 3
        for _ in range(20000):
            if len(world.results) == passes:
                break
            world.now += 0.01
            for role in range(1 + len(world.shards) + len(world.replicas)):
                if role != asleep:
                    world.move(role)
        assert len(world.results) == passes and world.workers[2].tasks.number == 0
        given = unpack(int(world.workers[2].orders.window.local["task"][2].max()))
        assert given.number == 1 and given.portion >= 2, "its words are those of the first pass"
        for _ in range(3):
            world.move(asleep)
        assert world.workers[2].tasks.number == 0 and world.workers[2].computed == 0
        world.finish()
        world.check(spans, examples)
        assert world.workers[2].tasks.number == len(spans) and world.workers[2].computed > 0


def test_half_a_row_of_positions_is_none():
    """What a replica reads while the coordinator writes the next pass's positions: the lower bound of one, the upper of another."""
    world = World(24, 2, 1, 1, [Range(0, 24), Range(30, 60)])
    while world.driver.ledger.number < 1:
        world.move(0)
        world.move(1)
    tasks, local = world.workers[0].tasks, world.workers[0].orders.window.local
    whole = local["span"].copy()
    world.driver.ledger.open(2, Range(30, 60), [])
    local["span"].flat[0] = whole.flat[0]
    tasks.look()
    assert tasks.number == 0
    local["span"][...] = whole
    tasks.look()
    assert (tasks.number, tasks.span) == (1, Range(0, 24))


def test_words_hold_what_they_are_given():
    for task in (Task(1, 0, 0, False), Task((1 << 22) - 1, (1 << 20) - 1, (1 << 20) - 1, True), Task(7, 3, 11, True)):
        assert unpack(pack(*task)) == task and 0 < pack(*task) < 1 << 63


class Book:
    """A ledger whose replicas are played by the test: pass 1 of so many portions of one example."""

    def __init__(self, portions: int, replicas: int, push_every: int = 2, backups: bool = True, absent: Sequence[int] = ()) -> None:
        self.memory, self.now = LocalWindow([WindowLayout(task_fields(replicas))]), 0.0
        self.ledger = WorkQueue(self.memory, replicas, push_every, backups, 1.0, lambda: self.now)
        self.ledger.absent.update(absent)
        self.portions = Blocks(1, portions).portions(Range(0, portions))
        self.ledger.open(1, Range(0, portions), self.portions)
        self.ledger.turn()

    def computed(self, replica: int, tasks: int) -> None:
        self.memory.local["finished"][replica] = pack(1, tasks)
        self.ledger.turn()

    def offered(self, replica: int, number: int, first: int, count: int) -> bool:
        """Return whether a bundle is accepted."""
        self.memory.local["offer"][replica] = number, first, count, 1.0, 0
        self.memory.local["offered"][replica] += 1
        self.ledger.turn()
        offer, accepted = divmod(int(self.memory.local["verdict"][replica]), 2)
        assert offer == self.memory.local["offered"][replica]
        return bool(accepted)


def test_a_bundle_of_another_pass_or_of_a_lost_replica_is_refused():
    book = Book(12, 3)
    ledger, tally = book.ledger, book.ledger.tally
    for replica in range(3):
        book.computed(replica, 2)
    assert not book.offered(0, 0, 0, 2) and (tally.accepted, tally.refused) == (0, 2)
    ledger.absent.add(2)
    assert not book.offered(2, 1, 0, 2) and (tally.accepted, tally.refused) == (0, 4)
    assert book.offered(0, 1, 0, 2) and (tally.accepted, tally.refused, ledger.bundles) == (2, 4, [1, 0, 0])
    book.computed(0, 4)
    assert book.offered(0, 1, 2, 2) and ledger.bundles == [2, 0, 0] and ledger.loss == 2.0
    assert not book.offered(0, 1, 2, 2), "its portions count once"


def test_what_of_a_refused_bundle_nobody_else_has_is_computed_again_in_its_order():
    book = Book(3, 2)
    book.computed(0, 2)
    book.computed(0, 3)
    assert book.ledger._given == [[0, 1, 2], [2]] and book.offered(1, 1, 0, 1)
    assert not book.offered(0, 1, 0, 3), "one of its portions has been accepted"
    assert book.ledger._given[0] == [0, 1, 2, 0, 1] and not book.ledger.complete
    book.computed(0, 5)
    assert book.offered(0, 1, 3, 2) and book.ledger.complete and book.ledger.tally.accepted == 3


def test_a_block_stays_where_it_was_computed():
    book = Book(8, 2)
    assert book.ledger._given == [[0, 1], [4, 5]]
    book.computed(1, 2)
    book.computed(1, 4)
    assert book.ledger._given[1] == [4, 5, 6, 7, 3, 2], "what it takes from the other is what that one would come to last"
    assert book.offered(1, 1, 0, 6) and book.offered(0, 1, 0, 2) and book.ledger.complete
    book.ledger.open(2, Range(0, 8), book.portions)
    assert [list(queue) for queue in book.ledger._queues] == [[0, 1], [2, 3, 4, 5, 6, 7]]


def test_a_portion_is_computed_by_two_at_most_and_by_another_where_one_is_silent():
    book = Book(1, 3)
    assert book.ledger._given == [[0], [0], []] and book.ledger.tally.backups == 1
    book = Book(1, 3, backups=False)
    assert book.ledger._given == [[0], [], []] and book.ledger.tally.backups == 0
    beats = np.zeros(3)
    book.ledger.hear(beats)
    book.now, beats[1:] = 2.0, 1
    book.ledger.hear(beats)
    book.ledger.turn()
    assert book.ledger._given == [[0], [0], []] and book.ledger.tally.backups == 1


def test_backups_are_first_of_what_no_living_replica_has_and_then_of_what_was_not_computed():
    book, beats = Book(2, 3, absent=(1, 2)), np.zeros(3)
    book.ledger.hear(beats)
    book.computed(0, 1)
    book.ledger.absent = {2}
    book.ledger.turn()
    assert book.ledger._given == [[0, 1], [1], []]
    # Portion 0 was computed by one that is silent now and may never deliver it; portion 1 is under way.
    book.now, beats[1:], book.ledger.absent = 2.0, 1, set()
    book.ledger.hear(beats)
    book.ledger.turn()
    assert book.ledger._given == [[0, 1], [1], [0]]


def test_where_bundles_end():
    """After every third portion, and at the end, where little shall be computed again, after each."""
    book, ends = Book(9, 1, push_every=3), []
    for index in range(9):
        task = unpack(int(book.memory.local["task"][0, index % 2]))
        assert task[:3] == (1, index, index)
        ends.append(task.ends)
        book.computed(0, index + 1)
    assert ends == [False, False, True, False, False, True, True, True, True]


# --- waits that progress, and evaluations ---------------------------------------------------------------------------------------


def coordinator_driven(world: World, others: Sequence[Iterator[Any]], seconds: float = 0.2) -> None:
    """Drive the coordinator with a deadline of one second; between its turns everyone else has one, and time goes on."""

    def turns() -> Turns:
        for wait in world.coordinator:
            yield wait
            if world.done and not world.pace.keeper.writing and wait is IDLE:
                return
            # Less than a quarter of the deadline: a longer turn would be one in which the job was stopped.
            world.now += seconds
            assert world.now < 1000, "no end"
            for other in others:
                next(other, None)

    drive(turns(), 1.0, clock=world.clock)


def test_a_checkpoint_longer_than_the_deadline_ends_nothing():
    world = World(8, 2, 1, 1, [Range(0, 8)])
    keeper, left = world.pace.keeper, [0]

    def advance() -> bool:
        left[0] -= keeper.writing
        keeper.writing = left[0] > 0
        return keeper.writing

    def begin() -> None:
        keeper.writing, left[0], world.pace.checkpoint = True, 60, lambda: None

    keeper.due, keeper.advance, world.pace.checkpoint = lambda steps: True, advance, begin
    coordinator_driven(world, [*world.shards, *world.replicas])
    assert left[0] <= 0 and len(world.results) == 1
    # Replicas alone that live are no progress of a checkpoint: where the disk hangs, the wait ends.
    hung = World(8, 2, 1, 1, [Range(0, 8)])
    hung.pace.keeper.due, hung.pace.keeper.writing = lambda steps: False, True
    with pytest.raises(Lost, match="waits for the shards to send a checkpoint"):
        coordinator_driven(hung, [*hung.shards, *hung.replicas])


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_end_of_a_run_waits_for_whom_it_names(evaluates: bool):
    """Where the disk hangs, or the replica that evaluates, the signs of life of others are no progress."""
    world = World(8, 2, 1, 2, [])
    world.coordinator, world.pace.keeper.writing = finish(world.pace), not evaluates
    if evaluates:
        world.pace.desk.evaluate(0)

    def living() -> Iterator[None]:
        while True:
            world.workers[1].orders.poll(now=True)
            yield

    said = "the evaluation by replica 0" if evaluates else "the shards to send a checkpoint"
    with pytest.raises(Lost, match=f"the coordinator waits for {said}"):
        coordinator_driven(world, [*world.shards, living()])


def test_replicas_are_heard_while_they_move_data():
    """A replica that pushes for long polls no orders, but gives signs of life; of a cut one all partitions must."""
    world = World(8, 2, 1, 2, [])
    pace, now = world.pace, [0.0]
    topology = Topology(shards=1, replicas=2, partitions=2)
    memory = LocalWindow(
        [WindowLayout([*coordinator_fields(topology), *heartbeat_fields(topology)]), *(WindowLayout(()) for _ in range(5))]
    )
    watch = HeartbeatWatch(memory, topology, 100.0, lambda: now[0])
    pulses = [Heartbeat(memory, topology, rank, 100.0, lambda: False, lambda: now[0]) for rank in range(1, topology.size)]
    pace.watch = pace.roll._watch = watch
    heard, ledger = [], world.driver.ledger
    for silent in ((), (2,), ()):
        for _ in range(3):
            now[0] += 10
            world.now += 10
            for rank, pulse in enumerate(pulses, start=1):
                if rank not in silent:
                    pulse.beat()
            progress = pace.tick()
            ledger.hear(pace.beats)
        heard.append([progress, ledger.silent(0), ledger.silent(1)])
    assert heard == [[True, False, False], [True, True, False], [True, False, False]]


@pytest.mark.parametrize("goes_on", [True, False])
def test_bundles_that_arrive_for_longer_than_the_deadline_end_nothing(goes_on: bool):
    world = World(8, 2, 1, 1, [])

    def role() -> Turns:
        yield from world.driver.space.ask([Fill("gradient", 0.0)])
        world.done = True
        yield IDLE

    def shard() -> Iterator[Any]:
        for _ in range(60):
            if goes_on:
                world.pace.channel.send(0, "events", ())
            yield
        yield from world.shards[0]

    world.coordinator = role()
    with nullcontext() if goes_on else pytest.raises(Lost, match="waits for shard 0 to answer"):
        coordinator_driven(world, [shard()])
    assert world.done is goes_on


def test_a_replica_that_ends_later_than_the_deadline_ends_nothing():
    """The method has ended while a replica evaluates for long."""
    world = World(8, 2, 1, 1, [])

    def evaluating() -> Iterator[None]:
        orders = world.workers[0].orders
        for _ in range(60):
            orders.poll(now=True)
            yield
        orders.note(done=1)
        orders.poll(now=True)

    def role() -> Turns:
        yield from world.driver.dismiss()
        world.done = True
        yield IDLE

    world.coordinator = role()
    coordinator_driven(world, [evaluating()])
    assert world.done
    hung = World(8, 2, 1, 1, [])
    hung.coordinator = hung.driver.dismiss()
    with pytest.raises(Lost, match="waits for the replicas to end"):
        coordinator_driven(hung, [])


@pytest.mark.parametrize("lost", [False, True])
def test_no_trial_point_is_evaluated(lost: bool):
    """The replica that is asked sleeps before it has its copy and comes back amid a pass, or is lost amid one as it evaluates."""
    world, first = World(24, 2, 1, 3, []), 1
    desk, roll, orders = world.pace.desk, world.pace.roll, world.workers[first].orders
    scores: list[float] = []
    world.pace.record.evaluation = lambda *row: scores.append(row[-4])

    def role() -> Turns:
        for k in (1, 2, 3):
            yield from world.driver.space.run([Fill("params", k)])
            yield from world.driver.evaluation()
            yield from world.driver.space.run([Fill("params", k + 0.5)])
            yield from world.driver.sum_up(Pass(Range(0, 24), "base"))
        world.done = True

    world.coordinator = role()
    if lost:
        orders.report = lambda score: None  # type: ignore[method-assign]
    for _ in range(20000):
        amid = world.accruals[0].params[0] == 1.5 and world.driver.ledger.number == 1
        if lost and amid and first in roll.active:
            assert desk.evaluating == first
            roll.active.remove(first)
            world.driver.ledger.absent.add(first)
            if desk.give_up(first):
                roll.evaluation_lost()
        world.now += 0.01
        for moved in range(5):
            if moved != 2 + first or ((amid or scores) and first in roll.active) or (lost and not amid):
                world.move(moved)
        if world.done:
            break
    assert world.done and (lost or world.workers[first].computed > 0)
    assert sorted(set(scores)) == ([2, 3] if lost else [1, 2, 3]), scores


# --- how fast -----------------------------------------------------------------------------------------------------------------


def turns_of(slow: int, backups: bool, portions: int = 200, push_every: int = 2) -> int:
    """Return the turns of one pass by four replicas of which one needs `slow` turns for what the others do in one."""
    spans = [Range(0, portions * 8)]
    # Slots hold a whole push, so that computing is what takes the turns.
    world = World(portions * 8, 8, 1, 4, spans, f"push_every={push_every} backups={backups} patience=1e9", slot=1 << 16)
    turn = 0
    while not world.done:
        turn += 1
        world.now += 0.03
        assert turn < 100000
        world.move(0)
        next(world.shards[0])
        for r, replica in enumerate(world.replicas):
            if r or turn % slow == 0:
                next(replica, None)
        world.move(0)
    return turn


def test_backup_portions_pay():
    fast, with_backups, without = turns_of(1, True), turns_of(10, True), turns_of(10, False)
    print(f"turns of a pass: all fast {fast}, one of four slowed ten times {with_backups} with backups, {without} without")
    assert with_backups <= 1.35 * fast < without


# --- blocks and their reader --------------------------------------------------------------------------------------------------


@given(size=st.integers(1, 9), examples=st.integers(1, 40), lo=st.integers(0, 100), n=st.integers(0, 90))
def test_portions_are_the_span_cut_at_blocks(size, examples, lo, n):
    blocks = Blocks(size, examples)
    rows = [blocks(p.block).lo + i for p in blocks.portions(Range(lo, lo + n)) for i in range(p.lo, p.hi)]
    assert rows == [e % examples for e in range(lo, lo + n)]
    assert all(
        0 < p.hi - p.lo <= size and blocks(p.block).lo + p.hi <= blocks(p.block).hi for p in blocks.portions(Range(lo, lo + n))
    )


@pytest.mark.parametrize("kind", ["u1", "f4", "f8"])
@pytest.mark.parametrize("vectors", [False, True])
def test_reader_gives_every_example_of_a_portion(kind, vectors):
    rng = np.random.default_rng(2)
    x = rng.integers(0, 255, (23, 4)).astype(kind)
    y = rng.standard_normal((23, 3)) if vectors else rng.integers(0, 5, 23)
    asked: list[Range] = []

    def read(rows: Range) -> Examples:
        asked.append(rows)
        return Examples(x[rows.slice], y[rows.slice])

    reader = Reader(read, Blocks(8, 23), 3, 0.5, np.dtype("f8"), keep=2)
    out = np.zeros((4, 3))
    for portion in (Portion(0, 0, 8), Portion(2, 1, 6), Portion(0, 2, 8)):
        reader.open(portion)
        got, targets = [], []
        while count := reader.next(out):
            got.append(out[:, :count].T.copy())
            targets.append(reader.target[..., :count].T.copy())
        rows = slice(portion.block * 8 + portion.lo, portion.block * 8 + portion.hi)
        np.testing.assert_array_equal(np.concatenate(got), 0.5 * x[rows].astype("f8"))
        np.testing.assert_array_equal(np.concatenate(targets), y[rows])
    assert asked == [Range(0, 8), Range(16, 23)], "a block that was read stays"
    reader.prefetch(1)
    reader.open(Portion(1, 0, 1))
    assert asked[2:] == [Range(8, 16)]
    reader.open(Portion(0, 0, 1))
    reader.open(Portion(2, 0, 1))
    assert asked[3:] == [Range(16, 23)], "what was not used for longest goes first"
    reader.close()


def blocks_read(world: World) -> Iterator[Any]:
    """Yield what each replica was given in the present pass, as blocks."""
    ledger = world.driver.ledger
    for given_here in ledger._given:
        yield [ledger._portions[p].block for p in given_here]


def test_signs_of_life_are_given_while_a_portion_is_read() -> None:
    beats, enough = [0], threading.Event()

    def slowly(rows: Range) -> Examples:
        assert enough.wait(30)
        return Examples(np.zeros((rows.size, 2), np.float32), np.zeros(rows.size, np.int64))

    def beat() -> None:
        beats[0] += 1
        if beats[0] == 3:
            enough.set()

    reader = Reader(slowly, Blocks(4, 8), 4, 1.0, np.dtype("f4"), 2)
    reader.open(Portion(0, 0, 4), beat)
    assert beats[0] == 3 and reader.next(np.zeros((2, 4), np.float32)) == 4
    # The replica gives its own signs of life.
    worker, beats[0] = World(8, 4, 1, 1, [Range(0, 8)]).workers[0], 0
    worker.orders.beat, worker.replica.open = beat, lambda portion, alive: alive()
    worker._batch = [Portion(0, 0, 1)]
    next(worker._compute(Task(1, 0, 0, False)), None)
    assert beats[0] > 0


def test_portions_go_where_their_examples_are():
    spans = [Range(0, 60)] * 4
    world = World(60, 3, 1, 4, spans, "push_every=1 backups=False")
    seen: list[list[list[int]]] = []
    while not world.done:
        world.now += 0.001
        for role in range(6):
            world.move(role)
        if world.driver.ledger.complete and len(seen) < len(world.results):
            seen.append(list(blocks_read(world)))
    world.finish()
    assert seen[0] == [list(range(5 * r, 5 * r + 5)) for r in range(4)], "neighbors, in order"
    assert all(later == seen[0] for later in seen)
