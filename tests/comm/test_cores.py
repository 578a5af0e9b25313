"""Cores that the ranks of a host share in virtual time, against what can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import pytest

from dbnet.comm.simulated.clock import VirtualTime
from dbnet.comm.simulated.cores import Cores
from dbnet.comm.simulated.interconnect import Interconnect, Way
from dbnet.comm.simulated.window import SimulatedMemory, SimulatedWindow
from dbnet.comm.turns import IDLE, Turns
from dbnet.comm.window import Field, WindowLayout


def ends(tasks: Mapping[int, tuple[float, float]], cores: int) -> dict[int, float]:
    """Return when each rank ends that comes at a moment with so many seconds of work."""
    time, found = VirtualTime(), {}
    if cores:
        time.cores = dict.fromkeys(tasks, Cores(time, cores))

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


def test_two_on_one_core_take_twice_as_long() -> None:
    assert ends({0: (0.0, 1.0), 1: (0.0, 1.0)}, 1) == {0: 2.0, 1: 2.0}
    assert ends({0: (0.0, 1.0), 1: (0.0, 1.0)}, 2) == {0: 1.0, 1: 1.0}


def test_three_that_come_one_after_the_other() -> None:
    """Alone for 1 s, two for 1 s at 1/2, three at 1/3: the last, short one leaves first; then halves again."""
    assert ends({0: (0.0, 3.0), 1: (1.0, 2.0), 2: (2.0, 0.5)}, 1) == {2: 3.5, 0: 5.5, 1: 5.5}
    # On two cores only the time of all three is shared: 2/3 each from 2 to 2.75.
    assert ends({0: (0.0, 3.0), 1: (1.0, 2.0), 2: (2.0, 0.5)}, 2) == {2: 2.75, 0: 3.25, 1: 3.25}


@pytest.mark.parametrize("cores", [1, 2, 3, 5])
def test_many_as_in_exact_arithmetic(cores: int) -> None:
    rng = np.random.default_rng(cores)
    tasks = {rank: (float(rng.integers(0, 40)) / 4, float(rng.integers(1, 30)) / 8) for rank in range(25)}
    found, exact = ends(tasks, cores), shared(tasks, cores)
    assert found == pytest.approx({rank: float(end) for rank, end in exact.items()}, rel=1e-12)
    assert len(set(found.values())) > 10


def test_who_has_a_core_ends_as_alone_to_the_bit() -> None:
    """Also after a time in which cores were short."""
    rng = np.random.default_rng(0)
    tasks = {rank: (float(rng.random()), float(rng.random())) for rank in range(4)}
    assert ends(tasks, 4) == ends(tasks, 0)
    late = tasks | {rank: (comes + 100.0, work) for rank, (comes, work) in enumerate(tasks.values(), start=4)}
    short = ends(late | {8: (0.0, 5.0), 9: (0.0, 5.0)}, 4)
    alone = ends(late, 0)
    assert {rank: short[rank] for rank in range(4, 8)} == {rank: alone[rank] for rank in range(4, 8)}
    # Those before were held up, or the comparison would show nothing.
    assert sum(short[rank] > alone[rank] for rank in range(4)) > 1


@pytest.mark.parametrize(("cores", "wanted"), [(0, 2.0), (1, 4.0)])
def test_copies_within_a_host_take_a_core(cores: int, wanted: float) -> None:
    """Two ranks put 1 MB each at 1 MB/s and begin with a second of calls: at once where they have cores, else in turns."""
    time, found = VirtualTime(), []
    wire = Interconnect(time, [0, 0, 0], Way(0.0, 1e6), Way(0.0, 1e-9), overhead=1.0)
    memory = SimulatedMemory([WindowLayout([Field("params", "uint8", (10**6,))]), WindowLayout([]), WindowLayout([])])
    if cores:
        time.cores = dict.fromkeys(range(3), Cores(time, cores))

    def role(rank: int) -> Turns:
        window = SimulatedWindow(memory, wire, rank)
        window.put(0, "params", np.full(10**6, rank, np.uint8))
        window.flush(0)
        found.append(time.now)
        # Whoever only put goes on ahead of what it has put.
        time.elapse(1.0)
        return
        yield

    time.play({rank: role(rank) for rank in (1, 2)}, {})
    assert found == pytest.approx([wanted] * 2, rel=1e-4)
    assert memory.local[0]["params"].tolist()[:: 10**6 - 1] == [2, 2]


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
        time.notify(1)
        return
        yield

    time.play({0: polls(), 1: serves(), 2: wakes()}, {1: 10.0})
    # 20, 40 and 80 us, each too long by 100; the server looks after 120 and 260 us, and finds then what came at 200.
    assert found == pytest.approx({"polls": 4.4e-4, "serves": 2.6e-4})


def test_a_look_for_work_takes_a_core_that_is_shared() -> None:
    """Of a server, too, whose looks in vain are left out where it has a core of its own."""
    time, found = VirtualTime(pause=1e-3, turn=1e-4), {}
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
    # Pauses of 20 and 40 us; each look of 100 us goes at half its speed, and holds up the other one.
    assert found == pytest.approx({0: 4.6e-4, 1: 1.2e-3})
