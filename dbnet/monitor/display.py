"""What a run says while it goes on: one line per report, readable on a terminal, through mpirun and in a job's output file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dbnet.network.replica import Score

_HEAD = "  seconds   epochs      steps   loss   test acc  train acc  examples/s  staleness"
_ITERATIONS = "  seconds  iteration          loss  gradient      step  passes  rounds  backups  discarded   test acc"


class Display:
    """Prints a head once, then a line for each evaluation, and one at least every `interval` seconds."""

    def __init__(self, quiet: bool = False, interval: float = 5.0) -> None:
        self._quiet, self._interval, self._last = quiet, interval, 0.0
        self._headed = False
        self._shown: Score | None = None

    def say(self, text: str) -> None:
        """Print a sentence."""
        if self._quiet:
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # A run goes on when nobody reads its messages any more.
            self._quiet = True

    def warn(self, text: str) -> None:
        """Print a sentence about something that went wrong, also where nothing else is printed."""
        print(f"dbnet: {text}", file=sys.stderr, flush=True)

    def row(
        self, seconds: float, epochs: float, steps: int, loss: float, rate: float, staleness: float, score: Score | None
    ) -> None:
        """Print where the run stands; without a new `score` only if the last line is old enough."""
        if score is None and seconds - self._last < self._interval:
            return
        self._last = seconds
        if not self._headed:
            self.say(_HEAD)
            self._headed = True
        accuracies = ("", "") if score is None else (f"{score.test_accuracy:.4f}", f"{score.train_accuracy:.4f}")
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
