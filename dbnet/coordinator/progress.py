"""What is recorded and shown of a run: the replicas' progress, the shards' events, iterations of a batch method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbnet.coordinator.duty import Duty, Facts, RunTime
from dbnet.coordinator.evaluation import Evaluation
from dbnet.coordinator.orders import Status
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import ENDED, RunFile
from dbnet.monitor.tables import PROGRESS
from dbnet.network.replica import Score

INTERVAL, REPLICAS = 0.25, 8  # of many replicas rows come less often, not more of them


class Progress(Duty):
    """Rows and lines, each about what came since the one before.

    Parameters
    ----------
    facts, time
        The run.
    record, display
        The run file and what is printed.
    evaluation
        Its scores make a row at once.
    rows
        Whether the display shows a row for each; a batch method shows its iterations instead.
    """

    def __init__(self, facts: Facts, record: RunFile, display: Display, evaluation: Evaluation, time: RunTime, rows: bool) -> None:
        self._facts, self._record, self._display, self._evaluation, self._time = facts, record, display, evaluation, time
        self._rows, self._shown = rows, Status.nothing(len(facts.steps))
        self._next = self._shown_at = 0.0
        self._loss = float("nan")
        self._trouble = ""
        display.begin(facts.config, record.path.stem, facts.errors)

    def messages(self) -> dict[str, Callable[[int, Any], None]]:
        return {"events": lambda shard, content: self._record.events(shard, *content)}

    def act(self, status: Status) -> bool:
        score = self._evaluation.fresh
        if score is not None and not self._evaluation.overtaken:
            self._show(status, score)
        elif self._time.due() >= self._next:
            self._show(status, None)
            self._say_trouble()
        return False

    def say(self, text: str) -> None:
        """Print a sentence."""
        self._display.say(text)

    def iteration(self, *values: float) -> None:
        """Record and show an iteration of a batch method."""
        self._record.iteration(*values)
        self._display.iteration(values, self._evaluation.last)

    def _say_trouble(self) -> None:
        """Say once that the run file cannot be written, and once that it can again."""
        trouble, path = self._record.trouble, self._record.path
        if trouble and not self._trouble:
            self._display.warn(f"The coordinator cannot write the run file '{path}' ({trouble}). Its rows wait; the run goes on.")
        elif self._trouble and not trouble:
            self._display.warn(f"The run file '{path}' is written again; nothing was lost.")
        self._trouble = trouble

    def _show(self, now: Status, score: Score | None) -> None:
        """Append a row per replica: means since the last rows."""
        then, clock = self._shown, self._time.clock()
        since, self._shown_at = clock - self._shown_at, clock
        self._next = self._time.due() + INTERVAL * max(1.0, len(self._facts.steps) / REPLICAS)
        done = now["examples"] - then["examples"]
        # A replica that was resumed starts counting from its checkpoint, not from nought.
        fresh = (then.beats > 0) & (done > 0)
        if fresh.any():
            rows = self._made(then, now, np.flatnonzero(fresh), since)
            self._record.progress(rows)
            self._loss = float((now["loss"] - then["loss"])[fresh].sum() / done[fresh].sum())
            self._display.report(rows, self._record.staleness)
        self._shown = now
        if self._rows:
            epochs, steps = now.epochs(self._facts.examples), self._facts.beside + now.steps
            self._display.row(self._time.seconds, epochs, steps, self._loss, self._record.mean_staleness, score)

    def _made(self, then: Status, now: Status, replicas: np.ndarray, since: float) -> np.ndarray:
        """Return the rows of these replicas, which have made something in the last `since` seconds."""
        rows, done = np.zeros(len(replicas), PROGRESS), (now["examples"] - then["examples"])[replicas]
        rows["seconds"], rows["replica"] = self._time.seconds, replicas
        for name in ("steps", "examples", "pushes", "fetches", "bytes_pushed", "bytes_fetched", "waited"):
            rows[name] = now[name][replicas]
        for name, source in (("loss", "loss"), ("accuracy", "right")):
            rows[name] = (now[source] - then[source])[replicas] / done
        rows["throughput"] = done / max(since, 1e-9)
        return rows

    def conclude(self, state: int) -> None:
        """End the run file in this state."""
        self._display.end(ENDED.get(state, "broken off"))
        lost = self._record.close(state)
        if lost:
            self._display.warn(f"{lost} rows of the run file '{self._record.path}' are lost ({self._record.trouble}).")
