"""Checkpoints of a run over ranks: shards write their parts while they serve, one rank chooses what all go on from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dbnet.checkpoint.format import part_of
from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.verify import damage
from dbnet.core.config import load
from dbnet.monitor.results import Run
from dbnet.run.train import execute

pytestmark = pytest.mark.long
RUN_FILE = """[run]
folder = "out"
picture = false
[data]
path = "{data}"
[[model.layers]]
kind = "dense"
units = 200
activation = "sigmoid"
[[model.layers]]
kind = "dense"
units = 10
[method]
minibatch = 20
slot = 4096
[topology]
shards = 2
replicas = 2
[stop]
steps = 400
[evaluate]
train = 0
[checkpoint]
steps = 50
keep = 3
"""


@pytest.fixture
def run_file(digits: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN_FILE.format(data=digits))
    return path


def test_written_while_training_and_gone_on_from_elsewhere(in_turn: Callable, run_file: Path, tmp_path: Path) -> None:
    """On 1 + 2 + 2 ranks, then, when the last checkpoint has been damaged, from the one before on 1 + 3 + 1."""
    words = ["topology.shards=3", "topology.replicas=1", "stop.steps=410", "--resume=auto", "run.picture=true"]
    job = in_turn(
        5,
        {"call": "spoiled.block", "with": []},
        ["train", run_file],
        {"call": "spoiled.hurt", "with": ["out/run.checkpoint.h5", 1, "state.sum"]},
        ["train", run_file, *words],
        cwd=tmp_path,
    ).good()
    assert (tmp_path / "out" / "run-2.png").exists()
    folder = tmp_path / "out" / "run.checkpoints"
    masters = sorted(path for path in folder.iterdir() if path.name.count(".") == 1)
    assert 2 <= len(masters) <= 3 and all(damage(path) == [] for path in masters[:-1]) and not list(folder.glob("*.part"))
    assert len(list(folder.iterdir())) == 3 * len(masters)
    last, before = Checkpoint(masters[-1]), Checkpoint(masters[-2])
    assert last.replicas["steps"].tolist() == [400, 400] and 50 <= before.replicas["steps"].sum() <= 800
    # Nothing else is damaged.
    assert [one.partition(", elements")[0] for one in damage(last.path)] == [f"'{part_of(last.path, 1)}': /state.sum"]
    assert job.err.count("is damaged and left out") == 1 and f"{last.path.name}' is damaged" in job.err
    assert ".shard-1.h5': /state.sum, elements 0 .. " in job.err
    more = Checkpoint(tmp_path / "out" / "run-2.checkpoint.h5")
    assert Run(tmp_path / "out" / "run-2.h5").about["resumed_from"] == f"out/run.checkpoints/{before.path.name}"
    assert more.replicas["steps"].tolist() == [410] and len(more.ranges) == 3 and len(more.chain) == 1
    assert np.isfinite(Run(tmp_path / "out" / "run-2.h5").accuracy)


def test_from_four_partitions_to_one(mpirun: Callable, run_file: Path, tmp_path: Path) -> None:
    """A network cut over four ranks and two shards goes on in one piece, and comes to where it would have come uncut."""
    same = [
        "method.kind=sgd",
        "rule={kind='momentum', rate=0.1}",
        "model.dtype=float64",
        "topology.replicas=1",
    ]
    mpirun(7, "-m", "dbnet", "train", run_file, *same, "topology.partitions=4", "stop.steps=15", cwd=tmp_path).good()
    config = load(run_file, [*same, f"run.folder={tmp_path / 'out'}", "stop.steps=30"])
    rest = execute(config, resume="auto", quiet=True)
    assert Checkpoint(rest.checkpoint).chain[0]["topology"]["partitions"] == 4
    whole = execute(load(run_file, [*same, f"run.folder={tmp_path / 'whole'}", "stop.steps=30"]), quiet=True)
    np.testing.assert_allclose(rest.params, whole.params, rtol=0, atol=1e-11)
