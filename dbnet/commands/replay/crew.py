"""The one replica of a batch method's replay: what it computes depends on the parameters and the portions, whoever did it then.

Its partitions take turns, each with its part of the network; all of them do one job after another together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dbnet.comm.link import LocalLink, Wires
from dbnet.comm.turns import IDLE, Turns
from dbnet.core.ranges import Range
from dbnet.data.portions import Portion
from dbnet.network.model import footprint
from dbnet.network.replica import Score
from dbnet.run import roles
from dbnet.run.setup import Setup
from dbnet.shards.routes import routes


class Crew:
    """All partitions of a replica.

    Parameters
    ----------
    ready, flat
        The run; all parameters [parameters], which change between the jobs.
    """

    def __init__(self, ready: Setup, flat: np.ndarray) -> None:
        self._flat, size = flat, ready.topology.partitions
        wires = Wires(size)
        links = [LocalLink(wires, partition) if size > 1 else None for partition in range(size)]
        self._replicas = [roles.load_replica(ready, 0, partition, link) for partition, link in enumerate(links)]
        self._w = [np.zeros(replica.size, flat.dtype) for replica in self._replicas]
        used = [footprint(ready.model, ready.cut.boxes[p], leads=p == 0).used for p in range(size)]
        ways = [routes(pieces, [Range(0, flat.size)]) for pieces in used]
        self._moves = [[move for route in mine for move in route.moves(0, route.size)] for mine in ways]
        self._job: Callable[[int], Any] = int
        self._number, self._done, self._found = 0, [0] * size, [None] * size
        self._over = False

    def hands(self) -> list[Turns]:
        """Return the turns of each partition."""
        return [self._hand(partition) for partition in range(len(self._replicas))]

    def _hand(self, partition: int) -> Turns:
        while not self._over:
            if self._done[partition] < self._number:
                self._found[partition] = self._job(partition)
                self._done[partition] = self._number
            yield IDLE

    def leave(self) -> None:
        """No more jobs will come."""
        self._over = True
        for replica in self._replicas:
            replica.train.close()

    def fetch(self) -> None:
        """Take over the parameters as they are now."""
        for w, moves in zip(self._w, self._moves, strict=True):
            for place, target, n in moves:
                w[place : place + n] = self._flat[target : target + n]

    def bundle(self, portions: Sequence[Portion]) -> Turns[tuple[float, list[np.ndarray]]]:
        """Return the summed loss of some portions, and of each partition the sum of its gradients [its parameters]."""

        def job(partition: int) -> tuple[float, np.ndarray]:
            replica, w, loss, fresh = self._replicas[partition], self._w[partition], 0.0, True
            g = np.zeros_like(w)
            for portion in portions:
                replica.train.open(portion)
                while (found := replica.accrue_share(w, g, fresh))[0]:
                    loss, fresh = loss + found[1], False
            return loss, g

        found = yield from self._together(job)
        return found[0][0], [g for _, g in found]

    def evaluate(self) -> Turns[Score]:
        """Return the numbers of an evaluation of the parameters that were fetched."""
        return (yield from self._together(lambda partition: self._replicas[partition].evaluate(self._w[partition])))[0]

    def _together(self, job: Callable[[int], Any]) -> Turns[list[Any]]:
        self._job, self._number = job, self._number + 1
        while min(self._done) < self._number:
            yield IDLE
        return list(self._found)
