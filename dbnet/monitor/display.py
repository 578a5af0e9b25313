"""What a run says while it goes on: one line per report, readable on a terminal, through mpirun and in a job's output file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import isnan
from typing import NamedTuple

import numpy as np

from dbnet.core.config import Config
from dbnet.monitor.tables import PROGRESS
from dbnet.network.replica import Score

_HEAD = "  seconds   epochs      steps   loss   test acc  train acc  examples/s  staleness"
_ITERATIONS = "  seconds  iteration          loss  gradient      step  passes  rounds  backups  discarded   test acc"


# A rate that is shown is a mean over the last seconds: what falls into one report varies.
RECENT = 5.0


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
        self._shown: Score | None = None
        self._rows = np.zeros(0, PROGRESS)

    def begin(self, config: Config, name: str) -> None:
        """A run of this name begins."""

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
        if not self._headed:
            # Values have no accuracy.
            no_accuracy = score is not None and isnan(score.test_accuracy) and isnan(score.train_accuracy)
            self._values = no_accuracy and not (isnan(score.test_loss) and isnan(score.train_loss))
            self.say(_HEAD.replace(" test acc  train acc", "test loss train loss") if self._values else _HEAD)
            self._headed = True
        accuracies = ("", "")
        if score is not None:
            values = (score.test_loss, score.train_loss) if self._values else (score.test_accuracy, score.train_accuracy)
            accuracies = tuple(f"{value:.4g}" if self._values else f"{value:.4f}" for value in values)
        cells = (
            f"{seconds:9.1f}",
            f"{epochs:8.2f}",
            f"{steps:10d}",
            f"{loss:6.3f}" if loss == loss else "     -",
            f"{accuracies[0].replace('nan', '-'):>10}",
            f"{accuracies[1].replace('nan', '-'):>10}",
            f"{rate:11.0f}" if rate == rate else "          -",
            f"{staleness:10.2f}" if staleness == staleness else "         -",
        )
        self.say(" ".join(cells))

    def iteration(self, values: Sequence[float], score: Score | None) -> None:
        """Print a row for an iteration of a batch method: the columns of the run file's table, and a new score's accuracy."""
        if not self._headed:
            self.say(_ITERATIONS)
            self._headed = True
        seconds, number, loss, gradient, step, passes, rounds, backups, discarded = values
        accuracy = "" if score is None or score is self._shown else f"{score.test_accuracy:10.4f}".replace("nan", "-")
        self._shown = score
        self.say(
            f"{seconds:9.1f} {number:10d} {loss:13.6g} {gradient:9.2e} {step:9.2e} {passes:7d} {rounds:7d} {backups:8d} "
            f"{discarded:10d} {accuracy:>10}".rstrip()
        )
