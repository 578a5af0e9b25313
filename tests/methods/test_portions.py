"""Every example counts once: a whole world in one process over window memory, advanced by scripts with silence and return."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from batch_world import BatchWorld
from harness import Late, over
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet.comm.topology import Topology
from dbnet.comm.turns import IDLE, Turns, drive
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.heartbeat import Heartbeat, HeartbeatWatch, heartbeat_fields
from dbnet.coordinator.orders import coordinator_fields
from dbnet.core.errors import Lost
from dbnet.core.ranges import Range
from dbnet.data.file import Examples
from dbnet.data.portions import Blocks, Portion, Reader
from dbnet.methods.sandblaster.tasks import Task, pack, task_fields, unpack
from dbnet.methods.sandblaster.work_queue import WorkQueue
from dbnet.shards.space import Fill


@pytest.mark.long
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
    world = BatchWorld(examples, portion, shards, replicas, spans, f"push_every={push_every} backups={backups}")
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


def silent_after(world: BatchWorld, replica: int, when: Callable[[BatchWorld], bool]) -> None:
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
    world = BatchWorld(48, 2, 2, 3, spans, f"push_every=3 backups={backups}")
    silent_after(world, 0, MOMENTS[moment])
    world.finish()
    world.check(spans, 48)


def test_silence_between_verdict_and_push_begins_the_pass_again():
    spans = [Range(0, 24)] * 2
    world = BatchWorld(24, 1, 2, 3, spans, "push_every=2")
    silent_after(world, 0, lambda w: w.coordinator.queue.bundles[0] == 1)
    assert world.coordinator.queue.tally.restarts == 1
    world.finish()
    world.check(spans, 24)


def test_only_what_was_flushed_has_moved():
    """A transfer ends with its flush and no sooner, the newest first, and after each its target has a turn."""
    spans = [Range(0, 24)] * 3
    world = BatchWorld(24, 2, 2, 3, spans, "push_every=2")
    for worker in world.workers:
        memory = worker.orders.window
        # An end for each, so that none profits by another's flush.
        over(worker.store, Late(memory, world.move))
        worker.orders.window, worker.tasks._window = (Late(memory, world.move) for _ in range(2))
    world.finish()
    world.check(spans, 24)
    assert world.coordinator.queue.tally.restarts == 0


def test_half_a_bundle_is_taken_back():
    """The replica falls silent with some slices of a bundle in the gradient: the pass that began again is exact."""
    spans = [Range(0, 64)] * 2
    world = BatchWorld(64, 8, 1, 2, spans, "push_every=2")
    # A slot holds 8 numbers and a ring 2 slots, so a bundle of 64 numbers takes several turns.
    silent_after(world, 0, lambda w: w.workers[0].store.counts.pushes == 0 and w.accruals[0].held["gradient"][:8].any())
    assert world.coordinator.queue.tally.restarts == 1
    world.finish()
    world.check(spans, 64)
    assert world.accruals[0].dropped > 0, "the rest of the old bundle came and was dropped"


def test_a_task_of_a_pass_long_past_is_none():
    """A replica that slept looks again after each of many passes, of which it was given tasks in the first and the last alone."""
    examples, later = 24, [Range(k, k + 2) for k in range(1, 12)]
    for passes in (2, 5, 6, 11):
        spans = [Range(0, examples), *later[: passes - 1], Range(passes, passes + examples)]
        world = BatchWorld(examples, 2, 1, 3, spans, "push_every=1 backups=False")
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
    world = BatchWorld(24, 2, 1, 1, [Range(0, 24), Range(30, 60)])
    while world.coordinator.queue.number < 1:
        world.move(0)
        world.move(1)
    tasks, local = world.workers[0].tasks, world.workers[0].orders.window.local
    whole = local["span"].copy()
    world.coordinator.queue.open(2, Range(30, 60), [])
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
    """A work queue whose replicas are played by the test: pass 1 of so many portions of one example."""

    def __init__(self, portions: int, replicas: int, push_every: int = 2, backups: bool = True, absent: Sequence[int] = ()) -> None:
        self.memory, self.now = LocalWindow([WindowLayout(task_fields(replicas))]), 0.0
        self.queue = WorkQueue(self.memory, replicas, push_every, backups, 1.0, lambda: self.now)
        self.queue.absent.update(absent)
        self.portions = Blocks(1, portions).portions(Range(0, portions))
        self.queue.open(1, Range(0, portions), self.portions)
        self.queue.turn()

    def computed(self, replica: int, tasks: int) -> None:
        self.memory.local["finished"][replica] = pack(1, tasks)
        self.queue.turn()

    def offered(self, replica: int, number: int, first: int, count: int) -> bool:
        """Return whether a bundle is accepted."""
        self.memory.local["offer"][replica] = number, first, count, 1.0, 0
        self.memory.local["offered"][replica] += 1
        self.queue.turn()
        offer, accepted = divmod(int(self.memory.local["verdict"][replica]), 2)
        assert offer == self.memory.local["offered"][replica]
        return bool(accepted)


def test_a_bundle_of_another_pass_or_of_a_lost_replica_is_refused():
    book = Book(12, 3)
    queue, tally = book.queue, book.queue.tally
    for replica in range(3):
        book.computed(replica, 2)
    assert not book.offered(0, 0, 0, 2) and (tally.accepted, tally.refused) == (0, 2)
    queue.absent.add(2)
    assert not book.offered(2, 1, 0, 2) and (tally.accepted, tally.refused) == (0, 4)
    assert book.offered(0, 1, 0, 2) and (tally.accepted, tally.refused, queue.bundles) == (2, 4, [1, 0, 0])
    book.computed(0, 4)
    assert book.offered(0, 1, 2, 2) and queue.bundles == [2, 0, 0] and queue.loss == 2.0
    assert not book.offered(0, 1, 2, 2), "its portions count once"


def test_what_of_a_refused_bundle_nobody_else_has_is_computed_again_in_its_order():
    book = Book(3, 2)
    book.computed(0, 2)
    book.computed(0, 3)
    assert book.queue._given == [[0, 1, 2], [2]] and book.offered(1, 1, 0, 1)
    assert not book.offered(0, 1, 0, 3), "one of its portions has been accepted"
    assert book.queue._given[0] == [0, 1, 2, 0, 1] and not book.queue.complete
    book.computed(0, 5)
    assert book.offered(0, 1, 3, 2) and book.queue.complete and book.queue.tally.accepted == 3


def test_a_block_stays_where_it_was_computed():
    book = Book(8, 2)
    assert book.queue._given == [[0, 1], [4, 5]]
    book.computed(1, 2)
    book.computed(1, 4)
    assert book.queue._given[1] == [4, 5, 6, 7, 3, 2], "what it takes from the other is what that one would come to last"
    assert book.offered(1, 1, 0, 6) and book.offered(0, 1, 0, 2) and book.queue.complete
    book.queue.open(2, Range(0, 8), book.portions)
    assert [list(left) for left in book.queue._queues] == [[0, 1], [2, 3, 4, 5, 6, 7]]


def test_a_portion_is_computed_by_two_at_most_and_by_another_where_one_is_silent():
    book = Book(1, 3)
    assert book.queue._given == [[0], [0], []] and book.queue.tally.backups == 1
    book = Book(1, 3, backups=False)
    assert book.queue._given == [[0], [], []] and book.queue.tally.backups == 0
    beats = np.zeros(3)
    book.queue.hear(beats)
    book.now, beats[1:] = 2.0, 1
    book.queue.hear(beats)
    book.queue.turn()
    assert book.queue._given == [[0], [0], []] and book.queue.tally.backups == 1


def test_backups_are_first_of_what_no_living_replica_has_and_then_of_what_was_not_computed():
    book, beats = Book(2, 3, absent=(1, 2)), np.zeros(3)
    book.queue.hear(beats)
    book.computed(0, 1)
    book.queue.absent = {2}
    book.queue.turn()
    assert book.queue._given == [[0, 1], [1], []]
    # Portion 0 was computed by one that is silent now and may never deliver it; portion 1 is under way.
    book.now, beats[1:], book.queue.absent = 2.0, 1, set()
    book.queue.hear(beats)
    book.queue.turn()
    assert book.queue._given == [[0, 1], [1], [0]]


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


def coordinator_driven(world: BatchWorld, others: Sequence[Iterator[Any]], seconds: float = 0.2) -> None:
    """Drive the coordinator with a deadline of one second; between its turns everyone else has one, and time goes on."""

    def turns() -> Turns:
        for wait in world.leading:
            yield wait
            if world.done and not world.checkpoints.writing and wait is IDLE:
                return
            # Less than a quarter of the deadline: a longer turn would be one in which the job was stopped.
            world.now += seconds
            assert world.now < 1000, "no end"
            for other in others:
                next(other, None)

    drive(turns(), 1.0, clock=world.clock)


def test_a_checkpoint_longer_than_the_deadline_ends_nothing():
    world = BatchWorld(8, 2, 1, 1, [Range(0, 8)])
    checkpoints, left, begun = world.checkpoints, [0], []

    def advance() -> bool:
        left[0] -= checkpoints.writing
        checkpoints.writing = left[0] > 0
        return checkpoints.writing

    def begin(tables: dict, state: dict, seconds: float, steps: int) -> None:
        begun.append(state)
        checkpoints.writing, left[0] = True, 60

    checkpoints.due, checkpoints.advance, checkpoints.begin = lambda steps: not begun, advance, begin
    coordinator_driven(world, [*world.shards, *world.replicas])
    assert left[0] <= 0 and len(world.results) == len(begun) == 1
    # Replicas alone that live are no progress of a checkpoint: where the disk hangs, the wait ends.
    hung = BatchWorld(8, 2, 1, 1, [Range(0, 8)])
    hung.checkpoints.writing = True
    with pytest.raises(Lost, match="waits for the shards to send a checkpoint"):
        coordinator_driven(hung, [*hung.shards, *hung.replicas])


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_end_of_a_run_waits_for_whom_it_names(evaluates: bool):
    """Where the disk hangs, or the replica that evaluates, the signs of life of others are no progress."""
    world = BatchWorld(8, 2, 1, 2, [])
    world.leading, world.checkpoints.writing = world.coordinator.finish(), not evaluates
    if evaluates:
        world.coordinator.replicas.evaluate(0)

    def living() -> Iterator[None]:
        while True:
            world.workers[1].orders.poll(now=True)
            yield

    said = "the evaluation by replica 0" if evaluates else "the shards to send a checkpoint"
    with pytest.raises(Lost, match=f"the coordinator waits for {said}"):
        coordinator_driven(world, [*world.shards, living()])


def test_replicas_are_heard_while_they_move_data():
    """A replica that pushes for long polls no orders, but gives signs of life; of a cut one all partitions must."""
    world = BatchWorld(8, 2, 1, 2, [])
    coordinator, now = world.coordinator, [0.0]
    topology = Topology(shards=1, replicas=2, partitions=2)
    memory = LocalWindow(
        [WindowLayout([*coordinator_fields(topology), *heartbeat_fields(topology)]), *(WindowLayout(()) for _ in range(5))]
    )
    watch = HeartbeatWatch(memory, topology, 100.0, lambda: now[0])
    pulses = [Heartbeat(memory, topology, rank, 100.0, lambda: False, lambda: now[0]) for rank in range(1, topology.size)]
    coordinator.duties.membership._watch = watch
    heard, queue = [], coordinator.queue
    for silent in ((), (2,), ()):
        for _ in range(3):
            now[0] += 10
            world.now += 10
            for rank, pulse in enumerate(pulses, start=1):
                if rank not in silent:
                    pulse.beat()
            progress = coordinator.listen()
            queue.hear(coordinator.beats)
        heard.append([progress, queue.silent(0), queue.silent(1)])
    assert heard == [[True, False, False], [True, True, False], [True, False, False]]


@pytest.mark.parametrize("goes_on", [True, False])
def test_bundles_that_arrive_for_longer_than_the_deadline_end_nothing(goes_on: bool):
    world = BatchWorld(8, 2, 1, 1, [])

    def role() -> Turns:
        yield from world.coordinator.space.ask([Fill("gradient", 0.0)])
        world.done = True
        yield IDLE

    def shard() -> Iterator[Any]:
        for _ in range(60):
            if goes_on:
                world.coordinator.shards.channel.send(0, "events", ())
            yield
        yield from world.shards[0]

    world.leading = role()
    with nullcontext() if goes_on else pytest.raises(Lost, match="waits for shard 0 to answer"):
        coordinator_driven(world, [shard()])
    assert world.done is goes_on


def test_a_replica_that_ends_later_than_the_deadline_ends_nothing():
    """The method has ended while a replica evaluates for long."""
    world = BatchWorld(8, 2, 1, 1, [])

    def evaluating() -> Iterator[None]:
        orders = world.workers[0].orders
        for _ in range(60):
            orders.poll(now=True)
            yield
        orders.note(done=1)
        orders.poll(now=True)

    def role() -> Turns:
        yield from world.coordinator.dismiss()
        world.done = True
        yield IDLE

    world.leading = role()
    coordinator_driven(world, [evaluating()])
    assert world.done
    hung = BatchWorld(8, 2, 1, 1, [])
    hung.leading = hung.coordinator.dismiss()
    with pytest.raises(Lost, match="waits for the replicas to end"):
        coordinator_driven(hung, [])


@pytest.mark.parametrize("lost", [False, True])
def test_no_trial_point_is_evaluated(lost: bool):
    """The replica that is asked sleeps before it has its copy and comes back amid a pass, or is lost amid one as it evaluates."""
    world, first = BatchWorld(24, 2, 1, 3, []), 1
    replicas, orders = world.coordinator.replicas, world.workers[first].orders
    scores: list[float] = []
    world.record.evaluation, gone = lambda *row: scores.append(row[-4]), False

    def role() -> Turns:
        for k in (1, 2, 3):
            yield from world.coordinator.space.run([Fill("params", k)])
            yield from world.coordinator.evaluate()
            yield from world.coordinator.space.run([Fill("params", k + 0.5)])
            yield from world.coordinator.loss(Range(0, 24), "base")
        world.done = True

    world.leading = role()
    if lost:
        orders.report = lambda score: None  # type: ignore[method-assign]
    for _ in range(20000):
        amid = world.accruals[0].params[0] == 1.5 and world.coordinator.queue.number == 1
        if lost and amid and not gone:
            assert replicas.evaluating == first
            world.lose(first)
            gone = True
        world.now += 0.01
        for moved in range(5):
            if moved != 2 + first or ((amid or scores) and not gone) or (lost and not amid):
                world.move(moved)
        if world.done:
            break
    assert world.done and (lost or world.workers[first].computed > 0)
    assert (first in world.coordinator.duties.membership.active) != lost and gone == lost
    assert sorted(set(scores)) == ([2, 3] if lost else [1, 2, 3]), scores


# --- how fast -----------------------------------------------------------------------------------------------------------------


def turns_of(slow: int, backups: bool, portions: int = 200, push_every: int = 2) -> int:
    """Return the turns of one pass by four replicas of which one needs `slow` turns for what the others do in one."""
    spans = [Range(0, portions * 8)]
    # Slots hold a whole push, so that computing is what takes the turns.
    world = BatchWorld(portions * 8, 8, 1, 4, spans, f"push_every={push_every} backups={backups} patience=1e9", slot=1 << 16)
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


def blocks_read(world: BatchWorld) -> Iterator[Any]:
    """Yield what each replica was given in the present pass, as blocks."""
    queue = world.coordinator.queue
    for given_here in queue._given:
        yield [queue._portions[p].block for p in given_here]


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
    worker, beats[0] = BatchWorld(8, 4, 1, 1, [Range(0, 8)]).workers[0], 0
    worker.orders.beat, worker.replica.open = beat, lambda portion, alive: alive()
    worker._batch = Range(0, 8)
    next(worker._compute(Task(1, 0, 0, False)), None)
    assert beats[0] > 0


def test_portions_go_where_their_examples_are():
    spans = [Range(0, 60)] * 4
    world = BatchWorld(60, 3, 1, 4, spans, "push_every=1 backups=False")
    seen: list[list[list[int]]] = []
    while not world.done:
        world.now += 0.001
        for role in range(6):
            world.move(role)
        if world.coordinator.queue.complete and len(seen) < len(world.results):
            seen.append(list(blocks_read(world)))
    world.finish()
    assert seen[0] == [list(range(5 * r, 5 * r + 5)) for r in range(4)], "neighbors, in order"
    assert all(later == seen[0] for later in seen)
