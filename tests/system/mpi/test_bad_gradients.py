"""A run whose gradients are not finite ends on all ranks, in order, with a diagnosis and exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dbnet.monitor.results import Run

HERE = Path(__file__).resolve().parent
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


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (5, ("method.kind=downpour", "method.overlap=true")),
        (7, ("method.kind=downpour", "topology.partitions=2")),
        (5, ("method.kind=sandblaster",)),
    ],
    ids=["downpour", "cut", "sandblaster"],
)
def test_a_bad_example_ends_the_run_and_is_named(
    ranks: int, changes: tuple[str, ...], mpirun: Callable, digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(RUN_FILE.format(data=digits))
    done = mpirun(ranks, HERE / "spoiled.py", 1234, "train", tmp_path / "run.toml", *changes, cwd=tmp_path)
    assert done.code == 2, done.out + done.err
    assert "Example 1234 of the training set" in done.err and "mend the data" in done.err
    assert done.err.count("dbnet:") == 1 and "Traceback" not in done.err
    assert "refused push" in done.out
    run = Run(tmp_path / "out" / "run.h5")
    assert not run.finished and len(run.refused)
    assert not (tmp_path / "out" / "run.checkpoint.h5").exists()


def test_a_rate_that_is_too_high_ends_the_run_and_is_named(mpirun: Callable, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN_FILE.format(data=digits))
    done = mpirun(5, "-m", "dbnet", "train", tmp_path / "run.toml", "rule.rate=1e30", cwd=tmp_path)
    assert done.code == 2, done.out + done.err
    assert "lower rule.rate (1e+30)" in done.err
    assert not (tmp_path / "out" / "run.checkpoint.h5").exists()
