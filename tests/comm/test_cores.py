"""Cores that the ranks of a host share in virtual time, against what can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest

from dbnet.comm.simulated.clock import VirtualTime
from dbnet.comm.simulated.cores import Cores
from dbnet.comm.simulated.interconnect import Interconnect, Way
from dbnet.comm.simulated.memory import SimulatedMemory
from dbnet.comm.simulated.messages import SimulatedWires
from dbnet.comm.simulated.movers import VirtualMover
from dbnet.comm.simulated.window import SimulatedWindow
from dbnet.comm.turns import IDLE, Turns
from dbnet.comm.window import Field, WindowLayout


def ends(tasks: Mapping[int, tuple[float, float]], cores: int, slice: float = 4e-3, switch: float = 0.0) -> dict[int, float]:
    """Return when each rank ends that comes at a moment with so many seconds of work."""
    time, found = VirtualTime(), {}
    if cores:
        time.cores = dict.fromkeys(tasks, Cores(time, cores, switch, slice))

    def role(rank: int, comes: float, work: float) -> Turns:
        time.elapse(comes)
        time.compute(work)
        found[rank] = time.now
        return
        yield

    time.play({rank: role(rank, *task) for rank, task in tasks.items()}, {})
    return found


def shared(tasks: Mapping[int, tuple[float, float]], cores: int) -> dict[int, Fraction]:
    """Return the same in exact arithmetic, from change to change of the number of busy ranks."""
    left = {rank: Fraction(work) for rank, (_, work) in tasks.items()}
    comes, now, found = {rank: Fraction(at) for rank, (at, _) in tasks.items()}, Fraction(0), {}
    while len(found) < len(tasks):
        busy = [rank for rank in tasks if rank not in found and comes[rank] <= now]
        speed = min(Fraction(1), Fraction(cores, len(busy))) if busy else Fraction(1)
        until = min([now + left[rank] / speed for rank in busy] + [at for at in comes.values() if at > now])
        for rank in busy:
            left[rank] -= (until - now) * speed
            if not left[rank]:
                found[rank] = until
        now = until
    return found


def test_two_on_one_core_have_it_in_turns_of_a_slice() -> None:
    """The second one has slept, so it displaces the first; then each has the core for a slice."""
    tasks = {0: (0.0, 2.0), 1: (0.0, 1.5)}
    assert ends(tasks, 1, slice=1.0) == {1: 2.5, 0: 3.5}
    assert ends(tasks, 2, slice=1.0) == {0: 2.0, 1: 1.5}
    # Who comes back takes a quarter longer: 1 to 1.25, 0 to 2.5, 1 to 3 (the quarter that is left, and one more), 0 to 4.25.
    assert ends(tasks, 1, slice=1.25, switch=0.25) == {1: 3.0, 0: 4.25}


def test_who_wakes_displaces_whoever_has_had_more() -> None:
    """Not one that has had less: it waits for the end of the slice."""
    assert ends({0: (0.0, 3.0), 1: (1.0, 0.5)}, 1, slice=10.0) == {1: 1.5, 0: 3.5}
    time, found = VirtualTime(), {}
    time.cores = dict.fromkeys(range(2), Cores(time, 1, slice=10.0))

    def role(rank: int, *tasks: tuple[float, float]) -> Turns:
        for sleeps, work in tasks:
            time.elapse(sleeps)
            time.compute(work)
            found.setdefault(rank, []).append(time.now)
        return
        yield

    time.play({0: role(0, (0.0, 5.0)), 1: role(1, (1.0, 2.0), (0.5, 1.0))}, {})
    # At 3.5 it has had 2, the other one 1.5.
    assert found == {1: [3.0, 8.0], 0: [7.0]}


@pytest.mark.parametrize("cores", [1, 2, 3, 5])
def test_in_the_long_run_all_get_the_same(cores: int) -> None:
    """As in exact arithmetic of equal shares, up to slices, and to how cores help each other."""
    rng = np.random.default_rng(cores)
    tasks = {rank: (float(rng.integers(0, 40)) / 4, float(rng.integers(1, 30)) / 8) for rank in range(25)}
    found, exact = ends(tasks, cores), shared(tasks, cores)
    off = [found[rank] - float(exact[rank]) for rank in tasks]
    assert max(map(abs, off)) < 0.08 * max(found.values()) and len(set(found.values())) > 10
    # No core is idle while somebody waits.
    assert cores > 1 or max(found.values()) == pytest.approx(float(max(exact.values())))


def test_who_gives_way_goes_behind_those_that_wait() -> None:
    """So two replicas on one core take turns step by step, although a slice would last for all their steps."""
    order, time = [], VirtualTime(turn=1e-4)
    time.cores = dict.fromkeys(range(2), Cores(time, 1, slice=10.0))

    def steps(rank: int) -> Turns:
        for _ in range(3):
            time.compute(1.0)
            order.append(rank)
            yield None

    time.play({rank: steps(rank) for rank in range(2)}, {})
    assert order == [1, 0, 1, 0, 1, 0] and time.now == pytest.approx(6.0 + 6e-4)


@pytest.mark.parametrize(("cores", "work", "wanted"), [(1, 2.0, 2.064), (2, 2.0, 2.0), (2, 0.0105, 0.0105)])
def test_a_partition_that_waits_gives_its_core_to_the_one_it_waits_for(cores: int, work: float, wanted: float) -> None:
    """After 64 looks of a millisecond; on two cores it finds what comes while it looks at once."""
    time, found = VirtualTime(), {}
    time.cores = dict.fromkeys(range(2), Cores(time, cores, slice=10.0))
    wires = SimulatedWires(range(2), Interconnect(time, [0, 0], Way(0.0, 1e12), Way(0.0, 1e12), look=1e-3))

    def sends() -> Turns:
        time.compute(work)
        wires.send(0, 1, "tag", np.ones(1))
        return
        yield

    def waits() -> Turns:
        found["values"] = wires.take(0, 1, "tag", "values").tolist()
        found["at"] = time.now
        return
        yield

    time.play({0: sends(), 1: waits()}, {})
    assert found["values"] == [1.0]
    # It sleeps in the end, 50 us from look to look, each of which may cost the other one a millisecond.
    assert found["at"] == pytest.approx(wanted, rel=0.02)


def test_who_has_a_core_ends_as_alone_to_the_bit() -> None:
    """Also after a time in which cores were short."""
    rng = np.random.default_rng(0)
    tasks = {rank: (float(rng.random()), float(rng.random())) for rank in range(4)}
    assert ends(tasks, 4) == ends(tasks, 0)
    late = tasks | {rank: (comes + 100.0, work) for rank, (comes, work) in enumerate(tasks.values(), start=4)}
    short = ends(late | {8: (0.0, 5.0), 9: (0.0, 5.0)}, 4)
    alone = ends(late, 0)
    assert {rank: short[rank] for rank in range(4, 8)} == {rank: alone[rank] for rank in range(4, 8)}
    # Cores were short before, or the comparison would show nothing.
    assert max(short[8], short[9]) > 5.0


@pytest.mark.parametrize(("cores", "wanted"), [(0, 2.0), (1, 4.0)])
def test_copies_within_a_host_take_a_core(cores: int, wanted: float) -> None:
    """Two ranks put 1 MB each at 1 MB/s and begin with a second of calls: at once where they have cores, else in turns."""
    time, found = VirtualTime(), {}
    wire = Interconnect(time, [0, 0, 0], Way(0.0, 1e6), Way(0.0, 1e-9), overhead=1.0)
    memory = SimulatedMemory([WindowLayout([Field("params", "uint8", (10**6,))]), WindowLayout([]), WindowLayout([])])
    if cores:
        time.cores = dict.fromkeys(range(3), Cores(time, cores))

    def role(rank: int) -> Turns:
        window = SimulatedWindow(memory, wire, rank)
        window.put(0, "params", np.full(10**6, rank, np.uint8))
        window.flush(0)
        found[rank] = time.now
        # Whoever only put goes on ahead of what it has put.
        time.elapse(1.0)
        return
        yield

    time.play({rank: role(rank) for rank in (1, 2)}, {})
    # A slice may lie between the two.
    assert list(found.values()) == pytest.approx([wanted] * 2, abs=5e-3)
    assert memory.local[0]["params"].tolist()[:: 10**6 - 1] == [list(found)[-1]] * 2


def test_of_what_is_copied_only_that_within_a_host_takes_a_core() -> None:
    """Operations of a second; 8 bytes at one a second to a rank of the host, and as many from another host."""
    time, found = VirtualTime(), []
    wire = Interconnect(time, [0, 0, 1], Way(0.0, 1.0), Way(0.0, 1e9), overhead=1.0)
    memory = SimulatedMemory([WindowLayout([Field("params", "uint8", (8,))])] * 3)
    time.cores = dict.fromkeys(range(2), Cores(time, 2))

    def role() -> Turns:
        window, out = SimulatedWindow(memory, wire, 1), np.zeros(8, np.uint8)
        window.put(0, "params", out)
        window.flush(0)
        found.append(time.now)
        window.get(2, "params", out)
        window.flush(2)
        found.append(time.now)
        return
        yield

    time.play({1: role()}, {})
    assert found == pytest.approx([9.0, 10.0])


def test_naps_of_a_partition_that_waits_long_are_too_long_by_what_the_system_adds() -> None:
    """A tenth of a second each, so it finds after the third what came after a quarter."""
    time, found = VirtualTime(late=0.1), []
    time.cores = dict.fromkeys(range(2), Cores(time, 2))
    wires = SimulatedWires(range(2), Interconnect(time, [0, 0], Way(0.0, 1e12), Way(0.0, 1e12), look=1e-7))

    def sends() -> Turns:
        time.compute(0.25)
        wires.send(0, 1, "tag", np.ones(1))
        return
        yield

    def waits() -> Turns:
        wires.take(0, 1, "tag", "values")
        found.append(time.now)
        return
        yield

    time.play({0: sends(), 1: waits()}, {})
    assert found == pytest.approx([0.3], abs=0.01)


def test_a_server_is_woken_at_the_look_that_would_find_what_arrives() -> None:
    """After 0.12, 0.26, 0.44, 0.7, 1.12, 1.86 ms and every 1.1 ms; then one pause as long as the last one after it was woken."""
    time, found = VirtualTime(pause=1e-3, late=1e-4), []

    def serves() -> Turns:
        for _ in range(2):
            yield IDLE
            found.append(time.now)

    def wakes() -> Turns:
        for pause in (1e-2, 9.6e-4):
            time.elapse(pause)
            time.notify(1, 2)
        return
        yield

    time.play({1: serves(), 2: wakes()}, {1: 10.0})
    assert found == pytest.approx([1.066e-2, 1.176e-2])


def test_pauses_are_too_long_by_what_the_system_adds() -> None:
    """Of a rank that polls, and of a server that an arrival wakes at the look that would have found it."""
    time, found = VirtualTime(pause=1e-3, late=1e-4), {}

    def polls() -> Turns:
        for _ in range(3):
            yield IDLE
        found["polls"] = time.now

    def serves() -> Turns:
        yield IDLE
        found["serves"] = time.now

    def wakes() -> Turns:
        time.elapse(2e-4)
        time.notify(1, 2)
        return
        yield

    time.play({0: polls(), 1: serves(), 2: wakes()}, {1: 10.0})
    # 20, 40 and 80 us, each too long by 100; the server looks after 120 and 260 us, and finds then what came at 200.
    assert found == pytest.approx({"polls": 4.4e-4, "serves": 2.6e-4})


@pytest.mark.parametrize(("turn", "wanted"), [(1e-4, {1: 1.1e-3, 0: 1.2e-3}), (1e-5, {1: 1.02e-3, 0: 8e-5})])
def test_a_look_for_work_takes_a_core_that_is_shared(turn: float, wanted: dict[int, float]) -> None:
    """Of a server, too, whose looks in vain are left out where it has a core of its own."""
    time, found = VirtualTime(pause=1e-3, turn=turn), {}
    time.cores = dict.fromkeys(range(2), Cores(time, 1))

    def looks() -> Turns:
        for _ in range(2):
            yield IDLE
        found[0] = time.now

    def computes() -> Turns:
        time.compute(1e-3)
        found[1] = time.now
        return
        yield

    time.play({0: looks(), 1: computes()}, {0: 10.0})
    # Pauses of 20 and 40 us. The second look of 100 us has had more than the one that computes, and waits for its end.
    assert found == pytest.approx(wanted)


def test_many_that_look_for_work_let_others_get_on() -> None:
    """Also where more of them wake than the one that computes could come back to its core: it has it for a while then."""
    time, found = VirtualTime(pause=1e-3, turn=2e-6), {}
    time.cores = dict.fromkeys(range(31), Cores(time, 1, switch=4e-5))

    def looks() -> Turns:
        while not found and time.now < 0.2:
            yield IDLE

    def computes() -> Turns:
        time.compute(1e-2)
        found["at"] = time.now
        return
        yield

    time.play({rank: computes() if rank == 30 else looks() for rank in range(31)}, dict.fromkeys(range(30), 0.0))
    # Of twice 40 us once goes into coming back, so it takes twice as long, and as much as the others' looks.
    assert 1.5e-2 < found["at"] < 2.5e-2


@pytest.mark.parametrize(
    ("mine", "others", "ahead", "wanted"),
    [
        # It had the other core before, which two ranks want now: it takes a tenth of a second of the one whose data it moves.
        ([(0.0, 1.0, 0.1), (0.0, 1.0, 0.1), (0.0, 1.0, 0.0)], [[(1.5, 10.0)], [(1.2, 0.1), (0.3, 10.0)]], 0.0, 3.1),
        # No more want that core than this one.
        ([(0.0, 1.0, 0.1), (0.0, 1.0, 0.1), (0.0, 1.0, 0.0)], [[(1.5, 10.0)]], 0.0, 3.0),
        # They want it by then, though its rank has gone ahead of them.
        ([(0.0, 1.0, 0.1), (0.0, 1.0, 0.1), (0.0, 1.0, 0.0)], [[(2.6, 10.0)], [(1.65, 0.1), (0.95, 10.0)]], 0.5, 4.1),
        # It had 5 s there as the others did, and so has had its share here, where its rank has had 2.
        ([(0.0, 1.0, 5.0), (5.0, 1.0, 0.1), (0.0, 1.0, 0.0)], [[(6.2, 10.0)], [(6.05, 0.05), (0.2, 10.0)]], 0.0, 8.1),
        # One of the others has had but 2.8 s there: it has had more than its share here, too.
        (
            [(0.0, 1.0, 5.0), (0.0, 0.1, 0.0), (4.9, 3.0, 0.1), (0.0, 1.0, 0.0)], [[(6.2, 10.0)], [(0.2, 0.1), (6.0, 10.0)]],
            0.0, 10.0,
        ),
    ],
)  # fmt: skip
def test_what_moves_data_wakes_on_its_ranks_core_if_fewer_want_that(
    mine: list[tuple[float, float, float]], others: list[list[tuple[float, float]]], ahead: float, wanted: float
) -> None:
    """Of a rank that sleeps, computes and has data moved, beside others that sleep and compute: when it ends."""
    time, found = VirtualTime(), []
    time.cores = dict.fromkeys((0, 1, 2, 9), Cores(time, 2, slice=100.0))
    mover = VirtualMover(time, 9, "replica 0")

    def transfer(seconds: float) -> Turns:
        time.compute(seconds)
        return
        yield

    def moves() -> Turns:
        for sleeps, work, moved in mine:
            if sleeps:
                time.elapse(sleeps)
            time.compute(work)
            if moved:
                time.ahead(time.now + ahead)
                mover.start(transfer(moved))
        found.append(time.now)
        mover.stop()
        return
        yield

    def busy(tasks: list[tuple[float, float]]) -> Turns:
        for sleeps, work in tasks:
            time.elapse(sleeps)
            time.compute(work)
        return
        yield

    time.play({0: moves(), **{rank: busy(tasks) for rank, tasks in enumerate(others, 1)}}, {})
    assert found == pytest.approx([wanted])


def test_what_moves_data_stays_on_its_core_from_one_transfer_to_the_next() -> None:
    """Another wants that core, and its rank's core none; it is awake, so it comes behind the other there."""
    time, found = VirtualTime(), []
    time.cores = dict.fromkeys((0, 1, 2, 3, 9), Cores(time, 2, slice=100.0))
    mover = VirtualMover(time, 9, "replica 0")

    def transfer(seconds: float) -> Turns:
        time.compute(seconds)
        return
        yield

    def moves() -> Turns:
        time.compute(0.1)
        for seconds, beside in ((2.0, 0.05), (0.5, 0.0)):
            job = mover.start(transfer(seconds))
            time.compute(beside)
            while not job.done.wait(100.0):
                pass
            found.append(time.now)
        mover.stop()
        return
        yield

    def busy(*tasks: tuple[float, float]) -> Turns:
        for sleeps, work in tasks:
            time.elapse(sleeps)
            time.compute(work)
        return
        yield

    time.play({0: moves(), 1: busy((0.2, 20.0)), 2: busy((0.3, 0.5)), 3: busy((0.4, 1.0), (0.5, 20.0))}, {})
    assert found == pytest.approx([3.1, 21.2])


@pytest.mark.parametrize(
    ("tasks", "cores", "slice", "switch", "wanted"),
    [
        # One whose work ends when another wakes is not displaced.
        ({0: [(1.25, 1.75)], 1: [(1.0, 0.25)]}, 1, 10.0, 0.0, {1: [1.25], 0: [3.0]}),
        # At 2.2 rank 1 has had 0.5 s, less than the mean of the three, but more than rank 2 that has the core.
        (
            {0: [(0.0, 10.0)], 1: [(1.0, 0.5), (0.7, 0.5)], 2: [(2.0, 10.0)]}, 1, 100.0, 0.0,
            {1: [1.5, 12.5], 2: [12.0], 0: [21.0]},
        ),
        # At 6.0 rank 0 has had 3 s, more than the mean, so rank 2 comes next, though the slice of rank 0 would end first.
        ({0: [(0.0, 20.0)], 1: [(5.0, 1.0)], 2: [(1.0, 2.0), (2.5, 1.0)]}, 1, 10.0, 0.0, {2: [3.0, 7.0], 1: [6.0], 0: [24.0]}),
        # At 10.0 rank 1 goes to the core of rank 0, which at 10.5 has not had more there, though it has had 10 s.
        (
            {0: [(0.0, 10.0), (0.5, 1.0)], 1: [(8.0, 20.0)], 2: [(0.1, 0.1), (8.3, 20.0)]}, 2, 100.0, 0.0,
            {2: [0.2, 28.5], 0: [10.0, 11.5], 1: [30.5]},
        ),
        # Rank 0 comes back at 1.5 and has the core up to 2.0, when rank 2 displaces it, which has waited since 1.6.
        ({0: [(0.0, 3.0)], 1: [(1.0, 0.5)], 2: [(1.6, 0.5)]}, 1, 10.0, 0.25, {1: [1.5], 2: [2.5], 0: [4.5]}),
        # At 0.06 rank 1 leaves the first core to rank 0; the second one gives none back for 32 ms.
        ({0: [(0.02, 0.07)], 1: [(0.04, 0.06)], 2: [(0.03, 0.04)]}, 2, 0.02, 0.0, {1: [0.1], 0: [0.11], 2: [0.11]}),
        # Who has had a slice comes a slice later.
        ({0: [(1.75, 2.25), (0.0, 0.75)], 1: [(1.75, 2.75)]}, 1, 0.25, 0.0, {0: [6.25, 7.5], 1: [7.25]}),
    ],
)  # fmt: skip
def test_who_comes_next_is_who_has_had_less(
    tasks: dict[int, list[tuple[float, float]]], cores: int, slice: float, switch: float, wanted: dict[int, list[float]]
) -> None:
    """Of ranks that sleep and work, again and again: when each of their works ends."""
    time, found = VirtualTime(), {}
    time.cores = dict.fromkeys(tasks, Cores(time, cores, switch, slice))

    def role(rank: int) -> Turns:
        found[rank] = []
        for sleeps, work in tasks[rank]:
            time.elapse(sleeps)
            time.compute(work)
            found[rank].append(time.now)
        return
        yield

    time.play({rank: role(rank) for rank in tasks}, {})
    assert {rank: pytest.approx(moments) for rank, moments in found.items()} == wanted


def test_what_arrives_while_another_has_the_core_is_seen_when_one_has_it_again() -> None:
    """One looks for 10 s; from 1.0 to 3.0 another has its core, and at 2.0 it comes."""
    time, found = VirtualTime(), {}
    cores = Cores(time, 1, slice=100.0)
    time.cores = dict.fromkeys(range(2), cores)

    def looks() -> Turns:
        time.at(2.0, 0, cores.arrived, time.player)
        cores.watch(10.0)
        found[0] = time.now
        return
        yield

    def computes() -> Turns:
        time.elapse(1.0)
        time.compute(2.0)
        found[1] = time.now
        return
        yield

    time.play({0: looks(), 1: computes()}, {})
    assert found == {1: 3.0, 0: 3.0}


def test_one_that_holds_its_core_and_does_not_compute_keeps_it() -> None:
    """As a rank does in a flush, up to 2.0: who wakes at 1.5 has the core then."""
    time, found = VirtualTime(), {}
    time.cores = dict.fromkeys(range(2), Cores(time, 1, slice=100.0))

    def flushes() -> Turns:
        time.compute(1.0)
        time.at(2.0, 0, time.player.go)
        time.switch()
        time.compute(1.0)
        found[0] = time.now
        return
        yield

    def wakes() -> Turns:
        time.elapse(1.5)
        time.compute(0.5)
        found[1] = time.now
        return
        yield

    time.play({0: flushes(), 1: wakes()}, {})
    assert found == {1: 2.5, 0: 3.5}
