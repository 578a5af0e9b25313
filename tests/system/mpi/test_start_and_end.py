"""Starting and ending together: primitives alone, wrong launches, a failing rank, the cache of compiled kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    """Return a folder with a run file."""
    (tmp_path / "run.toml").write_text(
        f"""
run.folder = "out"
data.path = "{digits}"
stop.seconds = 60
evaluate.epochs = 1000
[model]
layers = [{{kind = "dense", units = 10}}]
[topology]
shards = 1
replicas = 2
"""
    )
    return tmp_path


@pytest.mark.parametrize("n", [3, 4, 6])
def test_window_and_channel(n: int, tmp_path: Path, mpirun: Callable) -> None:
    mpirun(n, HERE / "primitives.py", tmp_path).good()
    assert len(list(tmp_path.iterdir())) == n


def test_wrong_number_of_ranks(folder: Path, mpirun: Callable) -> None:
    before = sorted(folder.rglob("*"))
    job = mpirun(3, "-m", "dbnet", "train", "run.toml", "run.name=odd", cwd=folder, timeout=40)
    assert job.code != 0
    assert job.err.count("dbnet:") == 1 and "Traceback" not in job.err
    assert "= 4 ranks, but 3 were started" in job.err
    assert "mpirun -n 4 dbnet train run.toml run.name=odd" in job.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no.toml"], "No run file 'no.toml'"),
        (["run.toml", "rule.rat=1"], "did you mean 'rate'"),
        (["run.toml", "data.path=no.h5"], "No data file 'no.h5'"),
        (["run.toml", "run.folder=run.toml"], "Cannot make the output folder"),
        (["run.toml", "--resume"], "No checkpoint"),
        (["run.toml", "--nonsense"], "'dbnet train' does not take '--nonsense'"),
    ],
)
def test_one_rank_says_what_is_wrong(words: list[str], said: str, folder: Path, mpirun: Callable) -> None:
    before = sorted(folder.rglob("*"))
    job = mpirun(4, "-m", "dbnet", "train", *words, cwd=folder, timeout=40)
    assert job.code != 0
    assert job.err.count(said) == 1 and job.err.count("dbnet:") == 1 and "Traceback" not in job.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("rank", "who"), [(1, "shard"), (2, "replica")])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("error", "RuntimeError: the twentieth call failed"), ("user", "The twentieth call was refused."), ("exit", "")],
)
def test_a_failing_rank_ends_the_job(rank: int, who: str, kind: str, said: str, folder: Path, mpirun: Callable) -> None:
    job = mpirun(4, HERE / "failing.py", rank, kind, "run.toml", cwd=folder, timeout=30)
    assert job.code != 0 and job.seconds < 25
    assert job.err.count(said) == 1 or not said
    assert ("Traceback" in job.err) is (kind == "error")
    if kind == "error":
        assert f"rank {rank} of 4" in job.err
    assert not list((folder / "out").glob("*.part"))


def test_a_killed_rank_ends_the_job(folder: Path, mpirun: Callable) -> None:
    job = mpirun(4, HERE / "failing.py", 3, "kill", "run.toml", cwd=folder, timeout=30)
    assert job.code != 0 and job.seconds < 25


def test_kernels_are_compiled_once(folder: Path, mpirun: Callable) -> None:
    """With an empty cache one rank compiles, the others and every later process load."""
    cache = str(folder / "cache")
    probe = folder / "probe.py"
    probe.write_text(
        "import sys\n"
        "from dbnet.core import jit\n"
        "from dbnet.__main__ import main\n"
        "warm, counts = jit.warm, []\n"
        "jit.warm = lambda *a: counts.append(warm(*a))\n"
        "code = main(['train', 'run.toml', 'stop.seconds=0.2', '--quiet'])\n"
        "print(f'compiled {sum(counts)}', flush=True)\n"
        "sys.exit(code)\n"
    )
    first = mpirun(4, probe, cwd=folder, DBNET_CACHE=cache).good()
    counts = [int(n) for n in re.findall(r"compiled (\d+)", first.out)]
    assert len(counts) == 4 and sum(1 for n in counts if n) == 1
    alone = subprocess.run(
        [sys.executable, probe], cwd=folder, env={**os.environ, "DBNET_CACHE": cache, "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert alone.returncode == 0 and alone.stdout == "compiled 0\n", alone.stderr
    again = mpirun(4, probe, cwd=folder, DBNET_CACHE=cache).good()
    assert re.findall(r"compiled (\d+)", again.out) == ["0"] * 4


def test_evaluation_of_a_run_on_ranks_is_the_same_in_one_process(trainings: Callable, digits: Path) -> None:
    folder = trainings(3, {"a": ["stop.epochs=2"]})
    from dbnet.monitor.results import Run
    from dbnet.run import inference

    score, _ = inference.evaluate(str(folder / "a.checkpoint.h5"), None, "test")
    assert score.test_accuracy == pytest.approx(Run(folder / "a.h5").accuracy)
    assert json.loads(Run(folder / "a.h5").config.text())["run"]["name"] == "a"
