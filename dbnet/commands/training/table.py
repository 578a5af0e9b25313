"""What came out of a grid, a line for each of its settings: means over the seeds, and their spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dbnet.commands.training.grid import GridPoint, spelled
from dbnet.core.toml import written
from dbnet.monitor.many.differences import SEED, short
from dbnet.monitor.many.frames import aligned, summary
from dbnet.monitor.results import Run

# What is said of a run, and how; what is no column of these is an error of vectors.
_COLUMNS = {"accuracy": ".4f", "best": ".4f", "loss": ".4g", "seconds": ".1f", "staleness": ".2f"}
_ERROR = ".4g"


def rows(points: Sequence[GridPoint], files: Sequence[Path | None]) -> list[dict[str, Any]]:
    """Return a row for all runs that differ in nothing but the seed.

    Returns
    -------
    settings (what is its own), runs (that are finished), of (how many there are to be); and as [mean, standard deviation] over the
    runs (None where there is none, of fewer than two no deviation) accuracy (last, on what is evaluated), best (of the whole run),
    loss (last), what it says besides of vectors, seconds, staleness.
    """
    found: dict[str, dict[str, Any]] = {}
    errors: dict[str, None] = {}
    for point, path in zip(points, files, strict=True):
        settings = {key: value for key, value in point.values.items() if key != SEED}
        row = found.setdefault(written(settings), {"settings": settings, "of": 0, "came": []})
        row["of"] += 1
        if path is not None:
            run = Run(path, ["evaluation"])
            row["came"].append(summary(run))
            errors |= dict.fromkeys(run.errors)
    out, columns = [], ["accuracy", "best", "loss", *errors, "seconds", "staleness"]
    for row in found.values():
        came = row["came"]
        numbers = {name: [one[name] for one in came if one[name] == one[name]] for name in columns}
        means = {
            name: [mean(values) if values else None, stdev(values) if len(values) > 1 else None] for name, values in numbers.items()
        }
        out.append({"settings": row["settings"], "runs": len(came), "of": row["of"], **means})
    return out


def table(lines: Sequence[dict[str, Any]], part: str) -> str:
    """Return rows as text, and which of them is the best one on the `part` that is evaluated."""
    keys = list(lines[0]["settings"])
    columns = [name for name in lines[0] if name not in ("settings", "runs", "of")]
    shown = [name for name in columns if any(row[name][0] is not None for row in lines)]
    out = [[*(short(keys)[key] for key in keys), "runs", *shown]]
    for row in lines:
        runs = str(row["runs"]) if row["runs"] == row["of"] else f"{row['runs']} of {row['of']}"
        own = [spelled(value) for value in row["settings"].values()]
        out.append([*own, runs, *(_number(row[name], _COLUMNS.get(name, _ERROR)) for name in shown)])
    text = aligned(out, range(len(keys), len(out[0])))
    judged = "accuracy" if "accuracy" in shown else "loss"
    ranked = sorted((row for row in lines if row[judged][0] is not None), key=lambda row: row[judged][0])
    if len(ranked) < 2:
        return text
    best = ranked[-1 if judged == "accuracy" else 0]
    words = ", ".join(f"{key}={spelled(value)}" for key, value in best["settings"].items())
    return f"{text}\nBest: {words}, {part} {judged} {_number(best[judged], _COLUMNS[judged])}"


def _number(both: Sequence[float | None], form: str) -> str:
    middle, spread = both
    return "-" if middle is None else f"{middle:{form}}" + ("" if spread is None else f" ± {spread:{form.replace('.4g', '.2g')}}")
