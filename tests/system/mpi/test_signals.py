"""Signals to ranks, launchers and job scripts: a checkpoint, exit code 85, nothing left behind, and the run goes on."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from faults import until
from started import processes, programs

from dbnet.__main__ import main
from dbnet.commands.training.grid import grid
from dbnet.commands.training.state import states
from dbnet.monitor.results import Run
from dbnet.run import process

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
MPICH = any(one.metadata["Name"] == "mpich" for one in importlib.metadata.distributions())


def running(folder: Path) -> list[str]:
    """Wait until the run in the folder trains; return what its marker says."""

    def markers() -> list[list[str]]:
        return [p.read_text().split() for p in [*folder.glob(".dbnet-*"), *folder.glob("marker")] if not p.name.endswith(".part")]

    until(lambda: any(words[:1] == ["running"] for words in markers()), "training begins", 90)
    return next(words for words in markers() if words[:1] == ["running"])


# It ends by time alone.
BATCH = "{kind='sandblaster', descent={gradient_norm=0, loss_change=0}}"


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    """Return a folder with a configuration."""
    (tmp_path / "run.toml").write_text(
        f"""
run = {{folder = "out", picture = false}}
data.path = "{digits}"
stop.seconds = 600
evaluate.epochs = 100000
[model]
layers = [{{kind = "dense", units = 10}}]
dtype = "float64"
[topology]
shards = 1
replicas = 1
"""
    )
    return tmp_path


def test_the_coordinator_is_asked_to_stop(folder: Path, mpirun: Callable) -> None:
    words = ["-m", "dbnet", "train", "run.toml", "topology.replicas=2", "--marker", "marker"]

    def ask(_: subprocess.Popen[str]) -> None:
        pid = int(running(folder)[1])
        os.kill(pid, signal.SIGTERM)
        # The same request, passed on by someone else: it must not kill who is obeying it.
        os.kill(pid, signal.SIGUSR1)

    job = mpirun(4, *words, cwd=folder, meanwhile=ask, timeout=120)
    assert job.code == 85 and (folder / "marker").read_text() == "ended 85\n", job.err
    assert job.err.count("checkpoint out/run.checkpoint.h5") == 1 and "--resume auto" in job.err
    assert Run(folder / "out" / "run.h5").stopped


def test_a_second_signal_stops_at_once(folder: Path, mpirun: Callable) -> None:
    """The first one cannot be obeyed: a shard has been halted."""
    mark = f"DBNET_TEST={folder}"

    def ask(_: subprocess.Popen[str]) -> None:
        pid = int(running(folder)[1])
        ranks = {**processes(mark, "PMI_RANK=1\0"), **processes(mark, "OMPI_COMM_WORLD_RANK=1\0")}
        os.kill(next(iter(ranks)), signal.SIGSTOP)
        os.kill(pid, signal.SIGTERM)
        time.sleep(1)
        os.kill(pid, signal.SIGTERM)

    job = mpirun(
        3, "-m", "dbnet", "train", "run.toml", "--marker", "marker", cwd=folder, meanwhile=ask, timeout=120, DBNET_TEST=str(folder)
    )
    assert job.code != 0 and (folder / "marker").read_text() == "ended 130\n"
    assert "interrupted" in job.err and "Traceback" not in job.err
    assert not list((folder / "out").glob("*.checkpoint.h5*"))
    until(lambda: not processes(mark), "no process is left")


# --- jobs/local.sh ------------------------------------------------------------------------------------------------------------


def local(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start jobs/local.sh."""
    bin = folder / "bin"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DBNET_BIN": str(bin if bin.exists() else programs(bin))}
    return subprocess.Popen(
        [ROOT / "jobs" / "local.sh", "run.toml", *words], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def end(job: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the script; return its exit code and what it printed."""
    try:
        out, err = job.communicate(timeout=150)
    finally:
        if job.poll() is None:
            job.terminate()
    return job.returncode, out, err


@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, []), (signal.SIGUSR1, [f"method={BATCH}"])])
def test_local_script(number: signal.Signals, words: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, the run goes on: Downpour on ranks again, Sandblaster in this process, as test_batch_methods.py does it on ranks."""
    job = local(folder, *words)
    running(folder)
    # As a terminal's Ctrl-C does: to all of the script's process group.
    os.killpg(job.pid, number) if number == signal.SIGINT else job.send_signal(number)
    code, _, err = end(job)
    assert code == 85 and "the run is asked to write a checkpoint and stop" in err, err
    more = [*words, "stop.seconds=1", "--resume", "auto"]
    if words:
        monkeypatch.chdir(folder)
        assert main(["train", "run.toml", *more]) == 0
    else:
        code, out, err = end(local(folder, *more))
        assert code == 0 and "Test accuracy" in out, err
    assert Run(folder / "out" / "run-2.h5").about["resumed_from"] == "out/run.checkpoints/000001.h5"
    assert sorted(p.name for p in folder.iterdir()) == ["bin", "out", "run.toml"]
    until(lambda: not processes(str(folder / "bin")), "no process is left")


def test_local_script_hands_on_what_the_user_can_mend(folder: Path) -> None:
    code, _, err = end(local(folder, "data.path=none.h5"))
    assert code == 2 and err.count("No data file 'none.h5'") == 1 and "did not come to its own end" not in err


def test_a_picture_that_is_never_drawn_can_be_given_up(tmp_path: Path) -> None:
    """The run has ended, with its own code, and only the ranks of this launcher do not: Ctrl-C once more kills them."""
    bin, (plan, rank) = tmp_path / "bin", (tmp_path / "bin" / name for name in ("dbnet", "rank"))
    bin.mkdir()
    plan.write_text("#!/bin/sh\necho 3\n")
    # Deaf, so that it is asked once more while it is being killed.
    rank.write_text('#!/bin/bash\ntrap "" TERM\necho ended 0 >"${@: -1}"\ntouch drawing\nexec sleep 300\n')
    for program in (plan, rank):
        program.chmod(0o755)
    env = {**os.environ, "DBNET_BIN": str(bin), "DBNET_LAUNCH": str(rank)}
    job = subprocess.Popen([ROOT / "jobs" / "launch", "run.toml"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        until((tmp_path / "drawing").exists, "the run has ended", 20)
        until(lambda: job.poll() is not None or bool(job.send_signal(signal.SIGINT)), "it is given up")
    finally:
        job.kill()
    # However often: each is said once.
    err = job.communicate(timeout=20)[1]
    assert job.returncode == 0 and err.count("Once more kills them") == err.count("INT once more") == 1, err


@pytest.mark.skipif(not MPICH, reason="a sweep starts jobs/local.sh, which is tested with both")
def test_a_sweep_starts_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["stop={steps=5}", "run.seed=1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DBNET_BIN": str(programs(folder / "bin"))}
    words = [sys.executable, "-m", "dbnet", "sweep", "run.toml", *changes, "--mpi"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and done.stdout.startswith("1 of 1  run  test accuracy "), done
    run = Run(folder / "out" / "run.h5")
    assert run.finished and run.about["mpi"] != process.HERE
    monkeypatch.chdir(folder)
    assert [state.words for mpi in (True, False) for state in states(grid("run.toml", changes), mpi)] == ["done", "to do"]


def test_local_script_notices_a_run_that_was_killed(folder: Path) -> None:
    job = local(folder, "run.heartbeat=4")
    pid = int(running(folder)[1])
    os.kill(pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{pid}").exists(), "the coordinator is gone")
    job.send_signal(signal.SIGTERM)
    code, _, err = end(job)
    assert code == 1 and "did not come to its own end" in err and "--resume auto" in err
    until(lambda: not processes(str(folder / "bin")), "no process is left")


# --- jobs/survive -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MPICH, reason="Open MPI needs no wrapper")
def test_survivors_are_not_told_of_a_killed_rank(tmp_path: Path, mpirun: Callable) -> None:
    def kill(job: subprocess.Popen[str]) -> None:
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 3, "three ranks")
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGKILL)
        # A signal that the launcher passes on comes after its notice; the wrapper hands on this one alone.
        time.sleep(0.5)
        job.send_signal(signal.SIGTERM)
        until(lambda: all((tmp_path / f"{r}.SIGTERM").exists() for r in (0, 2)), "SIGTERM at the survivors")
        (tmp_path / "end").touch()

    options = ["-disable-auto-cleanup", ROOT / "jobs" / "survive"]
    mpirun(3, HERE / "signaled.py", tmp_path, options=options, meanwhile=kill, timeout=100)
    assert sorted(p.name for p in tmp_path.glob("*.SIG*")) == ["0.SIGTERM", "2.SIGTERM"]


@pytest.mark.skipif(not MPICH, reason="Open MPI needs no wrapper")
def test_no_rank_outlives_the_launcher(tmp_path: Path, mpirun: Callable) -> None:
    def kill(job: subprocess.Popen[str]) -> None:
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 3, "three ranks")
        job.kill()
        until(lambda: not processes(f"DBNET_TEST={tmp_path}"), "no process is left")

    mpirun(3, HERE / "signaled.py", tmp_path, options=["-disable-auto-cleanup", ROOT / "jobs" / "survive"], meanwhile=kill,
           timeout=100, DBNET_TEST=str(tmp_path))  # fmt: skip
