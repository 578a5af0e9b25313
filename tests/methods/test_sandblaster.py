"""Sandblaster in one process: SciPy's optimum, the local space's iterates, restart, warm start, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import adult
import numpy as np
import pytest
from scipy import optimize

from dbnet.checkpoint.reader import Checkpoint
from dbnet.core import config
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data.file import DataFile, write
from dbnet.data.formats.libsvm import Libsvm
from dbnet.methods.descent.base import solve
from dbnet.methods.descent.history import State
from dbnet.monitor.results import Run
from dbnet.monitor.runfile import RunFile
from dbnet.run import setup, train
from dbnet.run.outcome import Outcome
from dbnet.shards.space import LocalSpace

DROPOUT = "model.layers=[{kind='dropout', rate=0.1}, {kind='dense', units=10}]"
DENSE = "model.layers=[{kind='dense', units=10}]"


class SoftmaxRegression:
    """Mean softmax loss + decay / 2 |W|^2, its gradient, and nothing of dbnet: parameters are W [classes, units], then b."""

    def __init__(self, x: np.ndarray, y: np.ndarray, classes: int, decay: float) -> None:
        self.x, self.y, self.classes, self.decay = x, y, classes, decay

    def __call__(self, params: np.ndarray) -> tuple[float, np.ndarray]:
        n, units = self.x.shape
        w, b = params[: self.classes * units].reshape(self.classes, units), params[self.classes * units :]
        z = self.x @ w.T + b
        z -= z.max(axis=1, keepdims=True)
        logs = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        delta = np.exp(logs)
        delta[np.arange(n), self.y] -= 1
        gradient = np.concatenate([(delta.T @ self.x / n + self.decay * w).ravel(), delta.mean(axis=0)])
        return float(-logs[np.arange(n), self.y].mean() + self.decay / 2 * (w * w).sum()), gradient


@pytest.fixture(scope="module")
def adult_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adult")
    text, path = adult.write(folder / "adult", 1500), folder / "adult.h5"
    write(path, Libsvm(train=str(text), name="adult").read())
    return path


def cfg(data: Path, folder: Path, *changes: str) -> config.Config:
    """Return a run of softmax regression in float64, changed by overrides."""
    tree = {
        "run": {"folder": str(folder)},
        "data": {"path": str(data)},
        "model": {"layers": [{"kind": "dense", "units": 2}], "dtype": "float64", "decay": 1e-4},
        "method": {
            "kind": "sandblaster",
            "minibatch": 128,
            "portion": 128,
            "push_every": 3,
            "descent": {"loss_change": 0.0, "gradient_norm": 0.0},
        },
        "topology": {"shards": 2, "replicas": 2},
        "stop": {"iterations": 10},
        "evaluate": {"epochs": 100.0, "train": 0},
    }
    return config.load(tree, changes, lambda _: None)


def params(path: Path) -> np.ndarray:
    point = Checkpoint(path)
    out = np.zeros(point.size, point.dtype)
    point.read("params", Range(0, point.size), out)
    return out


def objective(cfg: config.Config) -> SoftmaxRegression:
    data = DataFile(cfg.data.path)
    part = data.read("train")
    return SoftmaxRegression(part.x * data.scale, part.y, data.classes, cfg.model.decay)


def local(cfg: config.Config, iterations: int) -> tuple[LocalSpace, State, list[float]]:
    """Run the same method on whole vectors with the formula's loss, from the run's initial parameters."""
    ready, f = setup.setup(cfg), objective(cfg)
    start = np.zeros(ready.model.layout.size)
    ready.model.layout.draw(Range(0, start.size), cfg.run.seed, start)
    space, state, losses = LocalSpace({"params": start, "gradient": np.zeros_like(start)}), State(), []

    def evaluate(w: np.ndarray, g: np.ndarray, examples: object) -> float:
        if state.iteration > len(losses):
            losses.append(state.loss)
        loss, g[:] = f(w)
        return loss

    solve(space, evaluate, cfg.method.descent.model_copy(update={"iterations": iterations}), state)
    return space, state, [*losses, state.loss]


# --- what it computes ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_optimum_is_scipys(adult_file: Path, tmp_path: Path) -> None:
    f = objective(cfg(adult_file, tmp_path))
    tight = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9}
    start = np.zeros(f.classes * (f.x.shape[1] + 1))
    best = optimize.minimize(f, start, jac=True, method="L-BFGS-B", options=tight).fun
    done = train.execute(
        cfg(adult_file, tmp_path, "stop.iterations=400", "method.portion=512", "method.descent.gradient_norm=1e-6"), quiet=True
    )
    reached = Run(done.run_file).iterations.loss.iloc[-1]
    assert reached == pytest.approx(f(params(done.checkpoint))[0], rel=1e-12)
    assert best * (1 - 1e-6) <= reached <= best * (1 + 1e-6)


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_iterates_are_those_of_the_local_space(adult_file: Path, tmp_path: Path, shards: int) -> None:
    wanted = cfg(adult_file, tmp_path, f"topology.shards={shards}", "topology.replicas=3", "method.portion=390")
    done = train.execute(wanted, quiet=True)
    space, state, losses = local(wanted, 10)
    found = Run(done.run_file).iterations
    assert found.iteration.tolist() == list(range(1, 11))
    np.testing.assert_allclose(found.loss, losses, rtol=1e-10)
    np.testing.assert_allclose(params(done.checkpoint), space.registers["params"], rtol=1e-10, atol=1e-10)
    assert found.passes.sum() == state.passes and (found.rounds[1:] <= 4).all()


@pytest.mark.parametrize("method", ["sandblaster", "downpour"])
def test_more_shards_than_parameters(tmp_path: Path, method: str) -> None:
    rng, layers = np.random.default_rng(2), "model.layers=[{kind='dense', units=2}]"
    write(tmp_path / "small.h5", {"train/x": rng.standard_normal((9, 2)), "train/y": rng.integers(0, 2, 9), "classes": 2})
    stop = "stop={iterations=3}" if method == "sandblaster" else "stop={epochs=2}"
    found = []
    for shards in (1, 7):
        changes = [layers, f"method.kind={method}", stop, f"topology.shards={shards}", f"run.name=on-{shards}"]
        done = train.execute(cfg(tmp_path / "small.h5", tmp_path, *changes), quiet=True)
        assert set(Run(done.run_file).events.shard) == set(range(min(shards, 6)))
        found.append(params(done.checkpoint))
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_epochs_are_passes_whatever_is_computed_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    contents = {f"{part}/x": rng.standard_normal((n, 5)) for part, n in (("train", 900), ("test", 9))}
    contents |= {f"{part}/y": rng.integers(0, 2, n) for part, n in (("train", 900), ("test", 9))}
    write(tmp_path / "small.h5", {**contents, "classes": 2})
    changes = ["topology.replicas=3", "evaluate.epochs=1", "stop.iterations=4"]
    run = Run(train.execute(cfg(tmp_path / "small.h5", tmp_path, *changes), quiet=True).run_file)
    assert run.iterations.backups.sum() > 0
    assert run.evaluation.epochs.tolist() == [0, *run.iterations.passes.cumsum()]
    # Seldom: the last iterate once more than that.
    seldom = [*changes, "evaluate.epochs=2.5", "run.name=seldom"]
    seen = Run(train.execute(cfg(tmp_path / "small.h5", tmp_path, *seldom), quiet=True).run_file)
    epochs = seen.evaluation.epochs.tolist()
    assert len(epochs) < 5 and epochs == sorted(set(epochs)) and epochs[-1] == seen.iterations.passes.sum()


KINDS = {
    "lbfgs": ["method.descent.kind=lbfgs", "method.descent.history=4"],
    "conjugate_gradient": ["method.descent.kind=conjugate_gradient"],
    "gradient_descent": ["method.descent.kind=gradient_descent"],
    "owlqn": ["method.descent.kind=owlqn", "method.descent.strength=1e-3", "method.descent.mask=weights", "model.decay=0.0"],
    "multibatch_lbfgs": ["method.descent={kind='multibatch_lbfgs', batch=400, overlap=100, rate=0.5}"],
}


class Interrupted(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_restart_during_a_pass_on_another_topology_is_as_if_uninterrupted(digits, tmp_path, monkeypatch, kind) -> None:
    changes = [DENSE, *KINDS[kind]]
    straight = train.execute(cfg(digits, tmp_path, *changes, "run.name=straight", "stop.iterations=12"), quiet=True)
    early = cfg(digits, tmp_path, *changes, "run.name=early", "checkpoint.seconds=1e-6")
    append = RunFile.iteration

    def interrupt(self: RunFile, *values: float) -> None:
        append(self, *values)
        if values[1] == 7:
            raise Interrupted

    monkeypatch.setattr(RunFile, "iteration", interrupt)
    with pytest.raises(Interrupted):
        train.execute(early, quiet=True)
    monkeypatch.undo()
    point = early.output(".checkpoint.h5")
    assert Checkpoint(point).state["state"]["iteration"] == 6
    iterate = train.execute(cfg(digits, tmp_path, *changes, "run.name=six", "stop.iterations=6"), quiet=True)
    np.testing.assert_allclose(params(point), params(iterate.checkpoint), rtol=1e-7, atol=1e-9)
    same_elsewhere(digits, tmp_path, changes, point, straight)


def same_elsewhere(digits: Path, folder: Path, changes: list[str], point: Path, straight: Outcome) -> None:
    """A run of twelve iterations that goes on from a checkpoint of its sixth on another topology comes to the same."""
    shape = ["topology.shards=3", "topology.replicas=1", "stop.iterations=12", "run.name=elsewhere"]
    late = train.execute(cfg(digits, folder, *changes, *shape), resume=str(point), quiet=True)
    np.testing.assert_allclose(params(late.checkpoint), params(straight.checkpoint), rtol=1e-7, atol=1e-9)
    found, wanted = Run(late.run_file).iterations, Run(straight.run_file).iterations
    np.testing.assert_allclose(found.loss, wanted.loss[-len(found) :], rtol=1e-9)
    assert found.iteration.tolist() == list(range(7, 13))


def test_start_takes_the_parameters_of_any_checkpoint(digits, tmp_path) -> None:
    warm = train.execute(cfg(digits, tmp_path, DENSE, "method.kind=downpour", "stop={epochs=1}", "run.name=warm"), quiet=True)
    for method in ("sandblaster", "downpour"):
        stop = "stop={iterations=0}" if method == "sandblaster" else "stop={epochs=0}"
        done = train.execute(
            cfg(digits, tmp_path, DENSE, f"method.kind={method}", stop, f"run.start={warm.checkpoint}", f"run.name={method}"),
            quiet=True,
        )
        np.testing.assert_array_equal(params(done.checkpoint), params(warm.checkpoint))
    moved = train.execute(cfg(digits, tmp_path, DENSE, f"run.start={warm.checkpoint}", "run.name=on"), quiet=True)
    assert Run(moved.run_file).iterations.loss.iloc[-1] < objective(cfg(digits, tmp_path, DENSE))(params(warm.checkpoint))[0]
    with pytest.raises(UserError, match="another network"):
        setup.setup(
            cfg(
                digits, tmp_path, "model.layers=[{kind='dense', units=5}, {kind='dense', units=10}]", f"run.start={warm.checkpoint}"
            )
        )


def test_a_run_of_another_method_goes_on_from_the_parameters(digits, tmp_path) -> None:
    warm = train.execute(cfg(digits, tmp_path, DENSE, "method.kind=downpour", "stop={epochs=1}", "run.name=warm"), quiet=True)
    done = train.execute(cfg(digits, tmp_path, DENSE, "run.name=next"), resume=str(warm.checkpoint), quiet=True)
    assert len(Run(done.run_file).iterations) == 10
    # Adagrad's sums are not in it; a rule without a state goes on.
    back = [DENSE, "method.kind=downpour", "stop={epochs=2}", "run.name=back"]
    with pytest.raises(UserError, match="no register"):
        train.execute(cfg(digits, tmp_path, *back), resume=str(done.checkpoint), quiet=True)
    back += ["rule={kind='sgd', rate=0.01}"]
    assert train.execute(cfg(digits, tmp_path, *back), resume=str(done.checkpoint), quiet=True).accuracy > 0.5


@pytest.mark.long
def test_multibatch_needs_no_whole_pass(digits, tmp_path) -> None:
    options = ["method.descent={kind='multibatch_lbfgs', batch=400, overlap=100, rate=1.0, decay=20}", "model.decay=1e-2"]
    done = train.execute(cfg(digits, tmp_path, DENSE, *options, "stop.iterations=120"), quiet=True)
    f = objective(cfg(digits, tmp_path, DENSE, "model.decay=1e-2"))
    best = optimize.minimize(f, np.zeros(650), jac=True, method="L-BFGS-B", options={"maxiter": 500}).fun
    assert f(params(done.checkpoint))[0] <= 1.05 * best
    rows = Run(done.run_file).iterations
    assert (rows.passes == 3).all() and (rows.rounds <= 5).all()


# --- when it ends, and what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "most"),
    [("{epochs=5}", 5), ("{accuracy=0.5}", 40), ("{seconds=0.3, iterations=100000}", 99999), ("{iterations=3}", 3)],
)
def test_it_ends(digits, tmp_path, stop, most) -> None:
    done = train.execute(cfg(digits, tmp_path, DENSE, f"stop={stop}", "evaluate.epochs=1.0"), quiet=True)
    rows = Run(done.run_file).iterations
    assert 0 < len(rows) <= most and Run(done.run_file).finished


def test_epochs_are_passes_over_the_data(make_data, tmp_path) -> None:
    """The three passes of a batch of a third of the data are a third of an epoch."""
    x, y = np.random.default_rng(1).random((12, 3)), np.arange(12) % 2
    data = make_data(train__x=x, train__y=y)
    options = ["method.descent={kind='multibatch_lbfgs', batch=4, overlap=1, rate=0.1}", "method.minibatch=4", "method.portion=4"]
    done = train.execute(cfg(data, tmp_path, *options, "stop={epochs=2}"), quiet=True)
    assert len(Run(done.run_file).iterations) == 6
    more = cfg(data, tmp_path, *options, "stop={epochs=3}", "run.name=more")
    assert len(Run(train.execute(more, resume=str(done.checkpoint), quiet=True).run_file).iterations) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["stop={steps=3}"], "give stop.iterations"),
        (["warmstart.steps=3"], "set run.start to a checkpoint"),
        ([DROPOUT], "model.layers.0 (dropout) draws random numbers at every step"),
        (["method.descent={kind='owlqn', strength=1.0, mask='biases'}"], "'weights' is 1 on all weights"),
        (["method.descent.kind=newton"], "method.descent.kind = 'newton' is not one of"),
        (["method.descent.histroy=3"], "did you mean 'history'?"),
    ],
)
def test_what_is_wrong_is_said(digits, tmp_path, changes, said) -> None:
    with pytest.raises(UserError) as error:
        setup.setup(cfg(digits, tmp_path, DENSE, *changes))
    assert said in str(error.value)
    setup.setup(cfg(digits, tmp_path, DROPOUT.replace("0.1", "0")))


def test_another_history_is_refused(digits, tmp_path) -> None:
    done = train.execute(cfg(digits, tmp_path, DENSE, "stop.iterations=2"), quiet=True)
    with pytest.raises(UserError, match=r"method.descent.history = 10, now it is 3"):
        train.execute(
            cfg(digits, tmp_path, DENSE, "method.descent.history=3", "run.name=other"), resume=str(done.checkpoint), quiet=True
        )


def test_run_file_round_trips(dbnet, digits, tmp_path, place) -> None:
    text = config.to_toml(cfg(digits, tmp_path, DENSE, "method.descent.line.curvature=0.5"))
    (place / "again.toml").write_text(text)
    assert config.load(place / "again.toml").method.descent.line.curvature == 0.5
    done = dbnet("train", "again.toml", "run.folder=out", "stop.iterations=2")
    assert done.code == 0 and "iteration" in done.out
    shutil.rmtree(place / "out")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(digits, tmp_path, kind) -> None:
    changes = [DENSE, *KINDS[kind]]
    straight = train.execute(cfg(digits, tmp_path, *changes, "run.name=straight", "stop.iterations=12"), quiet=True)
    early = train.execute(cfg(digits, tmp_path, *changes, "run.name=early", "stop.iterations=6"), quiet=True)
    late = train.execute(
        cfg(digits, tmp_path, *changes, "run.name=late", "stop.iterations=12"), resume=str(early.checkpoint), quiet=True
    )
    np.testing.assert_allclose(params(late.checkpoint), params(straight.checkpoint), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(Run(late.run_file).iterations.loss, Run(straight.run_file).iterations.loss[6:], rtol=1e-10)
    same_elsewhere(digits, tmp_path, changes, early.checkpoint, straight)
