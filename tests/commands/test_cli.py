"""Every command from one end to the other on the digits, and that the outputs agree with each other."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from finished import ROOT, Finished
from matplotlib.figure import Figure

import dbnet as package
from dbnet import open_run
from dbnet.__main__ import COMMANDS, main, parser
from dbnet.core.config import load, restored
from dbnet.core.registry import family
from dbnet.data.file import DataFile
from dbnet.monitor.pictures import figure

Command = Callable[..., Finished]


_TRAINED: list[tuple[Finished, Path]] = []


@pytest.fixture
def trained(run_file: Path, dbnet: Command, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Train, and leave the outputs in `out`; once, and from then on with copies."""
    if not _TRAINED:
        done = dbnet("train", run_file, "stop.epochs=8", "run.picture=true")
        _TRAINED.append((done, shutil.copytree("out", tmp_path_factory.mktemp("trained") / "out", symlinks=True)))
    else:
        shutil.copytree(_TRAINED[0][1], "out", symlinks=True)
    return _TRAINED[0][0]


def test_train(trained: Finished, run_file: Path) -> None:
    assert trained.code == 0 and trained.err == ""
    assert sorted(p.name for p in Path("out").iterdir()) == ["run.checkpoint.h5", "run.checkpoints", "run.h5", "run.png"]
    run = open_run("out/run.h5")
    assert run.finished and run.accuracy > 0.85
    assert f"Test accuracy  {run.accuracy:.4f}" in trained.out
    assert all(f"out/run{ending}" in trained.out for ending in (".h5", ".checkpoint.h5", ".png"))
    assert restored(run.config) == load(run_file, ["stop.epochs=8", "run.picture=true"])


def test_train_from_python_gives_the_parameters(run_file: Path) -> None:
    done = package.train(run_file, ["stop.epochs=1"])
    with h5py.File(done.checkpoint) as file:
        assert np.array_equal(file["params"][:], done.params)


def test_a_run_can_be_repeated_to_the_bit(run_file: Path) -> None:
    one, two = (package.train(run_file, [f"run.name={name}"]) for name in "ab")
    assert np.array_equal(one.params, two.params)
    assert not np.array_equal(one.params, package.train(run_file, ["run.seed=2"]).params)


def test_quiet_says_nothing(run_file: Path, dbnet: Command) -> None:
    assert dbnet("train", "--quiet", run_file, "stop.steps=3") == Finished(0, "", "")


def test_overrides_stand_anywhere(run_file: Path, dbnet: Command) -> None:
    assert dbnet("train", run_file, "stop.steps=3", "--quiet", "run.name=b").code == 0
    assert Path("out/b.h5").exists()
    assert dbnet("train", run_file, "run.name=b", "--resume", "stop.steps=5", "--quiet").code == 0
    assert open_run("out/b-2.h5").config.stop.steps == 5
    assert open_run("out/b-2.h5").about["resumed_from"] == "out/b.checkpoints/000001.h5"


def test_names_are_never_taken_twice(run_file: Path, dbnet: Command) -> None:
    dbnet("train", run_file, "stop.steps=2")
    before = {path: path.read_bytes() for path in Path("out").rglob("*.*") if path.is_file()}
    assert dbnet("train", run_file, "stop.steps=3").code == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    after = {path.name for path in Path("out").glob("run-2*")}
    assert after == {"run-2.h5", "run-2.checkpoint.h5", "run-2.checkpoints"}


def test_plan(run_file: Path, dbnet: Command) -> None:
    said = dbnet("plan", run_file, "topology.replicas=3", "-n", 6)
    assert said.code == 0 and f"mpirun -n 6 dbnet train {run_file} topology.replicas=3" in said.out
    assert "1,210 parameters" in said.out and not Path("out").exists()
    wrong = dbnet("plan", run_file, "-n", 9)
    assert wrong.code == 2 and "= 5 ranks, not 9" in wrong.err and "topology.shards=2 topology.replicas=6" in wrong.err


@pytest.mark.parametrize("source", ["plan", "run", "checkpoint"])
def test_the_effective_configuration_trains_again(source: str, trained: Finished, run_file: Path, dbnet: Command) -> None:
    file = {"run": "out/run.h5", "checkpoint": "out/run.checkpoint.h5"}.get(source)
    said = dbnet("inspect", "--config", file) if file else dbnet("plan", "--config", run_file, "stop.epochs=8", "run.picture=true")
    assert said.code == 0
    Path("again.toml").write_text(said.out)
    assert dbnet("train", "again.toml", "--quiet").code == 0
    first, second = json.loads(open_run("out/run.h5").config.text()), json.loads(open_run("out/run-2.h5").config.text())
    assert second["run"].pop("name") == "run-2" and first["run"].pop("name") == "run"
    assert first == second
    with h5py.File("out/run.checkpoint.h5") as one, h5py.File("out/run-2.checkpoint.h5") as two:
        assert np.array_equal(one["params"][:], two["params"][:])


def test_inspect(trained: Finished, digits: Path, dbnet: Command) -> None:
    run = dbnet("inspect", "out/run.h5")
    assert run.code == 0 and run.out.startswith("run file, finished") and "adagrad" in run.out
    point = dbnet("inspect", "out/run.checkpoint.h5")
    assert point.code == 0 and point.out.startswith("checkpoint of a run named 'run'") and "epoch 8" in point.out
    data = dbnet("inspect", digits)
    assert data.code == 0 and "1438 examples" in data.out and "8x8x1" in data.out


def test_evaluate_and_predict_agree(trained: Finished, digits: Path, dbnet: Command) -> None:
    data = DataFile(digits)
    for part in ("train", "test"):
        labels = data.read(part).y
        said = dbnet("evaluate", "out/run.checkpoint.h5", "--part", part)
        assert said.code == 0
        accuracy = float(said.out.split()[-1])
        assert dbnet("predict", "out/run.checkpoint.h5", digits, "p.csv", "--part", part, "--force").code == 0
        assert dbnet("predict", "out/run.checkpoint.h5", digits, "p.h5", "--part", part, "--force").code == 0
        table = np.loadtxt("p.csv", delimiter=",", skiprows=1, dtype=np.int64)
        assert Path("p.csv").read_text().startswith("example,class\n")
        assert table[:, 0].tolist() == list(range(len(labels)))
        assert f"{(table[:, 1] == labels).mean():.4f}" == f"{accuracy:.4f}"
        with h5py.File("p.h5") as file:
            assert np.array_equal(file["class"][:], table[:, 1]) and file["outputs"].shape == (len(labels), 10)
            assert np.array_equal(file["outputs"][:].argmax(axis=1), table[:, 1])
    assert f"{open_run('out/run.h5').accuracy:.4f}" == f"{accuracy:.4f}"
    rows = [line.split() for line in dbnet("evaluate", "out/run.checkpoint.h5", "--by-class").out.splitlines()[2:]]
    for k, row in enumerate(rows):
        mine = table[labels == k, 1]
        assert row[:4] == [str(k), str(len(mine)), str((mine == k).sum()), f"{(mine == k).mean():.4f}"]
    assert len(rows) == 10
    assert not list(Path().glob("*.part"))


def test_predictions_are_the_network_by_hand(trained: Finished, digits: Path, dbnet: Command) -> None:
    assert dbnet("predict", "out/run.checkpoint.h5", digits, "p.h5").code == 0
    with h5py.File("out/run.checkpoint.h5") as file:
        w = file["params"][:].astype(np.float64)
    first, b1, second, b2 = np.split(w, np.cumsum([16 * 64, 16, 160]))
    x = DataFile(digits).read("test").x / 16
    hidden = 1 / (1 + np.exp(-(x @ first.reshape(16, 64).T + b1)))
    z = hidden @ second.reshape(10, 16).T + b2
    with h5py.File("p.h5") as file:
        given = file["outputs"][:]
        assert np.array_equal(file["class"][:], z.argmax(axis=1))
    softmax = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    assert np.allclose(given, z, atol=1e-3) or np.allclose(given, softmax, atol=1e-4)


def test_predictions_by_ending(trained: Finished, digits: Path, dbnet: Command) -> None:
    point = "out/run.checkpoint.h5"
    for ending, words in ((".csv", "classes alone"), (".npy", "logits"), (".npz", "logits"), (".h5", "logits")):
        said = dbnet("predict", point, digits, f"p{ending}")
        assert said.code == 0 and said.out.startswith(f"359 predictions written to p{ending} (") and words in said.out
        said = dbnet("predict", point, digits, f"q{ending}", "--probabilities")
        assert said.code == 0 and "(outputs are probabilities of the classes)" in said.out
    z, shares = np.load("p.npy"), np.load("q.npy")
    assert z.shape == (359, 10) and z.dtype == np.float32 and not np.allclose(z.sum(axis=1), 1)
    by_hand = np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum(axis=1, keepdims=True)
    assert np.allclose(shares, by_hand, atol=1e-6)
    for name, outputs in (("p", z), ("q", shares)):
        with np.load(f"{name}.npz") as arrays, h5py.File(f"{name}.h5") as file:
            assert np.array_equal(arrays["outputs"], outputs) and np.array_equal(file["outputs"][:], outputs)
            assert np.array_equal(arrays["class"], z.argmax(axis=1)) and np.array_equal(file["class"][:], z.argmax(axis=1))
            assert str(arrays["checkpoint"]) == file.attrs["checkpoint"] == point
            assert ("logits" if name == "p" else "probabilities") in file["outputs"].attrs["meaning"]
    table = np.loadtxt("q.csv", delimiter=",", skiprows=1)
    assert np.array_equal(table[:, 1], z.argmax(axis=1)) and np.allclose(table[:, 2:], shares, atol=1e-7)
    assert Path("q.csv").read_text().startswith("example,class,output_0,output_1,")


def test_without_labelled_test_set(run_file: Path, make_data: Callable[..., Path], dbnet: Command) -> None:
    """Vector targets: no accuracy is spoken of, and predictions are values."""
    y = np.arange(16, dtype=np.float32).reshape(8, 2) / 16
    make_data(train__y=y, test__y=y[:4], classes=None)
    words = ["data.path=small.h5", "model.layers=[{kind='dense', units=2}]", "model.loss=squared", "method.minibatch=4"]
    said = dbnet("train", run_file, *words)
    assert said.code == 0 and "Test error     mean squared error 0." in said.out and said.err == "" and "accuracy" not in said.out
    point = "out/run.checkpoint.h5"
    tried = dbnet("evaluate", point)
    assert tried.code == 0 and tried.out.startswith("test: 4 examples, loss ") and "accuracy" not in tried.out
    assert "nan" not in said.out + tried.out + dbnet("inspect", "out/run.h5").out
    assert "(outputs are predicted values)" in dbnet("predict", point, "small.h5", "p.csv").out
    assert Path("p.csv").read_text().startswith("example,output_0,output_1\n")
    wrong = dbnet("predict", point, "small.h5", "q.csv", "--probabilities")
    assert wrong.code == 2 and wrong.err == "dbnet: The squared loss has no probabilities; leave out --probabilities.\n"


def test_squared_loss_of_labels_has_an_accuracy_and_no_errors(run_file: Path, dbnet: Command) -> None:
    said = dbnet("train", run_file, "model.loss=squared", "stop.epochs=", "stop.steps=1")
    assert said.code == 0 and "Test accuracy" in said.out and "R2" not in said.out, said


def test_what_is_seldom_meant_is_said(run_file: Path, make_data: Callable[..., Path], dbnet: Command) -> None:
    labels = np.arange(8) % 2
    make_data("first.h5", train__x=np.zeros((8, 3, 9, 9), np.float32), train__y=labels, test__x=None, test__y=None)
    make_data("bytes.h5", train__x=np.zeros((8, 5), np.uint8), train__y=labels, test__x=None, test__y=None)
    make_data("good.h5", train__x=np.zeros((8, 9, 9, 3), np.uint8), scale=1.0, test__x=None, test__y=None)
    layers = ["model.layers=[{kind='dense', units=2}]", "method.minibatch=4"]
    for name, said in (("first", "looks like channels first; axes are (rows, columns, maps)"), ("bytes", "no attribute scale")):
        for command in (["train", "--quiet"], ["plan"]):
            done = dbnet(command[0], run_file, f"data.path={name}.h5", *layers, *command[1:])
            assert (
                done.code == 0 and done.err.startswith(f"dbnet: '{name}.h5': ") and said in done.err and done.err.count("\n") == 1
            )
        assert said in dbnet("inspect", f"{name}.h5").out
    for words, said in (
        ([], ""),
        (["method.minibatch=5"], "method.minibatch = 5 is more than the 4 examples that a replica trains on: "),
        (["topology.replicas=9"], "topology.replicas = 9 is more than the 8 training examples: 1 have nothing to train on."),
        (["method.kind=sandblaster", "topology.replicas=2", "method.portion=8"], "but a pass has 1 portions: 1 have nothing"),
        (["method.kind=sandblaster", "method.minibatch=512", "method.portion=4"], ""),
        (
            ["method.kind=sandblaster", "method.portion=4", "rule.rate=0.7"],
            "rule.rate: batch methods have no update rule, so [rule] is not used",
        ),
        (["method.kind=sandblaster", "method.portion=4", "rule={kind='momentum'}"], "rule.kind: batch methods have no update rule"),
    ):
        done = dbnet("plan", run_file, "data.path=good.h5", *layers, *words)
        assert done.code == 0 and said in done.err and done.err.count("\n") == bool(said)


def test_plot(trained: Finished, dbnet: Command) -> None:
    assert dbnet("plot", "out/run.h5", "--force").out.strip() == "out/run.png"
    for name, start in (("other.png", b"\x89PNG"), ("other.svg", b"<?xml"), ("other.pdf", b"%PDF")):
        assert dbnet("plot", "out/run.h5", "--out", name, "--what", "waiting,lateness", "--against", "gradients").code == 0
        assert Path(name).read_bytes().startswith(start)
    for words, said in {
        ("--what", "los"): "There is no picture 'los'",
        ("--against", "hours"): "Nothing is drawn against 'hours'",
        ("--out", "a.jpg"): "must end in .png, .svg or .pdf",
        (
            "--what",
            "accuracy,gradient",
            "--out",
            "a.png",
        ): "'out/run.h5' has no gradient to draw: a batch method's iterations alone",
        ("--against", "iterations", "--out", "a.png"): "has no iterations: they are a batch method's",
        ("out/run.h5", "--out", "other.png"): "that file exists",
        ("out/run.h5",): "Where shall the picture of several runs go?",
    }.items():
        wrong = dbnet("plot", "out/run.h5", *words, *(["--force"] if len(words) == 2 and words[0] != "--out" else []))
        assert (wrong.code, wrong.err.count("\n")) == (2, 1) and said in wrong.err, wrong.err
    assert not Path("a.png").exists()


@pytest.mark.long
def test_drawing_leaves_a_notebook_its_backend(trained: Finished) -> None:
    code = (
        "import matplotlib\n"
        "matplotlib.use('svg')\n"
        "from matplotlib import pyplot as plt\n"
        "from dbnet import open_run\n"
        "from dbnet.monitor.pictures import figure\n"
        "mine = plt.figure()\n"
        "figure.draw(open_run('out/run.h5'), 'mine.png')\n"
        "print(matplotlib.get_backend(), plt.get_fignums() == [mine.number], plt.gcf() is mine)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stdout.split() == ["svg", "True", "True"] and done.stderr == "" and Path("mine.png").exists()


def test_a_picture_shows_where_accuracies_differ(trained: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """One steep early point does not squeeze the others into a line."""
    run, seen = open_run("out/run.h5"), []
    points = run.evaluation.iloc[[0] * 10].reset_index(drop=True)
    points["seconds"], points["accuracy"] = np.arange(10.0), [0.1, *np.linspace(0.96, 0.97, 9)]
    points["train_accuracy"] = [0.1, *np.linspace(0.98, 0.99, 9)]
    run.evaluation = points
    monkeypatch.setattr(Figure, "savefig", lambda made, path, **_: (seen.append(made), Path(path).touch()))
    figure.draw(run, "p.png")
    axes = seen[0].axes[1]
    low, high = axes.get_ylim()
    assert 0.94 < low < 0.96 and 0.99 < high < 1 and "1 early evaluation lies below" in axes.get_xlabel()
    assert "0.9700" in axes.get_title()


def test_data_digits(dbnet: Command) -> None:
    said = dbnet("data", "digits", "deep/d.h5")
    assert said.code == 0 and "10 classes" in said.out
    data = DataFile("deep/d.h5")
    assert data.sizes == {"train": 1438, "test": 359} and data.shape == (8, 8, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_data_idx(packed: bool, place: Path, dbnet: Command) -> None:
    rng = np.random.default_rng(5)
    arrays = {}
    for part, n in (("train", 30), ("test", 12)):
        arrays[part] = rng.integers(0, 256, (n, 4, 5)).astype("u1"), rng.integers(0, 3, n).astype("u1")
        for name, array in zip(("images", "labels"), arrays[part], strict=True):
            raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
            (place / f"{part}-{name}").write_bytes(gzip.compress(raw) if packed else raw)
    words = [word for part in arrays for name in ("images", "labels") for word in (f"--{part}-{name}", f"{part}-{name}")]
    assert dbnet("data", "idx", *words, "--name", "mine", "d.h5").code == 0
    data = DataFile("d.h5")
    assert (data.name, data.shape, data.classes, data.scale) == ("mine", (4, 5, 1), 3, 1 / 255)
    for part, (x, y) in arrays.items():
        assert np.array_equal(data.read(part).x, x.reshape(len(x), -1)) and np.array_equal(data.read(part).y, y)


def commands(
    top: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Yield every command, with its words, and its parser."""
    yield words, top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from commands(inner.complete(), (*words, name))


@pytest.mark.parametrize("words", [words for words, _ in commands(parser())], ids=" ".join)
def test_help_mentions_every_option(words: tuple[str, ...], dbnet: Command) -> None:
    said = dbnet(*words, "--help")
    assert said.code == 0 and said.err == ""
    for action in dict(commands(parser()))[words]._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(name in said.out for name in action.choices)
        else:
            names = action.metavar if isinstance(action.metavar, tuple) else [action.metavar or ""]
            assert all(word in said.out for word in (*action.option_strings, " ".join(names)))
            assert action.help, f"{' '.join(words)}: {action.dest} has no help"


@pytest.mark.long
def test_a_reader_that_has_seen_enough(run_file: Path) -> None:
    """`dbnet ... | head`: no traceback; a run goes on."""
    for words in (["plan", "--config", run_file], ["train", run_file, "stop.steps=2"], ["inspect", "out/run.h5"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "dbnet", *words], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        os.close(writer)
        assert (done.returncode, done.stderr) == (0, "")
    assert open_run("out/run.h5").finished


LIGHT = {"dbnet.comm.mpi", "dbnet.comm.patience", "dbnet.core.errors", "dbnet.core.version", "dbnet.run.signals"}


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ("--help", ""),
        ("trian", ""),
        ("data --help", "commands.data"),
        ("inspect none.h5", "commands.see.runs"),
        ("train none.toml", "commands.training.train"),
    ],
)
def test_a_command_imports_what_it_needs(words: str, more: str, place: Path) -> None:
    code = (
        "import sys\nfrom dbnet.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('\\n' + ' '.join(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    loaded = set(done.stdout.splitlines()[-1].split())
    files = {name for name in loaded if name.startswith("dbnet.")}
    assert "mpi4py" not in loaded and "matplotlib" not in loaded and "pandas" not in loaded
    commands = {name for name in files if name.startswith("dbnet.commands.")} - {"dbnet.commands.base", "dbnet.commands.usage"}
    commands = {name for name in commands if not any(other.startswith(f"{name}.") for other in commands)}
    assert len(commands) == (words.split()[0] in COMMANDS)
    if not commands:
        assert {name for name in files if name.count(".") > 1} - {"dbnet.commands.usage"} == LIGHT and "numpy" not in loaded
    if more:
        assert commands == {f"dbnet.{more}"} and ("dbnet.run.train" in loaded) == (more == "commands.training.train")


def test_version(dbnet: Command) -> None:
    assert dbnet("--version").out == f"dbnet {package.__version__}\n"


WRONG = {
    "": f"'dbnet' needs a command: {', '.join(COMMANDS)};",
    "trian": f"'dbnet' has no command 'trian' (did you mean 'train'?); there are {', '.join(COMMANDS)}",
    "train": "'dbnet train' needs RUN.toml; 'dbnet train --help' explains it.",
    "plan": "'dbnet plan' needs RUN.toml; ",
    "train a.toml --quite": "'dbnet train' does not take '--quite' (did you mean '--quiet'?); 'dbnet train --help'",
    "train a.toml --marker": "--marker needs a value; ",
    "train a.toml --quiet=3": "--quiet takes no value; ",
    "inspect a.h5 b.h5": "'dbnet inspect' does not take 'b.h5'; ",
    "predict a.h5 b.h5": "'dbnet predict' needs OUT; ",
    "data": "'dbnet data' needs a format: digits, idx, images, libsvm, npz, random; ",
    "data digit a.h5": "'dbnet data' has no format 'digit' (did you mean 'digits'?); there are digits, ",
    "data digits a.h5 --shape 3": "'dbnet data digits' does not take '--shape'; 'dbnet data digits --help'",
    "bench --repeat x": "--repeat: 'x' is not a whole number; ",
    "bench --repeat 0": "--repeat 0 measures nothing; give 1 or more.",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_words(words: str, place: Path, dbnet: Command) -> None:
    said = dbnet(*words.split())
    assert said.code == 2 and said.out == "" and list(place.iterdir()) == []
    assert said.err.startswith(f"dbnet: {WRONG[words]}") and said.err.count("\n") == 1 and said.err.endswith(".\n")


@pytest.mark.parametrize("words", [[], ["--quiet"], ["--resume", "auto"], ["topology.replicas=2"], ["--help"]])
def test_local_shows_its_own_usage(words: list[str], place: Path) -> None:
    done = subprocess.run(
        [ROOT / "jobs" / "local.sh", *words], capture_output=True, text=True, timeout=60,
        env={**os.environ, "DBNET_BIN": str(Path(sys.executable).parent)},
    )  # fmt: skip
    usage = "jobs/local.sh RUN.toml [table.key=value ...] [--resume [auto|CHECKPOINT]] [--quiet]"
    if words == ["--help"]:
        assert (
            done.returncode == 0 and done.stdout.startswith(f"usage: {usage}\n") and "Ctrl-C" in done.stdout and done.stderr == ""
        )
    else:
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"dbnet: name a configuration file: {usage}.\n")
    assert list(place.iterdir()) == []


def test_data_help_shows_the_order_of_axes(dbnet: Command) -> None:
    said = dbnet("data", "--help").out
    assert (
        "(rows, columns[, maps])" in said and "maps (colour channels) last" in said and 'file.attrs["scale"] = 10, 1 / 255' in said
    )


def test_bench_help_names_every_part(dbnet: Command) -> None:
    words = dbnet("bench", "--help").out.replace(",", " ").split()
    assert set(family("commands.bench")) <= set(words)


def test_as_a_module_from_anywhere(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dbnet", "train", "none.toml"],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("dbnet: No configuration file 'none.toml'") and done.stderr.count("\n") == 1
    )


def test_main_takes_its_words_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["dbnet", "inspect", "none.h5"])
    assert main() == 2
    assert capsys.readouterr().err == "dbnet: No file 'none.h5'.\n"
