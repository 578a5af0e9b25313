"""What several test files use: a small data set, a configuration, the command line called in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from finished import Finished
from hypothesis import settings

# Seconds decide nothing: other suites run beside this one.
settings.register_profile("dbnet", deadline=None)
settings.load_profile("dbnet")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A script's background starts with Ctrl-C ignored, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


RUN_FILE = """# A small network on the handwritten digits.
[run]
folder = "out"
picture = false

[data]
path = "{data}"

[[model.layers]]
kind = "dense"
units = 16
activation = "sigmoid"

[[model.layers]]
kind = "dense"
units = 10

[method]
minibatch = 20

[rule]
kind = "adagrad"
rate = 0.1

[topology]
shards = 2
replicas = 2

[stop]
epochs = 2

[evaluate]
epochs = 2
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the long forms of the tests that have one: fuzzing, faults")
    parser.addoption("--fast", action="store_true", help="without the tests that are marked `long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Return whether tests run in their long form."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data file of the handwritten digits."""
    from dbnet.core.registry import make
    from dbnet.data.file import write

    path = tmp_path_factory.mktemp("data") / "digits.h5"
    write(path, make("data.formats", {"kind": "digits"}, "data").read())
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to an empty folder; a run started by accident under a launcher's environment is none."""
    for name in list(os.environ):
        if name.startswith(("PMI_", "PMIX_", "OMPI_COMM_", "SLURM_")) or name == "MPI_LOCALNRANKS":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_file(place: Path, digits: Path) -> Path:
    """Return a configuration in the present folder."""
    path = place / "run.toml"
    path.write_text(RUN_FILE.format(data=digits))
    return path


@pytest.fixture
def dbnet(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Return a function that runs a command of the command line in this process."""
    from dbnet.__main__ import main

    def call(*arguments: object) -> Finished:
        capsys.readouterr()
        try:
            code = main([str(word) for word in arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        return Finished(code, *capsys.readouterr())

    return call


@pytest.fixture
def make_data(place: Path) -> Callable[..., Path]:
    """Return a function that writes, unchecked, a small data file: 8 examples of 3 units in 2 classes, changed by keywords."""
    import h5py

    def make(name: str = "small.h5", **changes: object) -> Path:
        x = np.arange(24, dtype=np.float32).reshape(8, 3) / 24
        contents = {"train/x": x, "train/y": np.arange(8) % 2, "test/x": x[:4], "test/y": np.arange(4) % 2, "classes": 2}
        contents.update({key.replace("__", "/"): value for key, value in changes.items()})
        with h5py.File(place / name, "w") as file:
            for key, value in contents.items():
                if value is not None:
                    (file if isinstance(value, np.ndarray) else file.attrs)[key] = value
        return place / name

    return make
