"""What must hold of a loss: arrays written in place, its delta is its derivative, and that cut it equals itself uncut."""

from __future__ import annotations

from functools import partial

import numpy as np

from dbnet.commands.see.checks.base import Broken, Checks, agrees, same, unwritten
from dbnet.core.ranges import Range, split
from dbnet.network.losses.base import Loss

# Output units, columns, and how many of these are examples.
_UNITS, _BATCH, _COUNT = 10, 6, 5


def checks(loss: Loss) -> Checks:
    """Return what must hold of a loss."""
    made = {"in place": in_place, "gradient": gradient, "padding": padding, "cut = uncut": cut, "float32": single}
    return {name: partial(look, loss) for name, look in made.items()}


def targets(loss: Loss) -> dict[str, np.ndarray]:
    """Return the targets that a loss is tried on: labels, and vectors where it allows them."""
    rng = np.random.default_rng(4)
    out = {"labels": rng.integers(0, _UNITS, _BATCH)}
    return {**out, "vectors": rng.standard_normal((_UNITS, _BATCH))} if loss.vectors else out


def outputs(dtype: str = "float64") -> np.ndarray:
    """Return outputs [units, batch] of a network."""
    return (np.random.default_rng(3).standard_normal((_UNITS, _BATCH)) * 3).astype(dtype)


def computed(
    loss: Loss, y: np.ndarray, target: np.ndarray, cuts: list[Range], dirt: float = 0.0
) -> tuple[list[tuple[float, int]], np.ndarray, np.ndarray]:
    """Return the score that each partition finds, the delta of all units, and the combined statistics.

    `dirt` is what the arrays hold before anything is written.
    """
    stats = np.full((len(cuts), loss.width, _BATCH), dirt, y.dtype)
    deltas = [np.full((c.size, _BATCH), dirt, y.dtype) for c in cuts]
    target = target if target.ndim == 1 else target.astype(y.dtype)
    for c, s, d in zip(cuts, stats, deltas, strict=True):
        loss.reduce(y[c.slice].copy(), target, c.lo, s, d)
    together, scores = stats.copy(), []
    for c, s, d in zip(cuts, stats, deltas, strict=True):
        loss.combine(together.copy(), s)
        loss.delta(y[c.slice].copy(), target, c.lo, s, _COUNT, d)
        scores.append(loss.score(s, target, _COUNT))
    return scores, np.concatenate(deltas), stats[0]


def in_place(loss: Loss) -> str:
    """Statistics and deltas are written into the arrays that are given, all of them."""
    for target in targets(loss).values():
        _, delta, stats = computed(loss, outputs(), target, split(_UNITS, 1), np.nan)
        unwritten(stats, f"stats [width = {loss.width}, batch]", "let reduce() write into it: stats[0, :] = ...")
        unwritten(delta, "dy", "let delta() write into it: dy[...] = ...")
    return "statistics and deltas written in place"


def gradient(loss: Loss) -> str:
    """The delta equals central differences of the mean loss, in float64."""
    worst = 0.0
    for name, target in targets(loss).items():
        y = outputs()
        delta = computed(loss, y, target, split(_UNITS, 1))[1]

        def value(y: np.ndarray = y, target: np.ndarray = target) -> float:
            return computed(loss, y, target, split(_UNITS, 1))[0][0][0] / _COUNT

        worst = max(worst, agrees(value, y, delta, f"dy (with {name} as targets; it is d loss / dy divided by `count`)"))
    return f"{worst:.0e} from differences in float64"


def padding(loss: Loss) -> str:
    """Columns from `count` on count nothing."""
    for target in targets(loss).values():
        y = outputs()
        scores, delta, _ = computed(loss, y, target, split(_UNITS, 1))
        y[:, _COUNT:] = 7.0
        others, changed, _ = computed(loss, y, target, split(_UNITS, 1))
        if scores != others:
            raise Broken("score() counts columns from `count` on, which are padding; sum stats[0, :count]")
        if delta[:, _COUNT:].any() or not np.array_equal(delta, changed):
            raise Broken("delta() gives columns from `count` on a gradient; these are padding: dy[:, count:] = 0")
        if not 0 <= scores[0][1] <= _COUNT:
            raise Broken(f"score() finds {scores[0][1]} right answers in {_COUNT} examples")
    return "columns beyond the examples count nothing"


def cut(loss: Loss) -> str:
    """The outputs cut over partitions give the same loss and the same delta."""
    for target in targets(loss).values():
        (whole,), delta, _ = computed(loss, outputs(), target, split(_UNITS, 1))
        for partitions in (2, 3, _UNITS + 2):
            cuts = split(_UNITS, partitions)
            scores, found, _ = computed(loss, outputs(), target, cuts)
            if any(score != scores[0] for score in scores):
                raise Broken(
                    f"on {partitions} partitions score() differs from one to another; compute it from the combined statistics"
                )
            same(np.array(scores[0], float), np.array(whole, float), 1e-12, f"[loss, right answers] on {partitions} partitions")
            same(found, delta, 1e-12, f"dy on {partitions} partitions; `lo` is the index of a partition's first unit")
    return f"on 2, 3 and {_UNITS + 2} partitions"


def single(loss: Loss) -> str:
    """In float32 the same comes out, to its rounding."""
    worst = 0.0
    for target in targets(loss).values():
        (wanted,), delta, _ = computed(loss, outputs(), target, split(_UNITS, 1))
        (found,), rough, _ = computed(loss, outputs("float32"), target, split(_UNITS, 1))
        worst = max(worst, same(rough, delta, 1e-4, "dy in float32"))
        worst = max(worst, same(np.array(found[0], float), np.array(wanted[0], float), 1e-4, "the loss in float32"))
    return f"{worst:.0e} from float64"
