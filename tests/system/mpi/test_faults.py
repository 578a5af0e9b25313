"""Ranks are killed, stopped, cut off while a run trains: what is promised then is kept.

The short form hurts each kind of rank once, under both methods; the long one (--soak) kills ranks at random, fifty runs in a row.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import ledger
import numpy as np
import pytest
from faults import COUNTS, ROOT, Hurt, prepare, trains, until

from dbnet.__main__ import main
from dbnet.core.ranges import split
from dbnet.data.file import DataFile
from dbnet.monitor.results import Run
from dbnet.monitor.trace.timeline import TraceView
from dbnet.run.train import execute

pytestmark = pytest.mark.long
BATCH = ("method.kind=sandblaster", "method.portion=32", "stop={iterations=40}", "evaluate.epochs=1000")
SHARDS, REPLICAS = 2, 3
KILLED = random.Random(20121203)
MPICH = any(one.metadata["Name"] == "mpich" for one in importlib.metadata.distributions())


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    return prepare(tmp_path, digits)


def opened(folder: Path, name: str = "run") -> Run:
    run = Run(folder / "out" / f"{name}.h5")
    assert run.finished
    return run


def shares(run: Run) -> np.ndarray:
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        return file["table.shares"][:]


def every_example_is_trained_on(run: Run, epochs: int) -> None:
    """All subsets are covered, each example by one share, and every share has come to the end."""
    rows, parts = shares(run), split(DataFile(run.config.data.path).sizes["train"], run.config.topology.replicas)
    for subset, part in enumerate(parts):
        mine = np.sort(rows[rows["subset"] == subset], order="lo")
        assert [mine["lo"][0], *mine["hi"]] == [0, *mine["lo"][1:], part.size]
    assert (rows["epoch"] >= epochs).all()


def the_ledger_balances(run: Run) -> None:
    """Of everyone's pushes each was applied once, in order; of a lost replica's as many as the record says."""
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        done = file["replicas"]["steps"].tolist()
    ledger.staleness_is_that_of_the_events(run)
    for _, mine in run.events.groupby(["shard", "partition"]):
        assert mine.applied.tolist() == list(range(len(mine)))
    lost = {int(row.replica): row for row in run.lost.itertuples()}
    for (*_, replica), mine in run.events.groupby(["shard", "partition", "replica"]):
        assert mine.push.tolist() == list(range(len(mine)))
        applied = int(mine.steps.sum())
        if replica in lost:
            assert lost[replica].applied <= applied <= lost[replica].steps
        elif replica >= len(done):
            # A spare one: its steps are added to those of whom it follows.
            assert any(0 <= done[before] - applied <= row.steps for before, row in lost.items())
        else:
            assert applied == done[replica]


def killed(job: Hurt, rank: int, what: str, within: float = 1.0) -> None:
    """Kill a rank somewhen in the next second, or `within` so many."""
    time.sleep(within * KILLED.random())
    job.hurt(rank)
    COUNTS[what] += 1


# --- replicas -----------------------------------------------------------------------------------------------------------------


def test_killed_replicas_cost_only_themselves(folder: Path) -> None:
    """Of three replicas two are killed, one after the other; the last one does all that is left."""
    job = Hurt(folder, "stop.epochs=150").training()
    killed(job, 1 + SHARDS, "replicas killed")
    killed(job, 1 + SHARDS + 1, "replicas killed")
    job.end().good()
    assert job.out.count("is lost: no sign of life") == 2 and job.out.count("Lost: replica") == 2
    run = opened(folder)
    assert len(run.lost) == 2
    the_ledger_balances(run)
    every_example_is_trained_on(run, 150)


@pytest.mark.skipif(not MPICH, reason="Open MPI's launcher says of no rank how it died")
def test_a_crash_is_no_kill(folder: Path) -> None:
    """A replica that is killed and one that crashes cost only themselves, but the crash shows in the exit code; two end the run."""
    job = Hurt(folder, "topology.shards=1", "stop.epochs=1000000", "stop.seconds=8").training()
    killed(job, 2, "replicas killed", within=0.2)
    job.hurt(3, signal.SIGABRT)
    COUNTS["replicas crashed"] += 1
    job.end()
    assert job.code == 1 and job.out.count("Lost: replica") == 2, job.err
    assert job.err.count("rank 3's process died of signal 6 (abort).") == 1 and "rank 2's" not in job.err
    assert "dbnet: Replica 1 crashed (signal 6, abort): that is a defect, not a kill; exit code 1.\n" in job.err
    every_example_is_trained_on(opened(folder), 1)
    assert not list(folder.glob(".dbnet*"))

    job = Hurt(folder, "run.name=two", "topology.shards=1", "stop.epochs=1000000").training()
    for replica in (0, 2):
        job.hurt(2 + replica, signal.SIGABRT)
    COUNTS["replicas crashed"] += 2
    job.end()
    assert job.code == 1 and "Two processes crashed (signal 6, abort): the run stops." in job.out, job.err
    assert "Stopped, since two processes crashed alike (signal 6, abort); checkpoint out/two.checkpoint.h5." in job.err
    assert Run(folder / "out" / "two.h5").stopped


FATAL = """
import os, signal

class Fatal(Gain):
    kind: ClassVar[str] = "fatal"
    gradients: ClassVar[int] = 0

    def backward_inputs(self, c, accumulate):
        super().backward_inputs(c, accumulate)
        Fatal.gradients += 1
        if Fatal.gradients == 100 and "{rank}" in (os.environ.get("PMI_RANK"), os.environ.get("OMPI_COMM_WORLD_RANK")):
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_spare_replica_takes_the_place_of_one_that_lost_a_partition(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was recorded of this replays to the bit, though one partition pushes what came of the killed one's values."""
    (folder / "fatal.py").write_text((ROOT / "tests" / "support" / "gain.py").read_text() + FATAL.format(rank=3))
    shape = ("topology={shards=1, replicas=2, partitions=2, spares=1}", 'model.modules=["fatal.py"]')
    layers = 'model.layers=[{kind="fatal"}, {kind="dense", units=16, activation="sigmoid"}, {kind="dense", units=10}]'
    job = Hurt(folder, *shape, layers, "stop.epochs=8", "record={schedule=true, trace=true, steps=1}")
    COUNTS["partitions killed"] += 1
    job.end().good()
    assert "Replica 0 is lost: no sign of life (partition" in job.out and "replica 2 takes over" in job.out
    run = opened(folder)
    the_ledger_balances(run)
    every_example_is_trained_on(run, 8)
    assert set(run.events.replica) == {0, 1, 2}
    # The trace of whoever was killed holds all that had ended.
    lanes = {lane.about["name"]: lane for lane in TraceView(run.path.with_suffix(".trace")).lanes}
    assert lanes["replica 0 partition 1"].steps == 99 and lanes["replica 0 partition 0"].steps in (99, 100)
    assert lanes["replica 2 partition 1"].steps > 0
    code, said = main(["replay", str(run.path), "--trust-modules"]), capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"identical: {len(run.events):,} updates, {len(run.evaluation)} evaluations, ") and code == 0, said


def test_a_batch_method_comes_to_the_same_without_a_replica(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was recorded of this replays to the bit: a pass that was begun again left nothing."""
    job = Hurt(folder, *BATCH, "topology.shards=1", "record.schedule=true").training()
    killed(job, 2 + 2, "replicas killed", within=0.4)
    job.end().good()
    run = opened(folder)
    whole = run.config.model_copy(update={"run": run.config.run.model_copy(update={"folder": str(folder / "alone")})})
    wanted = Run(execute(whole, quiet=True).run_file).iterations.loss
    np.testing.assert_allclose(run.iterations.loss[:25], wanted[:25], rtol=1e-10)
    # Sums in another order are rounded otherwise, and iterations amplify that.
    np.testing.assert_allclose(run.iterations.loss, wanted, rtol=1e-7)
    code, said = main(["replay", str(run.path)]), capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"identical: {len(run.iterations)} iterations, {len(run.evaluation)} evaluations, ") and code == 0, said


def test_a_replica_that_only_slept_is_told_and_leaves(folder: Path) -> None:
    """In the end a shard is sent the signal that stops the run."""
    job = Hurt(folder, "topology.replicas=2", "stop.epochs=1000000").training()
    until((folder / "out" / "run.h5").exists, "the run file is there")
    asleep = job.hurt(1 + SHARDS + 1, signal.SIGSTOP)
    until(lambda: len(Run(folder / "out" / "run.h5").lost) == 1, "the replica is given up")
    job.hurt(1 + SHARDS + 1, signal.SIGCONT)
    until(lambda: gone(asleep), "it has left")
    COUNTS["replicas stopped and continued"] += 1
    # Only now: a run that ends by the clock may end before.
    job.hurt(1, signal.SIGTERM)
    COUNTS["signals"] += 1
    job.end()
    assert job.code == 85 and "replica 1 was given up" in job.err, job.err
    run = Run(folder / "out" / "run.h5")
    assert run.stopped and list(run.lost.replica) == [1]
    the_ledger_balances(run)


def gone(pid: int) -> bool:
    """Whether a process has ended, perhaps with nobody asking for its code yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def resumed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that goes on with a run in this process and returns what it prints; over ranks test_signals.py does it."""

    def go_on(*overrides: str) -> str:
        monkeypatch.chdir(folder)
        code, said = main(["train", "run.toml", *overrides, "--resume", "auto"]), capsys.readouterr()
        assert code == 0, said.err
        return said.out

    return go_on


# --- shards and the coordinator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "who", "method"), [(2, "shard 1 is lost", ()), (0, "the coordinator is lost", BATCH)])
def test_a_run_without_a_server_ends_and_is_gone_on_with(
    rank: int, who: str, method: tuple[str, ...], folder: Path, resumed: Callable[..., str]
) -> None:
    # Signs of life end it, long before anyone has waited for long enough.
    words = [*method, "topology.replicas=1", "run.deadline=1000", "stop={iterations=100000}" if method else "stop.epochs=1000000"]
    job = Hurt(folder, *words).training()
    until((folder / "out" / "run.checkpoint.h5").exists, "a first checkpoint")
    killed(job, rank, "shards and coordinators killed")
    job.end()
    # MPI itself may notice before the bound, and does not say who.
    assert (
        job.code == 1
        and (who in job.err or "another rank is lost" in job.err)
        and "--resume auto" in job.err
        and "Traceback" not in job.err
    ), job.err
    end = ("stop={iterations=60}",) if method else ("stop.epochs=1",)
    assert "Test accuracy" in resumed(*method, *end)
    assert Run(folder / "out" / "run-2.h5").about["resumed_from"].startswith("out/run.checkpoints/")


def test_without_any_replica_the_checkpoint_is_saved(folder: Path, resumed: Callable[..., str]) -> None:
    job = Hurt(folder, "topology.replicas=2", "stop.epochs=1000000").training()
    for replica in range(2):
        job.hurt(1 + SHARDS + replica)
    COUNTS["replicas killed"] += 2
    job.end()
    assert job.code == 1 and "Every replica is lost; checkpoint out/run.checkpoint.h5" in job.err, job.err
    assert "Lost" not in resumed("topology.replicas=2", "stop.epochs=30")
    every_example_is_trained_on(opened(folder, "run-2"), 30)


# --- over TCP -----------------------------------------------------------------------------------------------------------------


def ranks(hosts, name: str) -> list[int]:
    """Return the process numbers of a host's ranks."""
    return [p for p in hosts.hosts.processes(name, "dbnet train") if Path(f"/proc/{p}/comm").read_text().startswith("python")]


@pytest.mark.parametrize("method", [(), BATCH], ids=["downpour", "sandblaster"])
def test_a_replica_on_another_host_is_killed(method: tuple[str, ...], hosts, folder: Path) -> None:
    """Coordinator, shard and a replica on one host; the replica on the other one is killed."""
    # Over TCP a step may take a hundred times as long: the run ends when it is told to, after the loss was noticed.
    method = (*method, "stop={iterations=1000000}") if method else ("stop.epochs=1000000",)
    method += ("topology={shards=1, replicas=2}", "run.heartbeat=2")
    words = ["-m", "dbnet", "train", "run.toml", *method, "--marker", "marker"]
    with hosts.start((3, 1), *words, cwd=folder, surviving=True) as job:
        # Open MPI's launcher takes a rank that dies at once for a daemon that never reported.
        until(lambda: trains(folder, 0.7), "training goes on", 90)
        (victim,), others = ranks(hosts, "h2"), ranks(hosts, "h1")
        os.kill(victim, signal.SIGKILL)
        COUNTS["replicas killed over TCP"] += 1
        until(lambda: len(Run(folder / "out" / "run.h5").lost), "the loss is noticed", 90)
        os.kill(others[0], signal.SIGTERM)
        COUNTS["signals"] += 1
        until(lambda: "ended" in (folder / "marker").read_text(), "the run ends", 90)
        hosts.kill(job)
        # What is printed in the end may be lost: Open MPI's launcher drops it when a rank was killed.
        out = job.communicate(timeout=60)[0]
    assert (folder / "marker").read_text() == "ended 85\n", out
    run = Run(folder / "out" / "run.h5")
    assert run.stopped and list(run.lost.replica) == [1]
    if BATCH[0] not in method:
        the_ledger_balances(run)


# --- the long form ------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(3600)
def test_kills_at_random(soak: bool, tmp_path: Path, digits: Path) -> None:
    """Any rank at any step of either method, fifty times; what cannot go on is gone on with from its checkpoint."""
    if not soak:
        pytest.skip("the long form of the fault tests: tests/run --soak")
    number = kills = 0
    while kills < 50:
        number += 1
        folder = tmp_path / f"{number}"
        folder.mkdir()
        prepare(folder, digits)
        batch, rank = number % 2 == 1, KILLED.randrange(1 + SHARDS + REPLICAS)
        words = ["method.kind=sandblaster", "stop={iterations=80}"] if batch else ["stop.epochs=120"]
        job = Hurt(folder, *words).training()
        time.sleep(0.7 * KILLED.random())
        if job.job.poll() is None:
            job.hurt(rank)
            kills += 1
            COUNTS["ranks killed at random"] += 1
        job.end()
        about = f"run {number}, rank {rank}, exit code {job.code}\n{job.out}\n{job.err}"
        if job.code == 0:
            run = opened(folder)
            if not batch:
                the_ledger_balances(run)
                every_example_is_trained_on(run, 120)
        else:
            assert rank <= SHARDS and job.code == 1 and "lost" in job.err, about
            Hurt(folder, *words, "--resume", "auto").end().good()
