"""Where a recorded schedule lies: a folder beside the run file, and in it a part for each rank, and its tail."""

from __future__ import annotations

from pathlib import Path

from dbnet.comm.topology import Role, Topology
from dbnet.core.config import Config


def schedule_of(config: Config) -> Path:
    """Return the path of the folder of a run's recorded schedule."""
    return config.output(".schedule")


def part_of_schedule(config: Config, world: Topology, rank: int) -> Path:
    """Return the path of a rank's part."""
    if world.role(rank) is Role.COORDINATE:
        return schedule_of(config) / "coordinator"
    if world.role(rank) is Role.SERVE:
        return schedule_of(config) / f"shard-{world.shard_of(rank)}"
    replica, partition = world.place(rank)
    return schedule_of(config) / f"replica-{replica}.{partition}"


def tail_of(path: Path) -> Path:
    """Return the path of what a part's rank has added since its last block."""
    return path.with_name(f"{path.name}.tail")
