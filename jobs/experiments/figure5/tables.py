"""Tables and picture of Figure 5's experiment, from the rows of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from figure5 import Study
    from matplotlib.axes import Axes

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


# Passes of Sandblaster: what they are drawn with, in the order of `Study.passes`.
PASS_LOOKS = (("#009E73", "^"), ("#CC79A7", "v"), ("#0072B2", "s"), ("#E69F00", "D"))


class Pass(NamedTuple):
    """How passes of Sandblaster are timed.

    Attributes
    ----------
    gigabits, longer
        Of the cards; how many times as long as over our examples.
    pushed
        After how many of the paper's examples a replica pushes; 0: twice a pass.
    """

    gigabits: float
    longer: float
    pushed: int = 0

    def __str__(self) -> str:
        longer = f"{self.longer:g} times as long" if self.longer != 1 else "as short as our data"
        return f"{self.gigabits:g} Gb/s, {longer}, " + (f"a push every {self.pushed:,}" if self.pushed else "two pushes")


class Point(NamedTuple):
    """Seconds to the goal of those seeds that reached it, of how many, and the rows of their runs."""

    replicas: int
    machines: int
    seconds: tuple[float, ...]
    seeds: int
    rows: tuple[dict[str, Any], ...] = ()

    @property
    def middle(self) -> float:
        """The median; of none, or where half of the seeds did not reach it, infinity."""
        return float(np.median([*self.seconds, *[np.inf] * (self.seeds - len(self.seconds))]))


def points(rows: Sequence[dict[str, Any]], rates: dict[str, float], gigabits: float = 1.0) -> dict[str, list[Point]]:
    """Return what is drawn of each method."""
    out: dict[str, list[Point]] = {}
    for method, rate in rates.items():
        own = [row for row in rows if (row["method"], row["rate"], row["gigabits"]) == (method, rate, gigabits)]
        for n in sorted({row["replicas"] for row in own}):
            found = tuple(row for row in own if row["replicas"] == n)
            reached = tuple(float(row["seconds"]) for row in found if row["seconds"] != "")
            out.setdefault(method, []).append(Point(n, CUT * n + SHARD_MACHINES, reached, len(found), found))
    needed = [row["passes"] for row in rows if row["method"] == "Sandblaster" and row["passes"] != ""]
    for n, seconds in pass_seconds(rows, Pass(gigabits, 1.0)).items():
        out.setdefault("Sandblaster", []).append(Point(n, n + SHARD_MACHINES, tuple(p * seconds for p in needed), len(needed)))
    return out


def pass_seconds(rows: Sequence[dict[str, Any]], wanted: Pass) -> dict[int, float]:
    """Return the seconds of a timed pass by replicas."""
    key = (wanted.gigabits, wanted.longer, wanted.pushed == 0)
    own = [row for row in rows if row["method"] == "passes"]
    found = [row for row in own if (row["gigabits"], row["longer"], row["portions"] == 2 * row["replicas"]) == key]
    return {row["replicas"]: row["seconds_in_all"] / row["passes_in_all"] for row in sorted(found, key=lambda row: row["replicas"])}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def told(rows: Sequence[dict[str, Any]], rates: dict[int, dict[str, float]], study: Study) -> str:
    """Return the tables of README.md; `rates` by the replicas that they were tuned with."""
    first, *others = study.tuned_at
    measured = ("reached", "gradients", "gradients a second", "staleness")
    head = ["method", "replicas", "machines", "Gb/s", f"seconds to {study.goal:.0%}", *measured]
    lines = []
    for gigabits in (study.gigabits, study.faster):
        for method, own in points(rows, rates[first], gigabits).items():
            lines += [line(NAMES[method], gigabits, point) for point in own]
            if gigabits == study.gigabits:
                again = [point for at in others for point in retuned(rows, rates, at, first).get(method, ())]
                lines += [line(f"{NAMES[method]} {point.rows[0]['rate']:g}", gigabits, point) for point in again]
    parts = [table(head, lines), tried(rows, study)]
    lines = []
    for one in study.passes:
        seconds = pass_seconds(rows, one)
        lines.append([str(one), *(f"{seconds[n]:,.1f}" if n in seconds else "not run" for n in study.batch_replicas)])
    parts.append(table(["seconds of a pass", *map(str, study.batch_replicas)], lines))
    needed = [f"{row['passes']} (seed {row['seed']})" for row in rows if row["method"] == "Sandblaster"]
    return "\n\n".join([*parts, f"Passes of L-BFGS to {study.goal:.0%}: {', '.join(needed)}."])


def tried(rows: Sequence[dict[str, Any]], study: Study) -> str:
    """Return the table of the rates that were tried."""
    same = [row for row in rows if (row["gigabits"], row["seed"]) == (study.gigabits, study.seeds[0])]
    found = {(row["method"], row["rate"], row["replicas"]): f"{row['seconds'] or 'never'} ({row['accuracy']})" for row in same}
    head = ["tried", "rate", *(f"seconds to {study.goal:.0%}, {at} replicas (last accuracy)" for at in study.tuned_at)]
    lines = [
        [NAMES[method], f"{rate:g}", *(found.get((method, rate, at), "not run") for at in study.tuned_at)]
        for method, rates in study.rates
        for rate in rates
    ]
    return table(head, lines)


def retuned(rows: Sequence[dict[str, Any]], rates: dict[int, dict[str, float]], at: int, first: int) -> dict[str, list[Point]]:
    """Return the points of `at` replicas with rates of their own, where these are not those tuned with `first` replicas."""
    own = {method: rate for method, rate in rates[at].items() if rate != rates[first][method]}
    found = points(rows, own)
    return {method: [point for point in found.get(method, ()) if point.replicas == at] for method in own}


def line(name: str, gigabits: float, point: Point) -> list[str]:
    """Return a point's line of the table."""
    span = f"{point.middle:.0f} ({min(point.seconds):.0f} to {max(point.seconds):.0f})" if point.seconds else "never"
    out = [name, str(point.replicas), str(point.machines), f"{gigabits:g}", span, f"{len(point.seconds)} of {point.seeds}"]
    if not point.rows:
        return [*out, "-", "-", "-"]
    at = [row["gradients"] for row in point.rows if row["gradients"] != ""]
    speed = np.median([row["gradients_in_all"] / row["seconds_in_all"] for row in point.rows])
    stale = np.median([row["staleness"] for row in point.rows])
    return [*out, f"{np.median(at):,.0f}" if at else "-", f"{speed:.0f}", f"{stale:.0f}"]


def draw(rows: Sequence[dict[str, Any]], rates: dict[int, dict[str, float]], study: Study, path: Path) -> None:
    """Draw the times to the goal, the paper's, and those of passes beside the paper's hours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ours, theirs, passes) = pyplot.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    draw_ours(ours, rows, rates, study)
    for method, hours in PAPER.items():
        colour, mark = LOOKS[method]
        after = [value - PAPER_WARMSTART for value in hours.values()]
        theirs.plot(list(hours), after, color=colour, marker=mark, label=NAMES[method])
    theirs.set(title="Dean et al. 2012, Figure 5", ylabel="hours to 16 %")
    for panel in (ours, theirs):
        panel.set(xlabel="machines", xscale="log", yscale="log")
        panel.set_xticks([300, 500, 1000, 2000, 5000], ["300", "500", "1,000", "2,000", "5,000"])
    ours.set_yticks([5, 10, 20, 50, 100, 200, 500, 1000], ["5", "10", "20", "50", "100", "200", "500", "1,000"])
    theirs.set_yticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    draw_passes(passes, rows, study)
    for panel in (ours, theirs, passes):
        panel.legend(fontsize=7.5)
        panel.set_xticks([], minor=True)
        panel.set_yticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.suptitle("Time after the warmstart")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_ours(panel: Axes, rows: Sequence[dict[str, Any]], rates: dict[int, dict[str, float]], study: Study) -> None:
    """Draw the times to the goal; what did not get there stands at the top, hollow."""
    first, *others = study.tuned_at
    for gigabits, dashes in ((study.gigabits, "-"), (study.faster, ":")):
        for method, own in points(rows, rates[first], gigabits).items():
            colour, mark = LOOKS[method]
            some = [point for point in own if point.seconds]
            middle = np.array([np.median(point.seconds) for point in some])
            spread = [middle - [min(p.seconds) for p in some], [max(p.seconds) for p in some] - middle]
            label = NAMES[method] if gigabits == study.gigabits else None
            machines = [p.machines for p in some]
            panel.errorbar(machines, middle, spread, color=colour, ls=dashes, marker=mark, ms=5, capsize=3, label=label)
            for missed in (point for point in own if len(point.seconds) < point.seeds and gigabits == study.gigabits):
                at, words = panel.get_xaxis_transform(), f"{missed.seeds - len(missed.seconds)} of {missed.seeds}"
                panel.plot(missed.machines, 0.96, mark, color=colour, mfc="none", ms=9, transform=at, clip_on=False)
                panel.annotate(words, (missed.machines, 0.90), xycoords=at, ha="center", fontsize=7.5, color=colour)
    for at in others:
        for method, own in retuned(rows, rates, at, first).items():
            for point in (point for point in own if point.seconds):
                label = f"{NAMES[method]} {point.rows[0]['rate']:g}"
                panel.plot(point.machines, point.middle, "*", color=LOOKS[method][0], ms=12, label=label)
    panel.plot([], [], ":", color="#555555", label=f"{study.faster:g} Gb/s")
    panel.set(title=f"here, {study.gigabits:g} Gb/s; hollow: did not get there", ylabel=f"virtual seconds to {study.goal:.0%}")


def draw_passes(panel: Axes, rows: Sequence[dict[str, Any]], study: Study) -> None:
    """Draw how much shorter a pass is than with the fewest replicas, here, at best, and in the paper."""
    replicas = np.array(study.batch_replicas)
    panel.plot(replicas, replicas[0] / replicas, ":", color="#888888", label="as many times shorter as replicas are more")
    hours = {machines - SHARD_MACHINES: value - PAPER_WARMSTART for machines, value in PAPER["Sandblaster"].items()}
    panel.plot(list(hours), np.array(list(hours.values())) / max(hours.values()), "k--", label="hours of the paper")
    for one, (colour, mark) in zip(study.passes, PASS_LOOKS, strict=False):
        seconds = pass_seconds(rows, one)
        if replicas[0] in seconds:
            shorter = np.array(list(seconds.values())) / seconds[replicas[0]]
            panel.plot(list(seconds), shorter, color=colour, marker=mark, label=str(one))
    panel.set(title="a pass of Sandblaster", xlabel="replicas", ylabel=f"time / time with {replicas[0]:,}")
    panel.set(xscale="log", yscale="log")
    panel.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    panel.set_xticks(replicas, [f"{n:,}" for n in replicas])
