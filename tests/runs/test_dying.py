"""Machines that die in simulated time: what the others make of it is what the code of an MPI run makes of it."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from finished import Finished
from small import small_run

from dbnet.comm.simulated.cores import Cores
from dbnet.comm.simulated.interconnect import Interconnect, Way
from dbnet.comm.simulated.memory import SimulatedMemory
from dbnet.comm.simulated.mortal import MortalTime
from dbnet.comm.simulated.movers import VirtualMover
from dbnet.comm.simulated.window import SimulatedWindow
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns
from dbnet.comm.window import Field, WindowLayout
from dbnet.coordinator.heartbeat import heartbeat_fields
from dbnet.coordinator.orders import OrderBook
from dbnet.core.config import build
from dbnet.core.errors import Lost, UserError
from dbnet.methods.sandblaster.work_queue import Tally
from dbnet.monitor.results import Run
from dbnet.network.cost import FaultsTable, Profile, load_profile
from dbnet.run.simulated.faults import SignsOfLife, ends
from dbnet.run.simulated.noise import Noise
from dbnet.run.simulated.simulate import Simulated, simulate
from dbnet.run.train import execute

EVERYBODY = (("coordinator", True), ("shard", 0), ("shard", 1), ("replica", 0), ("replica", 1))
MACHINES = Path(__file__).resolve().parents[2] / "jobs" / "machines"


def machine(*deaths: dict[str, Any], step: float = 0.1, **more: Any) -> Profile:
    """Return a machine whose steps take a tenth of a second, more than from one look at its orders to the next."""
    tables: dict[str, Any] = {
        "compute": {"rate": 1.0, "step": step, "apply": 1.0, "slice": 1e-5},
        "inside": {"latency": 1e-6, "bandwidth": 5.0},
        "between": {"latency": 2e-5, "bandwidth": 0.1},
        "faults": {"deaths": deaths},
    }
    return Profile.model_validate(tables | more)


@pytest.fixture
def tree(place: Path, make_data: Callable[..., Path]) -> dict[str, Any]:
    """Return a small run; whoever gives no sign of life for a second is lost."""
    tables = small_run(make_data())
    tables["run"]["heartbeat"] = 1.0
    return tables


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[MortalTime]:
    """Return the clocks of the run that is played."""
    found, made = [], MortalTime.__init__
    monkeypatch.setattr(MortalTime, "__init__", lambda time, *parts: [found.append(time), made(time, *parts)][1])
    return found


def played(tree: dict[str, Any], profile: Profile, **ways: Any) -> Simulated:
    return simulate(tree, profile, quiet=True, **ways)


def cleared() -> None:
    for path in Path("out").glob("run.*"):
        path.unlink() if not path.is_dir() else [part.unlink() for part in path.iterdir()] and path.rmdir()


def shares(run: Run) -> np.ndarray:
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        return file["table.shares"][:]


def every_example_is_trained_on(run: Run, epochs: int) -> None:
    """All subsets are covered, each example by one share, and every share has come to the end."""
    rows, size = shares(run), 8 // run.config.topology.replicas
    for subset in range(run.config.topology.replicas):
        mine = np.sort(rows[rows["subset"] == subset], order="lo")
        assert [mine["lo"][0], *mine["hi"]] == [0, *mine["lo"][1:], size]
    assert (rows["epoch"] >= epochs).all()


# --- who takes over ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("partitions", "at"), [(1, 0.05), (1, 0.95), (2, 0.55)])
def test_a_spare_replica_goes_on_exactly_where_one_died(tree: dict[str, Any], partitions: int, at: float) -> None:
    """It dies while it computes, when all that it made is applied and told: the same numbers as those of one that lives."""
    tree |= {"method": {"kind": "sgd", "minibatch": 2, "slot": 64}, "topology": {"shards": 2, "partitions": partitions}}
    alone = execute(build(tree), quiet=True)
    tree["topology"]["spares"] = 1
    done = played(tree, machine(*({"at": at, "replica": 0, "partition": p} for p in range(partitions))))
    np.testing.assert_array_equal(done.outcome.params, alone.params)
    run = Run(done.outcome.run_file)
    made = int(at / 0.1)
    assert done.outcome.finished and run.lost[["replica", "steps", "applied"]].to_numpy().tolist() == [[0, made, made]]
    assert done.died == "1 of 1 replicas" and run.lost.seconds[0] == pytest.approx(at + 1.0, abs=0.1)
    assert set(run.events.replica) == ({0, 1} if made else {1})
    every_example_is_trained_on(run, 6)


def test_a_partition_takes_its_replica_with_it(tree: dict[str, Any]) -> None:
    """The other one has had its values of the sixth step and pushes what it made of them, its half of a gradient."""
    tree["topology"] = {"shards": 2, "replicas": 2, "partitions": 2, "spares": 1}
    run = Run(played(tree, machine({"at": 0.55, "replica": 1, "partition": 1})).outcome.run_file)
    assert run.finished and run.lost[["replica", "steps", "applied"]].to_numpy().tolist() == [[1, 6, 5]]
    last = run.events[run.events.replica == 1].groupby("partition").push.max()
    assert last.tolist() == [5, 4] and set(run.events.replica) == {0, 1, 2}
    every_example_is_trained_on(run, 6)


@pytest.mark.parametrize("overlap", [False, True])
def test_without_a_spare_the_others_take_over(tree: dict[str, Any], overlap: bool) -> None:
    """Two of four, one of them when it has taken over from the other; what they had not told of is made again."""
    tree["method"]["overlap"] = overlap
    tree |= {"topology": {"shards": 2, "replicas": 4}, "stop": {"epochs": 120}}
    done = played(tree, machine({"at": 0.3, "replica": 1}, {"at": 1.8, "replica": 3}, step=1e-2, noise={"kind": "exponential"}))
    run = Run(done.outcome.run_file)
    assert done.outcome.finished and done.died == "2 of 4 replicas" and run.lost.replica.tolist() == [1, 3]
    every_example_is_trained_on(run, 120)
    for shard in range(2):
        mine = run.events[run.events.shard == shard]
        assert mine.applied.tolist() == list(range(len(mine)))
        for lost in run.lost.itertuples():
            assert lost.applied <= (mine.replica == lost.replica).sum() <= lost.steps


def test_a_replica_dies_in_the_warmstart_and_a_spare_one_while_it_waits(tree: dict[str, Any]) -> None:
    tree |= {"topology": {"shards": 2, "replicas": 2, "spares": 1}, "warmstart": {"steps": 30}}
    done = played(tree, machine({"at": 0.2, "replica": 2}, {"at": 0.45, "replica": 0}))
    run = Run(done.outcome.run_file)
    assert done.outcome.finished and run.lost.replica.tolist() == [0] and done.died == "1 of 2 replicas, 1 of 1 spare ones"
    assert "Lost: replica 2 at 1." in done.outcome.lost
    every_example_is_trained_on(run, 6)


def test_whoever_dies_after_its_last_step_is_missed_for_its_evaluation_alone(tree: dict[str, Any]) -> None:
    """One that is done evaluates for a second and more; the other one is asked in its place. Who dies later is not missed."""
    tree["evaluate"] = {"epochs": 6, "train": 8}
    compute = {"rate": 1.0, "step": 0.1, "apply": 1.0, "evaluation": 1e-5}
    done = played(tree, machine({"at": 4.5, "replica": 1}, {"at": 1000.0, "replica": 0}, compute=compute))
    run = Run(done.outcome.run_file)
    assert done.outcome.finished and done.died == "1 of 2 replicas" and run.evaluation.replica.tolist() == [0, 0]
    assert run.lost[["replica", "steps", "applied"]].to_numpy().tolist() == [[1, 12, 12]]


def test_who_dies_when_nobody_will_miss_it_ends_nothing(tree: dict[str, Any]) -> None:
    """A spare replica's partition, less than a second before the run is over; the other one waits for it in vain."""
    tree["topology"] = {"shards": 2, "replicas": 2, "partitions": 2, "spares": 1}
    done = played(tree, machine({"at": 0.9, "replica": 2, "partition": 0}))
    assert done.outcome.finished and done.died == "0 of 2 replicas, 1 of 1 spare ones" and not done.outcome.lost


def test_who_dies_when_the_coordinator_has_left_is_waited_for_by_nobody(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, clocks: list[MortalTime]
) -> None:
    """Ten microseconds after the last order, which it would have passed on to the other partition."""
    tree["topology"] = {"shards": 2, "replicas": 2, "partitions": 2}
    end = OrderBook.end
    monkeypatch.setattr(OrderBook, "end", lambda orders: [end(orders), clocks[0].at(clocks[0].now + 1e-5, 5, clocks[0].end, 5)][0])
    done = played(tree, machine())
    assert done.outcome.finished and done.died == "1 of 2 replicas" and clocks[0].dead == [5, 6]


@pytest.mark.parametrize("spares", [0, 1])
def test_a_batch_method_comes_to_the_same_without_a_replica(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, spares: int
) -> None:
    """Its portions are made by others, as backups; where a bundle was accepted and never came the pass begins again."""
    method, tallies, made = {"kind": "sandblaster", "minibatch": 2, "portion": 2, "slot": 64, "patience": 0.5}, [], Tally.__init__
    monkeypatch.setattr(Tally, "__init__", lambda tally: [made(tally), tallies.append(tally)][0])
    tree |= {"method": method, "stop": {"iterations": 5}, "evaluate": {"epochs": 5}}
    alone = Run(execute(build(tree | {"topology": {"shards": 2}}), quiet=True).run_file)
    tree["topology"] = {"shards": 2, "replicas": 3, "spares": spares}
    for at, again in ((0.05, 0), (0.11, 1)):
        done = played(tree, machine({"at": at, "replica": 1}))
        run = Run(done.outcome.run_file)
        np.testing.assert_allclose(run.iterations.loss, alone.iterations.loss, rtol=1e-9)
        assert done.outcome.finished and run.lost.replica.tolist() == [1] and len(run.iterations) == len(alone.iterations)
        assert (3 in set(run.progress.replica)) == bool(spares) and tallies[-1].restarts == again and tallies[-1].backups


def test_synchronous_steps_wait_for_one_that_died_until_it_is_lost(tree: dict[str, Any]) -> None:
    tree |= {"method": {"kind": "synchronous", "minibatch": 2, "slot": 64}}
    done = played(tree, machine({"at": 0.35, "replica": 1}))
    run = Run(done.outcome.run_file)
    assert done.outcome.finished and (run.events.eval("applied - fetched") == 0).all()
    every_example_is_trained_on(run, 6)
    # Where all wait the coordinator would rest for a quarter of a second.
    assert run.lost.seconds[0] == pytest.approx(0.35 + 1.0, abs=0.1)
    gap = np.diff(np.sort(run.events.seconds)).max()
    assert 1.0 < gap < 1.3


# --- to the byte ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["downpour", "synchronous", "sandblaster", "cores", "overlap"])
def test_where_nobody_dies_all_is_as_without_faults(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """To the byte, but for the table in the machine file."""
    tree |= {"topology": {"shards": 2, "replicas": 3}, "method": {"kind": kind, "minibatch": 2, "slot": 64, "slots": 2}}
    host = {}
    if kind == "sandblaster":
        tree |= {"stop": {"iterations": 2}, "method": {**tree["method"], "portion": 2}}
    if kind == "overlap":
        tree["method"] |= {"kind": "downpour", "overlap": True}
    if kind == "cores":
        host = {"ranks": 0, "cores": 2, "switch": 1e-5}
        tree |= {"topology": {"shards": 2, "replicas": 2, "partitions": 2}, "method": {**tree["method"], "kind": "downpour"}}
    # The coordinator looks at signs of life every half a millisecond.
    tree["run"]["heartbeat"] = 0.02
    monkeypatch.setattr(Profile, "model_dump", lambda *_, **__: {})
    found = []
    for faults in (None, {"mtbf": 1e12}):
        done = played(tree, machine(step=1e-3, noise={"kind": "exponential"}, host=host, faults=faults))
        found.append((done.outcome.run_file.read_bytes(), done.seconds, done.operations, done.sent, done.died))
        cleared()
    assert found[0] == found[1]


def test_the_same_seed_gives_the_same_deaths_and_the_same_bytes(tree: dict[str, Any]) -> None:
    tree |= {"topology": {"shards": 2, "replicas": 4, "partitions": 2, "spares": 1}, "stop": {"epochs": 100}}
    tree["run"]["heartbeat"] = 0.1
    faults, found = {"mtbf": 2.0, "servers": False}, []
    for seed in (1, 1, 2):
        tree["run"]["seed"] = seed
        done = played(tree, machine(step=1e-2, faults=faults))
        found.append(done.outcome.run_file.read_bytes())
        assert done.died and len(Run(done.outcome.run_file).lost)
        cleared()
    assert found[0] == found[1] != found[2]


def test_who_dies_when_is_a_matter_of_oneself() -> None:
    """Others change nobody's moment; machines die with all ranks on them; servers may be spared."""
    faults, few, many = FaultsTable(mtbf=100.0), Topology(2, 3, 2), Topology(2, 500, 2, 1)
    noise = Noise(machine(), 5)
    one, two = ends(faults, few, 1, noise, 0), ends(faults, many, 1, noise, 0)
    assert one == two[: len(one)] and len(set(two)) == many.size
    assert one[3:] == ends(faults, Topology(7, 3, 2), 1, noise, 0)[8:]
    assert np.mean(two) == pytest.approx(100.0, rel=0.1) and np.std(two) == pytest.approx(100.0, rel=0.1)
    assert not set(one) & set(ends(faults, few, 1, noise, 1)), "begun again from a checkpoint, others die"
    shared = ends(faults, few, 4, noise, 0)
    assert [len(set(shared[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and len(set(shared)) == 3
    assert len(set(ends(faults, few, 0, noise, 0))) == few.size, "all on one host: each by itself"
    kept = FaultsTable(mtbf=100.0, servers=False, deaths=[{"at": 1.0, "replica": 2, "partition": 1}, {"at": 2.0, "shard": 1}])
    assert ends(kept, few, 1, noise, 0) == [inf, inf, 2.0, *one[3:8], min(one[8], 1.0)]
    assert ends(kept, few, 2, noise, 0)[:4] == [inf, inf, 2.0, 2.0]


# --- what ends ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
def test_who_has_gone_ahead_of_the_others_does_nothing_after_its_death(beside: bool) -> None:
    """One puts 1 to 9, each of which takes half a second there and back; it dies at 2.2, when the fifth is under way.

    So does what moves its data beside it.
    """
    time, found = MortalTime([inf, 2.2]), []
    memory = SimulatedMemory([WindowLayout([Field("value", "int64", (1,))]), WindowLayout([])])

    def putting() -> Turns:
        window = SimulatedWindow(memory, Interconnect(time, [0, 1], Way(0.0, 1e15), Way(0.25, 1e15)), 1)
        for value in range(1, 10):
            window.put(0, "value", np.full(1, value))
            window.flush(0)
            found.append(value)
        yield None

    def waiting() -> Turns:
        time.elapse(10.0)
        yield None

    def starting() -> Turns:
        VirtualMover(time, 2 + 1, "one").start(putting())
        yield from waiting()

    time.play({0: waiting(), 1: starting() if beside else putting()}, {})
    assert memory.local[0]["value"].tolist() == [5] and found == [1, 2, 3, 4] and time.dead == [1]


def test_who_takes_one_turn_after_the_other_does_nothing_after_its_death() -> None:
    """Turns of a second, in which it looks at nothing: those at 0, 1 and 2, and none at 3 where it dies at 2.5; nor does it end."""
    time, found = MortalTime([inf, 2.5], 1e-3, 1.0), []

    def working() -> Turns:
        try:
            for _ in range(5):
                found.append(time.now)
                yield None
        finally:
            found.append(inf)

    def waiting() -> Turns:
        time.elapse(10.0)
        yield None

    time.play({0: waiting(), 1: working()}, {})
    gc.collect()
    assert found == [0.0, 1.0, 2.0] and time.dead == [1]


def test_who_dies_while_it_waits_for_a_core_is_given_none() -> None:
    """Rank 1 would be next at 2.0, when rank 2 has had what it wanted; it died at 1.5, so rank 0 is."""
    time, found = MortalTime([inf, 1.5, inf]), {}
    time.cores = dict.fromkeys(range(3), Cores(time, 1, slice=100.0))

    def working(rank: int, comes: float, work: float) -> Turns:
        time.elapse(comes)
        time.compute(work)
        found[rank] = time.now
        return
        yield

    time.play({0: working(0, 0.0, 5.0), 1: working(1, 0.8, 3.0), 2: working(2, 1.0, 1.0)}, {})
    assert found == pytest.approx({2: 2.0, 0: 6.2})


def test_signs_of_life_stop_with_a_death() -> None:
    """A replica's partition dies at 3.01 s, having given a sign at 3.0, and is lost after 2 s without; so is the other one."""
    world, time = Topology(1, 2, 2), MortalTime([inf, 8.0, inf, inf, inf, 3.01])
    memory = SimulatedMemory([WindowLayout(heartbeat_fields(world)), *[WindowLayout([])] * 5])
    window = SimulatedWindow(memory, Interconnect(time, [0] * 6, Way(0.0, 1.0), Way(0.0, 1.0)), 0)
    watch, found = SignsOfLife(window, world, 2.0, time), {}
    for look in range(100):
        time.now = 0.1 * look
        found[look] = watch.look()
    assert not found[49] and found[51] == [5] and found[99] == [4, 5] and time.ends[4] == pytest.approx(5.05, abs=0.06)
    assert time.ends[5] == 3.01, "who has died does not die again"
    assert watch.left(1) and not watch.left(5) and not watch.left(2)


def test_a_dead_rank_leaves_its_core_to_others(tree: dict[str, Any]) -> None:
    """Two replicas on one core take twice as long a step; one alone does not."""
    tree |= {"stop": {"seconds": 4.0}, "method": {"minibatch": 2}}
    host = {"ranks": 0, "cores": 1}
    run = Run(played(tree, machine({"at": 2.05, "replica": 1}, host=host), dry=True).outcome.run_file)
    mine = run.events[(run.events.shard == 0) & (run.events.replica == 0)].seconds
    assert np.diff(mine[mine < 2.0]).mean() == pytest.approx(0.2, rel=0.1)
    assert np.diff(mine[mine > 2.1]).mean() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("deaths", "words"),
    [
        ([{"at": 2.0, "shard": 1}], "shard 1 is lost, there was no sign of its life for 1 s, and its parameters with it; "),
        ([{"at": 2.0, "coordinator": True}], "shard 0: the coordinator is lost, there was no sign of its life for 1 s; "),
        ([{"at": 2.0, "coordinator": True}, {"at": 2.5, "shard": 0}], "shard 1: the coordinator is lost"),
        ([{"at": 2.0, who: which} for who, which in EVERYBODY], "All ranks have died; "),
    ],
)
def test_what_a_run_cannot_do_without_ends_it(tree: dict[str, Any], deaths: list[dict], words: str) -> None:
    """As over MPI; a run begins from the newest checkpoint, and other machines die then."""
    tree |= {"stop": {"epochs": 50}}
    with pytest.raises(Lost, match=re.escape(words) + ".*there is no checkpoint yet"):
        played(tree, machine(*deaths))
    assert not Run("out/run.h5").finished
    tree |= {"checkpoint": {"steps": 10}}
    with pytest.raises(Lost, match=r"begin from the newest checkpoint with run.start=out/run-2\.checkpoint\.h5"):
        played(tree, machine(*deaths))
    again = tree | {"run": tree["run"] | {"start": "out/run-2.checkpoint.h5"}, "stop": {"epochs": 1}}
    assert played(again, machine()).outcome.finished


def test_a_run_whose_coordinator_dies_while_all_leave_has_not_finished(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, clocks: list[MortalTime]
) -> None:
    """All is saved, and replicas are told to leave; shards hear nothing any more."""
    end = OrderBook.end
    monkeypatch.setattr(OrderBook, "end", lambda orders: [end(orders), clocks[0].end(0)][0])
    with pytest.raises(Lost, match="shard 0: the coordinator is lost"):
        played(tree, machine({"at": 0.35, "replica": 1}))
    assert not Run("out/run.h5").finished


def test_a_step_longer_than_patience_is_said(tree: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody dies of it here."""
    tree |= {"run": tree["run"] | {"heartbeat": 0.05}, "stop": {"steps": 3}}
    assert not simulate(tree, machine(speed={"cycle": [1.0, 3.0]}), dry=True).died
    words = "dbnet: A step takes 0.3 s on this machine, longer than run.heartbeat = 0.05: over MPI whoever makes one would be taken"
    assert words in capsys.readouterr().err


def test_on_the_command_line(dbnet: Callable[..., Finished], run_file: Path) -> None:
    """Who died and what was lost is said, and shown of the run file; without any replica the exit code is 1."""
    text = (MACHINES / "present.toml").read_text() + "\n[faults]\ndeaths = [{at = 1e-3, replica = 1}]\n"
    Path("one.toml").write_text(text)
    words = ("topology.replicas=2", "topology.shards=1", "topology.partitions=1", "run.heartbeat=0.02", "stop.epochs=10")
    done = dbnet("simulate", run_file, "--machine", "one.toml", *words)
    assert done.code == 0 and not done.err
    assert "out/run.checkpoint.h5\nDied           1 of 2 replicas\nLost: replica 1 at 0.0 s; of its " in done.out
    assert "Replica 1 is lost: no sign of life for 0.02 s; replica 0 takes over.\n" in done.out
    assert "lost         replica 1 at 0.0 s" in dbnet("inspect", "out/run.h5").out
    assert "Lost: replica 1 at 0.0 s." in dbnet("watch", "out/run.h5").out
    told = dbnet("plan", run_file, "--machine", "one.toml", *words).out
    assert told.endswith("Machines die there (faults), but in no prediction: dbnet simulate has them.\n")
    Path("all.toml").write_text(text.replace("replica = 1}", "replica = 1}, {at = 2e-3, replica = 0}"))
    done = dbnet("simulate", run_file, "--machine", "all.toml", *words)
    assert done.code == 1 and "Every replica is lost; begin from the checkpoint with run.start=out/run-2.checkpoint.h5" in done.err
    assert "Died           2 of 2 replicas\n" in done.out


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("mtbf = 0", "faults.mtbf = 0 is not allowed: it must be greater than 0"),
        ("mtbf = '7'", "faults.mtbf = '7' is not allowed: it must be a number"),
        ("rate = 1.0", "Unknown key 'faults.rate'"),
        ("deaths = [{replica = 1}]", "The key 'faults.deaths.0.at' is missing"),
        ("deaths = [{at = 1.0}]", "faults.deaths.0: say whose machine dies"),
        ("deaths = [{at = 1.0, replica = 1, shard = 1}]", "give one of replica, shard and coordinator"),
        ("deaths = [{at = 1.0, shard = 1, partition = 1}]", "partition belongs to a replica"),
        ("deaths = [{at = 1.0, replica = 2}]", "faults.deaths names replica 2, but the highest is 1; name another"),
        ("deaths = [{at = 1.0, replica = 0, partition = 1}]", "faults.deaths names partition 1, but the highest is 0"),
        ("deaths = [{at = 1.0, shard = 2}]", "faults.deaths names shard 2, but the highest is 1"),
    ],
)
def test_deaths_that_cannot_be_are_refused(tree: dict[str, Any], table: str, words: str) -> None:
    Path("machine.toml").write_text(f"{(MACHINES / 'present.toml').read_text()}\n[faults]\n{table}\n")
    with pytest.raises(UserError, match=re.escape(words)):
        played(tree, load_profile("machine.toml"))
    assert not Path("out").exists()
