"""Ranks that are killed while a run starts, or when it has ended, at places that the test names."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from faults import COUNTS, Hurt, prepare, until
from started import processes, programs

from dbnet.monitor.results import Run

pytestmark = pytest.mark.long
HERE = Path(__file__).resolve().parent
DEADLINES = {"before MPI is up": 5.0, "compiling": 10.0, "having ended": 10.0}
MPICH = any(one.metadata["Name"] == "mpich" for one in importlib.metadata.distributions())


def dying(folder: Path, digits: Path, rank: int, place: str) -> Hurt:
    """Run with a rank that kills itself, to the end; nothing may be left."""
    prepare(folder, digits, bound=4)
    command = programs(folder / "bin") / "dbnet"
    command.write_text(f"#!/bin/sh\nexec {sys.executable} {HERE / 'dying.py'} {rank} '{place}' \"$@\"\n")
    job = Hurt(folder, "topology={shards=1, replicas=2}", f"run.deadline={DEADLINES[place]}", "stop.epochs=2")
    try:
        job.out, job.err = job.job.communicate(timeout=150)
    finally:
        left = processes(job.mark, besides=("sleep",))
        job.end()
    assert not left
    COUNTS[f"ranks killed {place}"] += 1
    return job


@pytest.mark.parametrize(
    ("rank", "place", "who"),
    [
        (2, "before MPI is up", "the ranks did not come together within"),
        (3, "compiling", "replica 1 gave no sign of life"),
        (0, "compiling", "the coordinator is lost"),
    ],
)
def test_a_rank_killed_while_the_run_starts_ends_it(rank: int, place: str, who: str, tmp_path: Path, digits: Path) -> None:
    job = dying(tmp_path, digits, rank, place)
    assert job.code == 1 and "Traceback" not in job.err, job.err
    # Open MPI itself may notice first, and does not say who; on a loaded machine it is slow to end those that speak next.
    assert job.err.count(who) == 1 or (not MPICH and "another rank is lost" in job.err), job.err
    assert not list(tmp_path.glob("out/*.checkpoint*"))


def test_a_rank_killed_when_all_is_done_costs_nothing(tmp_path: Path, digits: Path) -> None:
    job = dying(tmp_path, digits, 3, "having ended").good()
    assert not [line for line in job.err.splitlines() if line.startswith("dbnet:")], job.err
    assert "Test accuracy" in job.out and Run(tmp_path / "out" / "run.h5").finished


def test_a_job_that_is_stopped_and_continued_as_a_whole_goes_on(tmp_path: Path, digits: Path) -> None:
    """Twice, each longer than the deadline, with transfers, cuts and pushes under way; a replica is asked to end it."""
    prepare(tmp_path, digits, bound=1.5)
    shape = "topology={shards=1, replicas=2, partitions=2}"
    job = Hurt(tmp_path, shape, "run.deadline=4", "stop.epochs=1000000", "method.overlap=true").training()
    pids = [job.pid(rank) for rank in range(1 + 1 + 4)]
    # The shard is stopped first and continued last: whoever pushes waits for it before and after, and is seen to wait on.
    shards, others = pids[1:2], [pids[0], *pids[2:]]
    for _ in range(2):
        seen = progress(tmp_path)
        for group, number, seconds in (
            (shards, signal.SIGSTOP, 0.3),
            (others, signal.SIGSTOP, 5.5),
            (others, signal.SIGCONT, 0.3),
            (shards, signal.SIGCONT, 0.0),
        ):
            for pid in group:
                os.kill(pid, number)
            # Time that passes is what is tested, not what is waited for.
            time.sleep(seconds)
        until(lambda seen=seen: job.job.poll() is not None or progress(tmp_path) > seen + 2, "it trains again", 60)
    job.hurt(2, signal.SIGTERM)
    COUNTS["jobs stopped and continued as a whole"] += 1
    job.end()
    assert job.code == 85 and Run(tmp_path / "out" / "run.h5").stopped, job.err
    assert not len(Run(tmp_path / "out" / "run.h5").lost)


def progress(folder: Path) -> int:
    return len(Run(folder / "out" / "run.h5").progress)
