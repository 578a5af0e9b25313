"""What a replay has come to: what was compared, or what differed first."""

from __future__ import annotations


class Difference(Exception):
    """The first thing that is not as it was recorded."""


class Ended(Exception):
    """The record of this replica ends here: it was killed, or recording ended."""


class Compared:
    """What a replay has compared so far.

    Attributes
    ----------
    exact
        Whether bits are compared, and not only counted.
    updates, evaluations, checkpoints
        How many there were, of a batch method iterations in place of updates; a checkpoint counts when all of its parts do.
    scores
        Of each evaluation who made it, and its numbers as recorded and now.
    """

    def __init__(self, exact: bool, shards: int, unit: str = "update") -> None:
        self.exact, self._shards, self._unit = exact, shards, unit
        self.updates = 0
        self.scores: list[tuple[str, list[float], list[float]]] = []
        self._parts: dict[str, int] = {}

    def part(self, checkpoint: str) -> None:
        """Count one shard's part of a checkpoint."""
        name = checkpoint.split(".")[0]
        self._parts[name] = self._parts.get(name, 0) + 1

    @property
    def evaluations(self) -> int:
        return len(self.scores)

    @property
    def checkpoints(self) -> int:
        return sum(count == self._shards for count in self._parts.values())

    def words(self) -> str:
        counts = ((self.updates, self._unit), (self.evaluations, "evaluation"), (self.checkpoints, "checkpoint"))
        return ", ".join(f"{n:,} {name}{'s' if n != 1 else ''}" for n, name in counts)
