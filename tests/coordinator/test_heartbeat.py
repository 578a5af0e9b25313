"""Signs of life: who is lost when, who was given up, who waits for whom; with a clock that the test moves."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest

from dbnet.comm.channel import Mailboxes
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns, Wait, drive
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.duty import RunTime
from dbnet.coordinator.heartbeat import GivenUp, Heartbeat, HeartbeatWatch, Watchdog, heartbeat_fields, polling
from dbnet.coordinator.membership import LostReplica, Membership
from dbnet.coordinator.orders import OrderBook, coordinator_fields
from dbnet.core.errors import Lost, UserError

WORLD = Topology(shards=1, replicas=2, partitions=2, spares=1)
BOUND = 1.0


class Job:
    """All ranks' signs of life; `clock` is moved by hand."""

    def __init__(self, world: Topology = WORLD) -> None:
        self.now, self.asked = 0.0, set()
        self.memory = LocalWindow(
            [
                WindowLayout([*coordinator_fields(world), *heartbeat_fields(world)]),
                *(WindowLayout(()) for _ in range(1, world.size)),
            ]
        )
        self.watch = HeartbeatWatch(self.memory, world, BOUND, self.clock)
        self.replicas = OrderBook(self.memory, world)
        self.pulses = {
            rank: Heartbeat(self.memory, world, rank, BOUND, lambda rank=rank: rank in self.asked, self.clock)
            for rank in range(1, world.size)
        }

    def clock(self) -> float:
        return self.now

    def live(self, seconds: float, without: tuple[int, ...] = (), step: float = 0.1) -> list[int]:
        """Let time pass; return who is lost then."""
        lost: list[int] = []
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += step
            for rank, pulse in self.pulses.items():
                if rank not in without:
                    pulse.beat(f"waits for shard {rank}")
            if 0 not in without:
                lost = self.watch.look()
        return lost


def test_who_gives_signs_of_life_is_not_lost() -> None:
    job = Job()
    assert job.live(20) == []


@pytest.mark.parametrize("rank", [1, 2, 5, 7])
def test_a_silent_rank_is_lost_after_the_bound_and_no_sooner(rank: int) -> None:
    job = Job()
    job.live(3)
    assert job.live(0.9, without=(rank,)) == []
    assert job.live(0.3, without=(rank,)) == [rank]


def test_who_has_left_is_not_lost() -> None:
    job = Job()
    job.live(1)
    job.watch.tell()
    assert job.pulses[3].leave() and job.watch.left(3) and not job.watch.left(2)
    assert job.live(5, without=(3,)) == []


def test_a_job_that_was_stopped_as_a_whole_goes_on() -> None:
    job = Job()
    job.live(1)
    job.now += 100
    assert job.watch.look() == []
    assert job.live(2) == []


def test_rounds_look_no_oftener_than_anybody_can_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 1,000 rounds of a second 40 look at all ranks' signs of life, and who is silent is found as soon."""
    job, looks, look = Job(), [], HeartbeatWatch.look
    monkeypatch.setattr(HeartbeatWatch, "look", lambda watch: looks.append(job.now) or look(watch))
    said: list[str] = []
    parts = (
        job.replicas,
        Mailboxes(2).at(0),
        job.watch,
        lambda status, replica: 0,
        RunTime(job.clock),
        said.append,
        lambda loss: None,
    )
    members, silent = Membership(*parts), WORLD.origin_rank(1, 0)
    while not members.lost:
        job.now += 1e-3
        for rank, pulse in job.pulses.items():
            if rank != silent:
                pulse.beat()
        members.act(job.replicas.status())
    assert 36 <= len(looks) <= 45 and members.active == [0, 2]
    assert next(iter(members.lost.values())) == pytest.approx(BOUND, abs=2 * job.watch.period)


def test_one_that_was_given_up_learns_it() -> None:
    job = Job()
    job.live(1)
    job.replicas.give_up(1)
    job.now += 0.1
    for rank in WORLD.replica_ranks(1):
        with pytest.raises(GivenUp):
            job.pulses[rank].beat()
    for rank in (1, *WORLD.replica_ranks(0), *WORLD.replica_ranks(2)):
        job.pulses[rank].beat()


def test_everyone_notices_a_lost_coordinator() -> None:
    job = Job()
    job.live(1)
    with pytest.raises(UserError, match=r"shard 0: the coordinator is lost.*--resume auto"):
        job.live(1.3, without=(0, 2, 3, 4, 5, 6, 7))
    with pytest.raises(UserError, match="replica 2 partition 1: the coordinator is lost"):
        job.live(2, without=(0, 1, 2, 3, 4, 5, 6))
    soon = Heartbeat(job.memory, WORLD, 1, 0.25, lambda: False, job.clock)
    with pytest.raises(Lost, match=r"no sign of its life for 0\.25 s;"):
        for _ in range(20):
            job.now += 0.05
            soon.beat()


def test_a_signal_on_any_rank_reaches_the_coordinator() -> None:
    job = Job()
    job.live(1)
    assert not job.watch.asked
    job.asked.add(4)
    job.live(0.1)
    assert job.watch.asked


def test_the_graph_says_who_waits_for_whom() -> None:
    job = Job()
    job.live(1)
    job.live(0.5, without=(2,))
    job.watch.say("the coordinator waits for shard 0 to answer")
    text = job.watch.graph()
    assert text == job.pulses[1].graph()
    lines = text.split("\n")
    assert len(lines) == 1 + WORLD.size
    assert " ".join(lines[1].split()) == "the coordinator waits for shard 0 to answer (sign of life 0.0 s ago)"
    assert "replica 0 partition 0" in lines[3] and "waits for shard 2 (sign of life 0.5 s ago)" in lines[3]


def test_a_wait_in_vain_says_who_waits_for_whom() -> None:
    job = Job()
    job.live(1)

    def role() -> Turns:
        while True:
            job.now += 1
            yield Wait("replica 0 waits for shard 0 to make room in its ring")

    with pytest.raises(Lost) as raised:
        drive(role(), 5.0, clock=job.clock, beat=lambda reason: None, graph=job.watch.graph)
    said = str(raised.value).split("\n")
    assert said[0].startswith("Waited 5 s in vain: replica 0 waits for shard 0 to make room") and len(said) == 2 + WORLD.size


def test_a_call_that_does_not_return_ends_the_rank_and_names_the_peer() -> None:
    said: list[str] = []
    since = time.perf_counter() - 9
    window = SimpleNamespace(blocked=lambda: (1, since))
    dog = Watchdog(window, "replica 0", WORLD, 0.05, said.append)
    dog._thread.join(10)
    assert len(said) == 1 and said[0].startswith("replica 0 waited 0.05 s in vain for shard 0: an MPI call to it does not return.")
    quiet = Watchdog(SimpleNamespace(blocked=lambda: None), "replica 0", WORLD, 0.05, said.append)
    quiet.stop()
    assert len(said) == 1


class Called(Job):
    """Membership over signs of life; a round of the coordinator is `act`."""

    def __init__(self, world: Topology = WORLD, made: int = 10) -> None:
        super().__init__(world)
        self.boxes, self.said, self.recorded, self.handed = Mailboxes(1 + world.shards), [], [], []
        self.members = Membership(
            self.replicas, self.boxes.at(0), self.watch, lambda status, replica: made, RunTime(self.clock), self.said.append,
            self.recorded.append,
        )  # fmt: skip

    def act(self) -> None:
        self.members.act(self.replicas.status())
        self.handed += [(gone.replica, gone.heirs) for gone in self.members.departed()]


def test_a_spare_replica_takes_the_place_of_a_lost_one_and_then_all_that_are_left() -> None:
    job = Called()
    job.live(1)
    for lost, heirs, active in ((0, [2], [1, 2]), (2, [1], [1])):
        job.live(1.5, without=(WORLD.origin_rank(lost, 1),))
        job.act()
        job.act()
        assert job.handed[-1] == (lost, heirs) and job.members.active == active
        assert job.boxes.at(1).receive().content == lost
        job.pulses = {rank: pulse for rank, pulse in job.pulses.items() if rank not in WORLD.replica_ranks(lost)}
    assert len(job.handed) == 2 and len(job.said) == 2 and job.members.broken
    job.members.closed(0, (0, (8, 9)))
    job.members.closed(0, (2, (12, 12)))
    assert [loss[0] for loss in job.recorded] == [0, 2]
    assert [(loss.steps, loss.applied) for loss in job.recorded] == [(10, 8), (12, 12)]
    said = job.members.summary()
    assert "Lost: replica 0" in said and "of its 10 gradients 8 were applied, 2 went with it" in said


def test_a_replica_that_died_early_has_lost_no_gradient() -> None:
    job = Called(made=0)
    job.live(1)
    job.live(1.5, without=(WORLD.origin_rank(0, 1),))
    job.act()
    job.members.closed(0, (0, None))
    assert re.fullmatch(r"Lost: replica 0 at [\d.]+ s, before its first gradient\.", job.members.summary())


def test_many_that_take_over_are_counted() -> None:
    job = Called(Topology(shards=1, replicas=200, partitions=1, spares=0))
    job.live(1)
    job.live(1.5, without=(job.members._world.origin_rank(7, 0),))
    job.act()
    job.act()
    assert job.said == ["Replica 7 is lost: no sign of life for 1 s; the other 199 replicas take over."]


def test_a_lost_spare_is_nobodys_loss() -> None:
    job = Called()
    job.live(1)
    job.live(1.5, without=(6,))
    job.act()
    assert job.members.spares == [] and job.members.active == [0, 1] and not job.handed


def test_a_lost_shard_ends_the_run() -> None:
    job = Called()
    job.live(1)
    job.live(1.5, without=(1,))
    with pytest.raises(UserError, match=r"shard 0 is lost.*--resume auto"):
        job.act()


def test_gradients_that_some_shard_did_not_apply_went_with_the_replica() -> None:
    world = Topology(shards=3, replicas=2)
    job = Called(world)
    job.live(1)
    job.live(1.5, without=(world.origin_rank(1, 0),))
    job.act()
    for shard, applied in ((0, (9, 9)), (1, None), (2, (7, 11))):
        job.members.closed(shard, (1, applied))
    assert job.recorded == [LostReplica(1, job.members.lost[1], 11, 7)]


def test_hundreds_of_replicas_poll_so_seldom_that_their_number_does_not_matter() -> None:
    assert polling(Topology(1, 2)) == polling(Topology(4, 50)) == 0.02
    for replicas in (100, 500, 5000):
        assert replicas / polling(Topology(1, replicas)) == pytest.approx(2500)
