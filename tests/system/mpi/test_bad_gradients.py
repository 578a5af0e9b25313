"""A run whose gradients are not finite ends on all ranks, in order, with a diagnosis and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dbnet.monitor.results import Run

if TYPE_CHECKING:
    from conftest import Job

pytestmark = pytest.mark.long
RUN_FILE = """[run]
folder = "out"
[data]
path = "{data}"
[[model.layers]]
kind = "dense"
units = 16
activation = "sigmoid"
[[model.layers]]
kind = "dense"
units = 10
[method]
minibatch = 20
[topology]
shards = 2
replicas = 2
[evaluate]
train = 0
epochs = 1000
[stop]
seconds = 60
[guard]
refused = 3
"""


SPOILED = {"call": "spoiled.spoil", "with": [1234]}


def ends_with(said: str, done: Job, run_file: Path) -> None:
    assert done.code == 2, done.out + done.err
    assert said in done.err and done.err.count("dbnet:") == 1 and "Traceback" not in done.err
    assert not run_file.with_suffix(".checkpoint.h5").exists()


def the_example_is_named(done: Job, run_file: Path) -> None:
    ends_with("Example 1234 of the training set", done, run_file)
    assert "mend the data" in done.err and "refused push" in done.out
    run = Run(run_file)
    assert not run.finished and len(run.refused)


def test_a_bad_example_or_a_rate_too_high_ends_the_run_and_is_named(several: Callable, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN_FILE.format(data=digits))
    train = ["train", "run.toml", "run.picture=false"]
    rate, downpour, sandblaster = several(
        5,
        [*train, "run.name=rate", "rule.rate=1e30"],
        SPOILED,
        [*train, "run.name=downpour", "method.kind=downpour", "method.overlap=true"],
        [*train, "run.name=sandblaster", "method.kind=sandblaster"],
        cwd=tmp_path,
    )
    ends_with("lower rule.rate (1e+30)", rate, tmp_path / "out" / "rate.h5")
    the_example_is_named(downpour, tmp_path / "out" / "downpour.h5")
    the_example_is_named(sandblaster, tmp_path / "out" / "sandblaster.h5")


def test_a_bad_example_of_a_cut_network_is_the_exit_code_of_the_job(in_turn: Callable, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN_FILE.format(data=digits))
    done = in_turn(4, SPOILED, ["train", "run.toml", "topology={shards=1, replicas=1, partitions=2}"], cwd=tmp_path)
    the_example_is_named(done, tmp_path / "out" / "run.h5")
