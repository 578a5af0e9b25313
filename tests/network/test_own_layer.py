"""A layer in a user's own file: found through the configuration, cut, checked, trained like any other."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import h5py
import pytest

from dbnet import load, open_run
from dbnet import train as run_here
from dbnet.__main__ import main
from dbnet.checkpoint.format import store, text
from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm import mpi
from dbnet.core.errors import OWN, UserError
from dbnet.core.registry import family, load_file, make

FILE = Path(__file__).parents[1] / "support" / "gain.py"


def test_a_run_file_names_its_file(run_file: Path, dbnet: Callable) -> None:
    layers = "model.layers=[{kind='dense', units=32, activation='tanh'}, {kind='gain'}, {kind='dense', units=10}]"
    done = dbnet("train", run_file, f"model.modules=['{FILE}']", layers, "stop.epochs=8")
    assert done.code == 0, done.err
    assert float(done.out.split("Test accuracy")[1].split()[0]) > 0.85


def forget() -> None:
    """Make this process one that never loaded anybody's module."""
    for name in [name for name in sys.modules if name.startswith(OWN)]:
        del sys.modules[name]
    family("network.layers").pop("gain", None)


TRAP = FILE.read_text() + "\nopen('ran', 'a').close()\n"
DIGEST = hashlib.sha256(TRAP.encode()).hexdigest()
LAYERS = "model.layers=[{kind='dense', units=8}, {kind='gain'}, {kind='dense', units=10}]"


@pytest.fixture
def sent(run_file: Path, dbnet: Callable) -> Iterator[Path]:
    """Return the folder with the outputs of a run whose own module is not here: they were made elsewhere."""
    Path("trap.py").write_text(TRAP)
    done = dbnet("train", run_file, "--quiet", "model.modules=['trap.py']", LAYERS, "stop.epochs=1")
    assert (done.code, done.err) == (0, "") and Path("ran").exists()
    for name in ("ran", "trap.py"):
        Path(name).unlink()
    forget()
    yield Path("out")
    forget()


def test_opening_an_output_runs_nothing(sent: Path, dbnet: Callable) -> None:
    point, record = sent / "run.checkpoint.h5", sent / "run.h5"
    before = set(sys.modules)
    for words in (["inspect", record], ["inspect", point], ["inspect", "--config", record], ["inspect", "--config", point],
                  ["inspect", "--modules", record], ["inspect", "--modules", point], ["inspect", "--verify", point],
                  ["plot", record]):  # fmt: skip
        done = dbnet(*words)
        assert (done.code, done.err) == (0, ""), done
        if "--modules" in words:
            assert done.out == f"# trap.py, SHA-256 {DIGEST}\n{TRAP}"
        elif words[0] == "inspect" and len(words) == 2:
            assert f"trap.py (SHA-256 {DIGEST[:12]}" in done.out
    known = {"path": "trap.py", "sha256": DIGEST, "text": TRAP}
    assert open_run(str(record)).about["modules"] == Checkpoint(point).modules == [known]
    assert not Path("ran").exists() and not [name for name in set(sys.modules) - before if name.startswith(OWN)]


def test_own_modules_of_a_checkpoint_want_trust(sent: Path, digits: Path, dbnet: Callable) -> None:
    point = sent / "run.checkpoint.h5"
    for words in (["evaluate", point], ["predict", point, digits, "p.csv"]):
        done = dbnet(*words)
        assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
        assert f"'{point}' holds Python code that would be run: trap.py (SHA-256 {DIGEST[:12]}" in done.err
        assert done.err.endswith("and --trust-modules runs it.\n") and not Path("ran").exists()
    assert not Path("p.csv").exists()
    done = dbnet("evaluate", point, "--trust-modules")
    assert done.code == 0 and done.out.split()[-1] == f"{open_run(str(sent / 'run.h5')).accuracy:.4f}"
    assert Path("ran").exists()
    # What this process runs already needs no leave.
    assert dbnet("predict", point, digits, "p.csv").code == 0
    forget()
    Path("ran").unlink()
    with pytest.raises(UserError, match=r"Python code that would be run: trap.py .* and trust_modules=True runs it\.$"):
        load(point)
    assert not Path("ran").exists()
    assert f"{load(point, trust_modules=True).evaluate().accuracy:.4f}" == done.out.split()[-1] and Path("ran").exists()


def test_a_module_that_is_not_what_it_says(sent: Path, dbnet: Callable) -> None:
    path = sent / "run.checkpoint.h5"
    with h5py.File(path, "a") as file:
        found = text(file, "modules")
        del file["modules"]
        store(file, "modules", [{**found[0], "text": TRAP + "\n"}])
    done = dbnet("evaluate", path, "--trust-modules")
    assert done.code == 2 and "/modules is damaged" in done.err and not Path("ran").exists()


def test_a_file_that_changed_is_another_module(tmp_path: Path) -> None:
    """In a notebook that goes on, the last one that was loaded counts, also where it had been loaded before."""
    path, old = tmp_path / "gain.py", FILE.read_text()
    for content, spread in ((old, 1.0), (old.replace("spread=1.0", "spread=2.0"), 2.0), (old, 1.0)):
        path.write_text(content)
        load_file(str(path))
        assert make("network.layers", {"kind": "gain"}, "layer").parameters((3,))["gain"].spread == spread


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.py", None, "model.modules: there is no file"),
        ("a\0b.py", None, "model.modules: there is no file"),
        ("gain.txt", FILE.read_bytes(), "is not a Python file; its name must end in .py"),
        ("broken.py", b"x = 1\nimport nothing_of_this_name\n", "fails in line 2 with ModuleNotFoundError: No module named"),
        ("broken.py", b"x = 1\ndef (\n", "fails with SyntaxError: invalid syntax (broken.py, line 2)."),
        ("broken.py", b"import sys\nsys.exit(3)\n", "fails in line 2 with SystemExit: 3."),
        ("broken.py", b"\xff\xfe", "is not text in UTF-8"),
        ("broken.py", b"x = 1\0", "fails with"),
    ],
)
def test_a_missing_or_broken_file_is_one_sentence(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_file(f"{tmp_path}/{name}")
    assert said in str(error.value) and str(error.value).startswith("model.modules: ") and "\n" not in str(error.value)


FAILURES = {
    "forward": ("scale(c.y.reshape(-1, batch)", 'raise ValueError("of mine")  #', "in forward fails with ValueError: of mine: "),
    "kernel": ("y[u, j] = gain[u] * x[u, j]", "y[u, j] = gain.nothing", "in a kernel fails with TypingError: "),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_ones_own_line_comes_first(case: str, ranks: int, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, said = FAILURES[case]
    # Another text is another module, with kernels of its own.
    Path("bad.py").write_text(f"{FILE.read_text().replace(old, new)}# {ranks}\n")
    line = next(n for n, text in enumerate(Path("bad.py").read_text().split("\n"), 1) if new in text)
    words = ["train", str(run_file), "model.modules=['bad.py']", LAYERS, "--quiet"]
    if ranks == 1:
        with pytest.raises(Exception, match=r"of mine|nothing"):
            main(words)
    else:
        ended = SimpleNamespace(rank=1, size=ranks, Abort=sys.exit)
        with pytest.raises(SystemExit), mpi.abort_on_error(ended):
            run_here(str(run_file), words[2:4])
    err = capsys.readouterr().err
    assert err.startswith(f"dbnet: '{Path('bad.py').resolve()}', line {line}, {said}"), err
    assert (ranks == 1) == ("Traceback" not in err)
    forget()
