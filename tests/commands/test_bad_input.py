"""Whatever the user gives wrongly: one sentence on stderr, an exit code that is not 0, no traceback, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from finished import ROOT, Finished

from dbnet.core import config
from dbnet.core.errors import UserError
from dbnet.core.files import writing
from dbnet.core.registry import FAMILIES, SOURCES
from dbnet.run import setup

Command = Callable[..., Finished]


def listing() -> dict[str, bytes | None]:
    """Return everything in the present folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path().rglob("*"))}


@pytest.fixture
def refused(dbnet: Command) -> Callable[..., str]:
    """Return a function that runs a command, checks that it refuses as it should, and returns its sentence."""

    def call(*words: object) -> str:
        before = listing()
        done = dbnet(*words)
        assert done.code == 2, done
        assert done.err.startswith("dbnet: ") and done.err.endswith(".\n") and done.err.count("\n") == 1, done.err
        assert "Traceback" not in done.err and done.out == ""
        assert listing() == before
        return done.err

    return call


def test_missing_files(run_file: Path, refused: Callable[..., str]) -> None:
    assert "No configuration file 'none.toml'" in refused("train", "none.toml")
    said = refused("train", run_file, "data.path=none.h5")
    assert "No data file 'none.h5'; 'dbnet data --help' says how to make it" in said and "digits" not in said
    Path("README.md").write_text("how")
    assert "; README.md says how to make it" in refused("train", run_file, "data.path=none.h5")
    assert "No checkpoint of a run named 'run' in 'out'" in refused("train", run_file, "--resume")
    assert "No checkpoint 'none.h5'" in refused("train", run_file, "--resume", "none.h5")
    for command in (["inspect", "none.h5"], ["plot", "none.h5"], ["evaluate", "none.h5"], ["predict", "none.h5", "a.h5", "o.csv"]):
        assert "none.h5" in refused(*command)


def test_what_a_training_cannot_be(run_file: Path, refused: Callable[..., str]) -> None:
    assert "run.threads = 9999, but a rank may run on " in refused("train", run_file, "run.threads=9999")
    said = refused("plan", run_file, "model.layers.1.init=he_norm")
    assert "model.layers.1.init = 'he_norm' is not one of" in said and "(did you mean 'he_normal'?)" in said
    assert "Unknown key 'model.layers.0.init.valu'" in refused("plan", run_file, "model.layers.0.init={kind='constant', valu=1}")
    said = refused("train", run_file, "rule.schedule=cosine", "stop={seconds=1}")
    assert "must know its end: give rule.schedule.length" in said
    assert "did you mean 'cosine'" in refused("plan", run_file, "rule.schedule.kind=cosin")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_truncated_data(share: float, digits: Path, run_file: Path, refused: Callable[..., str]) -> None:
    Path("cut.h5").write_bytes(digits.read_bytes()[: int(digits.stat().st_size * share)])
    assert "'cut.h5' cannot be read" in refused("train", run_file, "data.path=cut.h5")
    refused("inspect", "cut.h5")


@pytest.mark.parametrize(
    ("name", "said"),
    [("run.toml", ": it is a text file, and dbnet's files are HDF5; 'dbnet data --help' shows"),
     (".", ": it is a folder; give a regular file."),
     ("a.npz", ": it is a zip archive, like NumPy's .npz, "),
     ("a.npy", ": it is a NumPy array, "), ("noise", " (it is no HDF5 file);"),
     ("cut.h5", " (it is cut off: it has 3,000 of its 82,813 bytes); "), ("empty", " (it is no HDF5 file);")],
)  # fmt: skip
def test_not_hdf5(name: str, said: str, run_file: Path, digits: Path, refused: Callable[..., str]) -> None:
    np.savez("a.npz", np.zeros(3))
    np.save("a.npy", np.zeros(3))
    Path("noise").write_bytes(bytes(range(256)))
    Path("empty").touch()
    Path("cut.h5").write_bytes(digits.read_bytes()[:3000])
    said = f"'{name}' cannot be read{said}".replace("82,813", f"{digits.stat().st_size:,}")
    assert said in refused("train", run_file, f"data.path={name}")
    for command in (["inspect", name], ["plot", name], ["evaluate", name], ["train", run_file, "--resume", name]):
        assert said in refused(*command) or (name == "." and "--resume" in command)


DATA = {
    "labels": ({"train__y": np.array([0, 1, 9, 0, 1, 0, 1, 0])}, "/train/y[2] = 9 is not a label; with 2 classes"),
    "nan": ({"train__x": np.where(np.arange(24).reshape(8, 3) == 10, np.nan, 0)}, "/train/x of example 3 is nan"),
    "inf": ({"train__x": np.where(np.arange(24).reshape(8, 3) == 10, np.inf, 0)}, "/train/x of example 3 is inf"),
    "nan in the test": ({"test__x": np.full((4, 3), np.nan)}, "/test/x of example 0 is nan"),
    "shape": ({"train__x": np.zeros((8, 3, 1, 1, 1))}, "must have 1, 2 or 3 axes"),
    "lengths": ({"train__x": np.zeros((7, 3))}, "do not fit each other"),
    "classes": ({"classes": 3}, "The last layer has 2 units but the data ask for 3"),
    "one-hot": (
        {"train__y": np.eye(2)[np.arange(8) % 2], "test__y": np.eye(2)[np.arange(4) % 2]},
        "/train/y holds one-hot vectors of 2 classes; store the labels themselves, y.argmax(axis=1), which the softmax loss wants.",
    ),
    "targets": ({"train__y": np.zeros((8, 2)), "test__y": np.zeros((4, 2))}, "set model.loss = 'squared'"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case: str, run_file: Path, make_data: Callable[..., Path], refused: Callable[..., str]) -> None:
    changes, said = DATA[case]
    make_data(**changes)
    assert said in refused("train", run_file, "data.path=small.h5", "model.layers=[{kind='dense', units=2}]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["topology.replica=4"], "Unknown key 'topology.replica' (did you mean 'replicas'?)"),
        (["method.n_psh=4"], "Unknown key 'method.n_psh' (did you mean 'n_push'?)"),
        (["topology.replicas=none"], "topology.replicas = 'none' is not allowed"),
        (["topology.replicas"], "is not an override"),
        (["model.layers.1.units=9"], "The last layer has 9 units but the data ask for 10; set its units to 10"),
        (["model.layers.0.kind=dens"], "(did you mean 'dense'?)"),
        (["method.kind=sgd"], "set topology.replicas = 1"),
        (["run.name=../x"], "run.name"),
    ],
)
def test_wrong_keys_and_values(words: list[str], said: str, run_file: Path, refused: Callable[..., str]) -> None:
    assert said in refused("train", run_file, *words)


def test_checkpoint_of_another_network(run_file: Path, dbnet: Command, refused: Callable[..., str]) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=2").code == 0
    assert "another network" in refused("train", run_file, "--resume", "model.layers.0.units=17")
    assert "is not a dbnet checkpoint" in refused("train", run_file, "--resume", "out/run.h5")
    assert "is a checkpoint; give a run file or a data file" in refused("plot", "out/run.checkpoint.h5")


def test_checkpoint_that_is_damaged(run_file: Path, dbnet: Command, refused: Callable[..., str]) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=2").code == 0
    whole = Path("out/run.checkpoint.h5").read_bytes()
    for n in (0, 100, len(whole) // 2, len(whole) - 1):
        Path("cut.h5").write_bytes(whole[:n])
        refused("train", run_file, "--resume", "cut.h5")
        refused("evaluate", "cut.h5")
    for name in ("clock", "replicas", "ranges"):
        shutil.copy("out/run.checkpoint.h5", "less.h5")
        with h5py.File("less.h5", "a") as file:
            del file[name]
        assert name in refused("train", run_file, "--resume", "less.h5")


def test_data_of_another_network(
    run_file: Path, digits: Path, dbnet: Command, make_data: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=2").code == 0
    make_data()
    point = "out/run.checkpoint.h5"
    assert "the network takes (8, 8, 1)" in refused("evaluate", point, "small.h5")
    make_data(
        "vectors.h5", test__x=np.zeros((4, 8, 8)), test__y=np.eye(10)[:4], train__x=np.zeros((8, 8, 8)), train__y=np.eye(10)[:8]
    )
    assert "holds vectors, but the softmax loss of the network wants labels" in refused("evaluate", point, "vectors.h5")
    assert "the network takes (8, 8, 1)" in refused("predict", point, "small.h5", "o.csv")
    assert "has no part 'nonsense'" in refused("evaluate", point, "--part", "nonsense")
    assert "has no /nonsense/x" in refused("predict", point, digits, "o.csv", "--part", "nonsense")
    assert "Cannot write 'run.toml/o.csv'" in refused("predict", point, digits, "run.toml/o.csv")
    Path("folder.csv").mkdir()
    assert "Cannot write 'folder.csv'" in refused("predict", point, digits, "folder.csv")
    assert "'o.npi': '.npi' is no ending for predictions; take .csv, .npy, " in refused("predict", point, digits, "o.npi")
    assert "only run files and checkpoints" in refused("inspect", "--config", "small.h5")


def test_files_that_are_there(run_file: Path, digits: Path, dbnet: Command, refused: Callable[..., str]) -> None:
    """What may be anybody's is replaced with --force alone, a link that leads nowhere too."""
    assert dbnet("train", run_file, "--quiet", "stop.steps=2").code == 0
    Path("link.csv").symlink_to("nowhere")
    predict = ["predict", "out/run.checkpoint.h5", digits]
    plot = ["plot", "out/run.h5"]
    for words in (["data", "digits", "mine.h5"], [*predict, "mine.h5"], [*predict, "link.csv"], [*plot, "--out", "mine.png"], plot):
        out = Path("out/run.png" if len(words) == 2 else words[-1])
        if not out.is_symlink():
            out.write_text("mine")
        assert f"Cannot write '{out}': that file exists; choose another name, or give --force to replace it." in refused(*words)
        assert dbnet(*words, "--force").code == 0 and out.read_bytes() != b"mine" and not out.is_symlink()
        out.unlink()
    assert not list(Path().rglob("*.part"))


def test_a_file_that_comes_in_the_meantime(tmp_path: Path) -> None:
    """Whoever is first keeps the name; two who write at once do not write into each other's file."""
    path = tmp_path / "a"
    with pytest.raises(UserError, match="that file exists"), writing(path, force=False) as late:
        late.write_text("late")
        with writing(path, force=False) as early:
            early.write_text("early")
    assert path.read_text() == "early" and list(tmp_path.iterdir()) == [path]
    with writing(path, force=True) as part:
        part.write_text("forced")
    assert path.read_text() == "forced"


def test_output_folder_that_is_a_file(run_file: Path, refused: Callable[..., str]) -> None:
    assert "Cannot make the output folder" in refused("train", run_file, "run.folder=run.toml")
    assert "Cannot make the output folder" in refused("train", run_file, "run.folder=run.toml/deep")


def run_as_nobody(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command without root's rights, which would let it write anywhere."""
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    return subprocess.run(
        [*drop, sys.executable, "-m", "dbnet", *words], cwd=cwd, capture_output=True, text=True, timeout=100,
        env={**{k: v for k, v in os.environ.items() if k not in ("DBNET_CACHE", "XDG_CACHE_HOME")},
             "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere, and there is no setpriv")
def test_output_folder_without_permission(tmp_path_factory: pytest.TempPathFactory, run_file: Path, digits: Path) -> None:
    folder = Path("/tmp") / f"dbnet-{os.getpid()}-readonly"
    folder.mkdir()
    try:
        shutil.copy(digits, folder / "digits.h5")
        (folder / "run.toml").write_text(run_file.read_text().replace(str(digits), "digits.h5"))
        (folder / "out").mkdir()
        for path in (folder / "digits.h5", folder / "run.toml"):
            path.chmod(0o444)
        for path in (folder / "out", folder):
            path.chmod(0o555)
        done = run_as_nobody(["train", "run.toml"], folder)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'out' is not writable; set run.folder" in done.stderr
        done = run_as_nobody(["train", "run.toml", "run.folder=new"], folder)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Cannot make the output folder 'new'" in done.stderr
        done = run_as_nobody(["data", "digits", "d.h5"], folder)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Cannot write 'd.h5'" in done.stderr
        assert sorted(p.name for p in folder.rglob("*")) == ["digits.h5", "out", "run.toml"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("names", [("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.long
def test_mpirun_of_another_mpi(names: tuple[str, str], rank: int, run_file: Path) -> None:
    """Every rank sees a world of its own; the first says so."""
    code = (
        "import types, sys\n"
        "world = types.SimpleNamespace(size=1, rank=0)\n"
        "fake = types.SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: 'Some MPI 1.0')\n"
        "sys.modules['mpi4py'] = types.SimpleNamespace(MPI=fake)\n"
        "sys.modules['mpi4py.MPI'] = fake\n"
        "from dbnet.__main__ import main\n"
        f"sys.exit(main(['train', {str(run_file)!r}]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), names[0]: "3", names[1]: str(rank)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == (rank == 0) and not Path("out").exists()
    if rank == 0:
        assert "started 3 ranks, but each sees a world of size 1" in done.stderr and "another MPI than mpi4py's" in done.stderr
        assert str(Path(sys.executable).parent / "mpirun") in done.stderr


def test_too_little_memory(run_file: Path, dbnet: Command) -> None:
    done = dbnet("train", run_file, "model.layers.0.units=9999999999999")
    assert done.code != 0 and "Not enough memory" in done.err and "Traceback" not in done.err and done.err.count("\n") == 1


def test_memory_is_counted_before_it_is_taken(run_file: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """2 shards with 2 (2 m + 7) vectors of 1,210 parameters each, and two replicas."""
    words = ["train", run_file, "method.kind=sandblaster", "stop={iterations=1}", "method.descent.history=100"]
    monkeypatch.setattr("dbnet.run.setup.memory", lambda: 4 * 1210 * 200)
    said = refused(*words)
    assert "Not enough memory: the run needs 0.0 GiB for vectors alone" in said and "method.descent.history" in said
    monkeypatch.undo()
    ready = setup.setup(config.load(run_file, words[2:]))
    monkeypatch.setattr("dbnet.run.setup.memory", lambda: 4 * 605 * 200)
    ready.check(0)
    with pytest.raises(UserError, match="Not enough memory: shard 1 needs"):
        ready.check(2)


@pytest.mark.parametrize("cut", ["train-images", "test-labels"])
def test_idx_files_that_are_cut_off(cut: str, place: Path, refused: Callable[..., str]) -> None:
    for name, header in (("images", b"\0\0\x08\x03\0\0\0\x02\0\0\0\x02\0\0\0\x02"), ("labels", b"\0\0\x08\x01\0\0\0\x02")):
        for part in ("train", "test"):
            (place / f"{part}-{name}").write_bytes(header + bytes(8 if name == "images" else 2))
    path = place / cut
    path.write_bytes(path.read_bytes()[:-1])
    words = [word for part in ("train", "test") for name in ("images", "labels") for word in (f"--{part}-{name}", f"{part}-{name}")]
    assert f"'{cut}' has" in refused("data", "idx", *words, "d.h5")
    assert "No file 'none'" in refused("data", "idx", *words, "--train-images", "none", "d.h5")


def test_own_members_that_do_not_fit_a_run(refused: Callable[..., str], run_file: Path, make_data: Callable[..., Path]) -> None:
    """An error with the name of a column; a coordinator that a record would not be of."""
    make_data(train__y=np.zeros((8, 2), np.float32), test__y=np.zeros((4, 2), np.float32), classes=None)
    Path("own.py").write_text(
        "from dbnet.methods.sandblaster.coordinator import SandblasterCoordinator\n"
        "from dbnet.methods.sandblaster.method import Sandblaster\n"
        "from dbnet.network.losses.squared import Squared\n"
        "class Other(SandblasterCoordinator):\n    pass\n"
        "class Mine(Sandblaster):\n    kind = 'mine'\n    coordinator = Other\n"
        "class Named(Squared):\n    kind = 'named'\n    def errors(self, *_):\n        return {'train loss': 1.0}\n"
    )
    own = ("train", run_file, "model.modules=['own.py']", "data.path=small.h5", "model.layers=[{kind='dense', units=2}]")
    batch = ("model.loss=squared", "method={kind='mine'}", "stop={iterations=1}", "record.schedule=true")
    try:
        assert "calls an error 'train_loss'" in refused(*own, "model.loss=named")
        assert "a coordinator of its own, which is not recorded" in refused(*own, *batch)
    finally:
        # Other tests go by what there is.
        FAMILIES["network.losses"].pop("named", None), FAMILIES["methods"].pop("mine", None), SOURCES.pop("own.py", None)
