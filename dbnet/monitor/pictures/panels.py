"""One set of axes per panel: the curves of one run in all their parts, or the main ones of several, repetitions as a band."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dbnet.monitor.many.differences import Group
from dbnet.monitor.pictures import curves
from dbnet.monitor.pictures.against import AXES, COUNTS, axis
from dbnet.monitor.pictures.curves import Curve
from dbnet.monitor.results import Run


def plain(text: str) -> str:
    """Return a text from a run so that matplotlib takes no part of it for a formula."""
    return text.replace("$", r"\$")


# Okabe and Ito (2008): told apart by the colour-blind, too. More curves than that get another dash.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
# The share of updates beyond which very late ones are not shown: they would squeeze all others into a corner.
MOST = 0.999
POINTS = 200


class Panel(NamedTuple):
    """What a panel shows.

    Attributes
    ----------
    title, unit
        Its head, and the label of its upright axis.
    curves
        Makes a run's curves, the main one first.
    scale
        Of the upright axis; "late": only as far as the later values go.
    own
        The label of the other axis, where that is no time.
    empty
        What is said where there is nothing to draw.
    """

    title: str
    unit: str
    curves: Callable[[Run], list[Curve]]
    scale: str = "linear"
    own: str = ""
    empty: str = "nothing of it is recorded"


_BATCH = "a batch method's iterations alone have one"
PANELS = {
    "loss": Panel("loss", "mean loss per example", curves.loss, "log"),
    "accuracy": Panel("accuracy", "share of examples classified right", curves.accuracy, "late"),
    "throughput": Panel("throughput", "examples per second", curves.throughput),
    "waiting": Panel("waiting for others", "share of a replica's time [%]", curves.waiting),
    "staleness": Panel("staleness", "share of updates [%]", curves.staleness, own="updates between fetch and apply"),
    "lateness": Panel(
        "mean staleness", "updates between fetch and apply", curves.lateness, empty="it needs updates as rows, record.events"
    ),
    "gradient": Panel("gradient", "norm of the gradient", curves.gradient, "log", empty=_BATCH),
    "passes": Panel("passes per iteration", "passes over the data", curves.passes, empty=_BATCH),
}


def panel(name: str) -> Panel:
    """Return the panel of this name, or of this column of `evaluation`."""
    words = name.replace("_", " ")
    return PANELS.get(name) or Panel(words, words, partial(curves.error, what=name), "late")


def colour(index: int) -> dict[str, Any]:
    """Return colour and dash of the curve of this number."""
    return {"color": COLOURS[index % len(COLOURS)], "ls": DASHES[index // len(COLOURS) % len(DASHES)]}


def fill(axes: Any, panel: Panel, groups: Sequence[Group], against: str) -> None:
    """Draw a panel of one run, or of several."""
    if len(groups) == 1 and len(groups[0].runs) == 1:
        shown = _one(axes, panel, groups[0].runs[0], against)
    else:
        points = len(groups) <= len(COLOURS)
        shown = [_group(axes, panel, group, against, colour(index), points) for index, group in enumerate(groups)]
    _dress(axes, panel, against, [y for y in shown if len(y)])
    if panel.title == "accuracy" and len(groups) == 1 and (tests := groups[0].tests) == tests:
        axes.set_title(f"accuracy (best on the {groups[0].runs[0].part} set {tests:.4f})")


def _one(axes: Any, panel: Panel, run: Run, against: str) -> list[np.ndarray]:
    """Draw all curves of a run; return the values of those that are not thin."""
    made, out, thin = panel.curves(run), [], 0
    if panel.own and len(made) > 1:
        return _bars(axes, made[1:])
    for curve in made:
        x = curve.x if panel.own else axis(run, curve.x, against)
        if curve.look == "thin":
            look = {**colour(thin), "lw": 1.0, "alpha": 0.85, "zorder": 1}
            thin += 1
        else:
            look = {"color": "black", "lw": 1.6, "ls": "-" if curve.look == "main" else "--", "zorder": 3}
            out.append(curve.y)
        if panel.own:
            return _bars(axes, made)
        few = len(x) <= 40 and curve.look != "thin"
        axes.plot(x, curve.y, label=curve.part, marker="." if few else None, ms=5, **look)
        if curve.low is not None and curve.high is not None:
            axes.fill_between(x, curve.low, curve.high, color=look["color"], alpha=0.2, lw=0, zorder=0)
    return out


def _bars(axes: Any, made: Sequence[Curve]) -> list[np.ndarray]:
    """Draw shares by staleness, a colour per shard."""
    if made[0].low is not None:
        curve = made[0]
        axes.bar(curve.x, curve.y, 0.8, color=COLOURS[0], label=curve.part)
        axes.errorbar(curve.x, curve.y, [curve.y - curve.low, curve.high - curve.y], fmt="none", ecolor="black", elinewidth=0.8)
    else:
        width = 0.8 / len(made)
        for index, curve in enumerate(made):
            at = curve.x + (index - (len(made) - 1) / 2) * width
            axes.bar(at, curve.y, width, color=COLOURS[index % len(COLOURS)], label=curve.part)
    axes.set_xlim(-0.6, max(_most(curve) for curve in made) + 0.6)
    return []


def _most(curve: Curve) -> int:
    """Return the staleness up to which almost all updates lie."""
    return int((curve.y.cumsum() < 100 * MOST).sum())


def _group(axes: Any, panel: Panel, group: Group, against: str, look: dict[str, Any], points: bool) -> np.ndarray:
    """Draw the main curve of runs that repeat one another: their mean, within the least and the largest; return the mean.

    `points`: few values are shown as such; among many curves they would hide the dashes.
    """
    lines = []
    for run in group.runs:
        made = panel.curves(run)[:1]
        lines += [(curve.x if panel.own else axis(run, curve.x, against), curve.y) for curve in made if len(curve.x)]
    label = plain(f"{group.label} {group.count}".rstrip())
    if not lines:
        axes.plot([], [], label=label, **look)
        return np.zeros(0)
    x, rows = together(lines, bool(panel.own))
    if panel.own:
        # Steps begin and end at nothing.
        x, rows = np.concatenate([[-1], x, [x[-1] + 1]]), np.pad(rows, ((0, 0), (1, 1)))
    mean = rows.mean(axis=0)
    draw = {"drawstyle": "steps-mid"} if panel.own else {"marker": "." if len(x) <= 40 and points else None, "ms": 5}
    axes.plot(x, mean, label=label, lw=1.6, **draw, **look)
    if len(rows) > 1:
        step = {"step": "mid"} if panel.own else {}
        axes.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=look["color"], alpha=0.2, lw=0, **step)
    if panel.own:
        return mean[: _most(Curve("", x, mean)) + 1]
    return mean


def together(lines: Sequence[tuple[np.ndarray, np.ndarray]], shares: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Bring curves to the same places: return these [n] and values [curves, n], interpolated between a curve's own places.

    They end where the shortest one ends: beyond it their mean would be one of others. Shares are 0 where a curve has none.
    """
    first = lines[0][0]
    if all(len(x) == len(first) and np.array_equal(x, first) for x, _ in lines):
        return first, np.array([y for _, y in lines])
    if shares:
        x = max((x for x, _ in lines), key=len)
        return x, np.array([np.append(y, np.zeros(len(x) - len(y))) for _, y in lines])
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    fewest = min(len(x) for x, _ in lines)
    x = np.linspace(low, high, min(POINTS, max(2, fewest))) if high > low else np.array([low])
    return x, np.array([np.interp(x, *line) for line in lines])


def _dress(axes: Any, panel: Panel, against: str, shown: Sequence[np.ndarray]) -> None:
    """Label axes with their units, whole ticks for counts; accuracies are shown where they differ."""
    axes.set(title=panel.title, ylabel=panel.unit, xlabel=panel.own or AXES[against])
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.has_data() or not (axes.patches or any(len(line.get_xdata()) for line in axes.lines)):
        axes.text(0.5, 0.5, panel.empty, ha="center", va="center", transform=axes.transAxes, color="#666666")
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        return
    if panel.scale == "log" and any((line.get_ydata() > 0).any() for line in axes.lines):
        axes.set_yscale("log")
    elif panel.scale == "late":
        _zoom(axes, shown)
    else:
        axes.set_ylim(bottom=0)
    for counted, way in ((panel.own or against in COUNTS, axes.xaxis), (panel.title.startswith("passes"), axes.yaxis)):
        if counted:
            way.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if panel.own and shown:
        axes.set_xlim(-0.6, max(map(len, shown)) - 1.4)
    elif not panel.own:
        starts = [line.get_xdata().min() for line in axes.lines if len(line.get_xdata())]
        # A run that went on from a checkpoint begins late.
        if min(starts) < 0.3 * axes.get_xlim()[1]:
            axes.set_xlim(left=0)


def _zoom(axes: Any, shown: Sequence[np.ndarray]) -> None:
    """Show accuracies and errors where they differ: the first steep points may lie beyond."""
    known = [y[np.isfinite(y)] for y in shown]
    late = [y[len(y) // 8 :] if len(y) > 8 else y for y in known if len(y)]
    if not late:
        return
    low, high = min(y.min() for y in late), max(y.max() for y in late)
    margin = max(0.08 * (high - low), 2e-3 * max(abs(low), abs(high)))
    least, most = low - margin if low < 0 else max(0.0, low - margin), high + margin
    axes.set_ylim(least, most if high > 1 else min(most, 1.005))
    for beyond, where in (([y < least for y in known], "below"), ([y > most for y in known], "above")):
        if count := int(max(rows.sum() for rows in beyond)):
            axes.set_xlabel(f"{axes.get_xlabel()}\n({count} early evaluation{'s lie' if count > 1 else ' lies'} {where})")
