"""Replicas cut over ranks: the same numbers as uncut ones, every push counted, evaluation and prediction cut too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import sums

from dbnet import train
from dbnet.monitor.results import Run
from dbnet.run import inference

pytestmark = pytest.mark.long
IMAGES = (
    "model.layers=[{kind='local', maps=3, field=3, activation='sigmoid'}, {kind='norm', radius=1},"
    " {kind='pool', over='l2', field=2},"
    " {kind='conv', maps=4, field=2, activation='tanh'}, {kind='dropout', rate=0.1}, {kind='dense', units=10}]"
)
EXACT = ["method.kind=sgd", "rule={kind='sgd', rate=0.2}", "model.dtype=float64", "stop.epochs=1"]


@pytest.fixture(scope="module")
def runs(trainings: Callable[..., Path], digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On one start of the ranks: a replica cut in two, in three; two of them cut in two; evaluation, prediction cut in seven."""
    two, three = ["topology.partitions=2", "topology.shards=4"], ["topology.partitions=3", "topology.shards=3"]
    shape = ["topology.replicas=2", "topology.partitions=2", "topology.shards=2"]
    point = "out/two-images.checkpoint.h5"
    return trainings(
        7,
        {
            "two-dense": [*EXACT, *two],
            "two-images": [*EXACT, IMAGES, *two],
            "three-dense": [*EXACT, *three],
            "three-images": [*EXACT, IMAGES, *three],
            "plain": ["rule.rate=0.1", "warmstart.steps=20", *shape],
            "seldom": ["rule.rate=0.05", "method.n_push=2", "method.n_fetch=3", "method.slot=512", "stop.epochs=8", *shape],
            "images": [IMAGES, "rule.rate=0.03", "stop.epochs=8", "checkpoint.seconds=0.2", *shape],
            "tally": [*sums.overrides(tmp_path_factory.mktemp("tally")), *shape],
        },
        then=[["evaluate", point, digits], ["predict", point, digits, "out/cut.h5"]],
    )


@pytest.mark.parametrize("name", ["two-dense", "two-images", "three-dense", "three-images"])
def test_a_cut_replica_trains_to_the_same_parameters(runs: Path, name: str, tmp_path: Path) -> None:
    run = Run(runs / f"{name}.h5")
    assert run.finished
    config, uncut = run.config, run.config.topology.model_copy(update={"partitions": 1})
    alone = train(config.model_copy(update={"run": config.run.model_copy(update={"folder": str(tmp_path)}), "topology": uncut}))
    with h5py.File(runs / f"{name}.checkpoint.h5") as file:
        np.testing.assert_allclose(file["params"][:], alone.params, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "seldom", "images"])
def test_cut_replicas_learn_together_and_lose_nothing(runs: Path, name: str) -> None:
    run = Run(runs / f"{name}.h5")
    assert run.finished
    assert run.accuracy > (0.8 if name == "images" else 0.85)
    steps = run.progress.groupby("replica").steps.max()
    for (_, _, replica), mine in run.events.groupby(["shard", "partition", "replica"]):
        assert mine.push.tolist() == list(range(len(mine)))
        assert mine.steps.sum() == steps[replica]
    for _, mine in run.events.groupby(["shard", "partition"]):
        assert mine.applied.tolist() == list(range(len(mine)))


def test_what_cut_replicas_push_sums_up_to_the_bit(runs: Path) -> None:
    sums.check(Run(runs / "tally.h5"))


def test_shared_parameters_are_pushed_once(runs: Path) -> None:
    """Partition 1 touches fewer parameters; a shard that holds none of its own hears nothing of it."""
    run = Run(runs / "images.h5")
    counts = run.events.groupby(["shard", "partition"]).size()
    assert set(counts.index.get_level_values("partition")) == {0, 1}
    assert counts.nunique() == 1


def test_evaluation_and_prediction_cut_over_ranks(runs: Path, digits: Path, tmp_path: Path) -> None:
    point = str(runs / "two-images.checkpoint.h5")
    score, n, _ = inference.evaluate(point, str(digits), "test")
    inference.predict(point, str(digits), "test", str(tmp_path / "one.h5"))
    said = f"test: {n} examples, loss {score.loss:.4f}, accuracy {score.accuracy:.4f}"
    assert (runs / "said").read_text().splitlines().count(said) == 1
    with h5py.File(tmp_path / "one.h5") as one, h5py.File(runs / "cut.h5") as cut:
        np.testing.assert_allclose(cut["outputs"][:], one["outputs"][:], atol=1e-11)
        np.testing.assert_array_equal(cut["class"][:], one["class"][:])
