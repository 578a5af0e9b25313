"""The wire protocol in one process: conservation, rings, slices, staleness, any number of shards."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from harness import Late, World, over
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet.comm.topology import Topology
from dbnet.comm.turns import Wait, take_turns
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.orders import GO, MADE, STATUS
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, split
from dbnet.core.registry import make
from dbnet.network.model import Footprint, Piece
from dbnet.shards.local_store import LocalStore
from dbnet.shards.push import Intake
from dbnet.shards.routes import Rings, Route, routes
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox, WindowStore


def whole_numbers(replica: int, step: int, w: np.ndarray) -> np.ndarray:
    """A gradient of whole numbers, different for every replica, step and parameter, so that sums are exact."""
    return np.round(100 * np.sin(1 + np.arange(w.size) * (1 + replica) + 7 * step))


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 23),
    shards=st.integers(1, 5),
    replicas=st.integers(1, 4),
    steps=st.integers(0, 9),
    n_fetch=st.integers(1, 4),
    n_push=st.integers(1, 4),
    slots=st.integers(2, 4),
    data=st.data(),
)
def test_every_gradient_is_applied_once(size, shards, replicas, steps, n_fetch, n_push, slots, data):
    """computed = applied + in flight + still accrued, at any moment of any schedule."""
    options = (f"n_fetch={n_fetch}", f"n_push={n_push}", "slot=64", f"slots={slots}", "local_rate=0.0")
    world = World(size, shards, replicas, steps, whole_numbers, options)
    for _ in range(data.draw(st.integers(0, 60))):
        if data.draw(st.booleans()):
            world.work(data.draw(st.integers(0, replicas - 1)))
        else:
            world.serve(data.draw(st.integers(0, shards - 1)))
    # A replica between two turns holds what it has not put into a ring yet: follow each push through its ring to see it all.
    world.run()
    computed = sum((g for replica in world.replicas for g in replica.computed), np.zeros(size))
    assert [len(r.computed) for r in world.replicas] == [steps] * replicas
    np.testing.assert_array_equal(world.w, -computed)
    assert not world.in_flight().any()


def test_what_is_in_flight_balances_the_ledger():
    """Whole pushes that fit their ring: computed = applied + in the rings after every single turn."""
    world = World(6, 2, 2, 5, whole_numbers, ("slots=16",))
    pattern = [("work", 0), ("work", 1), ("work", 0), ("serve", 0), ("work", 1), ("serve", 1)] * 12
    for move in pattern:
        world.script([move])
        computed = sum((g for r in world.replicas for g in r.computed), np.zeros(6))
        np.testing.assert_array_equal(computed, -world.w + world.in_flight())


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "momentum", "adam"])
@pytest.mark.parametrize("shards", [2, 3, 4])
def test_any_number_of_shards_gives_the_same_bits(rule, shards):
    """On the same script of turns S shards equal one shard."""

    def curved(replica: int, step: int, w: np.ndarray) -> np.ndarray:
        return np.sin(w * (1 + replica)) + 0.1 * step

    results = []
    for count in (1, shards):
        world = World(11, count, 3, 6, curved, ("slot=64", "n_push=2"), {"kind": rule, "rate": 0.1})
        rng = np.random.default_rng(5)
        for _ in range(150):
            if rng.integers(0, 2):
                world.work(int(rng.integers(0, 3)))
            else:
                world.serve_all()
        world.run()
        results.append(world.w)
    np.testing.assert_array_equal(results[0], results[1])


def test_staleness_is_what_the_script_predicts():
    """Replica 0 fetches, replica 1 makes three whole steps, then replica 0 pushes: three updates late."""
    world = World(4, 1, 2, 4, whole_numbers)
    world.script([("work", 0), ("work", 1)])  # both have seen GO
    world.work(0)  # fetched, not yet computed
    for _ in range(3):
        world.work(1)  # fetch
        world.work(1)  # gradient and push
        world.serve(0)
    world.work(0)
    world.serve(0)
    events = world.shards[0].take_events()
    late = events["applied"] - events["fetched"]
    assert events["replica"].tolist() == [1, 1, 1, 0]
    assert events["push"].tolist() == [0, 1, 2, 0]
    assert late.tolist() == [0, 0, 0, 3]
    assert np.bincount(late).tolist() == [3, 0, 0, 1]


def test_staleness_counts_from_the_oldest_accrued_gradient():
    world = World(4, 1, 2, 6, whole_numbers, ("n_push=3", "n_fetch=1"))
    world.run()
    events = world.shards[0].take_events()
    mine = events[events["replica"] == 0]
    assert mine["steps"].tolist() == [1, 3, 2]  # step 0 pushes, then every third, then the remainder


@pytest.mark.parametrize("direct", [False, True])
def test_the_clock_of_a_push_is_that_of_its_oldest_gradient(direct):
    """Two gradients in one push, and between them another replica's update: it is as late as the first one is."""
    world = World(4, 1, 2, 9, whole_numbers)
    shard = world.shards[0]
    stores = [LocalStore(shard.params, [shard], r, share=False) for r in range(2)] if direct else world.stores

    def gradient(replica: int, first: bool = True) -> None:
        for _ in stores[replica].fetch():
            pass
        stores[replica].accrued(first)

    def push(replica: int, steps: int) -> None:
        take_turns([stores[replica].push(steps, 0)])
        world.serve_all()

    gradient(0)
    gradient(1)
    push(1, 1)
    gradient(0, first=False)
    push(0, 2)
    gradient(0)
    push(0, 1)
    assert shard.take_events()[["replica", "fetched", "applied"]].tolist() == [(1, 0, 0), (0, 0, 1), (0, 2, 2)]


def test_the_warmstarts_steps_are_applied_before_they_are_reported():
    world = World(4, 1, 2, 9, whole_numbers, ("n_push=2",), tables=("warmstart.steps=4",))
    world.memory.local["order"][0, GO] = 2
    status = world.memory.local["status"][0]
    for _ in range(30):
        world.work(0)
    assert len(world.replicas[0].computed) == 4 and status[STATUS.index("steps")] < 4
    world.serve_all()
    for _ in range(30):
        world.work(0)
    assert len(world.replicas[0].computed) == 4 and status[STATUS.index("steps")] == 4
    np.testing.assert_array_equal(world.w, -sum(world.replicas[0].computed))
    world.memory.local["order"][0, GO] = 1
    world.run()
    assert len(world.replicas[0].computed) == 9


class Moving(Late):
    """A window in which the shard makes an update after each transfer from it: its clock is what its parameters say."""

    def __init__(self, memory: LocalWindow) -> None:
        super().__init__(memory, self.update)

    def update(self, rank: int) -> None:
        self._all[rank]["params"] += 1
        self._all[rank]["clock"] += 1


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_the_clock_is_read_before_the_parameters(overlap):
    """A measured staleness may be too large, never too small: parameters are at least as new as their clock says."""
    world = World(6, 2, 1, 9, whole_numbers, (f"overlap={overlap}",))
    store = world.stores[0]
    over(store, Moving(world.memory))
    for _ in range(3):
        for _ in (*store.fetch(), *store.arrive()):
            pass
        versions = [store.w[part.slice].max() for part in world.ranges]
        assert (store.clocks < versions).all() and store.clocks.max() == max(versions) - 1
    store.close()


@pytest.mark.parametrize("slots", [2, 3])
def test_only_what_was_flushed_has_moved(slots):
    """A transfer ends with its flush and no sooner, the newest first, and between any two the shards serve."""
    world = World(23, 2, 2, 6, whole_numbers, ("slot=64", f"slots={slots}"))
    for store in world.stores:
        over(store, Late(world.memory, lambda rank: world.serve_all()))
    world.run()
    np.testing.assert_array_equal(world.w, -sum(g for r in world.replicas for g in r.computed))
    for shard in world.shards:
        events = shard.take_events()
        assert all(events["push"][events["replica"] == r].tolist() == list(range(6)) for r in range(2))


def test_who_is_given_more_fetches_before_it_goes_on():
    """Between its own end and what a lost replica leaves others have trained; with n_fetch = 3 step 4 would not fetch by itself."""
    world = World(4, 1, 1, 4, whole_numbers, ("n_fetch=3", "n_push=1"))
    world.run()
    world.shards[0].params += 1000
    world.memory.local["order"][0, MADE] = -4  # as if four of the steps had been nobody's
    for _ in range(30):
        world.work(0)
        world.serve_all()
    seen = world.replicas[0].seen
    assert len(seen) == 8
    np.testing.assert_array_equal(seen[4], 1000 - sum(world.replicas[0].computed[:4]))


def test_a_full_ring_makes_the_replica_wait_and_loses_nothing():
    world = World(40, 1, 1, 3, whole_numbers, ("slot=64", "slots=2"))  # 5 slices of 8 numbers through 2 slots
    world.script([("work", 0), ("work", 0)])  # has seen GO, has fetched
    for _ in range(4):
        turn = next(world.turns[0])
        assert isinstance(turn, Wait)
        assert turn.reason == "replica 0 waits for shard 0 to make room in its ring"
    heads = world.memory.at(1).local["head"]
    assert heads[0] == 2
    world.serve(0)
    next(world.turns[0])
    assert heads[0] == 3
    world.run()
    np.testing.assert_array_equal(world.w, -sum(world.replicas[0].computed))
    assert heads[0] == 15  # the ring has wrapped seven times


def test_a_shard_without_parameters_has_no_rings_and_no_harm():
    world = World(3, 5, 2, 4, whole_numbers)
    assert [len(u) for u in world.users] == [2, 2, 2, 0, 0]
    world.run()
    np.testing.assert_array_equal(world.w, -sum(g for r in world.replicas for g in r.computed))


def test_overlap_takes_effect_one_step_later_and_conserves():
    world = World(16, 2, 2, 8, whole_numbers, ("overlap=true", "slot=64", "slots=2"))
    world.run()
    np.testing.assert_array_equal(world.w, -sum(g for r in world.replicas for g in r.computed))


def test_an_error_on_the_mover_reaches_the_replica():
    world = World(4, 1, 1, 3, whole_numbers, ("overlap=true",))

    def broken(*_: object) -> None:
        raise RuntimeError("the network is gone")

    world.work(0)
    world.memory.put = broken
    with pytest.raises(RuntimeError, match="the network is gone"):
        for _ in range(10_000):
            world.work(0)


def test_everyone_waiting_is_an_error_that_names_them():
    world = World(40, 1, 1, 3, whole_numbers, ("slot=64", "slots=2"))
    with pytest.raises(UserError, match="replica 0 waits for shard 0"):
        take_turns(world.turns)


def test_routes_follow_the_footprint():
    """Two pieces with a gap, cut by two shards in the middle of the second."""
    ways = routes([Piece(Range(2, 5), 0), Piece(Range(8, 14), 3)], split(20, 2))
    assert ways == [Route(0, 5, (0, 3), (2, 8), (0, 3)), Route(1, 4, (0,), (0,), (5,))]
    assert ways[0].segments(1, 4) == [(0, 3, 2), (2, 8, 2)]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 7),
)
def test_routes_carry_every_parameter_once(gaps, shards, slot):
    """Whatever the gaps between pieces, in the shards and in the origin's own vector, where others may own what lies between."""
    pieces, at, place = [], 0, 0
    for gap, n, skip in gaps:
        pieces.append(Piece(Range(place + gap, place + gap + n), at + skip))
        at, place = at + skip + n, place + gap + n
    ranges, got = split(place, shards), np.full(place, -1)
    for route in routes(pieces, ranges):
        first = 0
        while first < route.size:
            here = route.slice(first, slot)
            n = here.stop - here.start
            assert 0 < n <= slot
            for start, target, length in route.segments(first, n):
                where = ranges[route.shard].lo + target
                assert (got[where : where + length] == -1).all()
                got[where : where + length] = here.start + start + np.arange(length)
            first += n
    expected = np.full(place, -1)
    for piece in pieces:
        expected[piece.range.slice] = piece.at + np.arange(piece.range.size)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_an_evaluation_before_the_first_step_does_not_stand_for_a_fetch(overlap):
    """A snapshot leaves training as it was: the first gradient is that of fetched parameters."""
    world = World(4, 1, 1, 3, whole_numbers, (f"overlap={overlap}", "n_fetch=2"))
    world.memory.at(1).local["params"][:] = 7
    for _ in world.stores[0].snapshot(np.zeros(4)):
        pass
    world.run()
    assert (world.replicas[0].seen[0] == 7).all()
    assert world.stores[0].counts.fetches == 2


def test_overlapped_fetches_keep_the_local_steps_that_count():
    """n_fetch = 2: the local step of a fetch's own step is replaced by what lands; the other one reaches the next gradient."""
    world = World(4, 1, 1, 6, lambda r, k, w: np.ones_like(w), ("overlap=true", "n_fetch=2", "n_push=100", "local_rate=0.5"))
    world.run()
    # Nothing but gradient 0 is pushed before the end, so every fetch brings 0 or -1: all other movement is local.
    seen = [float(w[0]) for w in world.replicas[0].seen]
    assert seen[0] == 0
    assert seen[4] - seen[3] == -0.5


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    shards=st.integers(1, 3),
    moves=st.lists(st.integers(0, 5), max_size=60),
    after=st.integers(0, 30),
)
def test_a_lost_replica_is_applied_up_to_where_it_was_cut_off(size, shards, moves, after):
    """Each shard holds its first pushes whole, of one more perhaps the first slices, and nothing that comes later."""
    world = World(size, shards, 2, 1000, whole_numbers, ("slot=64", "slots=3"))
    for move in moves:
        world.work(1) if move < 3 else world.serve(move % shards)
    closed = [inbox.close(1) for inbox in world.inboxes]
    counts = [None if pair is None else pair[0] for pair in closed]
    before = world.w
    for _ in range(after):
        world.work(1)
    world.serve_all()
    np.testing.assert_array_equal(world.w, before)
    for shard, applied in zip(world.shards, counts, strict=True):
        part = shard.range
        assert (applied is None) is (part.size == 0)
        if part.size:
            pushes = [gradient[part.slice] for gradient in world.replicas[1].computed]
            rest = -shard.params - sum(pushes[:applied], np.zeros(part.size))
            following = pushes[applied] if applied < len(pushes) else np.zeros(part.size)
            assert any(np.array_equal(rest, np.where(np.arange(part.size) < n, following, 0)) for n in range(part.size + 1))
            assert shard.clock[0] == applied


def test_what_a_lost_replica_had_sent_is_applied_and_its_gradients_counted():
    """n_push = 3: its pushes hold gradients 0; 1 .. 3; 4 .. 6, and all of them lie in the ring."""
    world = World(8, 1, 2, 99, whole_numbers, ("n_push=3", "slot=64", "slots=4", "local_rate=0.0"))
    while world.stores[1].counts.pushes < 3:
        world.work(1)
    assert world.inboxes[0].close(1) == (7, 7) and not world.in_flight().any()
    np.testing.assert_array_equal(world.w, -sum(world.replicas[1].computed[:7]))


def test_the_least_and_the_most_that_partitions_of_a_lost_replica_had_sent():
    world, parts, dtype = Topology(1, 2, 2), [Range(0, 4), Range(4, 10)], np.dtype("f8")
    rings = Rings([Range(0, 10)], [[0, 1, 2, 3]], dtype, 64, 8)
    memory = LocalWindow([WindowLayout(()), WindowLayout(rings.fields(0, world)), *(WindowLayout(()) for _ in range(4))])
    end = memory.at(1)
    shard = Shard(Range(0, 10), make("shards.rules", {"kind": "sgd"}, "rule"), end.local["params"], end.local["clock"], lambda: 0.0)
    stores = []
    for origin in range(4):
        pieces = [Piece(parts[origin % 2], 0)]
        stores.append(WindowStore(memory, world, divmod(origin, 2), Footprint(pieces, pieces, parts[origin % 2].size), rings))
    inbox = Inbox(end, [Intake(shard) for _ in range(4)], world, range(4), [store.routes[0] for store in stores])
    for origin, pushes in enumerate((1, 1, 2, 3)):
        for number in range(pushes):
            stores[origin].accrued(first=True)
            take_turns([stores[origin].push(1, number)])
    # One slice of each origin in a turn, whoever has more.
    assert inbox.drain() and end.local["tail"].tolist() == [1, 1, 1, 1]
    assert inbox.close(1) == (2, 3)
    events = shard.take_events()
    assert np.bincount(2 * events["replica"] + events["partition"]).tolist() == [1, 1, 2, 3]
    # Each partition has its clock, and no push claims to be of a later one.
    assert shard.clock.tolist() == [3, 4]
    stores[1].clocks[0] = 9
    stores[1].accrued(first=True)
    take_turns([stores[1].push(1, 1)])
    assert inbox.drain() and shard.take_events()[["fetched", "applied"]].tolist() == [(4, 4)]


def test_a_slot_is_free_when_its_slice_was_applied():
    world, tails = World(20, 1, 1, 3, whole_numbers, ("slot=64", "slots=2")), []
    (intake,), tail = world.inboxes[0].intakes, world.memory.at(1).local["tail"]
    take = intake.take
    intake.take = lambda *slice_: (tails.append(int(tail[0])), take(*slice_))[1]
    world.run()
    assert tails == list(range(9)) and tail[0] == 9


def test_an_evaluation_amid_a_push_leaves_its_staleness():
    """The clock of a push is that of its gradients' parameters, whatever a snapshot has read since."""
    world = World(4, 1, 2, 9, whole_numbers)
    one, other = world.stores
    for store in (one, other):
        take_turns([store.fetch()])
        store.accrued(first=True)
    take_turns([other.push(1, 0)])
    world.serve_all()
    take_turns([one.snapshot(np.zeros(4))])
    one.accrued(first=True)
    take_turns([one.push(1, 0)])
    world.serve_all()
    assert world.shards[0].take_events()[["fetched", "applied"]].tolist() == [(0, 0), (0, 1)]


def test_pushes_of_a_resumed_run_count_on():
    world = World(4, 1, 1, 3, whole_numbers)
    world.stores[0].resume(41)
    world.run()
    assert world.shards[0].take_events()["push"].tolist() == [41, 42, 43] and world.stores[0].number == 44


def test_what_was_moved_is_counted():
    world = World(10, 2, 1, 6, whole_numbers, ("n_fetch=2", "n_push=3", "slot=64"))
    world.run()
    counts = world.stores[0].counts
    assert (counts.fetches, counts.bytes_fetched) == (3, 3 * 80)
    assert (counts.pushes, counts.bytes_pushed) == (3, 3 * 80)


def test_a_gradient_accrues_beside_the_one_that_leaves():
    """Two of the five slices of the first push have left when the next gradient is computed, whose push waits for it."""
    world = World(40, 1, 1, 4, whole_numbers, ("overlap=true", "n_fetch=10", "slot=64", "slots=2", "local_rate=0.0"))
    for _ in range(30):
        world.work(0)
    assert len(world.replicas[0].computed) == 2
    world.run()
    np.testing.assert_array_equal(world.w, -sum(world.replicas[0].computed))


@pytest.mark.parametrize("overlap", ["false", "true"])
def test_a_push_is_confirmed_when_its_last_slice_is_applied(overlap):
    world, gate = World(24, 1, 1, 9, whole_numbers, (f"overlap={overlap}", "slot=64", "slots=8")), threading.Event()
    store, put = world.stores[0], world.memory.put

    def held_up(*transfer: object) -> None:
        assert gate.wait(30)
        put(*transfer)

    world.memory.put = held_up
    take_turns([store.fetch()])
    store.accrued(first=True)
    store.g[:] = 1
    if overlap == "false":
        gate.set()
    for _ in store.push(1, 0):
        pass
    confirmed = store.confirm()
    for _ in range(20):
        assert isinstance(next(confirmed), Wait), "nothing has left, or nothing was applied"
    gate.set()
    for slices in range(3):
        while not world.serve(0):
            next(confirmed)
        assert world.memory.at(1).local["tail"][0] == slices + 1
        assert slices == 2 or all(isinstance(next(confirmed), Wait) for _ in range(5))
    assert len(list(confirmed)) <= 1 and (world.w == -1).all()
    store.close()
