"""A run on a terminal while it goes on: how far it is, what it has reached, who is fast and who waits, how stale updates are.

What is shown is a `Snapshot`, made by the run itself (`LiveDisplay`) or from its run file (`watch`, from another terminal, also
over a shared file system); `view` makes it something that rich draws. Where no terminal is there are plain lines (`display`).
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from dbnet.comm.topology import Topology
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.monitor.display import Display, Errors, Speed, recent
from dbnet.monitor.results import Run, bar, bulk, lateness
from dbnet.monitor.tables import PROGRESS
from dbnet.network.replica import Score

# More replicas or shards than these are summed up.
_EACH = 8
_REFRESH = 0.25


class Snapshot(NamedTuple):
    """Where a run stands.

    Attributes
    ----------
    name, config, state
        What runs, and in a word whether it still does.
    seconds, epochs, steps
        How far it is; iterations of a batch method.
    loss
        Mean of the last minibatches, or of the last iteration.
    score
        The last evaluation.
    speeds
        How fast each replica was in the last seconds.
    counts
        How many updates had which staleness [shards, bins].
    errors
        What the loss says besides of the last evaluation, by name, such as R2.
    """

    name: str
    config: Config
    state: str
    seconds: float
    epochs: float
    steps: int
    iterations: int
    loss: float
    score: Score | None
    speeds: Sequence[Speed]
    counts: np.ndarray
    errors: Mapping[str, float] = {}

    def goal(self) -> tuple[float, str]:
        """Return the share of the way to the stop criterion that is reached first (NaN: none is known), and it in words."""
        stop, replicas = self.config.stop, self.config.topology.replicas
        ways = [
            (self.epochs, stop.epochs, "{:.1f} of {:g} epochs"),
            (self.steps / replicas, stop.steps, "{:.0f} of {:g} steps of each replica"),
            (self.seconds, stop.seconds, "{:.0f} of {:g} s"),
            (self.iterations, stop.iterations, "{:.0f} of {:g} iterations"),
        ]
        known = [(now / end if end else 1.0, words.format(now, end)) for now, end, words in ways if end is not None]
        return max(known, default=(float("nan"), f"until a {self.config.evaluate.part} accuracy of {stop.accuracy or 1:g}"))

    @property
    def left(self) -> float:
        """Seconds that are left at the pace so far; NaN where that is not known."""
        share = self.goal()[0]
        return self.seconds * max(0.0, 1 - share) / share if share > 0 else float("nan")


def duration(seconds: float) -> str:
    """Return a time in words, like 1:02:03 or 12 s."""
    if not isfinite(seconds):
        return "?"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}" if minutes else f"{whole} s"


def view(shot: Snapshot, width: int) -> Any:
    """Return what rich draws."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    share, words = shot.goal()
    colour = {"running": "cyan", "finished": "green"}.get(shot.state, "red")
    head = Text.assemble((shot.name, "bold"), f"  {method(shot.config)}  ", (shot.state, colour), f"  {duration(shot.seconds)}")
    way = Table.grid(padding=(0, 1))
    left = f", {duration(shot.left)} left" if shot.state == "running" and shot.left == shot.left else ""
    done = 0.0 if share != share else min(1.0, share)
    part = f"{100 * done:3.0f} %  " if share == share else ""
    way.add_row(ProgressBar(1.0, done, width=max(10, min(40, width - 50))), f"{part}{words}{left}")
    lines = [head, way, Text(scores(shot))]
    speeds, late = _speeds(shot), _lateness(shot)
    if width >= 110:
        both = Table.grid(padding=(0, 4))
        both.add_row(speeds, late)
        return Group(*lines, both)
    return Group(*lines, speeds, late)


def method(config: Config) -> str:
    """Return in words what runs on what."""
    return f"{config.method.kind}, {Topology.of(config.topology).workers()}"


def scores(shot: Snapshot) -> str:
    """Return the line of losses and accuracies."""
    out = [f"loss {shot.loss:.4g}" if shot.loss == shot.loss else "no loss yet"]
    if shot.score is not None:
        part, score = shot.config.evaluate.part, shot.score
        numbers = ((f"{part} loss", score.loss), (f"{part} accuracy", score.accuracy), ("train accuracy", score.train_accuracy))
        out += [f"{name} {value:.4f}" for name, value in numbers if value == value]
        out += [f"{name} {value:.4g}" for name, value in shot.errors.items() if value == value and not name.startswith("train ")]
    return "   ".join(out)


def _table(*columns: str) -> Any:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index in (0, len(columns) - 1) else "right", no_wrap=True)
    return made


def _speeds(shot: Snapshot) -> Any:
    """Return the table of the replicas; of many their sum, the slowest and the fastest."""
    made, speeds = _table("replica", "examples/s", "waiting", ""), list(shot.speeds)
    top = max((speed.rate for speed in speeds), default=0.0)
    rows = [(str(speed.replica), speed) for speed in speeds]
    if len(speeds) > _EACH:
        order = sorted(speeds, key=lambda speed: speed.rate)
        rows = [(f"{speed.replica} ({word})", speed) for word, speed in (("slowest", order[0]), ("median", order[len(order) // 2]),
                ("fastest", order[-1]))]  # fmt: skip
    for name, speed in rows:
        filled = round(12 * speed.rate / top) if top > 0 else 0
        made.add_row(name, f"{speed.rate:,.0f}", _percent(speed.waited), "█" * filled)
    if len(speeds) > 1:
        rate, waited = sum(speed.rate for speed in speeds), sum(speed.waited for speed in speeds) / len(speeds)
        made.add_row(f"all {len(speeds)}", f"{rate:,.0f}", _percent(waited), "")
    if not speeds:
        made.add_row("none yet", "", "", "")
    return made


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == share else "-"


def _lateness(shot: Snapshot) -> Any:
    """Return the table of staleness by shard; of many their sum and the two extremes."""
    made = _table("shard", "staleness", "median", "95 %", "most", "")
    total = shot.counts.sum(axis=0)
    rows = [(str(shard), counts) for shard, counts in enumerate(shot.counts)]
    if len(rows) > _EACH:
        order = sorted((row for row in rows if row[1].sum()), key=lambda row: lateness(row[1]).mean)
        rows = [*order[:1], *order[1:][-1:]]
    if len(shot.counts) > 1:
        rows.append((f"all {len(shot.counts)}", total))
    bins = bulk(total)
    for name, counts in rows:
        late = lateness(counts)
        known = (f"{late.mean:.2f}", str(late.median), str(late.q95), late.most) if late.updates else ("-",) * 4
        made.add_row(name, *known, bar(counts[:bins], 24) if late.largest else "")
    return made


class LiveDisplay(Display):
    """Shows the run in the last lines of a terminal; sentences and evaluations stay above them."""

    def __init__(self, interval: float = 5.0) -> None:
        super().__init__(interval=interval)
        self._live: Any = None
        self._config: Config | None = None
        self._shot: Snapshot | None = None
        self._errors: Errors = lambda score: {}
        self._name, self._counts, self._score, self._iterations, self._drawn = "", np.zeros((1, 1), np.int64), None, 0, 0.0

    def begin(self, config: Config, name: str, errors: Errors = lambda score: {}) -> None:
        from rich.console import Console
        from rich.live import Live

        self._config, self._name, self._errors = config, name, errors
        # What goes to a file there stays there.
        self._live = Live(console=Console(), auto_refresh=False, redirect_stdout=False, redirect_stderr=sys.stderr.isatty())
        atexit.register(self.end)

    def end(self, state: str = "broken off") -> None:
        with self._shown_or_not():
            if self._live is not None and self._live.is_started and self._shot is not None:
                self._live.update(view(self._shot._replace(state=state), self._live.console.width), refresh=True)
                self._live.stop()
        self._live = None
        atexit.unregister(self.end)

    def say(self, text: str) -> None:
        with self._shown_or_not():
            if self._live is not None and self._live.is_started:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
                return
        super().say(text)

    def report(self, rows: np.ndarray, counts: np.ndarray) -> None:
        super().report(rows, counts)
        self._counts = counts

    def row(self, seconds: float, epochs: float, steps: int, loss: float, staleness: float, score: Score | None) -> None:
        self._score = score or self._score
        if score is not None:
            super().row(seconds, epochs, steps, loss, staleness, score)
        self._draw(seconds, epochs, steps, loss)

    def iteration(self, values: Sequence[float], score: Score | None) -> None:
        self._score, self._iterations = score or self._score, int(values[1])
        super().iteration(values, score)
        self._draw(values[0], float("nan"), 0, values[2])

    def _draw(self, seconds: float, epochs: float, steps: int, loss: float) -> None:
        if self._live is None or self._config is None:
            return
        self._shot = Snapshot(self._name, self._config, "running", seconds, epochs, steps, self._iterations, loss, self._score,
                              recent(self._rows), self._counts, self._errors(self._score) if self._score else {})  # fmt: skip
        if time.monotonic() - self._drawn < _REFRESH and self._live.is_started:
            return
        self._drawn = time.monotonic()
        with self._shown_or_not():
            if not self._live.is_started:
                self._live.start()
            self._live.update(view(self._shot, self._live.console.width), refresh=True)

    @contextmanager
    def _shown_or_not(self) -> Iterator[None]:
        """Where the terminal takes it no more, say so once and go on in plain lines: a run never ends of being looked at."""
        try:
            yield
        except (OSError, ValueError) as error:
            live, self._live = self._live, None
            with suppress(OSError, ValueError):
                live.stop()
            with suppress(OSError, ValueError):
                self.warn(f"The terminal does not take the live display ({error}); plain lines follow.")


def display_for(quiet: bool) -> Display:
    """Return what shows a run: on a terminal in its last lines, elsewhere, or `quiet`, as plain lines or none."""
    # Open MPI's launcher gives its ranks terminals of their own, which nobody sees.
    launched = any(name in os.environ for name in ("PMIX_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    return LiveDisplay() if drawn_on(sys.stdout) and not launched and not quiet else Display(quiet)


def drawn_on(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that shows what rich draws."""
    utf = (stream.encoding or "").lower().startswith("utf")
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb" and utf


def snapshot(run: Run) -> Snapshot:
    """Return where the run of a run file stands."""
    rows, points = run.progress, run.evaluation
    seconds = max((float(frame.seconds.iloc[-1]) for frame in (rows, points, run.iterations) if len(frame)), default=0.0)
    steps = int(rows.groupby("replica").steps.last().sum()) if len(rows) else 0
    score, epochs, known, besides = None, 0.0, 0, {}
    if len(points):
        last = points.iloc[-1]
        score, known, epochs = Score(*(float(last[name]) for name in Score._fields)), int(last.steps), float(last.epochs)
        besides = {name.replace("_", " "): float(last[name]) for name in run.errors}
    if known and steps > known:
        # Since the last evaluation.
        epochs *= steps / known
    speeds = recent(rows.to_records(index=False).astype(PROGRESS))
    losses = rows.loss.dropna()
    loss = float(run.iterations.loss.iloc[-1]) if len(run.iterations) else float(losses.iloc[-1]) if len(losses) else float("nan")
    done = int(run.iterations.iteration.iloc[-1]) if len(run.iterations) else 0
    name = run.path.name.removesuffix(".h5")
    counts = run.staleness.to_numpy().T
    return Snapshot(name, run.config, run.ended, seconds, epochs, max(steps, known), done, loss, score, speeds, counts, besides)


def watch(path: str | Path, once: bool = False, every: float = 1.0) -> None:
    """Show the run of a run file until it has ended; once where `once`, or where no terminal is.

    Raises
    ------
    UserError
        No run file.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    run = Run(path, ("progress", "evaluation", "iterations", "lost", "refused"))
    console = Console()

    def shown() -> Any:
        lost = [f"Lost: replica {row.replica} at {row.seconds:.1f} s." for row in run.lost.itertuples()]
        if len(run.refused):
            lost.append(f"Refused: {len(run.refused.drop_duplicates(['replica', 'push']))} pushes with values that are not finite.")
        return Group(*map(Text, lost), view(snapshot(run), console.width))

    if once or not console.is_terminal:
        console.print(shown())
        return
    with Live(shown(), console=console, auto_refresh=False) as live:
        while run.ended == "running":
            time.sleep(every)
            try:
                run.refresh()
            except UserError:
                # A table is being written, or the file system shows an old piece of it; the next look is whole.
                continue
            live.update(shown(), refresh=True)
