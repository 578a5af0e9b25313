"""What a run has produced, and how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dbnet.build import Setup
from dbnet.checkpoint import link_of
from dbnet.pace import Pace


@dataclass(frozen=True)
class Outcome:
    """What a run has produced.

    Attributes
    ----------
    run_file, checkpoint
        Paths of the outputs.
    accuracy
        Last accuracy on the test set; NaN without a test set.
    picture
        Where to draw the run; None: nowhere.
    unsaved
        Why the last checkpoint could not be written; nothing if it was.
    params
        The trained parameters, [parameters]; only after a run in one process.
    finished, stopped
        Whether the run came to its own end; whether a signal has stopped it: the checkpoint is to go on from.
    losses
        What was lost on the way, a line for each replica; then this rank must end by `mpi.leave`.
    diagnosis
        Why the run was stopped for its numbers.
    signal
        Name of the signal that this process got meanwhile; nothing where there was none.
    """

    run_file: Path
    checkpoint: Path
    accuracy: float
    picture: Path | None = None
    unsaved: str = ""
    params: np.ndarray | None = None
    finished: bool = True
    stopped: bool = False
    losses: str = ""
    diagnosis: str = ""
    signal: str = ""


def outcome(ready: Setup, pace: Pace, params: np.ndarray | None = None) -> Outcome:
    """Return what the run has produced."""
    accuracy = pace.last_score.test_accuracy if pace.last_score else float("nan")
    diagnosis = pace.guard.diagnosis() if pace.guard.stopped else ""
    config, ending = ready.config, (pace.finished, pace.stopped, pace.roll.summary(), diagnosis, pace.interrupt.by)
    picture = config.output(".png") if config.run.picture else None
    return Outcome(config.output(".h5"), link_of(config), accuracy, picture, pace.keeper.failure, params, *ending)
