"""Bounds of waits, with a clock that the test moves: what goes on, what was idle, what was stopped as a whole is not waited for."""

from __future__ import annotations

import errno
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from dbnet.comm import mpi
from dbnet.comm.link import MpiLink
from dbnet.comm.patience import Limit, Patience
from dbnet.comm.threads import Job, Mover
from dbnet.comm.topology import Role, Topology
from dbnet.comm.turns import BESIDE, IDLE, Turns, Wait, drive
from dbnet.comm.window import Bells
from dbnet.coordinator.heartbeat import Watchdog
from dbnet.core.errors import Lost
from dbnet.run.ranks import Rank

BOUND = 10.0


class Clock:
    """A clock that stands still unless it is moved; where `step` is given it moves whenever it is read."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_a_wait_ends_after_the_bound() -> None:
    clock = Clock()
    patience, ages = Patience(BOUND, clock), []
    while not patience.over():
        clock.now += 1
        ages.append(clock.now)
    assert ages[-1] == BOUND + 1
    patience.begin()
    assert not patience.over()


def test_time_in_which_the_loop_did_not_run_does_not_count() -> None:
    clock = Clock()
    patience = Patience(BOUND, clock)
    for gap, over in ((2, False), (100, False), (2, False), (1000, False), (2, False), (2, False), (2.1, True)):
        clock.now += gap
        assert patience.over() is over


@pytest.mark.parametrize(("gap", "lost"), [(2.0, True), (100.0, False)])
def test_a_role_stopped_while_it_waits(gap: float, lost: bool) -> None:
    """It waits eight times as long as the bound allows, but was stopped meanwhile, or not."""
    clock = Clock()

    def role() -> Turns:
        for _ in range(8):
            yield Wait("a shard waits for a replica")
            clock.now += gap

    if lost:
        with pytest.raises(Lost):
            drive(role(), BOUND, clock=clock)
    else:
        drive(role(), BOUND, clock=clock)


@pytest.mark.parametrize("reason", ["", "a replica waits for shard 0"])
def test_who_has_been_idle_looks_less_often(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer there was nothing to do the longer the pause; who waits for somebody looks each millisecond."""
    pauses, at = [], []
    monkeypatch.setattr(time, "sleep", pauses.append)

    def role() -> Turns:
        for _ in range(400):
            at.append(len(pauses))
            yield Wait(reason)
        yield None
        at.append(len(pauses))
        yield Wait(reason)
        at.append(len(pauses))

    drive(role(), BOUND, clock=Clock(), lazy=0.02)
    longest = [sum(pauses[a:b]) for a, b in pairwise(at)]
    assert longest[-1] == 2e-5
    if reason:
        assert max(longest) <= 1e-3
    else:
        # Never more than a part of the time before; at last as long as it may be.
        assert all(pause <= max(1e-3, sum(longest[:i]) / 16) + 1e-9 for i, pause in enumerate(longest))
        assert longest[399] == pytest.approx(0.02)


def test_who_can_be_woken_soon_rests_long(monkeypatch: pytest.MonkeyPatch) -> None:
    slept, rested = [], []
    monkeypatch.setattr(time, "sleep", slept.append)

    def role() -> Turns:
        yield from (IDLE,) * 6 + (None,) + (IDLE,) * 2 + (Wait("the coordinator waits for the shards"),) * 20

    drive(role(), BOUND, clock=Clock(), lazy=0.04, rest=rested.append)
    assert rested == [0.04] * 3 and slept[:5] == pytest.approx([2e-5, 8e-5, 32e-5, 2e-5, 8e-5])
    # Not everything that is waited for rings.
    assert len(slept) == 25 and max(slept) <= 1e-3


def test_who_has_a_thread_at_work_is_not_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody rings when the disk has taken a slice of a checkpoint."""
    slept, rested = [], []
    monkeypatch.setattr(time, "sleep", slept.append)
    drive(iter((BESIDE,) * 40 + (IDLE,)), BOUND, clock=Clock(), lazy=0.04, rest=rested.append)
    assert len(slept) == 40 and max(slept) <= 0.01 and rested == [0.04]


class Hosts:
    """What `Bells` asks of a communicator, of a process that is several ranks: those before this one have said their part."""

    def __init__(self, rank: int, size: int, before: Sequence[Any] = ()) -> None:
        self.rank, self.size, self.before, self.asked = rank, size, list(before), 0

    def allgather(self, mine: Any) -> list[Any]:
        self.asked += 1
        return [mine] if isinstance(mine, bool) else [*self.before, mine]


def waiting(bells: Bells) -> bool:
    return bool(select.select((bells._socket,), (), (), 0)[0])


def test_ranks_of_a_host_wake_each_other() -> None:
    first = Bells(Hosts(0, 1), Hosts(0, 1))
    name = (0, first._socket.getsockname())
    second = Bells(Hosts(1, 2), Hosts(1, 2, [name]))
    assert second.everywhere and waiting(first)
    assert second._socket.getsockname() != name[1] and len(name[1]) > 16, "two jobs, in whatever namespace, share no name"
    first.rest(20.0)
    assert not waiting(first), "what was heard does not end the next rest"
    for _ in range(1000):
        second.ring(0)
    assert waiting(first), "whoever rings often waits for nobody"
    second.ring(5)
    third = Bells(Hosts(1, 3), Hosts(1, 2, [name]))
    assert not third.everywhere, "one rank is on another host"
    first.rest(20.0)
    third.ring(0)
    assert not waiting(first), "who does not rest is not woken"
    first.close()
    second.ring(0)
    assert not Bells(Hosts(1, 2), Hosts(1, 2, [name])).everywhere, "it sees other sockets"
    second.close()
    second.ring(0)


def test_a_ring_is_lost_to_no_ring_that_others_do_not_hear() -> None:
    """Busy ranks hear none; their number times those that the system lets wait at each is more than a socket may have under way."""
    ranks, names, busy = [], [], 40
    for rank in range(busy + 1):
        ranks.append(Bells(Hosts(rank, rank + 1), Hosts(rank, rank + 1, names)))
        names.append((rank, ranks[-1]._socket.getsockname()))
        ranks[0].rest(0.0)
    resting, ringing = ranks[-1], Bells(Hosts(busy + 1, busy + 2), Hosts(busy + 1, busy + 2, names))
    resting.rest(0.0)
    for rank in range(busy):
        for _ in range(1000):
            if not ringing.ring(rank):
                break
        else:
            raise AssertionError("as if somebody heard")
    assert not waiting(resting)
    ringing.ring(busy)
    assert waiting(resting)
    for bells in (*ranks, ringing):
        bells.close()


def test_a_rank_rings_again_where_it_had_no_socket_before(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EMFILE, "so it is")

    bells = Bells(Hosts(0, 1), Hosts(0, 1))
    bells._ways.pop(0).close()
    bells.rest(0.0)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        assert not bells.ring(0)
    assert bells.ring(0) and waiting(bells)
    bells.close()


class Broken(socket.socket):
    """A socket of a system that allows or gives nothing."""

    def send(self, *_: Any) -> int:
        raise self.why

    recv = send


@pytest.mark.parametrize("why", [errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.EACCES, errno.EAGAIN, errno.EBADF])
def test_a_ring_that_cannot_be_sent_ends_nothing(why: int) -> None:
    bells = Bells(Hosts(0, 1), Hosts(0, 1))
    assert bells.everywhere
    broken = Broken(socket.AF_UNIX, socket.SOCK_DGRAM)
    broken.why = OSError(why, "so it is")
    whole, bells._socket, bells._ways[0] = [bells._socket, bells._ways[0]], broken, broken
    assert not bells.ring(0)
    bells.rest(20.0)
    for end in whole:
        end.close()
    bells.close()


@pytest.mark.parametrize("what", ["socket", "bind", "connect", "send"])
def test_a_rank_without_a_socket_takes_part_in_all_that_is_collective(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "so it is")

    first = Bells(Hosts(0, 1), Hosts(0, 1))
    names, world, node = [(0, first._socket.getsockname())], Hosts(1, 2), Hosts(1, 2)
    node.before = names
    if what == "socket":
        monkeypatch.setattr(socket, "socket", refuse)
    else:
        monkeypatch.setattr(socket, "socket", type("Refusing", (socket.socket,), {what: refuse}))
    bells = Bells(world, node)
    assert not bells.everywhere and (node.asked, world.asked) == (1, 1)
    monkeypatch.undo()
    bells.ring(0)
    assert not Bells(Hosts(0, 2), Hosts(0, 2, [(0, b""), (1, None)])).everywhere, "another has none"
    first.close()


def test_a_stranger_who_sends_without_end_costs_one_look() -> None:
    bells, heard = Bells(Hosts(0, 1), Hosts(0, 1)), []

    def recv(size: int) -> None:
        heard.append(size)
        assert len(heard) < 1000

    whole, bells._socket = bells._socket, SimpleNamespace(recv=recv)
    bells.rest(20.0)
    assert len(heard) > 10, "more than wait at once"
    whole.close()


@pytest.mark.parametrize("role", Role)
def test_who_rests_on_one_host(role: Role) -> None:
    """Servers, by what they have sent, where all can be woken; nobody where transfers need a look."""
    rank, rests = object.__new__(Rank), []
    rank.rank, rank._ready = 0, SimpleNamespace(topology=SimpleNamespace(role=lambda rank: role))
    rank._channel = SimpleNamespace(rest=lambda seconds, rest: rests.append((seconds, rest)))
    rank._bells = None
    assert rank._idle(BOUND) == {}
    rank._bells = SimpleNamespace(everywhere=False, rest=rests.append)
    assert rank._idle(BOUND) == {"lazy": 0.01}
    rank._bells.everywhere = True
    idle = rank._idle(BOUND)
    assert idle["lazy"] == 0.01 and ("rest" in idle) is (role is not Role.WORK)
    if "rest" in idle:
        idle["rest"](idle["lazy"])
        assert rests == [(0.01, rank._bells.rest)]


def test_who_was_idle_between_two_waits_begins_anew() -> None:
    clock = Clock()

    def role() -> Turns:
        for _ in range(5):
            yield Wait("the coordinator waits for any replica to compute")
            for _ in range(4):
                clock.now += 2
                yield IDLE

    drive(role(), BOUND, clock=clock)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_transfer_that_goes_on_may_take_longer_than_the_bound(goes_on: bool) -> None:
    clock, job = Clock(), Job(iter(()))

    def beat(_: str) -> None:
        clock.now += 1
        job.moved += goes_on
        if clock.now > 5 * BOUND:
            job.done.set()

    if goes_on:
        drive(job.wait("its last push to leave"), BOUND, clock=clock, beat=beat)
    else:
        with pytest.raises(Lost, match="waits for its last push to leave"):
            drive(job.wait("its last push to leave"), BOUND, clock=clock, beat=beat)


def test_the_mover_counts_what_went_on() -> None:
    def transfer() -> Turns:
        yield None
        yield Wait("replica 0 waits for shard 0 to make room in its ring")
        yield None

    mover = Mover()
    job = mover.start(transfer())
    mover.stop()
    assert job.done.is_set() and job.moved == 2


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_transfer_behind_one_that_goes_on_is_not_waited_for_in_vain(goes_on: bool) -> None:
    clock, hold = Clock(), threading.Event()

    def push() -> Turns:
        yield Wait("replica 0 waits for shard 0 to make room in its ring")
        hold.wait(30)

    mover = Mover()
    mover.start(iter(()))
    first, fetch = mover.start(push()), mover.start(iter(()))

    def beat(_: str) -> None:
        clock.now += 1
        first.moved += goes_on
        if clock.now > 5 * BOUND:
            hold.set()

    try:
        drive(fetch.wait("the parameters it is fetching"), BOUND, clock=clock, beat=beat)
        assert goes_on
    except Lost:
        assert not goes_on
    finally:
        hold.set()
        mover.stop()
    # What is over is not kept.
    assert first.behind is None and fetch.behind is None


@pytest.mark.parametrize(("step", "ends"), [(0.01, True), (0.3, False)])
def test_the_watchdog_does_not_count_a_stop(step: float, ends: bool) -> None:
    """`step` is in bounds: how long it was asleep, each time, before it looked again."""
    said, looks, bound = [], [0], 0.02
    enough = threading.Event()

    def blocked() -> tuple[int, float]:
        looks[0] += 1
        if looks[0] > 200:
            enough.set()
        return (1, 0.0)

    dog = Watchdog(SimpleNamespace(blocked=blocked), "replica 0", Topology(1, 1), bound, said.append, Clock(step * bound))
    if ends:
        dog._thread.join(30)
    else:
        assert enough.wait(30)
    dog.stop()
    assert len(said) == ends


@pytest.mark.parametrize(("step", "ends"), [(0.01, True), (0.3, False)])
def test_starting_and_ending_are_bounded_without_a_stop(step: float, ends: bool) -> None:
    said, enough, bound = [], threading.Event(), 0.02
    clock = Clock(step * bound)

    def counted() -> float:
        if clock.now > 50 * bound:
            enough.set()
        return clock()

    def stop() -> None:
        said.append("waited in vain")
        enough.set()

    limit = Limit(bound, stop, counted)
    assert enough.wait(30)
    limit.lift()
    assert said == ["waited in vain"] * ends


def test_only_the_end_of_mpi_is_bounded_and_not_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finalize may wait for ranks that are dead; a picture may take long."""
    ended, handler = [], signal.getsignal(signal.SIGALRM)
    fake = SimpleNamespace(
        Is_initialized=lambda: True,
        Is_finalized=lambda: bool(ended),
        Finalize=lambda: ended.append(signal.getitimer(signal.ITIMER_REAL)[0]),
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))
    try:
        mpi.finalize()
        assert ended[0] > 0 and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    mpi.finalize()
    assert len(ended) == 1


@pytest.mark.parametrize(("gap", "lost"), [(2.0, True), (100.0, False)])
def test_partitions_that_were_stopped_wait_on(gap: float, lost: bool) -> None:
    clock, link, said = Clock(), object.__new__(MpiLink), []
    link.rank, link._bound, link._beat, link._graph = 0, Patience(BOUND, clock), said.append, str
    try:
        for _ in range(8):
            clock.now += gap
            link._patiently("another partition's values")
        assert not lost
    except Lost:
        assert lost
    assert said[0] == "waits for another partition's values"
