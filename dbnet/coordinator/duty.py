"""What a duty of the coordinator is, the facts of a run that its duties share, and the time by which they act.

A new one is a file in this room, a field of `coordinator.Duties` (whose order is that of a round), and made in
`run.roles.coordinator`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dbnet.coordinator.orders import Status
from dbnet.core.config import Config
from dbnet.data.subsets import Share
from dbnet.network.replica import Score


class Facts(NamedTuple):
    """What is known when a run begins.

    Attributes
    ----------
    config, examples
        The run, and the size of its training set.
    subsets
        What each replica trains on at first.
    state
        What a method has stored in the checkpoint that the run goes on from.
    steps
        Steps that each replica, spare ones included, had made by then.
    beside
        Steps made by then that are nobody's: replicas of another number have the mean steps of the old ones, which do not add up.
    errors
        What the loss says besides of a score, by name in the order of the run file's columns.
    """

    config: Config
    examples: int
    subsets: Sequence[Sequence[Share]]
    state: dict[str, Any]
    steps: np.ndarray
    beside: int = 0
    errors: Callable[[Score], Mapping[str, float]] = lambda score: {}


class RunTime:
    """The time of a run.

    Parameters
    ----------
    clock
        Seconds since it began.
    due
        By what recurring work falls due: the clock, or within one process a count of turns.
    before
        Seconds of the runs that it goes on from.
    """

    def __init__(self, clock: Callable[[], float], due: Callable[[], float] | None = None, before: float = 0.0) -> None:
        self.clock, self.due, self._before = clock, due or clock, before
        self._ended: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a checkpoint included."""
        return self._before + (self.clock() if self._ended is None else self._ended)

    def stop(self) -> None:
        """Training has ended: what is saved and evaluated from here on belongs to this moment."""
        self._ended = self.clock() if self._ended is None else self._ended


class Duty:
    """What the coordinator sees to in every run: it takes some of the shards' messages and acts once a round."""

    def messages(self) -> dict[str, Callable[[int, Any], None]]:
        """Return by kind what takes the messages of shards: (shard, content)."""
        return {}

    def act(self, status: Status) -> bool:
        """Do what is due; return whether shards or disk were heard of."""
        return False

    def close(self) -> None:
        """End it with the run."""
