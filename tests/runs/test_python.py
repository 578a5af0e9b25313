"""dbnet in Python: train, plan and load do what the commands do, to the bit, and complain in one sentence."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

import dbnet as package
from dbnet.checkpoint.reader import Checkpoint
from dbnet.core.config import Config, load
from dbnet.core.errors import UserError
from dbnet.data.file import DataFile
from dbnet.run.inference import EVALUATION_BATCH, Trained

# A stride that leaves the last row and column of an 8 x 8 image out, so that the network wants a part of its inputs.
LAYERS = [
    {"kind": "conv", "maps": 2, "field": 3, "stride": 2, "activation": "tanh"},
    {"kind": "dense", "units": np.int64(10)},
]


@pytest.fixture
def scaled(digits: Path, tmp_path: Path) -> Path:
    """Return the digits as bytes with a scale, some of the test set."""
    data, path = DataFile(digits), tmp_path / "scaled.h5"
    with h5py.File(path, "w") as file:
        for part, n in (("train", 300), ("test", EVALUATION_BATCH + 7)):
            examples = data.read(part)
            file[f"{part}/x"] = examples.x[:n].reshape(-1, 8, 8).astype(np.uint8)
            file[f"{part}/y"] = examples.y[:n]
        file.attrs["classes"], file.attrs["scale"] = 10, 1 / 16
    return path


@pytest.fixture
def model(run_file: Path, scaled: Path) -> Trained:
    tree = {**tomllib.loads(run_file.read_text()), "data": {"path": scaled}, "model": {"layers": LAYERS}, "stop": {"epochs": 1}}
    return package.load(package.train(tree, quiet=True).checkpoint)


def test_tables_and_configurations_train_like_the_file(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stop.epochs=", "stop.steps=9"]
    tree, config = tomllib.loads(run_file.read_text()), load(run_file)
    before = repr(tree)
    outcomes = [package.train(source, words, quiet=True) for source in (str(run_file), run_file, tree, config)]
    assert capsys.readouterr() == ("", "") and repr(tree) == before
    assert all(np.array_equal(done.params, outcomes[0].params) for done in outcomes)
    stored = [package.open_run(done.run_file).config for done in outcomes]
    assert len({config.model_copy(update={"run": stored[0].run}).text() for config in stored}) == 1
    again = package.train(stored[0], quiet=True)
    assert np.array_equal(again.params, outcomes[0].params)


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"data": {}}, [], "The key 'data.path' is missing; add it to the configuration."),
        ({"rule": {"kind": "adagard"}}, [], "rule.kind = 'adagard' is not one of "),
        ({3: 4}, [], "Unknown key '3'"),
        ({"model": 3}, [], "model = 3 is not allowed: it must be a table"),
        ({}, "stop.steps=1", "Changes are a list of texts: write ['stop.steps=1'] instead of 'stop.steps=1'."),
        ({}, ["model.layers.7.units=1"], "there is no item 7"),
    ],
)
def test_wrong_tables_are_one_sentence(changes: dict, words: list[str], said: str, run_file: Path, place: Path) -> None:
    tree = {**tomllib.loads(run_file.read_text()), **changes}
    for function in (package.train, package.plan):
        with pytest.raises(UserError) as caught:
            function(tree, words)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (place / "out").exists()


def test_a_plan_is_what_the_command_prints(run_file: Path, dbnet: Callable) -> None:
    made, said = package.plan(run_file, ["topology.replicas=3"]), dbnet("plan", run_file, "topology.replicas=3")
    assert f"{made}\n" == said.out
    assert [rank.name for rank in made.ranks] == ["the coordinator", "shard 0", "shard 1", "replica 0", "replica 1", "replica 2"]
    assert made.memory == sum(rank.memory for rank in made.ranks)
    # Each of three replicas fetches and pushes all 1210 parameters in each step.
    assert made.bytes_per_step == 3 * 2 * 4 * 1210
    tree = tomllib.loads(run_file.read_text())
    assert str(package.plan(tree, ["topology.replicas=3"])) == str(made).replace(f"{run_file} topology", "RUN.toml topology")
    assert package.plan(tree, ["method.minibatch=1438"]).doubts[0].startswith("method.minibatch = 1438 is more than the 719")


def test_predict_equals_the_command(model: Trained, scaled: Path, dbnet: Callable) -> None:
    point = "out/run.checkpoint.h5"
    assert dbnet("predict", point, scaled, "p.npy").code == 0
    with h5py.File(scaled) as file:
        x, y = file["test/x"][:], file["test/y"][:]
    wanted, given = np.load("p.npy"), model.predict(x)
    assert given.dtype == np.float32 and np.array_equal(given, wanted)
    for part in (slice(0, 0), slice(3, 4), slice(0, EVALUATION_BATCH), slice(5, None)):
        assert np.array_equal(model.predict(x[part, :, :, None]), wanted[part])
    assert np.array_equal(model.predict(x.astype(np.float64)), wanted)
    said = dbnet("evaluate", point, scaled).out
    for score in (model.evaluate(), model.evaluate(scaled), model.evaluate(str(scaled), "test"), model.evaluate((x, y))):
        assert said == f"test: {len(x)} examples, loss {score.loss:.4f}, accuracy {score.accuracy:.4f}\n"
        assert score.accuracy == (wanted.argmax(axis=1) == y).mean()
    assert model.evaluate(part="train").loss != model.evaluate().loss


def test_parameters_by_name(model: Trained) -> None:
    point = Checkpoint("out/run.checkpoint.h5")
    assert {name: list(array.shape) for name, array in model.parameters.items()} == {name: shape for name, _, shape in point.layout}
    with h5py.File("out/run.checkpoint.h5") as file:
        assert np.array_equal(np.concatenate([array.ravel() for array in model.parameters.values()]), file["params"][:])
    with pytest.raises(ValueError, match="read-only"):
        next(iter(model.parameters.values()))[...] = 0
    assert isinstance(model.config, Config) and model.config == point.config


X = np.zeros((2, 8, 8), np.float32)
NAN = np.where(np.arange(128).reshape(2, 8, 8) == 100, np.float32("nan"), X)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (X.astype(int), "x is int64; use float32, float64 or uint8."),
        (X[0], "x has shape (8, 8); the network takes (examples, 8, 8, 1)."),
        (X.reshape(2, 64), "x has shape (2, 64); "),
        (np.float32(3), "x has shape (); "),
        (NAN, "x of example 1 is nan; remove it."),
        (X.astype(np.float64) + 1e300, "Example 0 holds 1e+300, "),
    ],
)
def test_wrong_inputs_are_one_sentence(x: np.ndarray, said: str, model: Trained) -> None:
    for function in (model.predict, lambda x: model.evaluate((x, [1, 2]))):
        with pytest.raises(UserError) as caught:
            function(x)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_wrong_data_are_one_sentence(model: Trained, make_data: Callable[..., Path]) -> None:
    for data, said in (
        ((X, [1]), "y is int64 (1,); for these x it must be 2 integers."),
        ((X, [1.0, 2.0]), "y is float64 (2,); "),
        ((X, [1, 10]), "y of example 1 is 10; labels are 0 .. 9."),
        ((X,), "data holds 1 arrays; give inputs and labels: (x, y)."),
        (make_data(), f"'{Path('small.h5').resolve()}' holds examples of shape (3,), the network takes (8, 8, 1)."),
        ("none.h5", "No data file 'none.h5'; "),
    ):
        with pytest.raises(UserError) as caught:
            model.evaluate(data)
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    for path, said in (("none.h5", "No checkpoint 'none.h5'; "), ("out/run.h5", "'out/run.h5' is not a dbnet checkpoint; ")):
        with pytest.raises(UserError, match=said):
            package.load(path)
