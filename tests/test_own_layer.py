"""A layer in a user's own file: found through the run file, cut, checked, trained like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from partitioned import run

from dbnet.errors import UserError
from dbnet.model import Model
from dbnet.registry import load_file, make

FILE = Path(__file__).with_name("gain.py")


def model() -> Model:
    load_file(str(FILE))
    entries = [{"kind": "local", "maps": 2, "field": 2, "activation": "tanh"}, {"kind": "gain"}, {"kind": "dense", "units": 3}]
    return Model(
        [make("layers", e, "layer") for e in entries], make("losses", {"kind": "softmax"}, "loss"), (5, 6, 1), 3, "float64"
    )


@pytest.mark.parametrize("partitions", [2, 3, 4])
def test_it_is_cut_like_any_other(partitions: int) -> None:
    rng, net = np.random.default_rng(3), model()
    w, x, target = rng.standard_normal(net.layout.size), rng.standard_normal((5, 6, 1, 4)), rng.integers(0, 3, 4)
    one, cut = (run(net, p, 4, w, x, target, 4) for p in (1, partitions))
    np.testing.assert_allclose(cut.g, one.g, atol=1e-12, rtol=0)
    np.testing.assert_allclose(cut.y, one.y, atol=1e-12, rtol=0)


def test_its_gradient_equals_finite_differences() -> None:
    rng, net = np.random.default_rng(4), model()
    w, x, target = rng.standard_normal(net.layout.size), rng.standard_normal((5, 6, 1, 4)), rng.integers(0, 3, 4)
    g = run(net, 1, 4, w, x, target, 4).g
    for i in rng.integers(0, w.size, 12):
        up, down = w.copy(), w.copy()
        up[i] += 1e-6
        down[i] -= 1e-6
        rise = run(net, 1, 4, up, x, target, 4).score[0] - run(net, 1, 4, down, x, target, 4).score[0]
        assert g[i] == pytest.approx(rise / 4 / 2e-6, abs=1e-7)


def test_a_run_file_names_its_file(run_file: Path, dbnet: Callable) -> None:
    layers = "model.layers=[{kind='dense', units=32, activation='tanh'}, {kind='gain'}, {kind='dense', units=10}]"
    done = dbnet("train", run_file, f"model.modules=['{FILE}']", layers, "stop.epochs=8")
    assert done.code == 0, done.err
    assert float(done.out.split("Test accuracy")[1].split()[0]) > 0.85


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.modules: there is no file"):
        load_file(str(tmp_path / "none.py"))
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(UserError, match="fails with ModuleNotFoundError"):
        load_file(str(tmp_path / "broken.py"))
