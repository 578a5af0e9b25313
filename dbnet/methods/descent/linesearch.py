"""Line search for the strong Wolfe conditions (Nocedal & Wright 2006, algorithms 3.5 and 3.6).

Along phi(a) = f(x + a d) a step is accepted when phi(a) <= phi(0) + c1 a phi'(0) and |phi'(a)| <= c2 |phi'(0)|. Each trial
point costs a pass over the data, so loss and slope are generators, during which others take their turns. The slope is asked for
only where the algorithm needs it, never where the loss alone rejects the step.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite, nan, sqrt
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from dbnet.comm.turns import Turns


class Point(NamedTuple):
    """A step along the direction, the loss there, and the slope (nan where it was not needed)."""

    step: float
    loss: float
    slope: float = nan


def rounding(dtype: np.dtype) -> float:
    """Return the relative rounding error of a loss of parameters of this type."""
    return 8 * float(np.finfo(dtype).eps)


class Wolfe(BaseModel):
    """Conditions that a step must satisfy.

    Parameters
    ----------
    decrease
        c1, the share of the linearly predicted decrease that must be reached.
    curvature
        c2, the share of the initial slope that may be left.
    trials
        Trial points per search.
    noise
        Relative rounding error of the loss: a rise of the loss by less is not seen as one. None: 8 epsilon of the parameters' type
        (1e-6 in float32, 2e-15 in float64).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    decrease: float = Field(default=1e-4, gt=0, lt=0.5)
    curvature: float = Field(default=0.9, gt=0, lt=1)
    trials: int = Field(default=20, gt=0, le=1000)
    noise: float | None = Field(default=None, ge=0)

    def complete(self, dtype: np.dtype) -> Wolfe:
        """Return these conditions for a loss of parameters of this type."""
        return self if self.noise is not None else self.model_copy(update={"noise": rounding(dtype)})


class _Search:
    """One search: its conditions, its origin, what it searches along, and how many trials are left."""

    def __init__(
        self, wolfe: Wolfe, origin: Point, loss: Callable[[float], Turns[float]], slope: Callable[[], Turns[float]]
    ) -> None:
        self.wolfe, self.origin, self.loss, self.slope, self.left = wolfe, origin, loss, slope, wolfe.trials
        self.slack = wolfe.complete(np.dtype("f8")).noise * abs(origin.loss)

    def decreases(self, point: Point) -> bool:
        """Test the first condition; a loss that is no number fails."""
        return point.loss <= self.origin.loss + self.wolfe.decrease * point.step * self.origin.slope + self.slack

    def flat(self, point: Point) -> bool:
        """Test the second condition."""
        return abs(point.slope) <= -self.wolfe.curvature * self.origin.slope

    def trial(self, step: float) -> Turns[Point]:
        self.left -= 1
        return Point(step, (yield from self.loss(step)))

    def bracket(self, step: float) -> Turns[Point | None]:
        """Algorithm 3.5: lengthen the step until an interval holds an acceptable one."""
        last = self.origin
        while self.left > 0:
            here = yield from self.trial(step)
            if not self.decreases(here) or (last.step > 0 and here.loss >= last.loss + self.slack):
                return (yield from self.zoom(last, here))
            here = here._replace(slope=(yield from self.slope()))
            if self.flat(here):
                return here
            if here.slope >= 0:
                return (yield from self.zoom(here, last))
            further = cubic(last, here)
            last, step = here, min(max(further, 2 * step), 10 * step) if isfinite(further) else 2 * step
        return (yield from self.settle(last))

    def zoom(self, lo: Point, hi: Point) -> Turns[Point | None]:
        """Algorithm 3.6: shrink an interval that holds an acceptable step; `lo` is its end with the lower loss."""
        third = None
        while self.left > 0 and abs(hi.step - lo.step) > 1e-12 * max(hi.step, lo.step):
            here = yield from self.trial(_between(lo, hi, third))
            if not self.decreases(here) or here.loss >= lo.loss + self.slack:
                third, hi = hi, here
                continue
            here = here._replace(slope=(yield from self.slope()))
            if self.flat(here):
                return here
            if here.slope * (hi.step - lo.step) >= 0:
                third, hi = hi, lo
            else:
                third = lo
            lo = here
        return (yield from self.settle(lo))

    def settle(self, best: Point) -> Turns[Point | None]:
        """Return to the best step that decreased the loss, if there was one."""
        if best.step == 0:
            return None
        loss = yield from self.loss(best.step)
        return Point(best.step, loss, (yield from self.slope()))


def strong_wolfe(
    wolfe: Wolfe, origin: Point, step: float, loss: Callable[[float], Turns[float]], slope: Callable[[], Turns[float]]
) -> Turns[Point | None]:
    """Search for a step.

    Parameters
    ----------
    origin
        Step 0, with its loss and its (negative) slope.
    step
        First step to try.
    loss
        Returns phi(step).
    slope
        Returns phi'(step) at the step whose loss was asked for last.

    Returns
    -------
    The accepted point, whose loss was asked for last. When the trials ran out, the best point that decreased the loss; None if
    there was none.
    """
    return (yield from _Search(wolfe, origin, loss, slope).bracket(step))


def _between(lo: Point, hi: Point, third: Point | None) -> float:
    """Return the minimizer of an interpolation between two points, kept away from both."""
    width = hi.step - lo.step
    if not isfinite(hi.loss):
        return lo.step + 0.1 * width
    step = cubic(lo, hi) if isfinite(hi.slope) else _cubic3(lo, hi, third) if third else nan
    share = (step - lo.step) / width
    if not 0 < share < 1:
        # The parabola through the lower end's loss and slope and the other end's loss.
        bend = hi.loss - lo.loss - lo.slope * width
        share = -lo.slope * width / (2 * bend) if bend > 0 else 0.5
    return lo.step + min(max(share, 0.1), 0.9) * width


def cubic(a: Point, b: Point) -> float:
    """Return the minimizer of the cubic through two points with their slopes (equation 3.59); nan if it has none."""
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.step - b.step)
    root = d1 * d1 - a.slope * b.slope
    if not root >= 0:
        return nan
    d2 = sqrt(root) * (1 if b.step > a.step else -1)
    below = b.slope - a.slope + 2 * d2
    return b.step - (b.step - a.step) * (b.slope + d2 - d1) / below if below else inf


def _cubic3(lo: Point, hi: Point, third: Point) -> float:
    """Return the minimizer of the cubic through a point with its slope and two more points (equation 3.58); nan if it has none."""
    u, v = hi.step - lo.step, third.step - lo.step
    if not isfinite(third.loss) or u == v or u == 0 or v == 0:
        return nan
    p, q = hi.loss - lo.loss - lo.slope * u, third.loss - lo.loss - lo.slope * v
    # phi = loss + slope t + b t^2 + a t^3
    a = (p / u / u - q / v / v) / (u - v)
    b = p / u / u - a * u
    root = b * b - 3 * a * lo.slope
    if root < 0 or a == 0:
        return nan
    return lo.step + (sqrt(root) - b) / (3 * a)
