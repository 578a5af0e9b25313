"""Fashion-MNIST, 256 sigmoid units, full batches: after 30 iterations the loss is that of SciPy's L-BFGS or below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from dbnet.checkpoint.reader import Checkpoint
from dbnet.core import config
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.data.file import write
from dbnet.monitor.results import Run
from dbnet.network.network import Network
from dbnet.run import setup, train

SOURCE = Path(__file__).resolve().parents[4] / "shared" / "data" / "fashion_mnist"
TREE = {
    "model": {"layers": [{"kind": "dense", "units": 256, "activation": "sigmoid"}, {"kind": "dense", "units": 10}]},
    "method": {
        "kind": "sandblaster",
        "portion": 2000,
        # Losses of a float32 network are rounded: a rise by less is none.
        "descent": {"kind": "lbfgs", "history": 10, "line": {"noise": 1e-7}, "loss_change": 0.0},
    },
    "topology": {"shards": 2, "replicas": 2},
    "evaluate": {"epochs": 100, "train": 0},
}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SOURCE.exists():
        pytest.skip(f"the data set is not at {SOURCE}")
    path, names = tmp_path_factory.mktemp("data") / "fashion.h5", {"train": "train", "test": "t10k"}
    files = {f"{part}_{what}": f"{SOURCE}/{stem}-{what}-idx{3 if what == 'images' else 1}-ubyte.gz"
             for part, stem in names.items() for what in ("images", "labels")}  # fmt: skip
    write(path, make("data.formats", {"kind": "idx", **files}, "data").read())
    return path


@pytest.mark.long
@pytest.mark.timeout(600)
def test_training_loss_is_scipys_or_below(fashion: Path, tmp_path: Path) -> None:
    tree = {**TREE, "data": {"path": str(fashion)}}
    warm = {"run": {"folder": str(tmp_path), "name": "warm"}, "method": {"minibatch": 50}, "rule": {"rate": 0.02}}
    point = train.execute(config.build({**tree, **warm, "stop": {"epochs": 1}}), quiet=True).checkpoint
    on = {"run": {"folder": str(tmp_path), "start": str(point)}, "method": {"kind": "sandblaster", "minibatch": 1000}}
    final = config.build({**tree, **on, "stop": {"iterations": 30}})
    mine = Run(train.execute(final, quiet=True).run_file).iterations
    assert len(mine) == 30

    ready = setup.setup(final)
    network, part, g = Network(ready.model, 1000), ready.data.read("train"), np.zeros(ready.model.layout.size, np.float32)

    def loss_and_gradient(params: np.ndarray) -> tuple[float, np.ndarray]:
        w, total = params.astype(np.float32), 0.0
        for k, lo in enumerate(range(0, 60000, 1000)):
            network.x[:] = part.x[lo : lo + 1000].T * np.float32(ready.data.scale)
            total += network.loss_and_gradient(w, g, part.y[lo : lo + 1000], 1000, k > 0)[0]
        return total / 60000, g.astype("f8") / 60

    start = np.zeros(g.size, np.float32)
    Checkpoint(point).read("params", Range(0, g.size), start)
    options = {"maxiter": 30, "maxcor": 10, "ftol": 0, "gtol": 0}
    scipys = optimize.minimize(loss_and_gradient, start.astype("f8"), jac=True, method="L-BFGS-B", options=options)
    reached = float(mine.loss.iloc[-1])
    print(f"loss after 30 iterations: {reached:.6f} in {mine.passes.sum()} passes, SciPy's {scipys.fun:.6f} in {scipys.nfev}")
    assert reached <= 1.01 * scipys.fun
