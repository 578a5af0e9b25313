"""A batch script of Slurm for a run file and the shape of a cluster: resources in the script, science in the run file.

Ranks fill the nodes in their order, as many on each as its cores or an even spread allow. A node's memory is what the plan says of
the ranks that are together there, and what compiling the kernels takes besides, which one of them does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import dbnet
from dbnet.commands.plan import ranks
from dbnet.core.errors import UserError
from dbnet.run.setup import Setup

COMPILING = 100 << 20
_WARNING = 120


class Shape(NamedTuple):
    """What a job asks for; memory per node in MiB."""

    nodes: int
    tasks: int
    tasks_per_node: int
    cpus_per_task: int
    memory: int


def shape(ready: Setup, nodes: int | None = None, cores: int | None = None) -> Shape:
    """Spread the run's ranks over `nodes` nodes with `cores` cores each; without `nodes` over as few as have a core for each rank.

    Raises
    ------
    UserError
        They do not fit.
    """
    world = ready.topology
    if (nodes is not None and nodes < 1) or (cores is not None and cores < 1):
        raise UserError("--nodes and --cores are numbers of at least 1.")
    fewest = 1 if cores is None else -(-world.size // cores)
    nodes = nodes or fewest
    each = -(-world.size // nodes)
    if nodes < fewest:
        raise UserError(
            f"{world.words()} are {world.size} ranks, {each} on each of {nodes} node(s), which have {cores} cores: "
            f"give --nodes {fewest}, or fewer replicas or partitions."
        )
    used = -(-world.size // each)
    if used < nodes:
        raise UserError(f"{world.size} ranks, {each} on a node, leave some of {nodes} nodes empty: give --nodes {used}.")
    needs = [rank.memory for rank in ranks(ready)]
    memory = COMPILING + max(sum(needs[first : first + each]) for first in range(0, world.size, each))
    return Shape(nodes, world.size, each, 1 if cores is None else cores // each, -(-memory // (1 << 20)))


def minutes(time: str) -> int:
    """Return a time limit in minutes; UserError where it is no HH:MM:SS."""
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", time)
    total = int(match[1]) * 60 + int(match[2]) if match else 0
    if total < 1:
        raise UserError(f"--time {time} is no time limit; write HH:MM:SS, at least 00:01:00.")
    return total


def script(
    ready: Setup, run_file: str, overrides: Sequence[str] = (), *, nodes: int | None = None, cores: int | None = None,
    time: str = "01:00:00",
) -> str:  # fmt: skip
    """Return the batch script."""
    limit, job = minutes(time), shape(ready, nodes, cores)
    launch = Path(dbnet.__file__).resolve().parents[1] / "jobs" / "launch"
    if not launch.exists():
        raise UserError(f"There is no {launch}, which batch scripts start; use dbnet from its source folder (jobs/install).")
    # Early enough for a checkpoint; Slurm looks at time limits every half a minute.
    warning = min(_WARNING, 30 * limit)
    words = " ".join(shlex.quote(word) for word in [run_file, *overrides])
    return f"""#!/usr/bin/env bash
# {ready.topology.words()}; memory as 'dbnet plan {run_file}' says.
#SBATCH --job-name={shlex.quote(ready.config.run.name)}
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks={job.tasks}
#SBATCH --ntasks-per-node={job.tasks_per_node}
#SBATCH --cpus-per-task={job.cpus_per_task}
#SBATCH --mem={job.memory}M
#SBATCH --time={time}
#SBATCH --signal=B:USR1@{warning}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
exec {shlex.quote(str(launch))} --requeue {words} --resume auto
"""
