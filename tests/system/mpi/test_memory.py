"""`dbnet plan` against what the ranks really take: never less, and at most 15 % more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dbnet.comm.topology import Role
from dbnet.commands.plan.ranks import ranks
from dbnet.core import config
from dbnet.core.jit import CHECKED
from dbnet.data.file import write
from dbnet.run.roles import use
from dbnet.run.setup import setup

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHECKED, reason="kernels that check their bounds are compiled at every start and take more memory"),
]
HERE = Path(__file__).resolve().parent
WIDE = ["model.layers=[{kind='dense', units=8000, activation='relu'}, {kind='dense', units=10}]"]
IMAGES = [
    "model.layers=[{kind='conv', maps=24, field=5, activation='relu'}, {kind='norm', radius=2}, {kind='pool', field=2},"
    " {kind='local', maps=8, field=3, activation='tanh'}, {kind='dense', units=10}]",
    "method.minibatch=200",
]
RUNS = {
    "overlap": [*WIDE, "method.overlap=true", "method.n_push=2", "method.n_fetch=2"],
    "images": [*IMAGES, "method.overlap=true"],
    "sandblaster": [
        *WIDE,
        "method.kind=sandblaster",
        "stop.iterations=3",
        "method.descent.history=3",
        "method.portion=90",
        "evaluate={epochs=1000, train=0}",
    ],
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a configuration on 210 images of 40 x 40, in a type that is not the network's."""
    folder = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(1)
    contents = {f"{part}/x": rng.random((n, 40, 40, 1)) for part, n in (("train", 210), ("test", 40))}
    write(folder / "images.h5", {**contents, "train/y": rng.integers(0, 10, 210), "test/y": rng.integers(0, 10, 40), "classes": 10})
    text = f'[run]\npicture = false\n[data]\npath = "{folder}/images.h5"\n[model]\nlayers = [{{kind = "dense", units = 10}}]\n'
    (folder / "run.toml").write_text(f"{text}[stop]\nepochs = 2\n")
    return folder / "run.toml"


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_is_what_ranks_take(name: str, run_file: Path, mpirun: Callable, tmp_path: Path) -> None:
    changes = RUNS[name]
    ready = setup(config.load(run_file, changes))
    # The cache of kernels is filled first: compiling takes memory of its own.
    use(ready.config, 1)
    mpirun(3, HERE / "measured.py", tmp_path, "train", run_file, *changes, cwd=tmp_path).good()
    said = {}
    for rank in ranks(ready):
        anonymous, files, shared = map(int, (tmp_path / f"{rank.rank}").read_text().split())
        # What a replica has mapped of the shard's window is the shard's.
        took = anonymous + files + (shared if ready.topology.role(rank.rank) is not Role.WORK else 0)
        said[rank.name] = (took >> 20, rank.memory >> 20, round(rank.memory / took, 3))
    assert all(1 <= ratio <= 1.15 for *_, ratio in said.values()), said
