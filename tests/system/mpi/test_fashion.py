"""Fashion-MNIST from its IDX archives to a test accuracy of 0.87, two replicas; skipped where the archives are not at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dbnet.__main__ import main
from dbnet.monitor.results import Run

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT.parent / "shared" / "data" / "fashion_mnist"


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"the Fashion-MNIST archives are not in {os.path.relpath(FOLDER, ROOT)}")
@pytest.mark.timeout(400)
def test_fashion(tmp_path: Path, mpirun: Callable) -> None:
    words = ["data", "idx", "--name", "fashion"]
    for part, stem in (("train", "train"), ("test", "t10k")):
        words += [f"--{part}-images", str(FOLDER / f"{stem}-images-idx3-ubyte.gz")]
        words += [f"--{part}-labels", str(FOLDER / f"{stem}-labels-idx1-ubyte.gz")]
    assert main([*words, str(tmp_path / "fashion.h5")]) == 0
    job = ["-m", "dbnet", "train", ROOT / "jobs" / "fashion.toml", "data.path=fashion.h5", "run.folder=out", "stop.accuracy=0.875"]
    mpirun(4, *job, cwd=tmp_path, timeout=350).good()
    run = Run(tmp_path / "out" / "fashion.h5")
    assert run.finished and run.accuracy >= 0.87
    assert set(run.events.replica) == {0, 1}
