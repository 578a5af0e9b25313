"""What a run says while it goes on: one line per report, readable on a terminal, through mpirun and in a job's output file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import NamedTuple

import numpy as np

from dbnet.core.config import Config
from dbnet.monitor.tables import PROGRESS
from dbnet.network.replica import Score

_HEAD = "  seconds   epochs      steps   loss {} {}  examples/s  staleness"
_ITERATIONS = "  seconds  iteration          loss  gradient      step  passes  rounds  backups  discarded {}"

# A rate that is shown is a mean over the last seconds: what falls into one report varies.
RECENT = 5.0

# What the loss says of a score besides, by name.
Errors = Callable[[Score], Mapping[str, float]]


class Speed(NamedTuple):
    """How fast a replica was in the last seconds: examples per second, share of its time that it waited, last mean loss."""

    replica: int
    rate: float
    waited: float
    loss: float


def recent(rows: np.ndarray, span: float = RECENT) -> list[Speed]:
    """Return how fast each replica was in the last `span` seconds before the last of these rows of the table `progress`."""
    out = []
    rows = rows[rows["seconds"] >= rows["seconds"].max(initial=0.0) - span]
    for replica in np.unique(rows["replica"]):
        own = rows[rows["replica"] == replica]
        first, last, losses = own[0], own[-1], own["loss"][np.isfinite(own["loss"])]
        time = float(last["seconds"] - first["seconds"])
        rate = float(last["examples"] - first["examples"]) / time if time > 0 else float(last["throughput"])
        waited = float(last["waited"] - first["waited"]) / time if time > 0 else float("nan")
        out.append(Speed(int(replica), rate, waited, float(losses[-1]) if len(losses) else float("nan")))
    return out


class Display:
    """Prints a head once, then a line for each evaluation, and one at least every `interval` seconds."""

    def __init__(self, quiet: bool = False, interval: float = 5.0) -> None:
        self._quiet, self._interval, self._last = quiet, interval, 0.0
        self._headed = self._values = False
        self._part, self._widths = "test", [10, 10]
        self._shown: Score | None = None
        self._rows = np.zeros(0, PROGRESS)

    def begin(self, config: Config, name: str, errors: Errors = lambda score: {}) -> None:
        """A run of this name begins; `errors` is what its loss says besides of a score, by name."""
        self._part = config.evaluate.part

    def end(self, state: str = "broken off") -> None:
        """The run has ended, how `state` says in words."""

    def report(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """Take in new rows of the table `progress`, and how many updates had which staleness [shards, bins]."""
        kept = np.concatenate([self._rows, rows])
        self._rows = kept[kept["seconds"] >= kept["seconds"].max(initial=0.0) - RECENT]

    def say(self, text: str) -> None:
        """Print a sentence."""
        if self._quiet:
            return
        try:
            print(text, flush=True)
        except OSError:
            # A run goes on when nobody reads its messages any more: a pipe that is closed, a terminal that is gone.
            self._quiet = True

    def warn(self, text: str) -> None:
        """Print a sentence about something that went wrong, also where nothing else is printed."""
        print(f"dbnet: {text}", file=sys.stderr, flush=True)

    def row(self, seconds: float, epochs: float, steps: int, loss: float, staleness: float, score: Score | None) -> None:
        """Print where the run stands; without a new `score` only if the last line is old enough."""
        rate = sum(speed.rate for speed in recent(self._rows)) if len(self._rows) else float("nan")
        if score is None and seconds - self._last < self._interval:
            return
        self._last = seconds
        self._head(_HEAD, score)
        judged = [text.rjust(width) for text, width in zip(self._judged(score), self._widths, strict=True)]
        cells = (
            f"{seconds:9.1f}",
            f"{epochs:8.2f}",
            f"{steps:10d}",
            f"{loss:6.3f}" if loss == loss else "     -",
            *judged,
            f"{rate:11.0f}" if rate == rate else "          -",
            f"{staleness:10.2f}" if staleness == staleness else "         -",
        )
        self.say(" ".join(cells))

    def iteration(self, values: Sequence[float], score: Score | None) -> None:
        """Print a row for an iteration of a batch method: the columns of the run file's table, and what a new score says."""
        self._head(_ITERATIONS, score)
        seconds, number, loss, gradient, step, passes, rounds, backups, discarded = values
        judged = self._judged(None if score is self._shown else score)[0].rjust(self._widths[0])
        self._shown = score
        self.say(
            f"{seconds:9.1f} {number:10d} {loss:13.6g} {gradient:9.2e} {step:9.2e} {passes:7d} {rounds:7d} {backups:8d} "
            f"{discarded:10d} {judged}".rstrip()
        )

    def _head(self, columns: str, score: Score | None) -> None:
        """Print the head of the columns, once."""
        if self._headed:
            return
        # Values have no accuracy.
        no_accuracy = score is not None and isnan(score.accuracy) and isnan(score.train_accuracy)
        self._values = no_accuracy and not (isnan(score.loss) and isnan(score.train_loss))
        titles = [f"{part} {'loss' if self._values else 'acc'}" for part in (self._part, "train")]
        self._widths = [max(10, len(title)) for title in titles]
        self.say(columns.format(*(title.rjust(width) for title, width in zip(titles, self._widths, strict=True))))
        self._headed = True

    def _judged(self, score: Score | None) -> list[str]:
        """Return the accuracies of a score, or of values the losses, as text: of what is evaluated, of the training set."""
        if score is None:
            return ["", ""]
        values = (score.loss, score.train_loss) if self._values else (score.accuracy, score.train_accuracy)
        return [(f"{value:.4g}" if self._values else f"{value:.4f}").replace("nan", "-") for value in values]
