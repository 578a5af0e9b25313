"""Sandblaster over one-sided windows: the same iterates as in one process, whatever replicas do; and what it costs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from dbnet.__main__ import main
from dbnet.checkpoint.reader import Checkpoint
from dbnet.core.ranges import Range
from dbnet.data.file import write
from dbnet.monitor.results import Run
from dbnet.run import outcome, train

RUN_FILE = """[run]
folder = "out"
picture = false
[data]
path = "{data}"
[model]
dtype = "float64"
decay = 1e-4
[[model.layers]]
kind = "dense"
units = 10
[method]
kind = "sandblaster"
minibatch = 32
slot = 4096
slots = 3
portion = 64
push_every = 2
[topology]
shards = 1
replicas = 1
[stop]
iterations = 10
[evaluate]
epochs = 1000
train = 0
"""


def params(path: Path) -> np.ndarray:
    point = Checkpoint(path)
    out = np.zeros(point.size, point.dtype)
    point.read("params", Range(0, point.size), out)
    return out


@pytest.fixture
def path(digits: Path, tmp_path: Path) -> Path:
    """Return a configuration."""
    (tmp_path / "run.toml").write_text(RUN_FILE.format(data=digits))
    return tmp_path / "run.toml"


@pytest.fixture
def alone(path: Path, tmp_path: Path) -> Callable[..., outcome.Outcome]:
    """Return a function that trains in this process."""
    return lambda *changes: train.execute(path, [f"run.folder={tmp_path}/alone", *changes], quiet=True)


def same_losses(found: Run, wanted: outcome.Outcome, start: int = 0) -> None:
    assert found.finished
    np.testing.assert_allclose(found.iterations.loss, Run(wanted.run_file).iterations.loss[start:], rtol=1e-10)


def same_iterates(folder: Path, name: str, wanted: outcome.Outcome) -> None:
    found = Run(folder / "out" / f"{name}.h5")
    same_losses(found, wanted)
    np.testing.assert_allclose(params(folder / "out" / f"{name}.checkpoint.h5"), params(wanted.checkpoint), rtol=1e-8, atol=1e-10)
    assert (found.iterations.rounds[1:] <= 4).all()


def replayed(folder: Path, name: str) -> None:
    """What was recorded of a run replays to the bit."""
    run, out = Run(folder / "out" / f"{name}.h5"), io.StringIO()
    with redirect_stdout(out):
        code = main(["replay", str(run.path)])
    said = out.getvalue().splitlines()[-1]
    assert code == 0 and said.startswith(f"identical: {len(run.iterations)} iterations, {len(run.evaluation)} evaluations, "), said


def test_iterates_are_those_of_one_process_whatever_a_replica_does(in_turn, path, alone, tmp_path) -> None:
    """On one start of the ranks: as it should be; cut; resumed on another topology; a replica that is silent for long and returns;
    one that holds up a pass.

    What was recorded of each replays to the bit.
    """
    train = ["train", path, "topology={shards=3, replicas=2}", "record.schedule=true"]
    other = ["train", path, "topology={shards=2, replicas=3}"]
    cut = ["train", path, "topology={shards=1, replicas=2, partitions=2}", "record.schedule=true", "checkpoint.seconds=0.1"]
    slow = [*other, "stop.iterations=8", "record.schedule=true"]
    silent = [*slow, "method.patience=0.3"]
    in_turn(
        6,
        [*train, "run.name=plain"],
        [*cut, "run.name=cut"],
        [*train, "run.name=part", "stop.iterations=5", "checkpoint.seconds=0.01"],
        [*other, "run.name=rest", f"--resume={tmp_path}/out/part.checkpoint.h5"],
        {"call": "slowed.slow", "with": [0.001, 1.5]},
        *([*silent, f"run.name=silent-{backups}", f"method.backups={backups}"] for backups in ("true", "false")),
        {"call": "slowed.slow", "with": [0.001, "hold"]},
        # Only a backup of the portion that is held can end the pass: nobody is ever taken for silent.
        [*slow, "run.name=held", "method.patience=1000", "run.heartbeat=1000"],
        cwd=tmp_path,
        timeout=100,
    ).good()
    whole = alone()
    for name in ("plain", "cut"):
        same_iterates(tmp_path, name, whole)
    same_losses(Run(tmp_path / "out" / "rest.h5"), whole, 5)
    wanted = alone("stop.iterations=8")
    runs = {name: Run(tmp_path / "out" / f"{name}.h5") for name in ("silent-true", "silent-false", "held")}
    for run in runs.values():
        same_losses(run, wanted)
    assert runs["held"].iterations.backups.sum() >= 1
    for name in ("plain", "cut", *runs):
        replayed(tmp_path, name)


@pytest.mark.long
def test_one_replica_and_the_coordinator_that_holds_no_vector(in_turn, path, alone, tmp_path) -> None:
    peak, large = {"call": "slowed.peak", "with": []}, []
    more = [
        "method.portion=4",
        "stop.iterations=1",
        "method.descent.kind=gradient_descent",
        "model.dtype=float32",
        "method.minibatch=4",
        "method.slot=1048576",
    ]
    for name, units in (("small", 100_000), ("large", 1_600_000)):
        data = tmp_path / f"{name}.h5"
        x = np.zeros((4, units), np.uint8)
        x[np.arange(4), np.arange(4)] = 1
        write(data, {"train/x": x, "train/y": np.arange(4), "classes": 10})
        large += [
            ["train", path, *more, f"data.path={data}", f"run.name={name}"],
            peak,
        ]
    out = in_turn(3, ["train", path], *large, cwd=tmp_path, timeout=110).good().out
    same_iterates(tmp_path, "run", alone())
    peaks = [int(kib) / 1024 for kib in re.findall(r"peak (\d+)", out)]
    print(f"coordinator's peak memory with 1 and 16 million parameters: {peaks[0]:.0f} and {peaks[1]:.0f} MiB")
    # A vector of 16 million float32 would be 61 MiB.
    assert len(peaks) == 2 and peaks[1] - peaks[0] < 20
