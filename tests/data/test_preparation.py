"""Data that a user has: .npz files and folders of images; held out, normalized; and the network that was trained on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import Finished
from PIL import Image

import dbnet as api
from dbnet.core.errors import UserError
from dbnet.data.file import DataFile, write
from dbnet.data.formats import images
from dbnet.data.formats.images import Images
from dbnet.data.formats.npz import Npz
from dbnet.data.preparation import Normalization, held_out, normalized, suited

Command = Callable[..., Finished]
RNG = np.random.default_rng(3)


def saved(place: Path, **arrays: Any) -> Npz:
    """Write arrays; return the format that reads them."""
    np.savez(place / "mine.npz", **arrays)
    return Npz(file=str(place / "mine.npz"))


# --- npz ----------------------------------------------------------------------------------------------------------------------

X = np.arange(24, dtype=np.float32).reshape(6, 4)
LABELS = {
    "integers": (np.array([0, 2, 1, 0, 2, 1]), [0, 2, 1, 0, 2, 1], ["0", "1", "2"]),
    "gaps": (np.array([7, -1, 7, 900, -1, 7]), [1, 0, 1, 2, 0, 1], ["-1", "7", "900"]),
    "a class without examples": (np.array([0, 3, 1, 0, 3, 1], "u1"), [0, 3, 1, 0, 3, 1], ["0", "1", "2", "3"]),
    "texts": (np.array(["b", "a", "ü", "a", "b", "b"]), [1, 0, 2, 0, 1, 1], ["a", "b", "ü"]),
    "bytes": (np.array([b"b", b"a", b"b", b"a", b"b", b"b"]), [1, 0, 1, 0, 1, 1], ["a", "b"]),
    "one-hot": (np.eye(3)[[0, 2, 1, 0, 2, 1]], [0, 2, 1, 0, 2, 1], ["0", "1", "2"]),
    "true or false": (np.array([True, False, True, False, True, True]), [1, 0, 1, 0, 1, 1], ["False", "True"]),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("names", [("x", "y"), ("x_train", "y_train"), ("train_x", "train_y")])
def test_labels_of_any_kind_become_classes_with_names(name: str, names: tuple[str, str], place: Path) -> None:
    y, wanted, classes = LABELS[name]
    write(place / "d.h5", saved(place, **dict(zip(names, (X, y), strict=True))).read())
    data = DataFile(place / "d.h5")
    assert data.read("train").y.tolist() == wanted
    assert (data.class_names, data.classes) == (classes, len(classes))
    assert np.array_equal(data.read("train").x, X)


def test_floats_are_values(place: Path) -> None:
    values = saved(place, x=X, y=np.linspace(0, 1, 6)).read()
    assert values["train/y"].shape == (6, 1) and "classes" not in values
    whole = saved(place, x=X, y=np.array([1.0, 2, 1, 2, 1, 2]))
    with pytest.raises(UserError, match="2 different whole numbers as float64: say --targets labels if"):
        whole.read()
    assert whole.model_copy(update={"targets": "labels"}).read()["train/y"].tolist() == [0, 1, 0, 1, 0, 1]
    assert whole.model_copy(update={"targets": "values"}).read()["train/y"].tolist() == [[1], [2], [1], [2], [1], [2]]


@pytest.mark.parametrize(
    ("x", "scale", "dtype"),
    [
        (RNG.integers(0, 256, (6, 3, 5), "u1"), 1 / 255, "u1"), (RNG.integers(0, 2, (6, 5), "u1"), 1, "u1"),
        (RNG.integers(0, 2, (6, 3, 5)) > 0, 1, "u1"), (RNG.random((6, 3, 5, 2), np.float32), 1, "f4"),
        (RNG.integers(-9, 9, (6, 5)), 1, "f4"), (RNG.random((6, 5)).astype("f2"), 1, "f4"), (RNG.random((6, 5)), 1, "f8"),
    ],
)  # fmt: skip
def test_inputs_of_any_number(x: np.ndarray, scale: float, dtype: str, place: Path) -> None:
    read = saved(place, x=x, y=np.arange(6)).read()
    assert read["scale"] == scale and read["train/x"].dtype == dtype and np.array_equal(read["train/x"], x)


def test_channels_first_are_turned(place: Path) -> None:
    x = RNG.integers(0, 256, (6, 3, 8, 9), "u1")
    first = saved(place, x=x, y=np.arange(6))
    assert np.array_equal(first.model_copy(update={"channels": "first"}).read()["train/x"][2, 7, 5], x[2, :, 7, 5])
    write(place / "d.h5", first.read())
    assert "'dbnet data npz --channels first'" in DataFile(place / "d.h5").doubts[0]


def test_images_that_were_not_scaled_are_doubted(place: Path) -> None:
    for x, said in ((255 * RNG.random((6, 8, 8)), "look like images of bytes"), (RNG.random((6, 8, 8)), None), (255 * X, None)):
        write(place / "d.h5", saved(place, x=x, y=np.arange(6)).read(), force=True)
        assert [said in doubt for doubt in DataFile(place / "d.h5").doubts] == [True] * bool(said)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X}, "has x but no y"),
        ({"y_train": X}, "has y_train but no x_train"),
        ({"x": X, "y": np.arange(5)}, "not of one number of examples"),
        ({"a": X, "b": X}, "holds a, b; name the arrays x_train and y_train"),
        ({"x": X, "y": np.array([None] * 6)}, "holds objects of Python, which would have to be run"),
        ({"x": X, "y": np.zeros((6, 2, 2))}, r"y of train has shape \(6, 2, 2\)"),
        ({"x": X + 1j, "y": np.arange(6)}, "x of train is complex64; it must hold numbers"),
        ({"x": np.array(["a"] * 6), "y": np.arange(6)}, "it must hold numbers"),
        (
            {"x": np.where(X == 16, np.nan, X), "y": np.arange(6)},
            "'.*mine.npz': x of train, example 4, holds nan; leave the example out, or put a number there",
        ),
        (
            {"x": X, "y": np.arange(6), "x_test": X * [[1], [np.inf], [1], [1], [1], [1]], "y_test": np.arange(6)},
            "x of test, example 1, holds inf",
        ),
        ({"x": X, "y": np.array([0.1, 0.2, 0.3, 1e300, 0.4, np.nan])}, "y of train, example 5, holds nan"),
        ({"x": X, "y": np.zeros((6, 2), int)}, "no one-hot vectors"),
        ({"x": X[:0], "y": np.zeros(0, int)}, "no training examples"),
        ({"x": X[:0], "y": np.zeros((0, 3))}, "no training examples"),
    ],
)
def test_arrays_that_are_no_data_are_refused(arrays: dict[str, Any], said: str, place: Path) -> None:
    with pytest.raises(UserError, match=said):
        saved(place, **arrays).read()


SIX, SOFT = np.arange(6), np.full((6, 3), 1 / 3)
HOT = np.eye(3)[SIX % 3]


@pytest.mark.parametrize(
    ("train", "test", "how", "said"),
    [
        (HOT, SIX % 3, "auto", r"y of train holds one-hot vectors of 3, y of test does not \(shape \(6,\)\)"),
        (HOT, SOFT, "auto", "y of train holds one-hot vectors of 3, y of test does not .*--targets values"),
        (HOT, np.eye(4)[SIX % 4], "labels", "y of train holds one-hot vectors of 3, y of test does not"),
        (SIX, HOT, "auto", "y of train holds integers, y of test floats"),
        (SIX, np.array(list("abcabc")), "auto", "y of train holds integers, y of test texts"),
        (np.array(list("abcabc")), SIX, "labels", "y of train holds texts, y of test integers"),
        (SIX, SIX + 0.5, "auto", "y of train holds integers, y of test floats"),
        (SIX * 1.0, np.array([0, 1, 2, np.nan, 4, 5]), "labels", "y of test holds labels that are no finite numbers"),
        (np.array([0, 1, np.inf, 0, 1, 1]), SIX * 1.0, "labels", "y of train holds labels that are no finite numbers"),
        (SIX + 0.5, np.array(list("abcabc")), "values", "y of test holds texts"),
        (SOFT, SOFT[:, :2], "auto", "y of train has 3 values an example, y of test 2"),
    ],
)  # fmt: skip
def test_parts_of_different_kinds_are_refused(train: np.ndarray, test: np.ndarray, how: str, said: str, place: Path) -> None:
    mine = saved(place, x_train=X, y_train=train, x_test=X, y_test=test).model_copy(update={"targets": how})
    with pytest.raises(UserError, match=said):
        mine.read()


def test_parts_of_one_kind_may_have_other_types(place: Path) -> None:
    one_hot = saved(place, x_train=X, y_train=HOT, x_test=X, y_test=HOT.astype("u1")).read()
    assert one_hot["test/y"].tolist() == [0, 1, 2, 0, 1, 2] and one_hot["classes"] == 3
    columns = saved(place, x_train=X, y_train=SIX[:, None], x_test=X, y_test=SIX.astype("u1")).read()
    assert columns["train/y"].tolist() == columns["test/y"].tolist() == SIX.tolist()
    soft = saved(place, x_train=X, y_train=SOFT, x_test=X, y_test=HOT).read()
    assert np.array_equal(soft["test/y"], HOT) and "classes" not in soft


@pytest.mark.parametrize("scale", [0.0, 1e-60, 1e60, np.nan])
def test_a_scale_that_takes_all_is_refused(scale: float, place: Path) -> None:
    with pytest.raises(UserError, match=r"^--scale \S+ is not a scale"):
        saved(place, x=X, y=SIX).model_copy(update={"scale": scale}).read()


@pytest.mark.parametrize(("raw", "said"), [(b"", "not a .npz"), (b"PK\3\4", "cannot be|can be read"), (None, "No file")])
def test_files_that_are_no_npz_are_refused(raw: bytes | None, said: str, place: Path) -> None:
    if raw is not None:
        Path("bad.npz").write_bytes(raw)
    with pytest.raises(UserError, match=said):
        Npz(file="bad.npz").read()
    np.save("one.npy", X)
    with pytest.raises(UserError, match="one array and no names"):
        Npz(file="one.npy").read()


# --- images -------------------------------------------------------------------------------------------------------------------


def pixels(path: str, array: np.ndarray, **how: Any) -> None:
    """Write an image."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **how)


def test_images_in_folders(place: Path) -> None:
    one, two = RNG.integers(0, 256, (2, 5, 7, 3), "u1")
    pixels("im/cat/b.png", one)
    pixels("im/cat/a.bmp", two)
    pixels("im/ant/1.PNG", two)
    Path("im/cat/notes.txt").write_text("no image")
    Path("im/.hidden").mkdir()
    write("d.h5", Images(folder="im").read())
    data = DataFile("d.h5")
    assert (data.shape, data.class_names, data.scale, data.name) == ((5, 7, 3), ["ant", "cat"], 1 / 255, "im")
    assert data.read("train").y.tolist() == [0, 1, 1]
    assert np.array_equal(data.read("train").x.reshape(3, 5, 7, 3), [two, two, one])


def test_images_of_parts_sizes_and_kinds(place: Path) -> None:
    """Scaled until they cover the size, and cut at both sides; turned as the camera says; 16 bits give their upper ones."""
    wide = np.zeros((4, 12), "u1")
    wide[:, 4:8] = 200
    pixels("im/train/a/1.png", wide)
    pixels("im/train/b/1.png", np.full((4, 4), 0x1234, "u2"))
    turned = Image.Exif()
    turned[0x0112] = 6
    lines = np.repeat(np.arange(0, 240, 60, dtype="u1")[:, None], 4, axis=1)
    pixels("im/val/a/1.png", lines, exif=turned)
    read = Images(folder="im", size="4").read()
    assert read["train/x"].shape == (2, 4, 4, 1) and (read["train/x"][0] == 200).all() and (read["train/x"][1] == 0x12).all()
    assert np.array_equal(read["validation/x"][0, 0, :, 0], lines[::-1, 0])
    assert Images(folder="im", size="2x3", colour="rgb").read()["train/x"].shape == (2, 2, 3, 3)
    with pytest.raises(UserError, match=r"'im/train/b/1.png' has 4 x 4 pixels \(rows x columns\), others have 4 x 12; say --size"):
        Images(folder="im").read()


@pytest.mark.parametrize("size", ["", "64"])
def test_images_that_do_not_fit_into_memory_are_refused(size: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        pixels(f"im/cat/{name}.png", np.full((64, 64, 3), 7, "u1"))
    # Two more while one is read.
    needed = 5 * 64 * 64 * 3
    monkeypatch.setattr(images, "_free", lambda: needed - 1, raising=False)
    with pytest.raises(UserError, match=r"^'im': 3 images of 64 x 64 x 3 bytes need 0.0 GiB, of which 0.0 are free.*--size"):
        Images(folder="im", size=size).read()
    monkeypatch.setattr(images, "_free", lambda: needed, raising=False)
    assert (Images(folder="im", size=size).read()["train/x"] == np.full((3, 64, 64, 3), 7)).all()


def test_folders_that_are_no_data_are_refused(place: Path) -> None:
    def said(folder: str = "im", **options: str) -> str:
        with pytest.raises(UserError) as error:
            Images(folder=folder, **options).read()
        return str(error.value)

    assert "No folder 'im'" in said()
    Path("im").mkdir()
    assert "'im' has no folders; images of a class go into a folder of its name" in said()
    Path("im/a").mkdir()
    assert "'im/a' holds no images" in said()
    Path("im/a/1.png").write_bytes(b"no")
    assert "'im/a/1.png' cannot be read: it is no image" in said()
    pixels("im/a/2.png", np.zeros((40, 40), "u1"))
    Path("im/a/1.png").write_bytes(Path("im/a/2.png").read_bytes()[:50])
    assert "'im/a/1.png' cannot be read" in said()
    pixels("im/a/1.png", np.zeros((4, 4), "u1"))
    assert "--size 3x is not a size" in said(size="3x")
    pixels("top/test/a/1.png", np.zeros((4, 4), "u1"))
    assert "'top' has test but no train" in said("top")
    pixels("top/train/b/1.png", np.zeros((4, 4), "u1"))
    assert "'top/test' has the class 'a', which 'top/train' does not have" in said("top")


# --- held out, normalized -----------------------------------------------------------------------------------------------------


def test_a_share_of_every_class_is_held_out() -> None:
    contents = {"train/x": np.arange(100.0)[:, None], "train/y": np.arange(100) % 4 // 3}
    one, two, other = (held_out(contents, "test", 0.2, seed) for seed in (1, 1, 2))
    assert np.bincount(one["test/y"]).tolist() == [15, 5] and np.bincount(one["train/y"]).tolist() == [60, 20]
    everything = np.concatenate([one["train/x"], one["test/x"]])
    assert sorted(everything.ravel().tolist()) == list(range(100))
    assert (one["test/x"].ravel() % 4 // 3 == one["test/y"]).all()
    assert np.array_equal(one["test/x"], two["test/x"]) and not np.array_equal(one["test/x"], other["test/x"])


@pytest.mark.parametrize(("how", "shape"), [("unit", (5,)), ("unit", (3, 4)), ("map", (3, 4)), ("map", (3, 4, 2))])
def test_normalized_inputs_have_mean_0_and_spread_1(how: str, shape: tuple[int, ...]) -> None:
    x = RNG.integers(0, 256, (5000, *shape)).astype("u1")
    x[..., 0] = x[..., 0] // 4 + 100
    read = normalized(
        {"train/x": x, "train/y": np.zeros(5000, int), "test/x": x[:7], "test/y": np.zeros(7, int), "scale": 0.5}, how
    )
    found, axes = read["train/x"].astype("f8"), 0 if how == "unit" else (0, 1, 2)
    found = found.reshape(5000, *shape, *([1] if len(shape) == 2 else []))
    np.testing.assert_allclose(found.mean(axis=axes), 0, atol=1e-5)
    np.testing.assert_allclose(found.std(axis=axes), 1, rtol=1e-5)
    assert read["scale"] == 1 and np.array_equal(read["test/x"], read["train/x"][:7])
    # A rank of a cut network normalizes the units that it needs.
    units, made = np.array([1, 2, 4]), Normalization(0.5, read["normalize/mean"], read["normalize/spread"])
    image = (*shape, 1) if len(shape) == 2 else shape
    part = suited(x[:7].reshape(7, -1)[:, units], 0.5, None, made, "x", image, units)[0]
    assert np.array_equal(part, read["test/x"].reshape(7, -1)[:, units])
    # A unit that never changes is 0, not 0/0.
    assert not normalized({"train/x": np.full((9, 3), 7.0), "train/y": np.zeros(9)}, "unit")["train/x"].any()


@pytest.mark.parametrize("how", ["unit", "map"])
@pytest.mark.parametrize(
    ("constant", "other", "scale"),
    [(np.uint8(7), np.uint8(9), 1 / 255), (np.float32(0.1), np.float32(0.6), 1.0), (np.float64(0.1), np.float64(-0.4), 1.0)],
)
def test_inputs_that_never_change_are_not_blown_up(constant: Any, other: Any, scale: float, how: str) -> None:
    """Their sums are not exact, so their spread is not quite 0."""
    x, y = np.full((1003, 3, 7, 2), constant), np.zeros(1003, int)
    read = normalized({"train/x": x, "train/y": y, "test/x": np.full_like(x[:5], other), "test/y": y[:5], "scale": scale}, how)
    assert (read["normalize/spread"] == 1).all()
    np.testing.assert_allclose(read["train/x"], 0, atol=1e-7)
    np.testing.assert_allclose(read["test/x"], scale * (float(other) - float(constant)), rtol=1e-5)


def test_what_rounding_alone_changes_counts_as_never_changing() -> None:
    x = np.full((1000, 2), 0.1, np.float32)
    x[::2, 0] = np.nextafter(np.float32(0.1), np.float32(1))
    x[::2, 1] = 0.1001
    read = normalized({"train/x": x, "train/y": np.zeros(1000, int)}, "unit")
    assert read["normalize/spread"][0] == 1 and abs(read["train/x"][:, 1]).max() == pytest.approx(1, rel=1e-2)


# --- used ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_toml(place: Path) -> Path:
    """Return a run on d.h5 of 60 images in two classes, and raw.npz that it was made from."""
    labels = np.arange(60) % 2
    x = np.clip(RNG.normal(120, 40, (60, 6, 5, 3)) + 60 * labels[:, None, None, None] * [1, 0, -1], 0, 255).astype("u1")
    np.savez("raw.npz", x=x, y=np.array(["left", "right"])[labels])
    lines = [
        "[run]",
        'folder = "out"',
        "picture = false",
        "[data]",
        'path = "d.h5"',
        "[[model.layers]]",
        'kind = "conv"',
        "maps = 3",
    ]
    lines += ["field = 3", "[[model.layers]]", 'kind = "dense"', "units = 2", "[rule]", "rate = 0.05", "[stop]", "epochs = 6"]
    path = place / "run.toml"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("how", ["map", "unit"])
def test_a_network_normalizes_raw_data_as_its_training_data_were(how: str, run_toml: Path, dbnet: Command) -> None:
    prepare = ["data", "npz", "raw.npz", "--test", "0.2", "--validation", "0.1"]
    said = dbnet(*prepare, "d.h5", "--normalize", how).out
    assert f"normalized: mean 0 and spread 1 of each {how}" in said and "classes left, right" in said and "validation 6" in said
    assert dbnet(*prepare, "raw.h5").code == 0
    done = dbnet("train", run_toml, "evaluate.part=validation")
    point = "out/run.checkpoint.h5"
    last = api.open_run("out/run.h5").evaluation.iloc[-1]
    assert done.code == 0 and "validation acc  train acc" in done.out
    assert f"\nValidation accuracy  {last.accuracy:.4f}\n" in done.out
    said = dbnet("inspect", "out/run.h5").out + dbnet("watch", "out/run.h5", "--once").out + repr(api.open_run("out/run.h5"))
    assert said.count(f"validation accuracy {last.accuracy:.4f}") == 3 and "test" not in said
    assert f"validation: 6 examples, loss {last.loss:.4f}" in dbnet("evaluate", point, "--part", "validation").out
    assert dbnet("report", "out/run.h5").code == 0 and "<p>Classes: left, right.</p>" in Path("out/run.html").read_text()
    assert [line.split()[:3] for line in dbnet("evaluate", point, "--by-class").out.splitlines()[2:]] == [
        ["0", "left", "6"], ["1", "right", "6"],
    ]  # fmt: skip
    scores = [dbnet("evaluate", point, name).out for name in ("d.h5", "raw.h5")]
    assert scores[0] == scores[1] and "accuracy 1.0000" in scores[0]
    for name in ("d.h5", "raw.h5"):
        assert dbnet("predict", point, name, f"{name}.csv", "--probabilities").code == 0
    table = Path("raw.h5.csv").read_text()
    assert table == Path("d.h5.csv").read_text() and table.startswith("example,class,name,left,right\n0,0,left,")
    # In Python, too, where x comes without a file.
    raw, model = DataFile("raw.h5").read("test"), api.load(point)
    x = raw.x.reshape(-1, 6, 5, 3)
    assert dbnet("predict", point, "d.h5", "d.npy").code == 0
    assert np.array_equal(model.predict(x), np.load("d.npy")) and model.evaluate((x, raw.y)).accuracy == 1
    # By other numbers, or where the training data were raw, nothing is guessed.
    assert dbnet("data", "npz", "raw.npz", "other.h5", "--normalize", how).code == 0
    assert "normalized by other numbers than the training data" in dbnet("evaluate", point, "other.h5", "--part", "train").err
    again = ["train", run_toml, "data.path=raw.h5", "stop.epochs=1"]
    assert "data that were normalized in another way than 'raw.h5'" in dbnet(*again, "--resume", point).err
    begun = dbnet(*again, "run.name=begun", f"run.start={point}")
    said = f"run.start: '{point}' was trained on data that were normalized in another way than 'raw.h5'"
    assert begun.code == 0 and (begun.out + begun.err).count(said) == 1
    assert dbnet(*again, "run.name=raw").code == 0
    assert "is normalized, but the training data were not" in dbnet("predict", "out/raw.checkpoint.h5", "d.h5", "p.csv").err


def test_values_have_errors_in_place_of_an_accuracy(run_toml: Path, dbnet: Command) -> None:
    x = RNG.random((80, 3)) * [1, 100, 0.01]
    np.savez("values.npz", x=x, y=x @ [1, 0.01, 100] + 5)
    assert "vector targets of 1 unit" in dbnet("data", "npz", "values.npz", "d.h5", "--test", "0.25", "--normalize", "unit").out
    layers, rule = "model={layers=[{kind='dense', units=1}], loss='squared'}", "rule={kind='sgd', rate=0.1}"
    done = dbnet("train", run_toml, layers, rule, "method.minibatch=10", "stop.epochs=2", "evaluate.epochs=1")
    assert done.code == 0, done.err
    y, found = DataFile("d.h5").read("test").y[:, 0], api.load("out/run.checkpoint.h5")
    run, (loss, train) = api.open_run("out/run.h5"), (found.evaluate(part=part).loss for part in ("test", "train"))
    last, spread = run.evaluation.iloc[-1], DataFile("d.h5").read("train").y.var()
    wanted = f"mean squared error {2 * loss:.4g}, R2 {1 - 2 * loss / y.var():.4g}"
    assert (last.mean_squared_error, last.R2) == pytest.approx((2 * last.loss, 1 - 2 * last.loss / y.var()), rel=1e-5)
    assert (last.train_mean_squared_error, last.train_R2) == pytest.approx((2 * train, 1 - 2 * train / spread), rel=1e-5)
    assert f", {wanted}" in dbnet("inspect", "out/run.h5").out and f", {wanted}" in repr(run)
    assert dbnet("runs", "out").out.split()[:5] == ["run", "loss", "mean_squared_error", "R2", "seconds"]
    assert dbnet("report", "out/run.h5").code == 0
    page = Path("out/run.html").read_text()
    assert f">{last.R2:.4g}</td>" in page and "accuracy" not in page.split("<h2>Settings")[0]
    assert "there are loss," in dbnet("plot", "out/run.h5", "--what", "R3", "--out", "b.svg").err
    assert f"R2 {last.R2:.4g}" in dbnet("watch", "out/run.h5").out
    assert dbnet("plot", "out/run.h5", "--what", "mean_squared_error,R2", "--out", "b.svg").code == 0
    assert ">mean squared error<" in Path("b.svg").read_text()
    assert "test loss train loss" in done.out and f"Test error     {wanted}" in done.out and loss > 0.01 * y.var()
    assert dbnet("plot", "out/run.h5", "--out", "a.svg").code == 0 and "accuracy" not in Path("a.svg").read_text()
    assert dbnet("evaluate", "out/run.checkpoint.h5").out == f"test: 20 examples, loss {loss:.4f}, {wanted}\n"


REFUSED = {
    "--test 2": "--test 2 is not a share of the training set; give a number between 0 and 1, like 0.1",
    "--validation x": "--validation x is not a share",
    "--test 0.5 --validation 0.5": "--test and --validation together leave nothing to train on",
    "--test 0.001": "--test: that share of 60 training examples leaves none on one side",
    "--holdout-seed -1": "--holdout-seed -1 is not a whole number",
    "--normalize all": "--normalize: invalid choice: 'all'",
    "--targets values": "y of train holds texts (<U5), which cannot be values; take --targets labels",
    "--scale 0": "--scale 0 is not a scale",
    "--channels up": "data.channels = 'up' is not allowed: it must be 'last' or 'first'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_prepared_is_refused(words: str, run_toml: Path, dbnet: Command) -> None:
    before = sorted(Path().iterdir())
    done = dbnet("data", "npz", "raw.npz", "d.h5", *words.split())
    assert done.code == 2 and REFUSED[words] in done.err and done.err.count("\n") == 1 and sorted(Path().iterdir()) == before


def test_a_set_of_its_own_is_not_held_out_again(place: Path, dbnet: Command) -> None:
    np.savez("mine.npz", x_train=X, y_train=np.arange(6), x_test=X, y_test=np.arange(6))
    assert (
        "The source has a test set of its own; leave --test out." in dbnet("data", "npz", "mine.npz", "d.h5", "--test", "0.3").err
    )


def test_a_validation_set_must_be_there(run_file: Path, dbnet: Command) -> None:
    assert "has no validation set to evaluate; make it with" in dbnet("plan", run_file, "evaluate.part=validation").err


@pytest.mark.parametrize(
    ("change", "said"), [({"normalize/mean": np.zeros(3)}, "/normalize is damaged"), ({"class_names": ["a"]}, "hold 2 texts")]
)
def test_what_a_file_says_wrongly_of_itself_is_refused(change: dict, said: str, make_data: Callable[..., Path]) -> None:
    import h5py

    path = make_data()
    with h5py.File(path, "a") as file:
        for name, value in change.items():
            file[name] = value
    with pytest.raises(UserError, match=said):
        DataFile(path)
