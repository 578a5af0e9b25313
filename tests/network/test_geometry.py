"""Images that the first layer does not use whole, through the whole program: the same as images of just what it uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from geometries import Geometry

METHODS = {
    "sgd": ["method.kind=sgd", "stop.steps=3"],
    "downpour": ["topology.replicas=2", "stop.steps=2"],
    "sandblaster": ["method.kind=sandblaster", "method.portion=4", "stop.iterations=2"],
}


def learned(dbnet: Callable, folder: Path, geometry: Geometry, changes: list[str], used_only: bool) -> list[np.ndarray]:
    """Train, evaluate and predict; return the parameters, what was said, the outputs."""
    folder.mkdir()
    data = geometry.data(folder / "data.h5", used_only=used_only)
    (folder / "run.toml").write_text('[run]\nname = "run"\npicture = false\n[method]\nminibatch = 4\n[evaluate]\nepochs = 1\n')
    words = ["run.toml", geometry.words(), f"data.path={data}", f"run.folder={folder}", *changes]
    point, out = folder / "run.checkpoint.h5", folder / "out.h5"
    for command in (("train", folder / words[0], *words[1:]), ("predict", point, data, out)):
        done = dbnet(*command)
        assert done.code == 0, (geometry.layers, geometry.shape, done)
    said = dbnet("evaluate", point)
    assert said.code == 0, said
    with h5py.File(point) as file, h5py.File(out) as predicted, h5py.File(folder / "run.h5") as run:
        last = run["evaluation"][-1]
        return [file["params"][:], predicted["outputs"][:], last["loss"], last["train_loss"], np.array(said.out)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.long
def test_what_the_first_layer_does_not_look_at_changes_nothing(dbnet: Callable, place: Path, method: str, soak: bool) -> None:
    geometries = [g for g in map(Geometry, range(400 if soak else 16)) if not g.fits]
    assert len(geometries) >= 3
    for i, geometry in enumerate(geometries[: 200 if soak else 3]):
        one, other = (learned(dbnet, place / f"{i}-{only}", geometry, METHODS[method], only) for only in (False, True))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{geometry.shape} {geometry.layers}")
