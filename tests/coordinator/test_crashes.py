"""A crash is told from a kill: by the wrapper of a rank, and in what the coordinator makes of its record; without MPI."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dbnet.comm.topology import Topology
from dbnet.coordinator.crashes import Crashes

SURVIVE = Path(__file__).resolve().parents[2] / "jobs" / "survive"
WORLD = Topology(shards=1, replicas=2)


def survive(program: str, rank: int, folder: Path | None) -> tuple[int, str]:
    """Return the exit code of a program as a rank under the wrapper, and what dbnet said; the shell itself names the dead, too."""
    env = {**os.environ, "PMI_RANK": f"{rank}", "DBNET_CRASHES": str(folder or "")}
    done = subprocess.run([SURVIVE, "sh", "-c", program], env=env, cwd=folder, capture_output=True, text=True, timeout=20)
    lines = (done.stdout + done.stderr).splitlines(keepends=True)
    return done.returncode, "".join(line for line in lines if line.startswith("dbnet:"))


@pytest.mark.parametrize(
    ("number", "name"),
    [(4, "illegal instruction"), (6, "abort"), (7, "bus error"), (8, "floating-point exception"), (11, "segmentation fault")],
)
def test_a_crash_is_told_of_and_written_down(number: int, name: str, tmp_path: Path) -> None:
    code, said = survive(f"ulimit -c 0; kill -{number} $$", 2, tmp_path)
    assert code == 128 + number and said == f"dbnet: rank 2's process died of signal {number} ({name}).\n"
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    crashes = Crashes(tmp_path, WORLD)
    assert crashes.signals() == {2: f"signal {number}, {name}"} and crashes.repeated() == ""
    assert crashes.summary() == f"Replica 0 crashed (signal {number}, {name}): that is a defect, not a kill; exit code 1."


@pytest.mark.parametrize(("program", "code"), [("exit 0", 0), ("exit 85", 85), ("kill -TERM $$", 143), ("kill -KILL $$", 137)])
def test_a_kill_is_no_crash(program: str, code: int, tmp_path: Path) -> None:
    assert survive(program, 1, tmp_path) == (code, "")
    assert not list(tmp_path.iterdir()) and Crashes(tmp_path, WORLD).summary() == ""


def test_without_a_folder_a_crash_is_only_told_of(tmp_path: Path) -> None:
    assert survive("ulimit -c 0; kill -ABRT $$", 3, None) == (134, "dbnet: rank 3's process died of signal 6 (abort).\n")
    code, said = survive("ulimit -c 0; rmdir $DBNET_CRASHES; kill -ABRT $$", 3, tmp_path)
    assert code == 134 and "could not be written down" in said
    assert Crashes(None, WORLD).signals() == {} == Crashes(tmp_path, WORLD).signals()


def test_two_of_one_signal_are_no_single_case(tmp_path: Path) -> None:
    crashes = Crashes(tmp_path, WORLD)
    survive("ulimit -c 0; kill -ABRT $$", 1, tmp_path)
    survive("ulimit -c 0; kill -SEGV $$", 2, tmp_path)
    assert crashes.repeated() == ""
    survive("ulimit -c 0; kill -SEGV $$", 3, tmp_path)
    assert crashes.repeated() == "signal 11, segmentation fault" and list(crashes.signals()) == [1, 2, 3]
