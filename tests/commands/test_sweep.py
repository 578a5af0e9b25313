"""`dbnet sweep`: the grid, its names, what is refused; runs that are done, that fail, that were killed; what came out."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from finished import ROOT, Finished

import dbnet as package
from dbnet.commands.training import state
from dbnet.commands.training.grid import GridPoint, grid, split_values
from dbnet.commands.training.state import alone
from dbnet.commands.training.worker import Answer, WorkerProcess
from dbnet.core.config import load
from dbnet.core.errors import UserError
from dbnet.core.registry import FAMILIES

Command = Callable[..., Finished]
# A rule of the user's own: one of its rates fails, one dies, one waits in its 60th update until a file says go.
RULE = """
import os, pathlib, time
from typing import ClassVar
from dbnet import Rule

class Moody(Rule):
    kind: ClassVar[str] = "moody"

    def apply(self, w, g, state, t):
        if self.rate == 4:
            raise ValueError("of mine")
        if self.rate == 8:
            os.kill(os.getpid(), 9)
        if self.rate == 0.25 and t == 60:
            pathlib.Path("there").touch()
            while not pathlib.Path("go").exists():
                time.sleep(0.01)
        w -= self.rate * g
"""


def names(run_file: Path, *words: str) -> list[str]:
    return [point.name for point in grid(run_file, words)]


def test_values_stand_between_commas_outside_of_brackets() -> None:
    assert split_values("1,2") == ["1", "2"] and split_values("") == [""]
    assert split_values("{kind='a,b', rate=1},[1, 2],\"x,y\"") == ["{kind='a,b', rate=1}", "[1, 2]", '"x,y"']


def test_every_combination_has_a_name_that_says_what_is_its_own(run_file: Path) -> None:
    found = names(run_file, "rule.rate=0.10,1e-05", "run.seed=1..3", "stop.epochs=3")
    assert found == [f"run_rate-{rate}_seed-{seed}" for rate in ("0.1", "1e-05") for seed in (1, 2, 3)]
    assert names(run_file, "run.name=a", "method.kind=downpour,synchronous") == ["a_method-downpour", "a_method-synchronous"]
    assert names(run_file, "topology.replicas=2..7..2,9") == [f"run_replicas-{n}" for n in (2, 4, 6, 9)]
    assert names(run_file, "model.layers.0.units=4,8", "rule.rate=1") == ["run_units-4", "run_units-8"]
    assert names(run_file, "run.seed=7") == ["run"]
    # What is no name of a file is replaced, and still every value has its own.
    odd = names(run_file, "rule={kind='sgd'},{kind='adam', rate=0.1, beta1=0.5},{kind='adam', rate=0.1, beta1=0.6}")
    assert len(set(odd)) == 3 and all(name.isascii() and not set(name) & set(" ={}'/,") for name in odd)
    # Whoever adds values gets no other names.
    assert names(run_file, "rule={kind='adam', rate=0.1, beta1=0.6},{kind='sgd'}") == [odd[2], odd[0]]


def test_points_are_the_runs_that_train_would_make(run_file: Path) -> None:
    point = grid(run_file, ["rule.kind=sgd,adam", "run.seed=5", "run.folder=there"])[1]
    config = point.config
    assert (config.rule.kind, config.run.seed, config.run.name, config.run.folder) == ("adam", 5, "run_rule-adam", "there")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rule.rate"], "write table.key=value or table.key=value,value."),
        (["rule.rate=0.1,,0.3"], "'rule.rate=0.1,,0.3' has an empty value among others"),
        (["run.seed=3..1"], "3..1 counts from 3 to 1 by 1"),
        (["run.seed=1..3..0"], "1..3..0 counts from 1 to 3 by 0"),
        (["run.seed=1..99999999999"], "more than 10,000 values"),
        (["run.seed=1..200", "topology.replicas=1..200"], "These are 40,000 runs; a grid has at most 10,000"),
        (["rule.rate=1", "rule.rate=2,3"], "'rule.rate' is given more than once"),
        (["run.name=a,b"], "run.name cannot be varied"),
        (["run.folder=a,b"], "run.folder cannot be varied"),
        (["run.seed=1,2,1"], "The grid has the same run twice: run.seed=1 and run.seed=1; leave one out."),
        (["rule.rate=0.5,0.50"], "the same run twice: rule.rate=0.5 and rule.rate=0.5"),
        (["run.seed=1..2", "rule.rate=0.1,-1"], "In the grid at run.seed=1, rule.rate=-1: rule.rate = -1 is not allowed"),
        (["rule.rat=1,2"], "Unknown key 'rule.rat' (did you mean 'rate'?)"),
        (["model.layers.1.units=10,11"], "In the grid at model.layers.1.units=11: The last layer has 11 units"),
    ],
)
def test_a_bad_grid_is_one_sentence_before_anything_starts(words: list[str], said: str, run_file: Path, dbnet: Command) -> None:
    done = dbnet("sweep", run_file, *words)
    assert done.code == 2 and done.out == "" and said in done.err and done.err.count("\n") == 1 and not Path("out").exists()


def test_an_array_of_slurm_is_the_same_grid(run_file: Path, dbnet: Command) -> None:
    words = ["sweep", run_file, "topology.replicas=1,3", "run.seed=1..2", "run.name=two words"]
    script = dbnet(*words, "--slurm", "--cores", 8)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script.out, re.M))
    assert (options["array"], options["nodes"], options["ntasks"]) == ("0-3", "1", "6") and options["output"] == "%x-%A-%a.out"
    point = f"{run_file} topology.replicas=1,3 run.seed=1..2 'run.name=two words'"
    assert f'/jobs/launch --requeue --point "$SLURM_ARRAY_TASK_ID" {point}\n' in script.out
    assert subprocess.run(["bash", "-n"], input=script.out, text=True, timeout=20).returncode == 0
    third = dbnet(*words, "--words", 2).out.split("\n")[:-1]
    assert third[0] == str(run_file) and load(third[0], third[1:]) == load(
        run_file, ["topology.replicas=3", "run.seed=1", "run.name=two words_replicas-3_seed-1", "run.picture=false"]
    )
    assert "the grid has the runs 0 .. 3" in dbnet(*words, "--words", 4).err


def test_runs_are_trained_once_and_compared(run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["sweep", run_file, "run.seed=1..2", "rule.rate=0.1,0.3", "stop.epochs=1"]
    done = dbnet(*words, "--jobs", 2)
    assert (done.code, done.err) == (0, "")
    files = {(rate, seed): Path(f"out/run_seed-{seed}_rate-{rate}.h5") for rate in (0.1, 0.3) for seed in (1, 2)}
    assert sorted(Path("out").glob("*[0-9].h5")) == sorted(files.values())
    assert sorted(p.name.partition("_")[0] for p in Path("out").iterdir()) == ["run"] * 12, "nothing else is left"
    # Each is the run that `dbnet train` makes with as many threads.
    half = sorted(os.sched_getaffinity(0))[: max(1, len(os.sched_getaffinity(0)) // 2)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: half)
        alone = package.train(run_file, ["run.seed=2", "rule.rate=0.3", "stop.epochs=1", "run.name=alone"], quiet=True)
    with h5py.File(files[0.3, 2].with_suffix(".checkpoint.h5")) as file:
        assert np.array_equal(alone.params, file["params"][:])
    # A line for each setting: mean and spread over the seeds.
    for rate in (0.1, 0.3):
        values = [package.open_run(files[rate, seed]).accuracy for seed in (1, 2)]
        line = next(line for line in done.out.split("\n") if line.startswith(f"{rate} "))
        assert f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" in line and line.split()[1] == "2"
    # The same command trains nothing, a larger grid what is new, another configuration under the same names all.
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    again = dbnet(*words)
    assert again.code == 0 and again.out.startswith("4 of 4 runs are done already.\n\n")
    assert again.out.split("\n\n")[1] == done.out.split("\n\n")[1]
    listed = dbnet(*words[:-1], "stop.epochs=2", "--list")
    assert listed.code == 0 and listed.out.split() == [
        word for i, path in enumerate(sorted(files.values())) for word in (str(i), path.stem, "to", "do")
    ]
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    rows = json.loads(dbnet("sweep", run_file, "run.seed=1..3", "rule.rate=0.1", "stop.epochs=1", "--json", "--list").out)
    assert [(row["settings"], row["runs"], row["of"]) for row in rows] == [({}, 2, 3)]


def test_threads_are_at_most_a_runs_share_of_the_cores(run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for asked, fix in ((2, "give --jobs 1"), (3, "make it at most 2")):
        done = dbnet("sweep", run_file, "run.seed=1..3", f"run.threads=1,{asked}", "--jobs", 2)
        assert done.code == 2 and done.out == "" and not Path("out").exists()
        assert done.err == f"dbnet: run.threads = {asked}, but with 2 runs at once each has 1 of the 2 cores here; {fix}.\n"


def test_a_lock_whose_name_is_taken_away_at_any_moment(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another sweep may end between any two looks at it: here while this one is refused, and before it compares."""
    path, held, said, tries = place / ".a.sweep", state.fcntl.flock, [], []

    def flock(number: int, how: int) -> None:
        tries.append(number)
        if len(tries) == 1:
            os.pwrite(number, b"process 7 on there\n", 0)
        if len(tries) < 3:
            path.unlink()
        if len(tries) == 1:
            raise BlockingIOError
        held(number, how)

    monkeypatch.setattr(state.fcntl, "flock", flock)
    with alone(place, "a", said.append, lambda: False):
        assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert len(tries) == 3 and not path.exists()
    assert said == [f"Another sweep of 'a' in '{place}' has not ended (process 7 on there); this one begins then."]


@pytest.mark.parametrize(("module", "name", "number", "said"), [
    ("os", "open", errno.EACCES, "cannot be opened (Permission denied); it may be another user's: change run.name or run.folder."),
    ("fcntl", "flock", errno.ENOLCK, "cannot be locked (No locks available); set run.folder to a disk that has locks."),
    ("fcntl", "flock", errno.EOPNOTSUPP, "cannot be locked (Operation not supported); set run.folder to a disk that has locks."),
])  # fmt: skip
def test_a_lock_that_cannot_be_had(
    module: str, name: str, number: int, said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(getattr(state, module), name, fail)
        with pytest.raises(UserError) as raised, alone(place, "a", lambda _: None, lambda: False):
            pass
    assert str(raised.value).startswith(f"'{place}/.a.sweep'") and str(raised.value).endswith(said)


def test_a_signal_stops_a_sweep(run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed on to what is under way, here a run that waits for it; nothing else begins, and the same command goes on."""
    told, played = threading.Event(), []

    def play(self: WorkerProcess, point: GridPoint, checkpoint: Path | None) -> Answer:
        played.append(point.name)
        os.kill(os.getpid(), signal.SIGINT)
        assert told.wait(60)
        return Answer(stopped=True)

    monkeypatch.setattr(WorkerProcess, "play", play)
    monkeypatch.setattr(WorkerProcess, "stop", lambda self, number=signal.SIGTERM: told.set())
    done = dbnet("sweep", run_file, "run.seed=1..3")
    assert (done.code, done.out, played) == (85, "", ["run_seed-1"])
    assert done.err == "dbnet: Stopped by a signal; 3 of 3 runs are left. The same command goes on.\n"


def test_runs_that_leave_nothing_have_failed(run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def play(self: WorkerProcess, point: GridPoint, checkpoint: Path | None) -> Answer:
        if point.config.run.seed == 1:
            raise OSError("no process")
        return Answer()

    monkeypatch.setattr(WorkerProcess, "play", play)
    done = dbnet("sweep", run_file, "run.seed=1..2")
    assert done.code == 1 and "run_seed-1 failed: it could not be started (no process)." in done.err
    assert "run_seed-2 failed: it has ended well, but its run file is not there." in done.err and "2 of 2 runs failed" in done.err


@pytest.mark.long
def test_failed_runs_are_named_and_a_killed_sweep_goes_on(run_file: Path, dbnet: Command, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: FAMILIES["shards.rules"].pop("moody", None))
    Path("moody.py").write_text(RULE)
    words = [
        "model.modules=['moody.py']",
        "rule={kind='moody'}",
        "stop.steps=50",
        "checkpoint.steps=10",
        "rule.rate=0.125,0.25,4,8",
    ]
    sweep = [sys.executable, "-m", "dbnet", "sweep", str(run_file), *words]
    killed = subprocess.Popen(sweep, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not Path("there").exists() and killed.poll() is None:
        assert time.monotonic() < end, "no run has come to its 60th update"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    first = Path("out/run_rate-0.125.h5")
    before = first.stat().st_mtime_ns
    # The run that is under way outlives the sweep until it can look at signals; the next sweep waits for it.
    Path("go").touch()
    done = dbnet("sweep", run_file, *words)
    assert done.code == 1 and "Traceback" not in done.err
    assert done.out.startswith("1 of 4 runs are done already.\n2 of 4  run_rate-0.25  test accuracy")
    assert first.stat().st_mtime_ns == before and not Path("out/run_rate-0.125-2.h5").exists()
    second = package.open_run("out/run_rate-0.25-2.h5")
    assert second.finished and str(second.about["resumed_from"]).startswith("out/run_rate-0.25.checkpoints/")
    assert not list(Path("out").glob(".*"))
    failed = [line for line in done.err.split("\n") if " failed: " in line]
    assert "run_rate-4 failed: " in failed[0] and "moody.py', line 11, in apply fails with ValueError: of mine" in failed[0]
    assert "run_rate-8 failed: its process died of signal 9" in failed[1]
    assert failed[2].startswith("dbnet: 2 of 4 runs failed: run_rate-4, run_rate-8; ")
    assert done.out.count("0 of 1") == 2
