"""Starting and ending together: primitives alone, wrong launches, a failing rank, the cache of compiled kernels."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dbnet.commands.see.doctor.command import two_ranks

HERE = Path(__file__).resolve().parent
MPICH = any(one.metadata["Name"] == "mpich" for one in importlib.metadata.distributions())


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    """Return a folder with a configuration."""
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


def test_window_and_channel(tmp_path: Path, mpirun: Callable) -> None:
    sizes = (3, 4, 6)
    mpirun(max(sizes), HERE / "primitives.py", tmp_path, *sizes).good()
    assert sorted(mark.name for mark in tmp_path.iterdir()) == [f"{size}.{rank}" for size in sizes for rank in range(size)]


def test_the_doctor_starts_two_ranks(place: Path) -> None:
    found = {finding.subject: finding for finding in two_ranks()}
    wanted = ["launcher", "MPI", "threads", "pinning", "windows", "one-sided on this host", "progress on this host"]
    assert list(found) == wanted and not [finding for finding in found.values() if finding.state == "broken"]
    assert "Put, Get, Accumulate, Fetch_and_op are right" in found["one-sided on this host"].said


UNFIT = ["model.layers=[{kind='dense', units=10, cut=[3]}]", "topology={shards=1, replicas=1, partitions=2}"]
REFUSED = [
    (["no.toml"], ["No configuration file 'no.toml'"]),
    (["run.toml", "rule.rat=1"], ["did you mean 'rate'"]),
    (["run.toml", "data.path=no.h5"], ["No data file 'no.h5'"]),
    (["run.toml", "run.folder=run.toml"], ["Cannot make the output folder"]),
    (["run.toml", "--resume"], ["No checkpoint"]),
    (["run.toml", "--nonsense"], ["'dbnet train' does not take '--nonsense'"]),
    (["run.toml", *UNFIT], ["model.layers.0.cut = [3] does not fit a layer of shape 10 and 2 partitions"]),
    (
        ["run.toml", "topology.replicas=3", "run.name=odd"],
        ["= 5 ranks, but 4 were started", "mpirun -n 5 dbnet train run.toml topology.replicas=3 run.name=odd"],
    ),
]


def test_one_rank_says_what_is_wrong(folder: Path, several: Callable) -> None:
    before = sorted(folder.rglob("*"))
    jobs = several(4, *(["train", *words] for words, _ in REFUSED), cwd=folder, timeout=100)
    for job, (words, said) in zip(jobs, REFUSED, strict=True):
        assert job.code == 2, words
        assert all(job.err.count(sentence) == 1 for sentence in said), job.err
        assert job.err.count("dbnet:") == 1 and "Traceback" not in job.err
    assert sorted(folder.rglob("*")) == before


def test_what_is_wrong_is_the_exit_code_of_the_job(folder: Path, mpirun: Callable) -> None:
    job = mpirun(3, "-m", "dbnet", "train", "run.toml", cwd=folder, timeout=100)
    assert job.code == 2 and job.err.count("= 4 ranks, but 3 were started") == 1 and job.err.count("dbnet:") == 1


# Who fails must end the others: they would wait for longer than the test does.
PATIENT = ["stop.seconds=1000", "run.deadline=1000", "run.heartbeat=500", "topology.replicas=1"]


@pytest.mark.parametrize(
    ("rank", "kind", "said"),
    [
        (1, "error", "RuntimeError: the twentieth call failed"),
        (2, "error", "RuntimeError: the twentieth call failed"),
        (2, "user", "The twentieth call was refused."),
        (1, "exit", ""),
    ],
    ids=["shard-error", "replica-error", "replica-user", "shard-exit"],
)
@pytest.mark.long
def test_a_failing_rank_ends_the_job(rank: int, kind: str, said: str, folder: Path, mpirun: Callable) -> None:
    job = mpirun(3, HERE / "failing.py", rank, kind, "run.toml", *PATIENT, cwd=folder, timeout=100)
    assert job.code != 0
    assert job.err.count(said) == 1 or not said
    assert ("Traceback" in job.err) is (kind == "error")
    if kind == "error":
        assert f"rank {rank} of 3" in job.err
    assert not list((folder / "out").glob("*.part"))


def test_a_killed_rank_ends_the_job(folder: Path, mpirun: Callable) -> None:
    job = mpirun(3, HERE / "failing.py", 2, "kill", "run.toml", *PATIENT, cwd=folder, timeout=100)
    assert job.code != 0


@pytest.mark.skipif(not MPICH, reason="compiling takes long, and which rank compiles is not MPI's")
@pytest.mark.long
def test_kernels_are_compiled_once(folder: Path, mpirun: Callable) -> None:
    """With an empty cache one rank compiles, the others and every later process load, and import nothing that no role needs."""
    cache = str(folder / "cache")
    probe = folder / "probe.py"
    probe.write_text(
        "import os, pathlib, sys, time\n"
        "from dbnet.commands.training import train\n"
        "from dbnet.core import jit\n"
        "from dbnet.__main__ import main\n"
        "warm, counts = jit.warm, []\n"
        "jit.warm = lambda *a: counts.append(warm(*a))\n"
        "pathlib.Path(f'{os.getpid()}.pid').touch()\n"
        "def others(): return [p for p in pathlib.Path().glob('*.pid') if p.stem != str(os.getpid()) and running(p.stem)]\n"
        "def running(pid):\n"
        "    stat = pathlib.Path(f'/proc/{pid}/stat')\n"
        "    return stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z'\n"
        "def alone(*a):\n"
        "    until = time.monotonic() + 60\n"
        "    while others() and time.monotonic() < until: time.sleep(0.01)\n"
        "    assert not others(), 'the picture makes others wait'\n"
        "    return draw(*a)\n"
        "draw, train.drawn = train.drawn, alone\n"
        "code = main(['train', 'run.toml', 'stop.seconds=0.2', '--quiet', *sys.argv[1:]])\n"
        "print(f'compiled {sum(counts)}', flush=True)\n"
        "heavy = 'numba', 'pandas', 'rich', 'matplotlib', 'scipy.linalg', 'dbnet.network.layers.local', 'dbnet.shards.rules.adam'\n"
        "print(' '.join(['imported', *sorted(set(heavy) & set(sys.modules))]) + '\\n', end='', file=sys.stderr, flush=True)\n"
        "sys.exit(code)\n"
    )
    first = mpirun(3, probe, "topology.replicas=1", cwd=folder, DBNET_CACHE=cache).good()
    counts = [int(n) for n in re.findall(r"compiled (\d+)", first.out)]
    assert len(counts) == 3 and sum(1 for n in counts if n) == 1
    alone = subprocess.run(
        [sys.executable, probe], cwd=folder, env={**os.environ, "DBNET_CACHE": cache, "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert alone.returncode == 0 and alone.stdout == "compiled 0\n", alone.stderr
    # The coordinator compiles, and draws the picture, as one process does.
    assert sorted(re.findall(r"imported ?(.*)", first.err))[:2] == ["", ""] and alone.stderr == "imported matplotlib pandas\n"
