"""LIBSVM's text format against scikit-learn's reader."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from dbnet.core.errors import UserError
from dbnet.data.formats.libsvm import Libsvm


@pytest.mark.parametrize("small", [True, False])
def test_dense_arrays_are_scikit_learns(tmp_path, small):
    rng = np.random.default_rng(3)
    paths = []
    for name, n in (("a", 30), ("b", 11)):
        x = rng.integers(0, 3, (n, 7)) * (1.0 if small else 0.37) * (rng.random((n, 7)) < 0.4)
        paths.append(str(tmp_path / name))
        dump_svmlight_file(x, rng.choice([-1, 1, 7], n), paths[-1], zero_based=False, comment="made by a test")
    out = Libsvm(train=paths[0], test=paths[1]).read()
    assert out["classes"] == 3 and out["train/x"].dtype == (np.uint8 if small else np.float32)
    for part, path in zip(("train", "test"), paths, strict=True):
        x, y = load_svmlight_file(path, n_features=out["train/x"].shape[1])
        np.testing.assert_allclose(out[f"{part}/x"], x.toarray(), rtol=1e-6)
        np.testing.assert_array_equal(np.array([-1, 1, 7])[out[f"{part}/y"]], y)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 3:1\n2 4\n", "line 2: not of the form"),
        ("1 0:1\n", "line 1: indices count from 1"),
        ("", "holds no examples"),
        ("x 1:1\n", "line 1: not of"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, said):
    path = tmp_path / "data"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        Libsvm(train=str(path)).read()
    with pytest.raises(UserError, match="No file"):
        Libsvm(train=str(tmp_path / "none")).read()


def test_command_writes_a_data_file(dbnet, place):
    (place / "t").write_text("+1 1:1 3:2\n-1 2:1 # a comment\n\n+1\n")
    assert dbnet("data", "libsvm", "--train", "t", "--name", "tiny", "t.h5").code == 0
    assert "3 units, 2 classes" in dbnet("inspect", "t.h5").out
