"""Random geometries through the whole program: trained on one rank and cut in two, the parameters have the same bits.

All numbers are whole multiples of a power of two that fit their type, so that no order of summation rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
from geometries import Geometry, whole_numbers

from dbnet import train
from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.weights import ENDINGS, write
from dbnet.core.config import load
from dbnet.network.parameters.layout import FlatLayout
from dbnet.run import inference

pytestmark = pytest.mark.long
RUN_FILE = """[run]
picture = false
[model]
dtype = "float64"
loss = "squared"
[method]
kind = "sgd"
minibatch = 4
[rule]
kind = "sgd"
rate = 0.0625
[stop]
steps = 2
[evaluate]
train = 4
"""


@pytest.fixture(scope="module")
def cut(in_turn: Callable, tmp_path_factory: pytest.TempPathFactory, soak: bool) -> tuple[Path, list[Geometry]]:
    """Train in this process, then cut in two from the same start; predict over four; all in one start of the ranks."""
    folder = tmp_path_factory.mktemp("geometries")
    geometries = [Geometry(seed) for seed in range(3, 63 if soak else 6)]
    assert 2 <= sum(not geometry.fits for geometry in geometries) < len(geometries)
    (folder / "run.toml").write_text(RUN_FILE)
    commands = []
    for i, geometry in enumerate(geometries):
        words = [geometry.words(), f"data.path={geometry.data(folder / f'{i}.h5')}", f"run.folder={folder}"]

        def config(*changes: str, words: list[str] = words):
            return load(folder / "run.toml", [*words, *changes])

        with mock.patch.object(FlatLayout, "draw", whole_numbers(FlatLayout.draw)):
            start = train(config(f"run.name=start-{i}", "stop.steps=0")).checkpoint
        train(config(f"run.name=one-{i}", f"run.start={start}"))
        # Parameters from other programs come by ranges, too.
        exported = folder / f"start-{i}{ENDINGS[i % 2]}"
        write(Checkpoint(start), exported, False)
        changes = [f"run.name=cut-{i}", f"run.start={exported}", "topology.partitions=2", "--quiet"]
        commands.append(["train", str(folder / "run.toml"), *words, *changes])
        point = folder / f"cut-{i}.checkpoint.h5"
        commands += [["evaluate", str(point)], ["predict", str(point), str(folder / f"{i}.h5"), str(folder / f"out-{i}.h5")]]
    (folder / "said").write_text(in_turn(4, *commands, cwd=folder).good().out)
    return folder, geometries


def test_one_rank_and_two_partitions_give_the_same_bits(cut: tuple[Path, list[Geometry]], tmp_path: Path) -> None:
    folder, geometries = cut
    scores = [line for line in (folder / "said").read_text().splitlines() if line.startswith("test: ")]
    assert len(scores) == len(geometries)
    moved = 0
    for i, geometry in enumerate(geometries):
        about = f"geometry {i}: {geometry.shape} {geometry.layers}"
        with h5py.File(folder / f"one-{i}.checkpoint.h5") as one, h5py.File(folder / f"cut-{i}.checkpoint.h5") as two:
            np.testing.assert_array_equal(two["params"][:], one["params"][:], err_msg=about)
            with h5py.File(folder / f"start-{i}.checkpoint.h5") as start:
                moved += not np.array_equal(start["params"][:], one["params"][:])
        # A checkpoint of a cut network, used in one process.
        point, out = str(folder / f"cut-{i}.checkpoint.h5"), tmp_path / f"{i}.h5"
        inference.predict(point, str(folder / f"{i}.h5"), "test", str(out))
        with h5py.File(out) as one, h5py.File(folder / f"out-{i}.h5") as four:
            np.testing.assert_array_equal(four["outputs"][:], one["outputs"][:], err_msg=about)
        score, n, _ = inference.evaluate(point, None, "test")
        assert scores[i] == f"test: {n} examples, loss {score.loss:.4f}, accuracy {score.accuracy:.4f}", about
        with h5py.File(folder / f"one-{i}.h5") as one, h5py.File(folder / f"cut-{i}.h5") as two:
            last, other = one["evaluation"][-1], two["evaluation"][-1]
            for name in ("accuracy", "train_accuracy"):
                assert last[name] == other[name], about
            for name in ("loss", "train_loss"):
                assert other[name] == pytest.approx(last[name], rel=1e-13), about
    assert moved > len(geometries) / 2
