"""The coordinator of a batch method whose schedule is recorded: it writes down what decides its passes.

Everything else follows. Parameters stay as they are while a pass goes on, so a bundle's sum depends on its portions alone, whoever
has computed it; who else has computed them, and what was refused, changes nothing. The loss is summed in the order in which bundles
were accepted; the gradient in the order in which each shard took their slices, which the shard writes down.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.core.ranges import Range
from dbnet.methods.descent.history import State
from dbnet.methods.descent.problem import Halted
from dbnet.methods.sandblaster.coordinator import SandblasterCoordinator
from dbnet.shards.schedule.log import CHECKPOINT, EVALUATE, EVALUATED, HALT, ITERATION, PASS, STOP, PartLog


class RecordingCoordinator(SandblasterCoordinator):
    """Runs a batch method and writes down its decisions.

    Parameters
    ----------
    log
        Its part of the record.
    parts
        What a coordinator is made of.
    """

    def __init__(self, log: PartLog, *parts: Any) -> None:
        super().__init__(*parts)
        self._log, self._asked = log, 0

    def run(self) -> Turns:
        yield from super().run()
        self._log.close()

    def loss(self, examples: Range | None = None, iterate: str = "params") -> Turns[float]:
        queue, before = self.queue, self.queue.number
        try:
            loss = yield from super().loss(examples, iterate)
        except Halted:
            self._log.add(HALT, queue.number if queue.number > before else 0)
            raise
        self._log.add(PASS, [queue.number, queue.accepted])
        return loss

    def accepted(self, state: State) -> Turns[str]:
        self._log.add(ITERATION, marks(state))
        reason = yield from super().accepted(state)
        if reason:
            self._log.add(STOP, reason)
        return reason

    def checkpoint(self) -> None:
        super().checkpoint()
        self._log.add(CHECKPOINT, [self.duties.checkpoints.master.stem, self.queue.number])

    def tick(self) -> None:
        # What is to be evaluated stays as it is until somebody has fetched it, which no round but this or a later one hears of.
        if self.replicas.asked != self._asked:
            self._asked = self.replicas.asked
            self._log.add(EVALUATE, self.duties.evaluation.turn)
        super().tick()
        if (score := self.duties.evaluation.fresh) is not None:
            self._log.add(EVALUATED, np.array(score, "<f8"))


def marks(state: State) -> np.ndarray:
    """Return what an iteration is known by: its number, loss, the norm of its gradient, its step."""
    return np.array([state.iteration, state.loss, np.sqrt(state.square), state.step], "<f8")
