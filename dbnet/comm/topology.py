"""Who is what: world = 1 coordinator + S shards + (R + spares) x P partitions, in this order of ranks.

The numbering is arithmetic, the same on every rank and without MPI; `communicators` splits by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, split


class Role(StrEnum):
    """What a rank does."""

    COORDINATE = "coordinate"
    SERVE = "serve"
    WORK = "work"


@dataclass(frozen=True)
class Topology:
    """The shape of a world.

    Attributes
    ----------
    shards, replicas, partitions
        S, R and P.
    spares
        Replicas that wait until another one is lost; they are numbered after the others.
    """

    shards: int
    replicas: int
    partitions: int = 1
    spares: int = 0

    @classmethod
    def of(cls, shape: Any) -> Topology:
        """Return the world that a configuration's table asks for."""
        return cls(shape.shards, shape.replicas, shape.partitions, shape.spares)

    @property
    def copies(self) -> int:
        """Number of replicas, spare ones included."""
        return self.replicas + self.spares

    @property
    def size(self) -> int:
        return 1 + self.shards + self.origins

    @property
    def origins(self) -> int:
        """Number of ranks that fetch and push."""
        return self.copies * self.partitions

    def role(self, rank: int) -> Role:
        return Role.COORDINATE if rank == 0 else Role.SERVE if rank <= self.shards else Role.WORK

    def shard_rank(self, shard: int) -> int:
        return 1 + shard

    def shard_of(self, rank: int) -> int:
        return rank - 1

    def origin_rank(self, replica: int, partition: int) -> int:
        return 1 + self.shards + replica * self.partitions + partition

    def replica_ranks(self, replica: int) -> range:
        """Return the ranks of all partitions of a replica."""
        first = self.origin_rank(replica, 0)
        return range(first, first + self.partitions)

    def place(self, rank: int) -> tuple[int, int]:
        """Return (replica, partition) of a working rank."""
        return divmod(rank - 1 - self.shards, self.partitions)

    def name(self, rank: int) -> str:
        """Return a rank's name for messages, like 'replica 1' or 'shard 0'."""
        if self.role(rank) is Role.COORDINATE:
            return "the coordinator"
        if self.role(rank) is Role.SERVE:
            return f"shard {rank - 1}"
        replica, partition = self.place(rank)
        return f"replica {replica}" + (f" partition {partition}" if self.partitions > 1 else "")

    def shard_ranges(self, parameters: int) -> list[Range]:
        """Return each shard's range of the flat vector."""
        return split(parameters, self.shards)

    def check(self, size: int, launch: str) -> None:
        """Raise UserError where a world of `size` ranks does not fit; `launch` is the command after mpirun -n N."""
        if size != self.size:
            raise UserError(f"{self.wanted()}, but {size} were started. Start it with: mpirun -n {self.size} {launch}")

    def wanted(self) -> str:
        """Say how many ranks the configuration asks for."""
        copies = f"({self.replicas} replicas + {self.spares} spare)" if self.spares else f"{self.replicas} replicas"
        parts = f"1 coordinator + {self.shards} shards + {copies} x {self.partitions} partitions"
        return f"The configuration asks for {parts} = {self.size} ranks"

    def words(self) -> str:
        """Say who takes part."""
        return f"1 coordinator, {self.workers()}"

    def workers(self) -> str:
        """Say who takes part besides the coordinator."""

        def some(n: int, name: str) -> str:
            return f"{n} {name}{'s' if n != 1 else ''}"

        cut = f" of {some(self.partitions, 'partition')}" if self.partitions > 1 else ""
        spare = f", {some(self.spares, 'spare replica')}" if self.spares else ""
        return f"{some(self.shards, 'shard')}, {some(self.replicas, 'replica')}{cut}{spare}"
