"""The run file as tables of pandas: what a run writes is what a notebook reads, also while it is still written.

Each table of the file is a data frame whose columns are those of `tables`; staleness is `applied - fetched` of an event, its
histogram per shard is counted by `runfile`, and the loss over time follows by arithmetic.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dbnet.core.config import Config, stored
from dbnet.core.errors import UserError
from dbnet.core.files import reading
from dbnet.core.untrusted.opening import opened
from dbnet.monitor.runfile import BINS, ENDED, FINISHED, HERE, STOPPED
from dbnet.monitor.tables import TABLES, column

if TYPE_CHECKING:
    import pandas as pd

# A run that goes on writes rows four times a second or with every step; one without progress for run.deadline ends itself.
SILENT = 30.0


class Run:
    """A run file for analysis, also of a run that is still going on (call `refresh`, or open it again).

    Parameters
    ----------
    path
        The run file.
    tables
        The frames to read; default: all. `staleness` is always read.

    Attributes
    ----------
    config
        The effective configuration.
    about
        Versions, revision, MPI library, hosts.
    progress, evaluation, iterations, events, lost, refused, staleness
        pandas frames; see the columns in the module's text. `staleness` has a row per bin and a column per shard.
    busy
        Seconds in which each shard had something to do [shards]; 0 in one process.
    finished, stopped
        Whether the run came to its own end; whether a signal stopped it, with a checkpoint.
    written
        When the file was last written to, in seconds since 1970.
    """

    progress: pd.DataFrame
    evaluation: pd.DataFrame
    iterations: pd.DataFrame
    events: pd.DataFrame
    lost: pd.DataFrame
    refused: pd.DataFrame

    def __init__(self, path: str | Path, tables: Collection[str] = tuple(TABLES)) -> None:
        self.path, self._tables = Path(path), tables
        if not self.path.exists():
            raise UserError(f"No record of a run '{path}'; a run prints the path of its own at the end.")
        self.refresh()

    def __repr__(self) -> str:
        last = self.evaluation.iloc[-1] if "evaluation" in self._tables and len(self.evaluation) else None
        said = "" if last is None else "".join(f", {words}" for words in reached(self, last))
        epochs = "" if last is None else f", {last.epochs:.1f} epochs, {last.seconds:.1f} s"
        return f"<Run {self.path}: {self.ended}{epochs}{said}>"

    def refresh(self) -> None:
        """Read what has been written so far."""
        import pandas as pd

        with (
            reading(self.path, "a run that has just begun can be opened a moment later"),
            opened(self.path, growing=True) as file,
        ):
            if "progress" not in file or "config" not in file.attrs:
                raise UserError(f"'{self.path}' is not a dbnet run file; give the NAME.h5 of a run.")
            self.config: Config = stored(json.loads(file.attrs["config"]))
            self.about = {key: _decode(value) for key, value in file.attrs.items() if key != "config"}
            for name in self._tables:
                rows = file[name][:] if name in file else np.zeros(0, TABLES[name])
                setattr(self, name, pd.DataFrame(rows))
            counts, self.busy = file["staleness"][:].T, file["busy"][:]
            self.finished, self.stopped = (int(file["state"][()]) == state for state in (FINISHED, STOPPED))
            last = int(np.flatnonzero(counts.sum(axis=1)).max(initial=0)) + 1
            self.staleness: pd.DataFrame = pd.DataFrame(counts[:last], columns=[f"shard {s}" for s in range(counts.shape[1])])
        self.staleness.index.name = "staleness"
        self.written = self.path.stat().st_mtime

    @property
    def ended(self) -> str:
        """How the run ended, in words: finished, stopped by a signal, running, or broken off (silent for too long)."""
        if self.finished or self.stopped:
            return ENDED[FINISHED if self.finished else STOPPED]
        return "running" if time.time() - self.written < self.config.run.deadline + SILENT else "broken off"

    @property
    def occupancy(self) -> np.ndarray:
        """The share of the run so far in which each shard was busy [shards]; NaN where nobody knows, as in one process."""
        passed = float(self.progress.seconds.max()) if len(self.progress) else 0.0
        return np.minimum(self.busy / passed, 1.0) if passed and self.busy.any() else np.full(len(self.busy), np.nan)

    @property
    def part(self) -> str:
        """What is evaluated: "test" or "validation"."""
        return self.config.evaluate.part

    @property
    def here(self) -> bool:
        """Whether all roles took turns in one process, so that seconds say nothing of ranks that run side by side."""
        return self.about.get("mpi") == HERE

    @property
    def errors(self) -> list[str]:
        """Columns of `evaluation` with what the loss says besides of vectors, such as "R2"; nothing of labels."""
        return [column(name) for name in self.about.get("errors", [])]

    @property
    def accuracy(self) -> float:
        """Last accuracy on what is evaluated; NaN where there was no evaluation."""
        return float(self.evaluation.accuracy.iloc[-1]) if len(self.evaluation) else float("nan")


def reached(run: Run, row: Any) -> list[str]:
    """Return in words what a row of `evaluation` says of the part that is evaluated."""
    numbers = [(f"{run.part} accuracy", row.accuracy, ".4f"), (f"{run.part} loss", row.loss, ".4f")]
    numbers += [(name.replace("_", " "), row[name], ".4g") for name in run.errors]
    return [f"{name} {value:{form}}" for name, value, form in numbers if value == value]


class Late(NamedTuple):
    """How stale the updates of one shard were: the number of updates, their mean, median, 95 % quantile and largest staleness."""

    updates: int
    mean: float
    median: int
    q95: int
    largest: int

    @property
    def most(self) -> str:
        """The largest staleness in words: the last bin counts all beyond, too."""
        return f"{self.largest}+" if self.largest >= BINS - 1 else str(self.largest)


def lateness(counts: np.ndarray) -> Late:
    """Return what is to be said of updates counted by staleness [bins]; quantiles are staleness that so many have at most."""
    total, passed = int(counts.sum()), counts.cumsum()
    if not total:
        return Late(0, float("nan"), 0, 0, 0)
    mean = float((np.arange(len(counts)) * counts).sum() / total)
    median, q95 = (int(np.searchsorted(passed, share * total)) for share in (0.5, 0.95))
    return Late(total, mean, median, q95, int(np.flatnonzero(counts)[-1]))


def bulk(counts: np.ndarray) -> int:
    """Return how many bins hold almost all updates [bins]: a few very late ones would leave the rest a single bar."""
    return int(np.searchsorted(counts.cumsum(), 0.999 * counts.sum())) + 1


def bar(counts: np.ndarray, width: int) -> str:
    """Return a histogram of updates by staleness [bins] as `width` characters; each stands for as many bins as fit."""
    each = -(-len(counts) // width)
    heights = np.append(counts, np.zeros(-len(counts) % each)).reshape(-1, each).sum(axis=1)
    top = heights.max(initial=0)
    return "".join(" " if not h else "▁▂▃▄▅▆▇█"[min(7, int(8 * h / top))] for h in heights) if top else ""


def _decode(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value.item() if hasattr(value, "item") else value
    except json.JSONDecodeError:
        return value


def open_run(path: str | Path) -> Run:
    """Open a run file for analysis, also while it grows.

    Parameters
    ----------
    path
        The NAME.h5 of a run.

    Returns
    -------
    Its rows as pandas frames, its configuration, and what it says of itself; see `Run`.

    Raises
    ------
    UserError
        There is no such file, or it is no run file.
    """
    return Run(path)
