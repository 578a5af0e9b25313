"""Many runs at once: their frames as one, each row with what tells its run from the others, and a table of them."""

from __future__ import annotations

import glob
from collections.abc import Callable, Container, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dbnet.core.config import warn
from dbnet.core.errors import UserError
from dbnet.core.files import UNREADABLE, words
from dbnet.core.untrusted.opening import opened
from dbnet.monitor.many.differences import differences, names, said, short, spelled, together
from dbnet.monitor.results import Run

if TYPE_CHECKING:
    import pandas as pd

# Columns of a table of runs; what else differs goes into one.
_COLUMNS = 6


def find(where: str | Path | Iterable[str | Path], say: Callable[[str], None] = warn) -> list[Path]:
    """Return the run files that a folder, a pattern like ``runs/*.h5``, or a list of files stands for.

    In folders and patterns checkpoints and data files are passed over, and damaged files with a sentence.

    Raises
    ------
    UserError
        There is none.
    """
    if not isinstance(where, str | Path):
        paths = [Path(path) for path in where]
        # Of many a shell has given the checkpoints, too.
        return [path for path in paths if len(paths) == 1 or not path.name.endswith(".checkpoint.h5")]
    pattern = str(Path(where) / "*.h5") if Path(where).is_dir() else str(where)
    if Path(pattern).is_file():
        return [Path(pattern)]
    found = []
    for path in sorted(map(Path, glob.glob(pattern, recursive=True)), key=_natural):
        if path.is_dir() or path.name.endswith(".checkpoint.h5"):
            continue
        try:
            with opened(path, growing=True) as file:
                if "progress" in file and "config" in file.attrs:
                    found.append(path)
        except UserError as error:
            say(f"Passed over: {error}")
        except UNREADABLE as error:
            say(f"Passed over: '{path}' cannot be read ({words(error)}).")
    if not found:
        raise UserError(f"There is no run file '{pattern}'; give a folder of run files, or a pattern in quotes like 'runs/*.h5'.")
    return found


def _natural(path: Path) -> tuple[str, int, str]:
    """Sort NAME-2 before NAME-10."""
    name, _, number = path.stem.rpartition("-")
    return (str(path.parent / name), int(number), "") if number.isdecimal() else (str(path.parent / path.stem), 0, path.name)


class Runs:
    """The frames of many runs, tidy: every row says by which run it is, and what tells that run from the others.

    Attributes
    ----------
    paths, names
        The run files, and a short name of each.
    varied
        For each run the keys of the configuration that are not the same in all, with their values.
    few
        The runs with their evaluations alone.
    table
        A row per run: what it is, what differs, how it came out (see `summary`).
    progress, evaluation, iterations, events, lost, refused
        The frames of all runs below one another, in front the columns `run` and one per key that differs; read when first used.
    staleness
        A row per run, shard and staleness: updates.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.names = list(paths), names(paths)
        self.few = [Run(path, ["evaluation"]) for path in self.paths]
        self.varied = differences([run.config for run in self.few])

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return listing(self)

    def __iter__(self) -> Any:
        return (Run(path) for path in self.paths)

    @property
    def keys(self) -> list[str]:
        """What differs."""
        return together(self.varied)

    @cached_property
    def table(self) -> pd.DataFrame:
        rows = [
            {"run": name, **{key: values.get(key) for key in self.keys}, **summary(run)}
            for name, values, run in zip(self.names, self.varied, self.few, strict=True)
        ]
        return _whole(rows, self.keys)

    def _joined(self, frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
        import pandas as pd

        out = []
        for name, values, rows in zip(self.names, self.varied, frames, strict=True):
            front = {"run": name, **{key: values.get(key) for key in self.keys}}
            out.append(pd.concat([_whole([front] * len(rows), self.keys), rows], axis=1))
        filled = [frame for frame in out if len(frame)]
        return pd.concat(filled, ignore_index=True) if filled else out[0]

    @cached_property
    def evaluation(self) -> pd.DataFrame:
        return self._joined(run.evaluation for run in self.few)

    @cached_property
    def staleness(self) -> pd.DataFrame:
        def long(run: Run) -> pd.DataFrame:
            rows = run.staleness.rename(columns=lambda name: int(name.removeprefix("shard "))).reset_index()
            rows = rows.melt(id_vars="staleness", var_name="shard", value_name="updates")
            return rows[rows.updates > 0].reset_index(drop=True)[["shard", "staleness", "updates"]]

        return self._joined(long(run) for run in self.few)

    def __getattr__(self, name: str) -> pd.DataFrame:
        if name not in ("progress", "iterations", "events", "lost", "refused"):
            raise AttributeError(f"'Runs' has no attribute {name!r}")
        self.__dict__[name] = out = self._joined(getattr(Run(path, [name]), name) for path in self.paths)
        return out


def _whole(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> pd.DataFrame:
    """Return a frame in whose columns `keys` whole numbers stay whole, where some runs have none, too."""
    import pandas as pd

    out = pd.DataFrame(rows)
    for key in keys if len(rows) else ():
        out[key] = out[key].convert_dtypes()
    return out


def open_runs(where: str | Path | Iterable[str | Path]) -> Runs:
    """Open many run files for analysis: their frames below one another, with what differs as columns.

    Parameters
    ----------
    where
        A pattern like "runs/*.h5", a folder, or a list of paths. Checkpoints and data files in it are passed over.

    Returns
    -------
    Tidy pandas frames; see `Runs`.

    Raises
    ------
    UserError
        There is no run file.
    """
    paths = find(where)
    if not paths:
        raise UserError("No run file is given; give a pattern like 'runs/*.h5', a folder, or a list of paths.")
    return Runs(paths)


def summary(run: Run) -> dict[str, Any]:
    """Return how a run came out.

    accuracy (last, on what is evaluated) and best; loss (last, on the same), and of vectors what it says besides; seconds; epochs;
    steps (of all replicas together); staleness (mean over all updates); ended (how).
    """
    last = run.evaluation.iloc[-1] if len(run.evaluation) else None
    accuracies = run.evaluation.accuracy.dropna()
    updates = run.staleness.to_numpy().sum()
    late = (run.staleness.index.to_numpy()[:, None] * run.staleness.to_numpy()).sum()
    return {
        "accuracy": float("nan") if last is None else float(last.accuracy),
        "best": float(accuracies.max()) if len(accuracies) else float("nan"),
        "loss": float("nan") if last is None else float(last.loss),
        **{name: float("nan") if last is None else float(last[name]) for name in run.errors},
        "seconds": float("nan") if last is None else float(last.seconds),
        "epochs": float("nan") if last is None else float(last.epochs),
        "steps": 0 if last is None else int(last.steps),
        "staleness": float(late / updates) if updates else float("nan"),
        "ended": run.ended,
    }


def listing(runs: Runs) -> str:
    """Return the table of runs as text, a line per run: name, what differs, accuracy, seconds, staleness, how it ended."""
    shown, rest = runs.keys[:_COLUMNS], runs.keys[_COLUMNS:]
    name = short(runs.keys)
    columns = {**scored(runs), "seconds": ".1f", "epochs": ".1f", "staleness": ".2f"}
    out = [["run", *columns, "ended", *(name[key] for key in shown), *(["also"] if rest else [])]]
    for row, values in zip(runs.table.to_dict("records"), runs.varied, strict=True):
        own = [spelled(values[key]) if key in values else "" for key in shown]
        also = [said({key: values[key] for key in rest if key in values}, runs.keys)] if rest else []
        numbers = (f"{row[key]:{form}}" for key, form in columns.items())
        out.append([row["run"], *numbers, row["ended"], *own, *also])
    return aligned([["-" if cell == "nan" else cell for cell in row] for row in out], range(1, 1 + len(columns)))


def scored(runs: Runs) -> dict[str, str]:
    """Return the columns of `Runs.table` that say how good runs are, and their form: accuracies, of vectors losses."""
    found = runs.table
    errors = [name for name in found.columns if name in {name for run in runs.few for name in run.errors}]
    accuracies = {"accuracy": ".4f", "best": ".4f"} if not errors or found.accuracy.notna().any() else {}
    return accuracies | ({"loss": ".4g"} | dict.fromkeys(errors, ".4g") if errors else {})


def aligned(table: Sequence[Sequence[str]], numbers: Container[int]) -> str:
    """Return a table of texts as lines; columns of `numbers` end, the others begin below each other."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = zip(range(len(row)), row, widths, strict=True)
        lines.append("  ".join(cell.rjust(width) if i in numbers else cell.ljust(width) for i, cell, width in cells).rstrip())
    return "\n".join(lines)
