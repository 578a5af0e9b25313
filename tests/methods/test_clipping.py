"""Clipping: by value and by the norm of the whole replica, however it is cut; what is not finite stays."""

from __future__ import annotations

import numpy as np
import pytest

from dbnet.core import config
from dbnet.core.errors import UserError
from dbnet.core.kernels.vector import clip
from dbnet.data.file import write
from dbnet.run import roles, setup, train


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_are_bounded_and_what_is_not_finite_stays(dtype):
    x = np.array([0.25, -0.25, 0.5, 3, -3, np.inf, -np.inf, np.nan, 0], dtype)
    wanted = np.array([0.25, -0.25, 0.5, 0.5, -0.5, np.inf, -np.inf, np.nan, 0], dtype)
    both = x.copy(), x.copy()
    clip(both[0], 0.5)
    clip.py_func(both[1], 0.5)
    for found in both:
        np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def tree(tmp_path):
    """Return a run of a small network of images with shared parameters."""
    rng = np.random.default_rng(3)
    path = tmp_path / "images.h5"
    write(path, {"train/x": rng.standard_normal((40, 6, 4)), "train/y": rng.integers(0, 2, 40), "classes": 2})
    return {
        "run": {"folder": str(tmp_path / "runs")},
        "data": {"path": str(path)},
        "model": {
            "layers": [{"kind": "conv", "maps": 3, "field": 3, "activation": "tanh"}, {"kind": "dense", "units": 2}],
            "dtype": "float64",
            "decay": 0.01,
        },
        "method": {"minibatch": 10},
        "rule": {"kind": "sgd", "rate": 0.5},
        "stop": {"steps": 6},
        "evaluate": {"train": 0},
    }


@pytest.fixture
def run(tree):
    """Return what trains it, cut or not."""
    return lambda *changes: train.execute(config.load(tree, changes), quiet=True).params


def test_the_norm_is_that_of_all_partitions_together(run):
    """Filters are held by every partition, and count once."""
    whole = run("method.clip_norm=0.1")
    np.testing.assert_allclose(run("method.clip_norm=0.1", "topology.partitions=2"), whole, rtol=1e-11, atol=1e-13)
    assert np.abs(whole - run()).max() > 1e-3
    # Six steps of at most 0.5 times the bound each.
    assert np.linalg.norm(whole - run("stop.steps=0")) < 0.5 * 0.1 * 6
    assert np.array_equal(run("method.clip_norm=1e9"), run())


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_each_minibatch_is_clipped_before_it_is_added(tree, rate):
    """And before the replica's own step is made with it."""
    replica = roles.load_replica(setup.setup(config.load(tree, ["method.clip_norm=0.01"])), 0)
    w = np.full(replica.size, 0.1)
    g, before = np.zeros_like(w), np.zeros_like(w)
    for accrued in range(3):
        start = w.copy()
        replica.accrue(w, g, accrued, rate)
        assert np.linalg.norm(g - before) == pytest.approx(0.01)
        np.testing.assert_allclose(start - w, rate * (g - before), rtol=1e-9, atol=1e-15)
        before[:] = g


def test_a_batch_method_clips_nothing_and_has_no_rate(run):
    with pytest.raises(UserError, match="clip_norm is an option of "):
        run("method={kind='sandblaster', clip_norm=1}")
    with pytest.raises(UserError, match="finds its own steps, so no rate can follow"):
        run("method.kind=sandblaster", "rule.schedule=cosine", "stop={iterations=1}")
