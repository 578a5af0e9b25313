"""Which checkpoint a run goes on from: the newest whole one of its name; damaged ones are passed over and named."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from finished import ROOT, Finished
from leading import Led, Losses
from points import MODEL, TREE, write

from dbnet import open_run
from dbnet.checkpoint.format import part_of
from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.resume import candidates, choose
from dbnet.checkpoint.verify import damage
from dbnet.comm import mpi
from dbnet.comm.channel import Mailboxes
from dbnet.comm.topology import Topology
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.orders import STATUS, coordinator_fields
from dbnet.core.config import Config, build, load
from dbnet.core.errors import UserError
from dbnet.data.subsets import Share
from dbnet.methods.downpour import DownpourCoordinator
from dbnet.monitor.display import Display
from dbnet.run.roles import coordinator, coordinator_layout
from dbnet.run.setup import setup

Command = Callable[..., Finished]


def config(folder: Path, name: str = "run") -> Config:
    return build({**TREE, "run": {"folder": str(folder), "name": name}})


def hurt(path: Path, name: str = "params") -> None:
    """Flip a bit of a dataset."""
    with h5py.File(path) as file:
        at = file[name].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def test_the_newest_by_the_time_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A name that was asked for with its number is another one.
    for name, number in (("run", 1), ("run-2", 1), ("run", 2), ("runner", 9), ("run-x", 9)):
        write(tmp_path, number, name=name)
    mine = config(tmp_path)
    assert candidates(mine) == [tmp_path / "run.checkpoints" / f"00000{number}.h5" for number in (2, 1)]
    newest = tmp_path / "run.checkpoints" / "000002.h5"
    os.utime(newest, (0, 0))
    assert choose(mine, "", Display(True).warn) == choose(mine, "auto", Display(True).warn) == str(newest)
    assert choose(mine, None, Display(True).warn) is None and choose(config(tmp_path, "new"), "auto", Display(True).warn) is None
    with pytest.raises(UserError, match="No checkpoint of a run named 'new'"):
        choose(config(tmp_path, "new"), "", Display(True).warn)
    assert capsys.readouterr() == ("", "")
    # What ran in simulated time is never gone on from unasked.
    with h5py.File(tmp_path / "run.h5", "w") as file:
        file.attrs["world"] = "simulated"
    assert candidates(mine) == [] and choose(mine, "auto", Display(True).warn) is None
    assert choose(mine, str(newest), Display(True).warn) == str(newest)


def test_damaged_ones_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        write(tmp_path, number, keep=9)
    masters = candidates(config(tmp_path))
    hurt(part_of(masters[0], 1), "state.sum")
    masters[1].write_bytes(masters[1].read_bytes()[:200])
    assert choose(config(tmp_path), "auto", Display(True).warn) == str(masters[2])
    said = capsys.readouterr().err.splitlines()
    # A master that cannot say when it was written is dated as its file.
    assert sorted(line.split("'")[1] for line in said) == sorted(map(str, masters[:2]))
    assert any(f"'{part_of(masters[0], 1)}': /state.sum, elements 0 .. " in line for line in said)
    part_of(masters[2], 0).unlink()
    with pytest.raises(UserError, match=r"All 3 checkpoints of 'run' in .* are damaged"):
        choose(config(tmp_path), "auto", Display(True).warn)


def test_a_given_one_is_read_through(tmp_path: Path) -> None:
    link = write(tmp_path)
    assert choose(config(tmp_path), str(link), Display(True).warn) == str(link.resolve())
    hurt(part_of(link.resolve(), 2), "clock")
    with pytest.raises(UserError, match=r"is damaged: .*000001.shard-2.h5': /clock"):
        choose(config(tmp_path), str(link), Display(True).warn)


def test_auto_begins_and_goes_on(run_file: Path, dbnet: Command) -> None:
    words = ["train", run_file, "--quiet", "--resume", "auto", "stop.epochs=99"]
    assert dbnet(*words, "stop.steps=10") == Finished(0, "", "")
    assert dbnet(*words, "stop.steps=20").code == 0
    assert dbnet(*words, "stop.steps=30").code == 0
    assert open_run("out/run-2.h5").about["resumed_from"] == "out/run.checkpoints/000001.h5"
    assert open_run("out/run-3.h5").about["resumed_from"] == "out/run-2.checkpoints/000001.h5"
    last = Checkpoint("out/run-3.checkpoint.h5")
    assert last.replicas["steps"].tolist() == [30, 30]
    assert [(tree["run"]["name"], tree["stop"]["steps"]) for tree in last.chain] == [("run", 10), ("run-2", 20)]
    hurt(part_of(last.path, 0))
    again = dbnet(*words, "stop.steps=30")
    assert again.code == 0 and again.err.count("\n") == 1
    assert "The checkpoint 'out/run-3.checkpoints/000001.h5' is damaged and left out: " in again.err
    assert "'out/run-3.checkpoints/000001.shard-0.h5': /params, elements 0 .. " in again.err
    assert open_run("out/run-4.h5").about["resumed_from"] == "out/run-2.checkpoints/000001.h5"


def test_inspect_verify(run_file: Path, dbnet: Command) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=2").code == 0
    point = "out/run.checkpoint.h5"
    sound = dbnet("inspect", point, "--verify")
    assert sound.code == 0 and sound.out.startswith(f"'{point}' is whole: 3 files, ")
    hurt(Path("out/run.checkpoints/000001.shard-1.h5"), "state.sum")
    damaged = dbnet("inspect", point, "--verify")
    assert damaged.code == 1 and "damaged: 'out/run.checkpoints/000001.shard-1.h5': /state.sum, elements 0 .. 605" in damaged.out
    assert "only checkpoints have checksums" in dbnet("inspect", "out/run.h5", "--verify").err
    assert "No file 'none.h5'" in dbnet("inspect", "none.h5", "--verify").err
    Path("text.h5").write_text("no HDF5")
    assert dbnet("inspect", "text.h5", "--verify").code == 1
    # What it would train on is damaged too.
    assert "state.sum" in dbnet("train", run_file, "--resume", point).err


def test_start_takes_any_checkpoint(run_file: Path, dbnet: Command) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=5").code == 0
    assert dbnet("train", run_file, "--quiet", "stop.steps=5", "run.start=out/run.checkpoint.h5", "run.name=on").code == 0
    assert [tree["run"]["name"] for tree in Checkpoint("out/on.checkpoint.h5").chain] == ["run"]


def test_other_data_are_refused(run_file: Path, digits: Path, dbnet: Command) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=5").code == 0
    shutil.copy(digits, "turned.h5")
    shutil.copy(digits, "less.h5")
    with h5py.File("turned.h5", "a") as turned, h5py.File("less.h5", "a") as less:
        turned["train/y"][:] = np.roll(turned["train/y"][:], 1)
        for name in ("train/x", "train/y"):
            values = less[name][:-1]
            del less[name]
            less[name] = values
    more = ["train", run_file, "--quiet", "stop.steps=6"]
    for path, said in (("turned.h5", "other training labels than"), ("less.h5", "1438 training examples, 'less.h5' has 1437")):
        done = dbnet(*more, f"data.path={path}", "--resume", "auto")
        assert done.code == 2 and said in done.err and "run.start" in done.err and done.err.count("\n") == 1
        assert not Path("out/run-2.h5").exists()
    # The same labels in another file and type are the same data; parameters may be taken along to any.
    with h5py.File("turned.h5", "a") as file:
        labels = np.roll(file["train/y"][:], -1).astype(np.uint8)
        del file["train/y"]
        file["train/y"] = labels
    assert dbnet(*more, "data.path=turned.h5", "--resume", "auto").code == 0
    assert dbnet(*more, "data.path=less.h5", "run.start=out/run.checkpoint.h5").code == 0


def test_a_run_goes_on_where_the_other_has_ended(run_file: Path, dbnet: Command) -> None:
    """Also with another number of replicas: seconds, and steps of all together, never jump back."""
    assert dbnet("train", run_file, "stop.epochs=99", "stop.steps=50").code == 0
    done = dbnet("train", run_file, "stop.epochs=99", "stop.steps=80", "topology.replicas=1", "--resume")
    assert (
        done.code == 0 and "Goes on from 'out/run.checkpoints/000001.h5': " in done.out and "and 100 steps of training." in done.out
    )
    rows = [line.split() for line in done.out.splitlines() if line.startswith("      ")]
    assert [int(row[2]) for row in rows] == sorted(int(row[2]) for row in rows) and int(rows[0][2]) >= 100
    first, second = open_run("out/run.h5"), open_run("out/run-2.h5")
    assert second.evaluation.steps.tolist() == sorted(second.evaluation.steps) and second.evaluation.steps.iloc[0] >= 100
    last = max(first.evaluation.seconds.max(), first.progress.seconds.max())
    assert last <= Checkpoint("out/run.checkpoint.h5").seconds <= second.evaluation.seconds.min()
    assert Checkpoint("out/run-2.checkpoint.h5").steps == 130


def test_what_spare_replicas_have_made_counts_for_whom_they_follow() -> None:
    world = Topology(shards=1, replicas=2, spares=2)
    memory = LocalWindow([WindowLayout(coordinator_fields(world))])
    wanted = build({**TREE, "topology": {"replicas": 2, "spares": 2}})
    led = Led(DownpourCoordinator, wanted, 100, memory, world, Mailboxes(2).at(0), lambda: 1.0, MODEL.layout)
    at = {name: STATUS.index(name) for name in ("steps", "examples", "pushes", "epoch", "position")}
    for replica, counts in enumerate([(10, 100, 5, 1, 7), (11, 110, 6, 1, 8), (20, 200, 9, 2, 30), (5, 50, 2, 3, 40)]):
        memory.local["status"][replica, list(at.values())] = counts
        if replica in (0, 2):
            led.losses.lose(replica)
        led.coordinator.tick()
    assert led.coordinator._cursors().tolist() == [(35, 350, 16, 3, 40), (11, 110, 6, 1, 8)]
    # What a spare one still has to do follows from the steps of all before it.
    assert [led.coordinator.replicas.made(replica) for replica in range(4)] == [0, 0, 10, 30]
    assert led.coordinator.duties.membership.active == [1, 3]
    # No spare is left: one that took a place before is an heir like any other, with steps of its own to make.
    led.losses.lose(1)
    led.coordinator.tick()
    assert led.coordinator.duties.membership.active == [3] and led.coordinator.replicas.made(3) == 30


def test_counters_of_who_dies_before_its_first_report_are_those_of_the_checkpoint(
    run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run in which nobody has reported yet: status, checkpoint and who takes a place know what was made before."""
    assert dbnet("train", run_file, "stop.epochs=99", "stop.steps=15").code == 0
    ready = setup(load(run_file, ["topology.spares=1"]), "out/run.checkpoint.h5")
    memory = LocalWindow([coordinator_layout(ready), *(WindowLayout(()) for _ in range(1, ready.topology.size))])
    losses, boxes = Losses(ready.topology), Mailboxes(1 + ready.topology.shards)
    world = SimpleNamespace(
        saves=True,
        inline=True,
        clock=lambda: 1.0,
        due=lambda: 1.0,
        watch=lambda: losses,
        asked=lambda: False,
        window=memory.at,
        channel=boxes.at,
    )
    led = coordinator(ready, world, SimpleNamespace(trouble="", events=None, path=Path("out/run.h5")), Display(True))  # type: ignore[arg-type]
    assert led.steps == 30 and led.status.epochs(ready.data.sizes["train"]) > 0
    before = led._cursors()[["steps", "examples", "pushes"]].tolist()
    losses.lose(0)
    led.duties.membership.act(led.replicas.status())
    ((lost, heirs, _),) = led.duties.membership.departed()
    led.inherit(lost, heirs)
    assert led._cursors()[["steps", "examples", "pushes"]].tolist() == before and before[0][0] == 15
    assert heirs == [2] and led.replicas.made(2) == 15 and led.made(led.status, led.facts, 0) == 0


def test_as_many_replicas_may_be_lost_as_there_are_run_after_run() -> None:
    """What is cut and cut again, by a run and those that go on from it, has its place; each example stays with one replica."""
    world, wanted = Topology(shards=1, replicas=12), build({**TREE, "topology": {"replicas": 12}})
    first = [[Share(r, 0, 20)] for r in range(12)]
    for generation in range(3):
        memory = LocalWindow([WindowLayout(coordinator_fields(world))])
        led = Led(DownpourCoordinator, wanted, 240, memory, world, Mailboxes(2).at(0), lambda: 1.0, MODEL.layout)
        for replica, shares in enumerate(first):
            led.coordinator.replicas.give(replica, shares)
        for lost in np.random.default_rng(generation).permutation(12)[:11].tolist():
            led.losses.lose(lost)
            led.coordinator.tick()
        left = [Share(*row) for row in led.coordinator._shares().tolist()]
        assert sorted((s.subset, e) for s in left for e in range(s.lo, s.hi)) == [(r, e) for r in range(12) for e in range(20)]
        first = [[share for share in left if share.subset == replica] for replica in range(12)]


def test_how_to_go_on_is_how_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DBNET_STARTED", *mpi._SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert mpi.started() == "dbnet train"
    monkeypatch.setenv("PMI_SIZE", "5")
    assert mpi.started() == "mpirun -n 5 dbnet train"
    monkeypatch.setenv("DBNET_STARTED", "jobs/local.sh")
    assert mpi.started() == "jobs/local.sh"


@pytest.mark.long
def test_whenever_it_is_killed_the_newest_is_whole(run_file: Path, place: Path) -> None:
    """One process, all roles, killed at random moments of its writing; each time the next one goes on from what is there."""
    words = [sys.executable, "-m", "dbnet", "train", str(run_file), "--quiet", "stop={steps=1000000}", "checkpoint.steps=1"]
    env, chance, reached = {**os.environ, "PYTHONPATH": str(ROOT)}, random.Random(5), 0
    for kill in range(3):
        link = place / "out" / ("run.checkpoint.h5" if kill == 0 else f"run-{kill + 1}.checkpoint.h5")
        job = subprocess.Popen([*words, "--resume", "auto"], env=env, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not link.exists() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.7))
        job.send_signal(signal.SIGKILL)
        said = job.communicate(timeout=30)[1]
        assert link.exists() and said == "", said
        assert damage(link) == []
        steps = int(Checkpoint(link).replicas["steps"].sum())
        assert steps >= reached
        reached = steps
