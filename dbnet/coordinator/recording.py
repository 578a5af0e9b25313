"""Orders of a run whose schedule is recorded: what a replica has been told, and at which of its looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbnet.coordinator.orders import Orders
from dbnet.data.subsets import Share
from dbnet.network.replica import Score
from dbnet.shards.schedule.log import EVALUATED, ORDER, SHARE, PartLog


class RecordingOrders(Orders):
    """A replica's half, which writes down what it has seen; of a cut replica partition 0 writes for all, but for shares.

    It stands before anything comes of it: another partition's push may be applied though this one is killed.
    """

    def __init__(self, log: PartLog, *parts: Any) -> None:
        super().__init__(*parts)
        self._log, self._looks = log, 0
        self._known = self._order.tobytes()

    def poll(self, now: bool = False, fill: Callable[[], None] = lambda: None) -> None:
        super().poll(now, fill)
        self._looks += 1
        # After every step, and mostly for nothing: as bytes it takes a tenth of the time.
        if self.leads and (order := self._order.tobytes()) != self._known:
            self._known = order
            self._log.add(ORDER, np.array([self._looks, *self._order], "<i8"))

    def share(self, number: int) -> Share:
        share = super().share(number)
        self._log.add(SHARE, np.array([number, *share], "<i8"))
        return share

    def report(self, score: Score) -> None:
        if self.leads:
            self._log.add(EVALUATED, np.array(score, "<f8"))
        super().report(score)
