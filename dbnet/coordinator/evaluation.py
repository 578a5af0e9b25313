"""Evaluations: when one is due, which replica is asked, and what came of it.

One replica evaluates at a time, in turn, from its own copy of the parameters, while the others go on.
"""

from __future__ import annotations

from dbnet.coordinator.duty import Duty, Facts, RunTime
from dbnet.coordinator.membership import Membership
from dbnet.coordinator.orders import OrderBook, Status
from dbnet.monitor.runfile import RunFile
from dbnet.network.replica import Score


class Evaluation(Duty):
    """Has the parameters evaluated.

    Attributes
    ----------
    last
        The last score.
    fresh
        The score that came in this round.
    overtaken
        Whether it is of parameters before the last ones of a run that ended meanwhile: its row stands where it was asked for.
    turn
        Whose turn it was last.
    """

    def __init__(self, facts: Facts, replicas: OrderBook, members: Membership, record: RunFile, time: RunTime) -> None:
        self._facts, self._replicas, self._members, self._record, self._time = facts, replicas, members, record, time
        self.last: Score | None = None
        self.fresh: Score | None = None
        self.overtaken, self.turn = False, 0
        self._status, self._at, self._epochs = replicas.status(), 0.0, 0.0
        self._counted: int | None = None
        self._asked = 0.0, 0, 0.0

    @property
    def _passed(self) -> float:
        return self._status.epochs(self._facts.examples) if self._counted is None else self._counted / self._facts.examples

    def counts(self, examples: int) -> None:
        """Take so many examples as passed, whatever replicas report: of a batch method they compute some twice."""
        self._counted = examples

    def act(self, status: Status) -> bool:
        self._status, self.fresh = status, self._replicas.collect()
        if self.fresh is not None:
            self.last, self._at, self._epochs, place = self.fresh, self._time.seconds, self._passed, self._place()
            over = all(self._replicas.done(replica) for replica in self._members.active)
            self.overtaken = over and self._asked[1:] != place[1:]
            seconds, steps, epochs = self._asked if self.overtaken else place
            self._record.evaluation(seconds, self.turn, steps, epochs, *self.fresh, *self._facts.errors(self.fresh).values())
        return False

    def _place(self) -> tuple[float, int, float]:
        """Return where the run is: seconds, steps, epochs."""
        return self._time.seconds, self._facts.beside + self._status.steps, self._passed

    @property
    def running(self) -> bool:
        return self._replicas.evaluating is not None

    @property
    def due(self) -> bool:
        every = self._facts.config.evaluate
        by_epochs = every.epochs is not None and self._passed - self._epochs >= every.epochs
        by_time = every.seconds is not None and self._time.seconds - self._at >= every.seconds
        return (by_epochs or by_time) and not self.running

    def ask(self, replica: int | None = None) -> None:
        """Ask a replica, by default the next in turn, if there is one."""
        self._epochs, self._asked, active = self._passed, self._place(), sorted(self._members.active)
        if not active:
            return
        later = [r for r in active if r > self.turn]
        self.turn = replica if replica is not None else (later or active)[0]
        self._replicas.evaluate(self.turn)
