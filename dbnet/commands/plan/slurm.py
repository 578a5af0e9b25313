"""A batch script of Slurm for a configuration and the shape of a cluster: resources in the script, science in the configuration.

Ranks fill the nodes in their order, as many on each as its cores or an even spread allow. A node's memory is what the plan says of
the ranks that are together there, and what compiling the kernels takes besides, which one of them does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dbnet.comm.topology import Topology
from dbnet.core.config import Config
from dbnet.core.errors import UserError

COMPILING = 100 << 20
_WARNING = 120


class JobShape(NamedTuple):
    """What a job asks for; memory per node in MiB."""

    nodes: int
    tasks: int
    tasks_per_node: int
    cpus_per_task: int
    memory: int


def shape(world: Topology, needs: Sequence[int], nodes: int | None = None, cores: int | None = None) -> JobShape:
    """Spread the run's ranks over `nodes` nodes with `cores` cores each; without `nodes` over as few as have a core for each rank.

    Parameters
    ----------
    needs
        Memory of each rank, in bytes.

    Raises
    ------
    UserError
        They do not fit.
    """
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
    memory = COMPILING + max(sum(needs[first : first + each]) for first in range(0, world.size, each))
    return JobShape(nodes, world.size, each, 1 if cores is None else cores // each, -(-memory // (1 << 20)))


def minutes(time: str) -> int:
    """Return a time limit in minutes; UserError where it is no HH:MM:SS."""
    match = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", time)
    total = int(match[1]) * 60 + int(match[2]) if match else 0
    if total < 1:
        raise UserError(f"--time {time} is no time limit; write HH:MM:SS, at least 00:01:00.")
    return total


def script(
    config: Config, needs: Sequence[int], words: Sequence[str], *, nodes: int | None = None, cores: int | None = None,
    time: str = "01:00:00",
) -> str:  # fmt: skip
    """Return the batch script for the configuration and its changes in `words`, whose ranks need so much memory each, in bytes."""
    world = Topology.of(config.topology)
    about = f"{world.words()}; memory as 'dbnet plan {words[0]}' says."
    start = f"--requeue {shlex.join(words)} --resume auto"
    return _written(config.run.name, about, shape(world, needs, nodes, cores), time, "%x-%j.out", start)


def array(
    name: str, needs: Sequence[tuple[Topology, Sequence[int]]], words: Sequence[str], *, nodes: int | None = None,
    cores: int | None = None, time: str = "01:00:00",
) -> str:  # fmt: skip
    """Return the batch script of an array over the grid that `words` say: a task for each run, with what the largest run needs.

    Parameters
    ----------
    needs
        Of each run its world, and the memory of its ranks in bytes.
    """
    shapes = [shape(world, memory, nodes, cores) for world, memory in needs]
    largest = JobShape(*(max(numbers) for numbers in zip(*shapes, strict=True)))
    about = f"{len(needs)} runs of a grid, a task each: 'dbnet sweep {words[0]} ... --list' shows them."
    start = f'--requeue --point "$SLURM_ARRAY_TASK_ID" {shlex.join(words)}'
    return _written(name, about, largest, time, "%x-%A-%a.out", start, f"#SBATCH --array=0-{len(needs) - 1}\n")


def _written(name: str, about: str, job: JobShape, time: str, output: str, start: str, more: str = "") -> str:
    limit, launch = minutes(time), Path(__file__).resolve().parents[3] / "jobs" / "launch"
    if not launch.exists():
        raise UserError(f"There is no {launch}, which batch scripts start; use dbnet from its source folder (jobs/install).")
    # Early enough for a checkpoint; Slurm looks at time limits every half a minute.
    warning = min(_WARNING, 30 * limit)
    return f"""#!/usr/bin/env bash
# {about}
#SBATCH --job-name={shlex.quote(name)}
{more}#SBATCH --nodes={job.nodes}
#SBATCH --ntasks={job.tasks}
#SBATCH --ntasks-per-node={job.tasks_per_node}
#SBATCH --cpus-per-task={job.cpus_per_task}
#SBATCH --mem={job.memory}M
#SBATCH --time={time}
#SBATCH --signal=B:USR1@{warning}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}
exec {shlex.quote(str(launch))} {start}
"""
