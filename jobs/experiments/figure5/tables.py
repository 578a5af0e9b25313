"""Tables and picture of Figure 5's experiment, from the rows of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from figure5 import Study

# 4 machines a Downpour replica, 1 a Sandblaster replica, 256 for shards.
SHARD_MACHINES, CUT = 256, 4
RULES = {"fixed rate": "sgd", "Adagrad": "adagrad"}
# Dean et al. 2012, Figure 5, digitised: hours to 16 % by machines. The warmstart, 10.8 hours, is taken off.
PAPER = {
    "fixed rate": {296: 74, 336: 58, 656: 32, 1056: 33},
    "Adagrad": {296: 38, 336: 35, 656: 17, 1056: 16},
    "Sandblaster": {756: 56, 1256: 40, 2256: 27, 5256: 25},
}
PAPER_WARMSTART = 10.8
# Okabe and Ito's colours, which the colour-blind tell apart.
LOOKS = {"fixed rate": ("#D55E00", "s"), "Adagrad": ("#0072B2", "o"), "Sandblaster": ("#009E73", "^")}
NAMES = {"fixed rate": "Downpour, fixed rate", "Adagrad": "Downpour, Adagrad", "Sandblaster": "Sandblaster L-BFGS"}


class Point(NamedTuple):
    """Seconds to the goal of those seeds that reached it, and of how many."""

    replicas: int
    machines: int
    seconds: tuple[float, ...]
    seeds: int

    @property
    def middle(self) -> float:
        """The median; of none, or where half of the seeds did not reach it, infinity."""
        return float(np.median([*self.seconds, *[np.inf] * (self.seeds - len(self.seconds))]))


def points(rows: Sequence[dict[str, Any]], rates: dict[str, float]) -> dict[str, list[Point]]:
    """Return what is drawn of each method."""
    out: dict[str, list[Point]] = {}
    for method, rate in rates.items():
        own = [row for row in rows if row["method"] == method and row["rate"] == rate]
        for n in sorted({row["replicas"] for row in own}):
            found = [row["seconds"] for row in own if row["replicas"] == n]
            reached = tuple(float(one) for one in found if one != "")
            out.setdefault(method, []).append(Point(n, CUT * n + SHARD_MACHINES, reached, len(found)))
    needed = [row["passes"] for row in rows if row["method"] == "Sandblaster" and row["passes"] != ""]
    for n, seconds in pass_seconds(rows, 1.0, 1.0).items():
        out.setdefault("Sandblaster", []).append(Point(n, n + SHARD_MACHINES, tuple(p * seconds for p in needed), len(needed)))
    return out


def pass_seconds(rows: Sequence[dict[str, Any]], gigabits: float, longer: float) -> dict[int, float]:
    """Return the seconds of a timed pass by replicas."""
    own = [row for row in rows if row["method"] == "passes" and row["gigabits"] == gigabits]
    least = {
        n: min(row["each"] for row in rows if row["method"] == "passes" and row["replicas"] == n)
        for n in {r["replicas"] for r in own}
    }
    return {
        row["replicas"]: row["seconds_in_all"] / row["passes_in_all"]
        for row in sorted(own, key=lambda row: row["replicas"])
        if round(row["each"] / least[row["replicas"]]) == longer
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def told(rows: Sequence[dict[str, Any]], rates: dict[str, float], study: Study) -> str:
    """Return the tables of README.md."""
    parts, found = [], points(rows, rates)
    head = [
        "method",
        "replicas",
        "machines",
        f"seconds to {study.goal:.0%}",
        "reached",
        "gradients",
        "gradients a second",
        "staleness",
    ]
    lines = []
    for method, own in found.items():
        for point in own:
            span = f"{point.middle:.0f} ({min(point.seconds):.0f} to {max(point.seconds):.0f})" if point.seconds else "never"
            line = [NAMES[method], str(point.replicas), str(point.machines), span, f"{len(point.seconds)} of {point.seeds}"]
            mine = [
                row
                for row in rows
                if row["method"] == method and row["replicas"] == point.replicas and row["rate"] == rates.get(method)
            ]
            if mine:
                at = [row["gradients"] for row in mine if row["gradients"] != ""]
                speed = np.median([row["gradients_in_all"] / row["seconds_in_all"] for row in mine])
                line += [
                    f"{np.median(at):,.0f}" if at else "-",
                    f"{speed:.0f}",
                    f"{np.median([row['staleness'] for row in mine]):.0f}",
                ]
            lines.append(line + ["-"] * (len(head) - len(line)))
    parts.append(table(head, lines))
    tried = [row for row in rows if row["replicas"] == study.tuned_at and row["seed"] == study.seeds[0] and row["method"] in RULES]
    shown = [[NAMES[r["method"]], f"{r['rate']:g}", str(r["seconds"] or "never"), f"{r['accuracy']:.3f}"] for r in tried]
    parts.append(table(["tried", "rate", f"seconds to {study.goal:.0%}, {study.tuned_at} replicas", "last accuracy"], shown))
    head = ["seconds of a pass", *map(str, study.batch_replicas)]
    lines = []
    for gigabits, longer in study.passes:
        seconds = pass_seconds(rows, gigabits, longer)
        lines.append([curve(gigabits, longer), *(f"{seconds[n]:.1f}" if n in seconds else "not run" for n in study.batch_replicas)])
    parts.append(table(head, lines))
    needed = [f"{row['passes']} (seed {row['seed']})" for row in rows if row["method"] == "Sandblaster"]
    return "\n\n".join([*parts, f"Passes of L-BFGS to {study.goal:.0%}: {', '.join(needed)}."])


def curve(gigabits: float, longer: float) -> str:
    return f"{gigabits:g} Gb/s" + (f", examples {longer:g} times as long" if longer != 1 else "")


def draw(rows: Sequence[dict[str, Any]], rates: dict[str, float], study: Study, path: Path) -> None:
    """Draw the times to the goal, the paper's, and those of passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ours, theirs, passes) = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for method, own in points(rows, rates).items():
        colour, mark = LOOKS[method]
        some = [point for point in own if point.seconds]
        middle = np.array([np.median(point.seconds) for point in some])
        spread = [middle - [min(p.seconds) for p in some], [max(p.seconds) for p in some] - middle]
        ours.errorbar([p.machines for p in some], middle, spread, color=colour, marker=mark, capsize=3, label=NAMES[method])
        for point in own:
            missed = point.seeds - len(point.seconds)
            if missed:
                ours.plot(
                    point.machines, 0.96, mark, color=colour, mfc="none", ms=9, transform=ours.get_xaxis_transform(), clip_on=False
                )
                words = f"{missed} of {point.seeds}"
                ours.annotate(
                    words, (point.machines, 0.91), xycoords=ours.get_xaxis_transform(), ha="center", fontsize=7, color=colour
                )
        hours = [value - PAPER_WARMSTART for value in PAPER[method].values()]
        theirs.plot(list(PAPER[method]), hours, color=colour, marker=mark, label=NAMES[method])
    ours.set(title="here, 1 Gb/s; hollow: did not get there", ylabel=f"virtual seconds to {study.goal:.0%}")
    theirs.set(title="Dean et al. 2012, Figure 5", ylabel="hours to 16 %")
    for panel in (ours, theirs):
        panel.set(xlabel="machines", xscale="log", yscale="log")
        panel.set_xticks([300, 500, 1000, 2000, 5000], ["300", "500", "1,000", "2,000", "5,000"])
        panel.legend(fontsize=8)
    theirs.set_yticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    ours.set_yticks([20, 50, 100, 200, 500, 1000], ["20", "50", "100", "200", "500", "1,000"])
    for (gigabits, longer), colour, mark in zip(study.passes, ("#009E73", "#CC79A7", "#E69F00"), "^vD", strict=False):
        seconds = pass_seconds(rows, gigabits, longer)
        if not seconds:
            continue
        passes.plot(list(seconds), list(seconds.values()), color=colour, marker=mark, label=curve(gigabits, longer))
    passes.set(title="a pass of Sandblaster", xlabel="replicas", ylabel="virtual seconds", xscale="log", yscale="log")
    passes.set_yticks([10, 20, 50, 100, 200, 500, 1000], ["10", "20", "50", "100", "200", "500", "1,000"])
    passes.set_xticks(study.batch_replicas, [f"{n:,}" for n in study.batch_replicas])
    passes.legend(fontsize=8)
    for panel in (ours, theirs, passes):
        panel.set_xticks([], minor=True)
        panel.set_yticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.suptitle("Time after the warmstart")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
