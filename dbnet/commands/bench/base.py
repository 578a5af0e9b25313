"""What a benchmark is: a few figures, each beside what it is compared with, measured in the same process run.

What is compared is timed in turns, so that a busy machine slows both; a figure is the smallest of its repetitions, its spread the
largest over the smallest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.registry import Member


class Row(NamedTuple):
    """One figure: what, dbnet's value, the value it is compared with, and the bar for their ratio.

    Attributes
    ----------
    value, other
        In `unit`; `other` is NaN where there is nothing to compare with.
    ratio, bar
        value / other for times (lower is better) or rates (higher is better), and the wanted bound, as text like '<= 1.0'.
    spread
        Largest over smallest repetition of `value`.
    """

    part: str
    name: str
    value: float
    unit: str
    against: str
    other: float
    ratio: float
    bar: str
    spread: float


def alternate(repeat: int, *functions: Callable[[], object]) -> list[np.ndarray]:
    """Time functions in turns; return each one's seconds, [repeat], after one unmeasured round."""
    out = np.zeros((repeat + 1, len(functions)))
    for i in range(repeat + 1):
        for j, function in enumerate(functions):
            start = time.perf_counter()
            function()
            out[i, j] = time.perf_counter() - start
    return list(out[1:].T)


def row(part: str, name: str, times: np.ndarray, against: str, other: np.ndarray | None, bar: str, scale: float, unit: str) -> Row:
    """Make a row of times; `scale` turns seconds into `unit`, or is an amount, for a unit per second."""
    best, base = times.min(), np.nan if other is None else other.min()
    if unit.endswith("/s"):
        return Row(part, name, scale / best, unit, against, scale / base, base / best, bar, times.max() / best)
    return Row(part, name, best * scale, unit, against, base * scale, best / base, bar, times.max() / best)


def launch(ranks: int) -> list[str] | None:
    """Return the words that start as many ranks; None where there is no mpirun."""
    launcher = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if launcher is None:
        return None
    said = subprocess.run([launcher, "--version"], capture_output=True, text=True, timeout=60).stdout
    crowd = ["--bind-to", "none", "--oversubscribe"] if "Open MPI" in said else []
    return [launcher, *crowd, "-n", str(ranks)]


def on_ranks(part: str, ranks: int, module: str, *words: object, environment: Mapping[str, str] | None = None) -> list[Row]:
    """Run a module, with `words`, under mpirun and return its rows; none, with a word of it, where there is no mpirun.

    It prints lines of tab-separated columns: "row", name, unit, scale, what it is compared with, bar, both lists of seconds.
    """
    start = launch(ranks)
    if start is None:
        print(f"{part}: left out, there is no mpirun on this machine")
        return []
    command = [*start, sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env={**os.environ, **(environment or {})})
    if done.returncode:
        raise UserError(f"'{' '.join(command)}' failed: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
    rows = []
    for line in done.stdout.splitlines():
        if line.startswith("row\t"):
            name, unit, scale, against, bar, *lists = line.split("\t")[1:]
            mine, other = (np.array([float(t) for t in text.split()]) for text in lists)
            rows.append(row(part, name, mine, against, other if other.size else None, bar, float(scale), unit))
    return rows


class Bench(Member):
    """Base of all benchmarks; the docstring's first line is what a user reads."""

    family: ClassVar[str] = "commands.bench"

    def rows(self, repeat: int) -> list[Row]:
        """Measure, each figure `repeat` times."""
        raise NotImplementedError
