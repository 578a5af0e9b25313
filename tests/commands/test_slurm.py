"""The batch scripts that `dbnet plan --slurm` writes, without Slurm."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dbnet.commands.plan.ranks import ranks
from dbnet.core import config
from dbnet.run.setup import setup

ROOT = Path(__file__).resolve().parents[2]


def options(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.M))


def test_ranks_are_spread_over_the_nodes(run_file: Path, dbnet: Callable) -> None:
    said = dbnet("plan", run_file, "topology.replicas=7", "--slurm", "--nodes", 2, "--cores", 16, "--time", "00:02:00")
    asked = options(said.out)
    assert said.code == 0 and said.err == "" and not Path("out").exists()
    assert [asked[name] for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "time")] == [
        "2",
        "10",
        "5",
        "3",
        "00:02:00",
    ]
    assert asked["signal"] == "B:USR1@60" and "requeue" in asked
    assert f"exec {ROOT}/jobs/launch --requeue {run_file} topology.replicas=7 --resume auto" in said.out
    # What the plan says of the fuller node's ranks, in bytes, and what compiling takes.
    ready = setup(config.load(run_file, ["topology.replicas=7"]))
    planned = [rank.memory for rank in ranks(ready)]
    assert int(asked["mem"].removesuffix("M")) == -(-(max(sum(planned[:5]), sum(planned[5:])) + (100 << 20)) // (1 << 20))
    assert subprocess.run(["bash", "-n"], input=said.out, text=True, timeout=20).returncode == 0


def test_as_few_nodes_as_have_the_cores(run_file: Path, dbnet: Callable) -> None:
    assert options(dbnet("plan", run_file, "--slurm", "--cores", 2).out)["nodes"] == "3"
    assert options(dbnet("plan", run_file, "--slurm").out)["nodes"] == "1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", 2, "--cores", 2], "give --nodes 3"),
        (["--nodes", 4], "leave some of 4 nodes empty: give --nodes 3"),
        (["--nodes", 9], "give --nodes 5"),
        (["--nodes", 0], "at least 1"),
        (["--time", "90"], "write HH:MM:SS"),
        (["--time", "00:00:10"], "at least 00:01:00"),
    ],
)
def test_what_does_not_fit_is_refused(words: list, said: str, run_file: Path, dbnet: Callable) -> None:
    done = dbnet("plan", run_file, "--slurm", *words)
    assert done.code == 2 and done.out == "" and said in done.err and done.err.count("\n") == 1


def test_words_for_the_shell_are_quoted(run_file: Path, dbnet: Callable) -> None:
    assert "'run.name=two words'" in dbnet("plan", run_file, "run.name=two words", "--slurm").out
