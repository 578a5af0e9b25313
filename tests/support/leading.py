"""A coordinator with all of its duties and stand-ins for what they write to: it is told who is lost, and writes no checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dbnet.comm.channel import Channel, Shards
from dbnet.comm.topology import Topology
from dbnet.comm.window import Window
from dbnet.coordinator.coordinator import Coordinator, Duties, Ending
from dbnet.coordinator.duty import Duty, Facts, RunTime
from dbnet.coordinator.evaluation import Evaluation
from dbnet.coordinator.guard import Guard
from dbnet.coordinator.membership import Membership
from dbnet.coordinator.orders import OrderBook
from dbnet.coordinator.progress import Progress
from dbnet.core.config import Config
from dbnet.network.parameters.layout import FlatLayout


def _nothing(*_: object) -> None:
    return None


class Unwritten(Duty):
    """Stands for checkpoints, on both sides: none is due and none is written, unless a test says otherwise."""

    writing = busy = False

    def due(self, steps: int) -> bool:
        return False

    def begin(self, tables: dict[str, np.ndarray], state: dict[str, Any], seconds: float, steps: int) -> None:
        raise AssertionError("nobody asked for a checkpoint")

    def act(self, status: object) -> bool:
        return self.advance()

    def advance(self) -> bool:
        return False


class Losses:
    """Stands for the watch over signs of life: who is lost is what a test says."""

    bound, asked, heard, period = 1.0, False, 0.0, 0.0

    def __init__(self, topology: Topology) -> None:
        self._topology, self._lost, self._left = topology, list[int](), set[int]()

    def lose(self, replica: int) -> None:
        """Have a replica give no sign of life for too long: at the coordinator's next look it is lost."""
        self._lost += self._topology.replica_ranks(replica)

    def leave(self, rank: int) -> None:
        """Have a rank say that it needs nobody any more."""
        self._left.add(rank)

    def left(self, rank: int) -> bool:
        return rank in self._left

    def tell(self) -> None:
        return None

    def look(self) -> list[int]:
        lost, self._lost = self._lost, []
        return lost


class Led:
    """A coordinator of `kind` over a window, and what stands beside it.

    Attributes
    ----------
    coordinator
        It itself.
    checkpoints, losses, record, display
        What a test may set, say and hear.
    """

    def __init__(
        self, kind: type[Coordinator], config: Config, examples: int, window: Window, topology: Topology, channel: Channel,
        clock: Callable[[], float], layout: FlatLayout,
    ) -> None:  # fmt: skip
        self.checkpoints, self.losses = Unwritten(), Losses(topology)
        names = ("events", "refused", "progress", "evaluation", "lost", "iteration")
        self.record: Any = SimpleNamespace(trouble="", path=Path("run.h5"), mean_staleness=0.0, **dict.fromkeys(names, _nothing))
        shown = ("begin", "say", "warn", "report", "row", "iteration")
        self.display: Any = SimpleNamespace(**dict.fromkeys(shown, _nothing))
        time, book = RunTime(clock), OrderBook(window, topology)
        facts = Facts(config, examples, [[]] * topology.replicas, {}, np.zeros(topology.copies))
        watch: Any = self.losses
        members = Membership(
            book, channel, watch, lambda status, r: kind.made(status, facts, r), time, self.display.say, self.record.lost
        )
        evaluation = Evaluation(facts, book, members, self.record, time)
        guard = Guard(config, layout, self.record, self.display, time, kind.by_pass)
        progress = Progress(facts, self.record, self.display, evaluation, time, kind.rows)
        duties = Duties(self.checkpoints, members, guard, evaluation, progress)  # type: ignore[arg-type]
        ending = Ending(config, lambda: False, duties, time)
        self.coordinator: Any = kind(facts, book, Shards(channel, topology), duties, ending, time)
