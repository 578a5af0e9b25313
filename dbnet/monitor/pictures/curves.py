"""What a run has to show, as curves: numbers against seconds, and staleness as shares of updates.

Rates are means over a window of time, taken from counts that only grow: a row's own rate depends on what happened to fall into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dbnet.monitor.results import Run

# A rate is a mean over this share of a run, and over a second at least.
WINDOW, SHORTEST = 0.04, 1.0
# More replicas or shards are not told apart by eye: their mean, least and largest are shown.
APART = 7


class Curve(NamedTuple):
    """One curve of one run: values at moments, and between which bounds they lie if they are means.

    Attributes
    ----------
    part
        What it shows: "test set", "replica 1", ...
    x, y
        Moments in seconds (staleness: updates between fetch and apply) and values, both [n].
    low, high
        Bounds [n], or nothing.
    look
        "main", "second" or "thin".
    """

    part: str
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    look: str = "main"


def _evaluations(run: Run, what: str) -> Iterator[Curve]:
    rows = run.evaluation
    for name, column, look in ((f"{run.part} set", what, "main"), ("part of the training set", f"train_{what}", "second")):
        known = rows[rows[column].notna()] if column in rows else rows[:0]
        if len(known):
            yield Curve(name, known.seconds.to_numpy(), known[column].to_numpy(), look=look)


def accuracy(run: Run) -> list[Curve]:
    """Return accuracy on the test or validation set and on a part of the training set."""
    return list(_evaluations(run, "accuracy"))


def error(run: Run, what: str) -> list[Curve]:
    """Return what else a loss says of vectors, a column of `evaluation`, of the same."""
    return list(_evaluations(run, what))


def loss(run: Run) -> list[Curve]:
    """Return the mean loss: of evaluations, and of a batch method's iterations; else of the minibatches of each replica."""
    out = list(_evaluations(run, "loss"))
    if len(run.iterations):
        return [*out, Curve("iterations", run.iterations.seconds.to_numpy(), run.iterations.loss.to_numpy(), look="thin")]
    known = run.progress[run.progress.loss.notna()]
    return [*out, *_parts("replica", {r: (rows.seconds.to_numpy(), rows.loss.to_numpy()) for r, rows in known.groupby("replica")})]


def gradient(run: Run) -> list[Curve]:
    """Return the norm of a batch method's gradient."""
    rows = run.iterations
    return [Curve("iterations", rows.seconds.to_numpy(), rows.gradient_norm.to_numpy())] if len(rows) else []


def passes(run: Run) -> list[Curve]:
    """Return how many passes over the data each iteration of a batch method took."""
    rows = run.iterations
    return [Curve("iterations", rows.seconds.to_numpy(), rows.passes.to_numpy(float))] if len(rows) else []


def throughput(run: Run) -> list[Curve]:
    """Return examples per second of all replicas together, and of each."""
    each = {r: rate(rows.seconds.to_numpy(), rows.examples.to_numpy(float), run) for r, rows in run.progress.groupby("replica")}
    if not any(len(x) for x, _ in each.values()):
        return []
    times = np.unique(run.progress.seconds.to_numpy())
    counts = np.zeros(len(times))
    for _, rows in run.progress.groupby("replica"):
        counts += np.interp(times, rows.seconds, rows.examples - rows.examples.iloc[0], left=0.0)
    total = Curve("all replicas", *rate(times, counts, run))
    return [total, *(_parts("replica", each) if len(each) > 1 else [])]


def waiting(run: Run) -> list[Curve]:
    """Return the share of its time, in percent, that each replica waited for others; first their mean."""
    each = {}
    for replica, rows in run.progress.groupby("replica"):
        x, y = rate(rows.seconds.to_numpy(), rows.waited.to_numpy(), run)
        each[replica] = x, 100 * y
    if not any(len(x) for x, _ in each.values()):
        return []
    times = np.unique(np.concatenate([x for x, _ in each.values()]))
    mean = np.nanmean([np.interp(times, x, y, left=np.nan, right=np.nan) for x, y in each.values()], axis=0)
    return [Curve("mean of the replicas", times, mean), *(_parts("replica", each) if len(each) > 1 else [])]


def rate(times: np.ndarray, counts: np.ndarray, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return moments and the growth of `counts` per second [n - 1], each a mean over the window that ends there."""
    if len(times) < 2:
        return times[:0], counts[:0]
    window = max(SHORTEST, WINDOW * float(run.progress.seconds.max()))
    first = np.minimum(np.searchsorted(times, times - window), np.arange(len(times)) - 1)[1:]
    first = np.maximum(first, 0)
    spans = np.maximum(times[1:] - times[first], 1e-9)
    return times[1:], (counts[1:] - counts[first]) / spans


def staleness(run: Run) -> list[Curve]:
    """Return the share of updates, in percent, that had each staleness: of all shards together, and of each."""
    counts = run.staleness.to_numpy(float)
    bins = run.staleness.index.to_numpy(float)
    if not counts.sum():
        return []
    total = Curve("all shards", bins, 100 * counts.sum(axis=1) / counts.sum())
    shares = 100 * counts / np.maximum(counts.sum(axis=0), 1)
    return [total, *(_parts("shard", {s: (bins, shares[:, s]) for s in range(counts.shape[1])}) if counts.shape[1] > 1 else [])]


def lateness(run: Run) -> list[Curve]:
    """Return the mean staleness of the updates within a window, of all shards together and of each."""
    events = run.events
    each = {}
    for shard, rows in events.groupby("shard"):
        late = (rows.applied - rows.fetched).to_numpy(float)
        if len(late) > 1:
            each[shard] = _mean_within(rows.seconds.to_numpy(), late, run)
    if not each:
        return []
    order = np.argsort(events.seconds.to_numpy(), kind="stable")
    late = (events.applied - events.fetched).to_numpy(float)[order]
    total = Curve("all shards", *_mean_within(events.seconds.to_numpy()[order], late, run))
    return [total, *(_parts("shard", each) if len(each) > 1 else [])]


def _mean_within(times: np.ndarray, values: np.ndarray, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return at most 200 moments and the mean of the values in the window that ends there; times ascend."""
    window = max(SHORTEST, WINDOW * float(times[-1]))
    at = np.linspace(times[0], times[-1], min(200, len(times)) + 1)[1:]
    sums = np.append(0.0, values.cumsum())
    first, last = np.searchsorted(times, at - window), np.searchsorted(times, at, side="right")
    return at, (sums[last] - sums[first]) / np.maximum(last - first, 1)


def _parts(what: str, each: dict[int, tuple[np.ndarray, np.ndarray]]) -> list[Curve]:
    """Return a thin curve for each replica or shard; of many their mean, within the least and the largest."""
    each = {number: line for number, line in each.items() if len(line[0])}
    if len(each) <= APART:
        return [Curve(f"{what} {number}", x, y, look="thin") for number, (x, y) in each.items()]
    times = np.unique(np.concatenate([x for x, _ in each.values()]))
    if len(times) > 400:
        times = np.linspace(times[0], times[-1], 400)
    rows = np.array([np.interp(times, x, y, left=np.nan, right=np.nan) for x, y in each.values()])
    mean, low, high = np.nanmean(rows, axis=0), np.nanmin(rows, axis=0), np.nanmax(rows, axis=0)
    return [Curve(f"{len(each)} {what}s: mean, least and largest", times, mean, low, high, "thin")]
