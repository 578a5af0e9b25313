"""What steps of networks take one rank: GFLOP/s by kind of layer, what a layer and a step take beside that; a network's own step.

A step's seconds are  step + layers x layer + sum over layers of flops / rate(kind), fitted to measured steps of networks of all
kinds with relative errors alike (non-negative least squares). Times are processor seconds of one thread, the lower quartile of
blocks (others may share the machine); before each step parameters come from elsewhere and the last gradient has been read, as
fetch and push leave them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet.core import config as configuration
from dbnet.core.ranges import Range
from dbnet.data import file
from dbnet.data.formats.random import Random
from dbnet.network.cost import MeasuredStep, Profile
from dbnet.network.model import Model
from dbnet.network.network import Network
from dbnet.network.replica import accrue_and_step
from dbnet.run import roles
from dbnet.run.setup import EVALUATION_BATCH, Setup, setup
from dbnet.shards.rules.adagrad import Adagrad
from dbnet.shards.rules.adam import Adam
from dbnet.shards.rules.momentum import Momentum
from dbnet.shards.rules.sgd import Sgd
from dbnet.shards.shard import Shard

_BLOCKS = 12
_SLICE = 1 << 18  # parameters of a slice of a push


def _dense(*units: int) -> list[dict[str, Any]]:
    return [{"kind": "dense", "units": n, "activation": "sigmoid"} for n in units]


class TrialNetwork(NamedTuple):
    """A network that is measured: shape of an example, layers below the last one of `classes` units, minibatch."""

    shape: str
    layers: list[dict[str, Any]]
    classes: int
    minibatch: int


# Small, middle and large; each kind of layer with little besides it.
TRIALS = (
    TrialNetwork("64", _dense(256), 10, 20),
    TrialNetwork("784", _dense(256), 10, 50),
    TrialNetwork("440", _dense(512, 512), 1024, 100),
    TrialNetwork("440", _dense(1024, 1024), 2048, 32),
    TrialNetwork("440", _dense(1536, 1536), 2048, 100),
    TrialNetwork("28,28,1", [{"kind": "conv", "maps": 8, "field": 5, "activation": "relu"}], 10, 32),
    TrialNetwork("32,32,3", [{"kind": "conv", "maps": 16, "field": 5, "activation": "relu"}], 10, 32),
    TrialNetwork("28,28,1", [{"kind": "local", "maps": 8, "field": 5}], 10, 32),
    TrialNetwork("32,32,3", [{"kind": "local", "maps": 8, "field": 7}], 10, 32),
    TrialNetwork("32,32,8", [{"kind": "pool", "over": "max", "field": 2, "stride": 2}], 10, 32),
    TrialNetwork("32,32,8", [{"kind": "pool", "over": "l2", "field": 3, "stride": 2}], 10, 32),
    TrialNetwork("32,32,8", [{"kind": "norm", "radius": 2}], 10, 32),
    TrialNetwork("4096", [{"kind": "dropout", "rate": 0.5}], 10, 32),
)


class Timed(NamedTuple):
    """A network with its seconds of a step, the median block over it, and its seconds of a pass in evaluation."""

    model: Model
    batch: int
    step: float
    spread: float
    forward: float

    def entry(self, about: str, beside: float = 0.0) -> MeasuredStep:
        """Return what a machine file says of it, with the seconds that a step takes `beside` the gradient."""
        seconds = {"step": float(f"{max(self.step + beside, self.step / 2):.4g}"), "forward": float(f"{self.forward:.4g}")}
        return MeasuredStep(about=about, network=self.model.identity, minibatch=self.batch, **seconds)


def blocks(action: Callable[[], object], before: Callable[[], object], budget: float) -> np.ndarray:
    """Return mean processor seconds of an action in blocks of `budget` seconds together; what is done `before` does not count."""

    def block(times: int) -> float:
        spent = 0.0
        for _ in range(times):
            before()
            began = time.thread_time()
            action()
            spent += time.thread_time() - began
        return spent / times

    block(1)
    times = max(1, int(budget / _BLOCKS / max(block(2), 1e-7)))
    return np.array([block(times) for _ in range(_BLOCKS)])


def timed(ready: Setup, budget: float) -> Timed:
    """Measure the steps of an uncut network on its own data."""
    replica, model = roles.load_replica(ready, 0), ready.model
    n = model.layout.size
    w, g, fetched, pushed = np.zeros((4, n), model.dtype)
    model.layout.draw(Range(0, n), 1, fetched)

    def moved() -> None:
        w[:] = fetched
        pushed[:] = g

    moved()
    steps = blocks(lambda: replica.accrue(w, g, 0, 0.0), moved, budget)
    judge = Network(model, EVALUATION_BATCH, training=False)
    judge.x[:] = np.resize(replica.network.x, judge.x.shape)
    target = np.resize(replica.train.target, (*replica.train.target.shape[:-1], EVALUATION_BATCH))
    passes = blocks(lambda: judge.score(w, target, EVALUATION_BATCH), lambda: None, budget / 3)
    step = usual(steps)
    return Timed(model, replica.train.batch, step, float(np.median(steps)) / step, usual(passes))


def lateness() -> float:
    """Return the seconds by which a short pause is longer here than it was meant to be."""
    found = []
    for _ in range(200):
        began = time.perf_counter()
        time.sleep(1e-4)
        found.append(time.perf_counter() - began - 1e-4)
    return usual(np.array(found))


def local(parameters: int = 1 << 22, times: int = 20) -> float:
    """Return the GB/s of gradients that a replica steps with by itself, of more than a cache holds."""
    total, g, w = np.zeros((3, parameters), np.float32)
    accrue_and_step(total, g, w, 0.1)
    found = np.zeros(times)
    for i in range(times):
        began = time.thread_time()
        accrue_and_step(total, g, w, 0.1)
        found[i] = time.thread_time() - began
    return float(f"{1e-9 * g.nbytes / usual(found):.3g}")


def rules(parameters: int = 1 << 20, times: int = 10) -> dict[str, float]:
    """Return how fast a shard applies gradients by each rule, as a multiple of Adagrad's speed."""
    g, found = np.ones(parameters, np.float32), {}
    for rule in (Adagrad(), Adam(), Momentum(), Sgd()):
        shard = Shard(Range(0, parameters), rule, np.zeros(parameters, np.float32), np.zeros(1, np.int64), time.perf_counter)
        seconds = np.zeros(times)
        for i in range(times):
            began = time.thread_time()
            for lo in range(0, parameters, _SLICE):
                shard.apply(lo, g[lo : lo + _SLICE], i + 1)
            seconds[i] = time.thread_time() - began
        found[rule.kind] = usual(seconds)
    return {kind: float(f"{found['adagrad'] / seconds:.3g}") for kind, seconds in found.items() if kind != "adagrad"}


def usual(times: np.ndarray) -> float:
    """Return the lower quartile."""
    return float(np.quantile(times, 0.25))


def trials(chosen: Iterable[TrialNetwork] = TRIALS, budget: float = 0.7) -> Iterator[Timed]:
    """Measure networks of all kinds of layers on random data."""
    for trial in chosen:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "data.h5")
            options = {"shape": trial.shape, "classes": trial.classes, "train": 4 * trial.minibatch, "test": 0}
            file.write(path, Random(**options).read(), False)
            yield timed(setup(configuration.load(tables_of(path, trial))), budget)


def tables_of(data: Path, trial: TrialNetwork) -> Mapping[str, Any]:
    """Return a run of a network as nested tables."""
    return {
        "data": {"path": str(data)},
        "model": {"layers": [*trial.layers, {"kind": "dense", "units": trial.classes}]},
        "method": {"minibatch": trial.minibatch},
        "stop": {"steps": 1},
        "evaluate": {"train": 0},
    }


def fitted(found: list[Timed]) -> dict[str, Any]:
    """Return [compute]'s rates, layer, step and evaluation that come closest to what was measured."""
    from scipy.optimize import nnls

    kinds = sorted({layer.kind for one in found for layer in one.model.layers})
    work = np.zeros((len(found), 2 + len(kinds)))
    for row, (model, batch, *_) in zip(work, found, strict=True):
        row[:2] = 1, len(model.layers)
        for i, layer in enumerate(model.layers):
            row[2 + kinds.index(layer.kind)] += (3 if i else 2) * batch * layer.flops(model.shapes[i], model.boxes()[i + 1])
    seconds = np.array([one.step for one in found])
    # Columns alike in size: the solver's tolerance is absolute.
    relative = work / seconds[:, None]
    size = np.abs(relative).max(axis=0)
    step, layer, *each = nnls(relative / size, np.ones(len(found)))[0] / size
    rates = {kind: float(f"{1e-9 / cost:.3g}") for kind, cost in zip(kinds, each, strict=True) if cost > 0}
    rate = rates.pop("dense", max(rates.values(), default=1.0))
    bare = {"rate": rate, "rates": rates, "step": step, "layer": layer, "apply": 1.0}
    way = {"latency": 0.0, "bandwidth": 1.0}
    profile = Profile.model_validate({"compute": bare, "inside": way, "between": way})
    passes = [profile.forward_seconds(one.model, one.model.boxes(), EVALUATION_BATCH) / one.forward for one in found]
    speed = {"step": float(f"{step:.3g}"), "layer": float(f"{layer:.3g}"), "evaluation": float(f"{np.median(passes):.3g}")}
    return {"rate": rate, "rates": rates, **speed}


def misses(found: list[Timed], profile: Profile) -> np.ndarray:
    """Return by how much the fit is off at each network, as a part of what was measured."""
    return np.array([profile.step_seconds(one.model, one.model.boxes(), one.batch) / one.step - 1 for one in found])
