"""The batch scripts, submitted to a real Slurm: time limits, cancellation, sweeps, and the scripts that `dbnet plan` writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cluster import Cluster

from dbnet.monitor.results import Run

ROOT = Path(__file__).resolve().parents[3]
# It ends by time alone.
BATCH = "{kind='sandblaster', descent={gradient_norm=0, loss_change=0}}"


def submit(cluster: Cluster, folder: Path, *words: object) -> str:
    """Submit a job from a folder of its own; return its number."""
    done = subprocess.run(
        ["sbatch", "--parsable", *map(str, words)], cwd=folder, env=cluster.env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def said(folder: Path) -> str:
    """Return what the jobs of a folder have printed."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))


def training(cluster: Cluster, folder: Path) -> None:
    """Wait until a run in the folder trains: its marker says so."""

    def begun() -> bool:
        return any(path.read_text().startswith("running") for path in folder.glob(".dbnet-*"))

    cluster.wait(begun, "training begins", 90, lambda: said(folder))


def ended(cluster: Cluster, job: str, folder: Path, state: str = "COMPLETED") -> None:
    """Wait for a job's end, and check that it is this one."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
    cluster.wait(lambda: cluster.field(job, "JobState") in over, f"the end of job {job}", 120, lambda: said(folder))
    assert cluster.field(job, "JobState") == state, said(folder)


@pytest.fixture
def folders(folder: Path) -> Sequence[Path]:
    """Return two folders with a configuration."""
    out = []
    for name in ("downpour", "sandblaster"):
        (folder / name).mkdir()
        (folder / name / "run.toml").write_text((folder / "run.toml").read_text())
        out.append(folder / name)
    return out


def test_a_time_limit_requeues_the_job_and_the_run_goes_on(cluster: Cluster, folders: Sequence[Path]) -> None:
    """Two jobs at once, over two nodes each; `scancel` sends what a time limit would send, which Slurm checks every 30 s."""
    jobs = []
    for place in folders:
        method = "method={kind='downpour'}" if place.name == "downpour" else f"method={BATCH}"
        job = submit(cluster, place, ROOT / "jobs" / f"{place.name}.sbatch", "run.toml", method)
        training(cluster, place)
        cluster.ask("scancel", "--signal=USR1", "--batch", job)
        jobs.append(job)
    for job, place in zip(jobs, folders, strict=True):
        ended(cluster, job, place)
        assert cluster.field(job, "Restarts") == "1" and cluster.field(job, "NumNodes") == "2"
        words = said(place)
        assert "Stopped by a signal; checkpoint out/run.checkpoint.h5" in words
        assert f"job {job}: back into the queue" in words and words.rstrip().endswith(f"job {job}: finished.")
        first, second = Run(place / "out" / "run.h5"), Run(place / "out" / "run-2.h5")
        assert first.stopped and second.finished
        assert second.about["resumed_from"] == "out/run.checkpoints/000001.h5"
    downpour, sandblaster = (Run(place / "out" / "run-2.h5") for place in folders)
    assert downpour.progress.seconds.iloc[-1] >= 3.5
    before = Run(folders[1] / "out" / "run.h5").iterations.iteration
    assert sandblaster.iterations.iteration.iloc[0] == (before.iloc[-1] if len(before) else 0) + 1


def test_a_canceled_job_ends_with_a_checkpoint_and_stays_away(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, ROOT / "jobs" / "downpour.sbatch", "run.toml", "stop.seconds=1000")
    training(cluster, folder)
    cluster.ask("scancel", job)
    ended(cluster, job, folder, "CANCELLED")
    assert (folder / "out" / "run.checkpoint.h5").exists() and Run(folder / "out" / "run.h5").stopped
    cluster.wait(lambda: not cluster.left(), "no process is left", 20, lambda: str(cluster.left()))
    assert cluster.field(job, "JobState") == "CANCELLED" and cluster.field(job, "Restarts") == "0"


def test_a_sweep(cluster: Cluster, folder: Path) -> None:
    """Tasks 0 and 5 of the array: two and four replicas, another rate; the smaller run leaves tasks of its job idle."""
    grid = ["run.toml", "rule.rate=0.03,0.1,0.3", "topology.replicas=2,4", "topology.shards=2", "stop.seconds=1"]
    words = [sys.executable, "-m", "dbnet", "sweep", *grid, "--slurm", "--cores", "8"]
    (folder / "sweep.sbatch").write_text(subprocess.check_output(words, cwd=folder, env=cluster.env, text=True, timeout=60))
    job = submit(cluster, folder, "--array=0,5", "sweep.sbatch")
    for task in (0, 5):
        ended(cluster, f"{job}_{task}", folder)
    runs = [Run(folder / "out" / f"run_rate-{rate}_replicas-{replicas}.h5").config for rate, replicas in ((0.03, 2), (0.3, 4))]
    assert [(c.rule.rate, c.topology.replicas) for c in runs] == [(0.03, 2), (0.3, 4)]
    assert "2 of the job's 7 tasks stay idle" in said(folder)
    # The script for any grid knows what the one for this grid has done.
    again = submit(cluster, folder, "--array=5", ROOT / "jobs" / "array.sbatch", *grid)
    ended(cluster, f"{again}_5", folder)
    assert "run 5 of the grid is done already" in said(folder) and not (folder / "out" / "run_rate-0.3_replicas-4-2.h5").exists()


def test_planned_scripts_are_accepted_and_run(cluster: Cluster, folder: Path) -> None:
    words = [
        "plan",
        "run.toml",
        "topology.replicas=3",
        "stop.seconds=1",
        "--slurm",
        "--nodes",
        "2",
        "--cores",
        "8",
        "--time",
        "00:05:00",
    ]
    script = subprocess.check_output([sys.executable, "-m", "dbnet", *words], cwd=folder, env=cluster.env, text=True, timeout=60)
    (folder / "run.sbatch").write_text(script)
    submit(cluster, folder, "--test-only", "run.sbatch")
    job = submit(cluster, folder, "run.sbatch")
    ended(cluster, job, folder)
    assert Run(folder / "out" / "run.h5").finished and f"job {job}: finished." in said(folder)


def test_too_few_tasks_are_said(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, ROOT / "jobs" / "downpour.sbatch", "run.toml", "topology.replicas=9")
    ended(cluster, job, folder, "FAILED")
    assert "the run needs 12 ranks, but the job has 5 tasks" in said(folder)
    assert cluster.field(job, "ExitCode") == "2:0"
