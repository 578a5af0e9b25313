"""How far many runs are: a bar in the last line of a terminal, lines that stay above it; elsewhere the lines alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, TextIO

from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.monitor.live import drawn_on, snapshot
from dbnet.monitor.results import Run


class Bar:
    """A bar over `total` runs.

    Attributes
    ----------
    shown
        Whether there is one: where `stream` is a terminal.
    """

    def __init__(self, total: int, stream: TextIO) -> None:
        self.shown, self._stream, self._progress, self._task = drawn_on(stream), stream, None, None
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (BarColumn(30), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn(), TextColumn("left"),
                       TimeRemainingColumn(), TextColumn("{task.description}", markup=False))  # fmt: skip
            self._progress = Progress(*columns, console=Console(file=stream), auto_refresh=False, redirect_stdout=False,
                                      redirect_stderr=False, speed_estimate_period=1e6)  # fmt: skip
            self._progress.start()
            self._task: Any = self._progress.add_task("", total=total)

    def at(self, done: float, words: str) -> None:
        """Show how many runs are done, parts of those under way counted too, and what is under way."""
        if self._progress is not None:
            # Beside the bar and the times.
            room = max(0, self._progress.console.width - 58)
            shown = words if len(words) <= room else f"{words[: room - 1]}…" if room > 8 else ""
            self._progress.update(self._task, completed=done, description=shown)
            self._progress.refresh()

    def say(self, line: str) -> None:
        """Print a line."""
        if self._progress is None:
            print(line, file=self._stream, flush=True)
        else:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print a line about something that went wrong."""
        if self._progress is not None and sys.stderr.isatty():
            self.say(f"dbnet: {line}")
        else:
            print(f"dbnet: {line}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.update(self._task, visible=False)
            self._progress.stop()


def share(config: Config, since: float) -> float:
    """Return the share of its way that a run has made which began to write its file at `since` (seconds since 1970) or later."""
    name = re.compile(re.escape(config.run.name) + r"(-\d+)?\.h5")
    try:
        files = [path for path in Path(config.run.folder).iterdir() if name.fullmatch(path.name) and path.stat().st_mtime >= since]
        newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
        part = 0.0 if newest is None else snapshot(Run(newest, ("progress", "evaluation", "iterations"))).goal()[0]
    except (UserError, FileNotFoundError):
        # It has just begun, or ends just now.
        return 0.0
    return min(1.0, part) if part == part else 0.0
