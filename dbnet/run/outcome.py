"""A small file that says how far a run is, for job scripts: launchers may return nonsense when a rank was killed.

The coordinator writes one line, `running PID HOST` when training begins, and `ended CODE` in its place when the run has come to its
own end, good or bad. A marker that does not say `ended` belongs to a run that did not.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from dbnet.checkpoint.format import link_of
from dbnet.coordinator.coordinator import Coordinator
from dbnet.core import errors
from dbnet.core.files import writing
from dbnet.run.setup import Setup


class Marker:
    """One rank's marker; without a path there is none. What an earlier run has left at the path is taken away."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            with writing(self.path) as part:
                part.touch()

    def running(self) -> None:
        """Say that training begins, in this process."""
        self._write(f"running {os.getpid()} {socket.gethostname()}")

    def ended(self, code: int) -> None:
        """Say that the run has ended with this exit code."""
        self._write(f"ended {code}")

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Write down the exit code of what the body raises."""
        try:
            yield
        except BaseException as error:
            self.ended(errors.exit_code(error))
            raise

    def _write(self, line: str) -> None:
        if self.path is None:
            return
        with writing(self.path) as part:
            part.write_text(f"{line}\n")


@dataclass(frozen=True)
class Outcome:
    """What a run has produced.

    Attributes
    ----------
    run_file, checkpoint
        Paths of the outputs.
    accuracy
        Last accuracy on what is evaluated; NaN without such a set, and for vectors.
    errors
        Of vectors what the last loss on what is evaluated says besides, in words.
    part
        What is evaluated: "test" or "validation".
    picture
        Where to draw the run; None: nowhere.
    unsaved
        Why the last checkpoint could not be written; nothing if it was.
    params
        The trained parameters, [parameters]; only after a run in one process.
    finished, stopped
        Whether the run came to its own end; whether a signal has stopped it: the checkpoint is to go on from.
    lost
        What was lost on the way, a line for each replica; then this rank must end by `mpi.leave`.
    diagnosis
        Why the run was stopped for its numbers.
    signal
        Name of the signal that this process got meanwhile; nothing where there was none.
    crashed, repeated
        Who died of a defect, a line for each: the run's exit code is 1; the signal that two of them died of, if it stopped the run.
    """

    run_file: Path
    checkpoint: Path
    accuracy: float
    picture: Path | None = None
    unsaved: str = ""
    params: np.ndarray | None = None
    finished: bool = True
    stopped: bool = False
    lost: str = ""
    diagnosis: str = ""
    signal: str = ""
    crashed: str = ""
    repeated: str = ""
    errors: str = ""
    part: str = "test"

    @property
    def result(self) -> str:
        """The last score as a line."""
        accuracy = f"{self.accuracy:.4f}" if self.accuracy == self.accuracy else f"none: no labelled {self.part} set"
        what, value = ("error", self.errors) if self.errors else ("accuracy", accuracy)
        return f"{f'{self.part.capitalize()} {what}':<13}  {value}"


def outcome(ready: Setup, coordinator: Coordinator, signal: str, params: np.ndarray | None = None) -> Outcome:
    """Return what the run has produced; `signal` is the one that stopped it, if one did."""
    duties, config = coordinator.duties, ready.config
    score, guard = duties.evaluation.last, duties.guard
    diagnosis = guard.diagnosis() if guard.stopped else ""
    members = duties.membership
    ending = (coordinator.finished, coordinator.ending.stopped, members.summary(), diagnosis, signal)
    ending += (members.crashes.summary(), members.repeated)
    picture = config.output(".png") if config.run.picture else None
    accuracy = score.accuracy if score else float("nan")
    errors = ""
    if ready.data.targets and score and isfinite(score.loss):
        errors = config.model.loss.words(score.loss, ready.data.targets, ready.variances[0])
    return Outcome(config.output(".h5"), link_of(config), accuracy, picture, duties.checkpoints.failure, params, *ending, errors,
                   config.evaluate.part)  # fmt: skip
