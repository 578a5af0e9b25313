"""Sandblaster's replicas take their time, and ranks say what memory they took; called by `several.py`."""

from __future__ import annotations

import resource
import time

from dbnet.comm import mpi
from dbnet.comm.turns import IDLE
from dbnet.methods.sandblaster.worker import SandblasterWorker
from dbnet.network.replica import Replica

HOLD = "hold"
_accrue, _compute = Replica.accrue_share, SandblasterWorker._compute


def slow(seconds: float, silence: float | str) -> None:
    """Slow down what is trained from now on.

    Parameters
    ----------
    seconds
        What every minibatch takes.
    silence
        For how many seconds replica 0 does nothing before its fourth portion; "hold": it holds that one, giving signs of life,
        until the pass is over without it.
    """

    def accrue_slowly(self: Replica, w: object, g: object, fresh: bool) -> tuple[int, float, int]:
        done = _accrue(self, w, g, fresh)
        if done[0]:
            time.sleep(seconds)
        return done

    def compute_slowly(self: SandblasterWorker, task: object) -> object:
        if self.orders.replica == 0 and self.computed == 3:
            if silence == HOLD:
                yield from held(self, task)
                return
            time.sleep(silence)
        yield from _compute(self, task)

    Replica.accrue_share, SandblasterWorker._compute = accrue_slowly, compute_slowly


def held(worker: SandblasterWorker, task: object) -> object:
    """Do nothing with a task while its pass lasts."""
    while worker.tasks.number == task.number and not worker.orders.stop:
        yield IDLE
        yield from worker.report()
        worker.tasks.look()
        if worker._offered.count and worker.tasks.verdict is not None:
            yield from worker._settle()
    # Counted, or the next pass would be held, too.
    worker.computed += 1


def peak() -> None:
    """Have the coordinator print its peak memory so far in KiB."""
    if mpi.launched_rank() == 0:
        print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}", flush=True)
