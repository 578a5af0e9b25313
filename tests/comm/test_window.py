"""What the protocols ask of a window: order where it matters, arrays that live until the flush, pieces, room."""

from __future__ import annotations

import gc
import weakref
from functools import partialmethod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import Late, World, over

from dbnet.comm import mpi
from dbnet.comm.channel import Message, MpiChannel
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Wait
from dbnet.comm.window import Field, LocalWindow, MpiWindow, WindowLayout
from dbnet.coordinator.heartbeat import Heartbeat, heartbeat_fields
from dbnet.coordinator.orders import EVALUATE, LOST, MADE, SHARES, OrderBook, Orders, coordinator_fields, most_shares
from dbnet.core.errors import UserError
from dbnet.core.jit import fence
from dbnet.core.ranges import Range
from dbnet.data.batches import Cursor
from dbnet.data.portions import Blocks
from dbnet.data.subsets import Share
from dbnet.methods.sandblaster.tasks import Tasks, task_fields
from dbnet.methods.sandblaster.work_queue import WorkQueue
from dbnet.network.model import Footprint, Piece
from dbnet.network.replica import Score
from dbnet.shards import store
from dbnet.shards.push import Intake, Push, Refusal
from dbnet.shards.routes import Rings, routes
from dbnet.shards.store import Inbox, WindowStore


class Watched(np.ndarray):
    """A field that notes whenever it is read or written."""

    def of(self, name: str, trace: list[str]) -> Watched:
        self.name, self.trace = name, trace
        return self

    def __getitem__(self, key):
        self.trace.append(f"load {self.name}")
        return self.view(np.ndarray)[key]

    def __setitem__(self, key, value):
        # An order is many levels, each a word of its own.
        self.trace.append(f"store {self.name} {key[-1]}" if self.name == "order" else f"store {self.name}")
        self.view(np.ndarray)[key] = value

    def copy(self):
        return self[...].copy()


class Traced(LocalWindow):
    """A target's end of a window that notes what is done to its memory, in order."""

    def __init__(self, memory: LocalWindow, rank: int) -> None:
        super().__init__((), rank, memory._all)
        self.trace: list[str] = []
        self.local = {name: field.view(Watched).of(name, self.trace) for name, field in self.local.items()}

    def sync(self) -> None:
        self.trace.append("sync")

    def ordered(self, first: str, then: str) -> bool:
        """Return whether something is done to both, and between them, whenever `then` follows, there is a sync."""
        seen, found = -1, False
        for i, event in enumerate(self.trace):
            if event == first:
                seen = i
            elif event == then and seen >= 0:
                if "sync" not in self.trace[seen:i]:
                    return False
                seen, found = -1, True
        return found


class Words:
    """Numbers of a field that are read and written as such, and headers that are unpacked from its bytes; it notes that."""

    def __init__(self, name: str, trace: list[str], words: Any) -> None:
        self._name, self._trace, self._words = name, trace, words
        self.pack_into = getattr(words, "pack_into", None)

    def __getitem__(self, at: int) -> int:
        self._trace.append(f"load {self._name}")
        return self._words[at]

    def __setitem__(self, at: int, value: int) -> None:
        self._trace.append(f"store {self._name}")
        self._words[at] = value

    def unpack_from(self, *parts: Any) -> tuple[int, ...]:
        self._trace.append(f"load {self._name}")
        return self._words.unpack_from(*parts)


class Noting:
    """A receiver that notes what a real one does to window memory."""

    largest, informed = np.inf, False

    def __init__(self, part: Range, trace: list[str], clock: np.ndarray) -> None:
        self.range, self.clock, self._trace = part, clock, trace
        self.pushes: list[Push] = []

    def begin(self, partition: int, fetched: int = 0) -> int:
        return 1

    def apply(self, lo: int, g: np.ndarray, t: int, arrival: object = None) -> None:
        self._trace += ["load ring", "store params"]

    def finish(self, push: Push) -> None:
        self.pushes.append(push)
        self.clock[push.partition] += 1

    def refuse(self, refusal: Refusal) -> None:
        raise AssertionError(refusal)


class Shop:
    """One shard and one replica over a window, 10 parameters, slices of 4."""

    def __init__(self, size: int = 10, slot: int = 32) -> None:
        world, part = Topology(1, 1), Range(0, size)
        piece = Piece(part, 0)
        rings = Rings([part], [[0]], np.dtype("f8"), slot, 8)
        self.memory = LocalWindow([WindowLayout(()), WindowLayout(rings.fields(0, world)), WindowLayout(())])
        self.shard = Traced(self.memory, 1)
        self.receiver = Noting(part, self.shard.trace, self.shard.local["clock"])
        self.inbox = Inbox(self.shard, [Intake(self.receiver)], world, [0], routes([piece], [part]))
        self.store = WindowStore(self.memory, world, (0, 0), Footprint([piece], [piece], size), rings)

    def push(self) -> None:
        self.store.accrued(first=True)
        for _ in self.store.push(1, 0):
            pass


def test_a_shard_orders_head_slot_tail_parameters_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop()
    inbox, trace = shop.inbox, shop.shard.trace
    inbox._heads, inbox._tails = Words("head", trace, inbox._heads), Words("tail", trace, inbox._tails)
    monkeypatch.setattr(store, "_WORDS", Words("header", trace, store._WORDS))
    for _ in range(2):
        shop.push()
        while shop.inbox.drain():
            pass
    order = shop.shard.ordered
    assert order("load head", "load header") and order("load head", "load ring")
    assert order("load ring", "store tail") and order("load header", "store tail")
    assert order("store params", "store clock")
    assert len(shop.receiver.pushes) == 2


def test_a_torn_clock_is_clipped() -> None:
    shop = Shop()
    shop.receiver.clock[0] = 7
    shop.store.clocks[0] = 1 << 40
    shop.push()
    shop.store.clocks[0] = -3
    shop.push()
    while shop.inbox.drain():
        pass
    assert [push.fetched for push in shop.receiver.pushes] == [7, 0]


def test_the_coordinator_orders_offers_verdicts_spans_and_tasks() -> None:
    memory = LocalWindow([WindowLayout([*task_fields(1)])])
    mine = Traced(memory, 0)
    queue = WorkQueue(mine, 1, 1, False, 10.0, lambda: 0.0)
    queue.open(1, Range(0, 4), Blocks(2, 4).portions(Range(0, 4)))
    queue.turn()
    tasks = Tasks(memory, 0, lambda: 0.0)
    for _ in range(2):
        tasks.look()
        first = tasks.index
        tasks.finish()
        tasks.offer(first, 1.0, 1)
        queue.turn()
    assert queue.complete
    assert mine.ordered("store span", "store task")
    assert mine.ordered("load offered", "load offer") and mine.ordered("load offer", "store verdict")


def test_the_coordinator_orders_reports_and_shares() -> None:
    world = Topology(1, 1)
    memory = LocalWindow([WindowLayout(coordinator_fields(world))])
    mine = Traced(memory, 0)
    book, orders = OrderBook(mine, world), Orders(memory, world, 0, lambda: 0.0)
    book.give(0, [Share(0, 0, 5)], made=3)
    for _ in range(2):
        book.evaluate(0)
        orders.poll(now=True)
        orders.copied()
        orders.report(Score(1.0, 2.0, 3.0, 4.0))
        assert book.collect() == Score(1.0, 2.0, 3.0, 4.0)
    assert mine.ordered("load reported", "load report") and mine.ordered("load report", f"store order {EVALUATE}")
    assert all(mine.ordered(first, f"store order {SHARES}") for first in ("store share", "store cursor", f"store order {MADE}"))


class Office:
    """The coordinator and two replicas over a window, the second of which is told of."""

    def __init__(self, period: float = 0.0, link: object = None) -> None:
        self.world, self.now, self.found = Topology(1, 2), 0.0, []
        self.memory = LocalWindow([WindowLayout(coordinator_fields(self.world)), *(WindowLayout(()) for _ in range(3))])
        self.desk = OrderBook(self.memory, self.world)
        late = Late(self.memory, lambda rank: self.found.append(self.desk.collect()))
        self.orders = Orders(late, self.world, 1, lambda: self.now, link, period)


def test_a_report_is_of_the_evaluation_whose_parameters_were_fetched() -> None:
    office, score = Office(), Score(1.0, 2.0, 3.0, 4.0)
    desk, orders = office.desk, office.orders
    desk.evaluate(1)
    orders.poll(now=True)
    assert orders.evaluation_wanted and not desk.snapshot_taken
    orders.copied()
    assert desk.snapshot_taken
    # It takes so long that another one is asked for.
    desk.withdraw()
    desk.evaluate(1)
    orders.poll(now=True)
    orders.report(Score(5.0, 6.0, 7.0, 8.0))
    assert orders.evaluation_wanted and desk.evaluating == 1 and not any(office.found)
    orders.copied()
    orders.report(score)
    # It was there before its number, and was taken once.
    assert [s for s in office.found if s] == [score] and desk.evaluating is None and not orders.evaluation_wanted


def test_what_is_given_and_how_far_it_is() -> None:
    office = Office()
    desk, orders, most = office.desk, office.orders, most_shares(office.world)
    given = [Share(0, 0, 5, 2, 3), Share(1, 4, 9, 1, 0)]
    desk.give(0, [Share(0, 5, 7)])
    desk.give(1, given, made=3)
    orders.poll(now=True)
    assert (orders.given, orders.made) == (2, 3) and [orders.share(i) for i in range(2)] == given
    assert desk.shares(1) == given, "as it was given, before it says more"
    orders.note(done=1, taken=1)
    orders.note_cursors([Cursor(3, 1), Cursor(1, 2)])
    orders.poll(now=True)
    assert desk.shares(1) == [Share(0, 0, 5, 3, 1), Share(1, 4, 9, 1, 2)] and desk.shares(0) == [Share(0, 5, 7)]
    assert not desk.done(1), "it does not know yet of all that it was given"
    orders.note(taken=2)
    orders.poll(now=True)
    assert desk.done(1)
    desk.give(1, given * ((most - 2) // 2), made=4)
    assert len(desk.shares(1)) == most and desk.made(1) == 7
    with pytest.raises(UserError, match="More replicas were lost than the run can take"):
        desk.give(1, given[:1])


def test_orders_are_read_when_it_is_time_or_urgent() -> None:
    office, filled = Office(period=1.0), []

    def fill() -> None:
        filled.append(office.now)
        office.orders.note(steps=len(filled))

    heartbeat, steps = office.memory.local["status"][1, :1], office.memory.local["status"][1, 2:3]
    for now, urgent, beats in ((0.0, False, 1), (0.5, False, 1), (0.9, True, 2), (1.5, False, 2), (1.9, False, 3), (2.0, False, 3)):
        office.now = now
        office.orders.poll(urgent, fill)
        # What a replica tells is put together for that alone, and goes with it.
        assert heartbeat[0] == beats == len(filled) == steps[0]


def test_a_lost_replica_learns_it_and_its_evaluation_is_lost_once() -> None:
    office = Office()
    office.desk.evaluate(1)
    assert not office.desk.give_up(0) and office.desk.give_up(1) and not office.desk.give_up(1)
    assert office.desk.evaluating is None
    office.orders.poll(now=True)
    assert office.orders.has(LOST)


def test_parameters_may_change_when_all_partitions_have_their_copy() -> None:
    """Whoever says so before the others have met would let them fetch what is evaluated anew."""
    office, said = Office(), []
    office.orders.link = SimpleNamespace(meet=lambda: said.append(office.desk.snapshot_taken), share=lambda values: None)
    office.desk.evaluate(1)
    office.orders.poll(now=True)
    office.orders.copied()
    assert said == [False] and office.desk.snapshot_taken


def test_the_barrier_is_one_for_compiler_and_processor() -> None:
    fence.compiled()
    code = next(iter(fence.compiled.inspect_llvm().values())) if not fence.compiled.stats.cache_hits else "fence seq_cst"
    assert "fence seq_cst" in code


class Lazy(LocalWindow):
    """A window whose Put reads its array at the flush, as MPI may."""

    def __init__(self, memory: LocalWindow, rank: int = 0) -> None:
        super().__init__((), rank, memory._all)
        self.waiting: list[tuple[int, str, weakref.ref, int]] = []

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self.waiting.append((rank, field, weakref.ref(data), start))

    def flush(self, rank: int) -> None:
        gc.collect()
        for target, field, data, start in self.waiting:
            array = data()
            assert array is not None, f"the array put into {field} is gone before the flush"
            super().put(target, field, array, start)
        self.waiting.clear()


def test_what_is_put_lives_until_the_flush() -> None:
    world = Topology(1, 1)
    memory = LocalWindow([WindowLayout([*coordinator_fields(world), *heartbeat_fields(world)]), WindowLayout(()), WindowLayout(())])
    lazy = Lazy(memory)
    heartbeat = Heartbeat(lazy, world, 2, 20.0, lambda: False)
    heartbeat.beat("waits for shard 0 to make room in its ring")
    assert bytes(memory.local["waits"][2]).startswith(b"waits for shard 0")
    orders = Orders(lazy, world, 0, lambda: 0.0)
    orders.poll(now=True)
    orders.report(Score(1.0, 2.0, 3.0, 4.0))
    assert memory.local["report"][0, 1:].tolist() == [1.0, 2.0, 3.0, 4.0]


class Rung(Late):
    """A window that notes whom an origin wakes, and what lies in a field of its memory by then."""

    def __init__(self, memory: LocalWindow, field: str) -> None:
        super().__init__(memory)
        self.field, self.found = field, []

    def wake(self, rank: int) -> None:
        self.found.append((rank, int(self._all[rank][self.field][0])))


def test_targets_are_woken_when_what_they_are_to_see_is_there() -> None:
    shop = Shop()
    rung = over(shop.store, Rung(shop.memory, "head"))
    shop.push()
    shop.push()
    assert rung.found == [(1, 3), (1, 6)], "with the last of three slices"
    shop = Shop(size=3 * store.EARLY // 8, slot=store.EARLY)
    rung = over(shop.store, Rung(shop.memory, "head"))
    shop.push()
    assert rung.found == [(1, 1), (1, 3)], "with the first, too, where it is large"
    shop = Shop(size=100)
    rung = over(shop.store, Rung(shop.memory, "head"))
    shop.store.accrued(first=True)
    for wait in shop.store.push(1, 0):
        assert wait is None or rung.found[-1] == (1, shop.memory._all[1]["head"][0]), "before a full ring is waited for"
        while shop.inbox.drain():
            pass
    assert len(rung.found) < 7 and rung.found[-1] == (1, 25)
    world = Topology(1, 1)
    rung = Rung(LocalWindow([WindowLayout(coordinator_fields(world))]), "reported")
    orders = Orders(rung, world, 0, lambda: 0.0)
    orders.note(snapshot=1)
    orders.report(Score(1.0, 2.0, 3.0, 4.0))
    assert rung.found == [(0, 1)]
    rung = Rung(LocalWindow([WindowLayout(task_fields(1))]), "offered")
    tasks = Tasks(rung, 0, lambda: 0.0)
    tasks.finish()
    tasks.offer(0, 1.0, 1)
    assert rung.found == [(0, 0), (0, 1)]
    job, found = World(10, 1, 1, 2, lambda replica, step, w: np.ones(10)), []
    job.memory.wake = lambda rank: found.append((rank, job.done))
    job.run()
    assert found == [(1, False), (1, False), (0, True)]
    sent, woken = [], []
    comm = SimpleNamespace(rank=1, isend=lambda message, rank: sent.append(rank))
    channel = MpiChannel(comm, lambda rank: woken.append((rank, *sent)), ("events",))
    channel.send(0, "events")
    channel.send(0, "drained")
    assert woken == [(0, 0, 0)]


class Slow:
    """A communicator whose messages arrive at the sender's next look; long ones are under way until they are taken."""

    def __init__(self) -> None:
        self.rank, self.here, self.queue = 0, [], []

    def isend(self, message: Message, rank: int) -> SimpleNamespace:
        self.queue.append(message.kind)
        return SimpleNamespace(Test=lambda: message.content is None or message.kind not in self.here + self.queue)

    def iprobe(self, rank: int) -> None:
        self.here, self.queue = self.here + self.queue, []

    improbe = partialmethod(iprobe, 0)


def test_who_is_woken_before_the_message_is_there_is_woken_again() -> None:
    """A server rests long only when nothing that it sent needs its looks; by then all who got something were woken after that."""
    comm, rung, rests = Slow(), [], []
    channel = MpiChannel(comm, lambda rank: rung.append((rank, bool(comm.here))), ("few", "many"))
    channel.send(1, "drained")
    channel.send(2, "few")
    channel.send(3, "many", np.zeros(1))
    channel.send(4, "saved", np.zeros(1))
    assert rung == [(1, False), (4, False)]
    channel.receive()
    assert rung[2:] == [(1, True), (3, True), (4, True)], "a long message needs its receiver, be it ever so patient"
    channel.rest(0.04, rests.append)
    assert rung[5:] == [(3, True), (4, True)]
    comm.here.clear()
    channel.rest(0.04, rests.append)
    channel.rest(0.04, rests.append)
    assert rests == [1e-3, 0.04, 0.04] and len(rung) == 8
    # Nothing that is sent between two looks is left out.
    channel.send(1, "drained")
    channel.rest(0.04, rests.append)
    assert rung[8:] == [(1, False), (1, True)]


class Told:
    """A window's MPI and its communicator: what is put into `memory` arrives at once, or when its rank calls MPI again."""

    def __init__(self, rank: int, size: int, said: list, at_once: bool = True) -> None:
        self.rank, self.size, self.said, self.at_once = rank, size, said, at_once
        self.memory = np.zeros(4, np.uint8)

    def Send(self, data: np.ndarray, rank: int) -> None:
        if self.at_once:
            self.memory[:] = 1
            self.memory[0] = 3

    def Recv(self, data: np.ndarray, rank: int) -> None:
        self.said.append(("Recv", rank))

    def Put(self, data: tuple, rank: int, target: tuple) -> None:
        self.said.append(("Put", rank, data[1], int(data[0][0])))

    def Get(self, data: tuple, rank: int, target: tuple) -> None:
        self.said.append(("Get", rank, data[1]))

    def Flush(self, rank: int) -> None:
        self.said.append(("Flush", rank))

    def Barrier(self) -> None:
        self.memory[0] = 3

    def Sync(self) -> None:
        pass

    def allgather(self, seen: bool) -> list[bool]:
        return [True, seen]


def tried(comm: Told) -> bool:
    """Try a window out whose two first ranks of three have four bytes."""
    win = object.__new__(MpiWindow)
    win._win, win._memory, win._byte = comm, comm.memory, None
    win._layouts = [WindowLayout([Field("four", "uint8", (4,))])] * 2 + [WindowLayout(())]
    return win.direct(comm, 0.0)


def test_a_window_is_direct_where_targets_need_not_call_mpi() -> None:
    for at_once in (True, False):
        comm = Told(0, 3, [], at_once)
        assert tried(comm) is at_once and not comm.memory.any(), "window memory starts with zeros"
    said: list = []
    assert tried(Told(2, 3, said))
    # No target looks in vain, and none is answered by one that has not yet left MPI.
    assert said[:2] == [("Recv", 0), ("Recv", 1)]
    for rank in (0, 1):
        mine = [(what, *more) for what, whom, *more in said[2:] if whom == rank]
        assert mine == [
            *(("Put", 64, 1), ("Flush",), ("Get", 64), ("Flush",)),
            *(("Put", 1, 1), ("Flush",), ("Get", 1), ("Flush",)),
            *(("Put", 1, 3), ("Flush",)),
        ]


class Counted(LocalWindow):
    """A window that notes the bytes that are under way before each flush."""

    def __init__(self, memory: LocalWindow) -> None:
        super().__init__((), 0, memory._all)
        self.bytes, self.largest, self.moved = 0, 0, 0

    def _note(self, nbytes: int) -> None:
        self.bytes, self.largest = self.bytes + nbytes, max(self.largest, nbytes)

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        self._note(out.nbytes)
        super().get(rank, field, out, start)

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._note(data.nbytes)
        super().put(rank, field, data, start)

    def flush(self, rank: int) -> None:
        self.moved, self.bytes = self.moved + self.bytes, 0


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_long_transfer_gives_way_between_pieces(shards: int, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time the replica gives way, which is when it gives a sign of life, at most a piece has moved; one in time never does."""
    monkeypatch.setattr(store, "PIECE", 800)
    monkeypatch.setattr(store, "MOMENT", 0.0 if slow else np.inf)
    size, world = 1000, Topology(shards, 1)
    ranges = world.shard_ranges(size)
    rings = Rings(ranges, [[0]] * shards, np.dtype("f8"), 80, 100)
    memory = LocalWindow([WindowLayout(()), *(WindowLayout(rings.fields(s, world)) for s in range(shards)), WindowLayout(())])
    for s, part in enumerate(ranges):
        memory.at(1 + s).local["params"][:] = np.arange(*part)
    counted = Counted(memory)
    pieces = [Piece(Range(0, 400), 0), Piece(Range(400, 1000), 400)]
    mine = WindowStore(counted, world, (0, 0), Footprint(pieces, pieces, size), rings)
    for transfer, other, least in ((mine.fetch(), 8 * shards, 1), (mine.push(1, 0), 9 * 8 * shards, 0)):
        turns, before = 0, counted.moved
        mine.accrued(first=True)
        for wait in transfer:
            assert not isinstance(wait, Wait)
            assert not slow or counted.moved - before <= 800 + other, "more than a piece moved without a sign of life"
            before, turns = counted.moved, turns + 1
        assert turns >= 9 if slow else turns == least
        assert counted.largest <= 800
    np.testing.assert_array_equal(mine.w, np.arange(size))


MPI = SimpleNamespace(THREAD_SINGLE=0, THREAD_FUNNELED=1, THREAD_SERIALIZED=2, THREAD_MULTIPLE=3, WIN_SEPARATE=4, WIN_UNIFIED=5)


def test_an_mpi_that_does_not_do_is_refused() -> None:
    mpi.require_threads(MPI.THREAD_MULTIPLE, MPI)
    mpi.require_model(MPI.WIN_UNIFIED, MPI)
    with pytest.raises(UserError, match=r"thread level 'serialized'.*MPI4PY_RC_THREAD_LEVEL"):
        mpi.require_threads(MPI.THREAD_SERIALIZED, MPI)
    with pytest.raises(UserError, match="unified memory model"):
        mpi.require_model(MPI.WIN_SEPARATE, MPI)
