"""Whatever stands in configurations and data files: success, or one sentence; no traceback, no hang, no memory without bound."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import run, sound, spoil, spoiled_bytes, spoiled_structure, spoiled_trees, toml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dbnet.checkpoint.format import part_of
from dbnet.checkpoint.reader import resolved
from dbnet.core.config import build
from dbnet.data.file import write

# Of the long form.
pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]

DENSE = [{"kind": "dense", "units": 4, "activation": "tanh"}, {"kind": "dropout", "rate": 0.2}, {"kind": "dense", "units": 3}]
IMAGES = [
    {"kind": "local", "maps": 2, "field": 2, "activation": "relu"},
    {"kind": "norm", "radius": 1},
    {"kind": "conv", "maps": 2, "field": [2, 3], "stride": 1},
    {"kind": "pool", "field": 2},
    {"kind": "dense", "units": 3},
]
BATCH = {"method": {"kind": "sandblaster", "portion": 4}, "stop": {"iterations": 2}}
RUNS: dict[str, dict[str, Any]] = {
    "downpour": {"model": {"layers": DENSE, "decay": 0.1}, "rule": {"kind": "momentum"}, "topology": {"shards": 2, "replicas": 2}},
    "images": {"model": {"layers": IMAGES, "dtype": "float64"}, "rule": {"kind": "adam"}, "method": {"n_push": 2, "overlap": True}},
    "sandblaster": {**BATCH, "model": {"layers": DENSE[::2]}, "topology": {"replicas": 2}},
    "owlqn": {
        **BATCH,
        "model": {"layers": DENSE[2:]},
        "method": {**BATCH["method"], "descent": {"kind": "owlqn", "strength": 0.1}},
    },
}
COMMON = {"data": {"path": "data.h5"}, "stop": {"steps": 3}, "run": {"folder": "out"}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Go to a folder with a data file, and of each run its configuration as TOML, its checkpoint and its record."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("fuzz")
    os.chdir(folder)
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 255, (12, 6, 6), np.uint8), np.arange(12) % 3
    write("data.h5", {"train/x": x, "train/y": y, "test/x": x[:6], "test/y": y[:6], "classes": 3, "scale": 1 / 255})
    for name, tables in RUNS.items():
        Path(f"{name}.toml").write_text(toml(full(tables)))
        done = run("train", f"{name}.toml", "--quiet", f"run.name={name}", bounded=False)
        assert done == (0, "", ""), done
    yield folder
    os.chdir(before)


def full(tables: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with all tables and all options of all members."""
    # More examples per step or portion than a replica has would be doubted.
    more = {"method": {"minibatch": 4, **tables.get("method", {})}}
    return json.loads(build(json.loads(json.dumps({**COMMON, **tables, **more}))).text())


@pytest.fixture
def fuzz(soak: bool, whole: Path) -> Callable[..., None]:
    """Return a function that calls a test with what strategies draw, `n` times or, in the long form, thirty times as often."""

    def call(n: int, test: Callable[..., None], *strategies: st.SearchStrategy) -> None:
        bounded = settings(
            max_examples=30 * n if soak else n, deadline=None, derandomize=not soak, database=None,
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        bounded(given(st.tuples(*strategies))(lambda drawn: in_empty_folder(test, *drawn)))()

    return call


def in_empty_folder(test: Callable[..., None], *drawn: Any) -> None:
    """Call a test in a folder of its own that holds the data file."""
    home = Path.cwd()
    Path("here").mkdir()
    try:
        os.chdir("here")
        os.symlink("../data.h5", "data.h5")
        test(*drawn)
    finally:
        os.chdir(home)
        shutil.rmtree("here")


def try_run_file() -> None:
    """Give run.toml to all commands that take one; training stops soon, if only the configuration is read that far."""
    for words in (["plan"], ["plan", "--config"], ["plan", "--ranks"], ["train", "--quiet"]):
        last = ["stop.seconds=0.2"] if words[0] == "train" else []
        done = run(words[0], "run.toml", *words[1:], *last)
        sound(done, words)


@pytest.mark.parametrize("name", RUNS)
def test_run_files_with_other_keys_and_values(name: str, fuzz: Callable[..., None]) -> None:
    def test(tree: dict[str, Any]) -> None:
        Path("run.toml").write_text(toml(tree))
        try_run_file()

    fuzz(12, test, spoiled_trees(full(RUNS[name])))


@pytest.mark.parametrize("name", RUNS)
def test_run_files_with_other_bytes(name: str, fuzz: Callable[..., None]) -> None:
    def test(raw: bytes) -> None:
        Path("run.toml").write_bytes(raw)
        try_run_file()

    fuzz(3, test, spoiled_bytes(toml(full(RUNS[name])).encode()))


def try_data(path: str, name: str) -> None:
    """Give a data file to all commands that take one."""
    point = f"../out/{name}.checkpoint.h5"
    sound(run("inspect", path))
    sound(run("train", f"../{name}.toml", "--quiet", f"data.path={path}", "stop.seconds=0.2"), "train")
    sound(run("evaluate", point, path), "evaluate")
    sound(run("predict", point, path, "out.csv", "--force"), "predict")


def test_data_files_with_other_contents(whole: Path, fuzz: Callable[..., None]) -> None:
    def test(changes: list[Any], name: str) -> None:
        spoil(Path("data.h5"), changes, Path("spoiled.h5"))
        try_data("spoiled.h5", name)

    fuzz(12, test, spoiled_structure(whole / "data.h5"), st.sampled_from(sorted(RUNS)))


def test_data_files_with_other_bytes(whole: Path, fuzz: Callable[..., None]) -> None:
    def test(raw: bytes) -> None:
        Path("spoiled.h5").write_bytes(raw)
        try_data("spoiled.h5", "downpour")

    fuzz(12, test, spoiled_bytes((whole / "data.h5").read_bytes()))


def try_checkpoint(path: str, name: str) -> None:
    """Give a checkpoint to all commands that take one."""
    sound(run("inspect", path), "inspect")
    sound(run("inspect", "--config", path), "inspect --config")
    sound(run("evaluate", path, "data.h5"), "evaluate")
    sound(run("predict", path, "data.h5", "out.h5", "--force"), "predict")
    more = ["stop.steps=5", "stop.iterations=3", "stop.seconds=0.2"]
    sound(run("train", f"../{name}.toml", "--quiet", "--resume", path, *more), "resume")
    sound(run("train", f"../{name}.toml", "--quiet", f"run.start={path}", "stop.seconds=0.2"), "start")


def copied(whole: Path, name: str) -> tuple[Path, Path]:
    """Copy a run's checkpoint to spoiled.h5 with its parts beside it; return the paths of the master and of one part."""
    master = resolved(whole / "out" / f"{name}.checkpoint.h5")
    parts = sorted(master.parent.glob(f"{master.stem}.shard-*.h5"))
    for shard, part in enumerate(parts):
        shutil.copy(part, part_of(Path("spoiled.h5"), shard))
    shutil.copy(master, "spoiled.h5")
    return master, parts[0]


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_with_other_contents(name: str, whole: Path, fuzz: Callable[..., None]) -> None:
    master, part = copied(whole, name)

    def test(changes: list[Any], inside: list[Any]) -> None:
        copied(whole, name)
        spoil(master, changes, Path("spoiled.h5"))
        try_checkpoint("spoiled.h5", name)
        copied(whole, name)
        spoil(part, inside, part_of(Path("spoiled.h5"), 0))
        try_checkpoint("spoiled.h5", name)

    fuzz(3, test, spoiled_structure(master), spoiled_structure(part))


def test_checkpoints_with_other_bytes(whole: Path, fuzz: Callable[..., None]) -> None:
    master, part = copied(whole, "sandblaster")

    def test(raw: bytes, inside: bytes) -> None:
        copied(whole, "sandblaster")
        Path("spoiled.h5").write_bytes(raw)
        try_checkpoint("spoiled.h5", "sandblaster")
        copied(whole, "sandblaster")
        part_of(Path("spoiled.h5"), 0).write_bytes(inside)
        try_checkpoint("spoiled.h5", "sandblaster")

    fuzz(4, test, spoiled_bytes(master.read_bytes()), spoiled_bytes(part.read_bytes()))


def try_record(path: str) -> None:
    """Give a run's record to all commands that take one."""
    sound(run("inspect", path), "inspect")
    sound(run("inspect", "--config", path), "inspect --config")
    sound(run("plot", path, "--out", "out.png", "--force"), "plot")


@pytest.mark.parametrize("name", ["downpour", "owlqn"])
def test_records_with_other_contents(name: str, whole: Path, fuzz: Callable[..., None]) -> None:
    def test(changes: list[Any]) -> None:
        spoil(whole / "out" / f"{name}.h5", changes, Path("spoiled.h5"))
        try_record("spoiled.h5")

    fuzz(3, test, spoiled_structure(whole / "out" / f"{name}.h5"))


def test_records_with_other_bytes(whole: Path, fuzz: Callable[..., None]) -> None:
    def test(raw: bytes) -> None:
        Path("spoiled.h5").write_bytes(raw)
        try_record("spoiled.h5")

    fuzz(6, test, spoiled_bytes((whole / "out" / "downpour.h5").read_bytes()))


def test_a_folder_for_a_file(whole: Path) -> None:
    for words in (["train"], ["plan"], ["inspect"], ["inspect", "--config"], ["plot"], ["evaluate"]):
        sound(run(*words, "out"))
    sound(run("train", "downpour.toml", "data.path=out"))
    sound(run("train", "downpour.toml", "--resume", "out"))
    sound(run("predict", "out/downpour.checkpoint.h5", "out", "out.csv", "--force"))


IDX = {
    "x": struct.pack(">4B3I", 0, 0, 8, 3, 4, 2, 2) + bytes(range(16)),
    "y": struct.pack(">4BI", 0, 0, 8, 1, 4) + bytes([0, 1, 0, 1]),
}


def test_idx_files_with_other_bytes(fuzz: Callable[..., None]) -> None:
    def test(x: bytes, y: bytes, zipped: bytes) -> None:
        for name, raw in {**IDX, "spoiled-x": x, "spoiled-y": y, "zipped": zipped}.items():
            Path(name).write_bytes(raw)
        for one, other in (("spoiled-x", "y"), ("x", "spoiled-y"), ("zipped", "y")):
            files = ["--train-images", one, "--train-labels", other, "--test-images", "x", "--test-labels", "y"]
            sound(run("data", "idx", *files, "made.h5", "--force"))

    fuzz(20, test, *map(spoiled_bytes, (IDX["x"], IDX["y"], gzip.compress(IDX["x"], mtime=0))))


def test_npz_and_image_files_with_other_bytes(fuzz: Callable[..., None]) -> None:
    image = Image.fromarray(np.arange(60, dtype="u1").reshape(4, 5, 3))
    arrays, pixels = io.BytesIO(), io.BytesIO()
    np.savez(arrays, x=np.zeros((4, 3)), y=np.array(["a", "b", "a", "b"]))
    image.save(pixels, "png")

    def test(raw: bytes, picture: bytes) -> None:
        Path("spoiled.npz").write_bytes(raw)
        Path("top/a").mkdir(parents=True, exist_ok=True)
        Path("top/a/1.png").write_bytes(picture)
        image.save("top/a/2.png")
        sound(run("data", "npz", "spoiled.npz", "made.h5", "--force"))
        sound(run("data", "images", "top", "made.h5", "--size", "4", "--force"))

    fuzz(15, test, spoiled_bytes(arrays.getvalue()), spoiled_bytes(pixels.getvalue()))


def test_libsvm_files_with_other_bytes(fuzz: Callable[..., None]) -> None:
    def test(raw: bytes) -> None:
        Path("spoiled").write_bytes(raw)
        Path("text").write_text("1 1:0.5 3:2\n-1 2:1\n")
        sound(run("data", "libsvm", "--train", "spoiled", "--test", "text", "made.h5", "--force"))

    fuzz(30, test, spoiled_bytes(b"1 1:0.5 3:-1e3 9:1\n-1 2:1 # no\n1\n3.5 4:255\n"))
