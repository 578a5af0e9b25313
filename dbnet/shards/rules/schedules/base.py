"""What a learning-rate schedule is: which share of rule.rate an update is made with. It is a function of a count of updates.

A shard knows the number t = 1, 2, ... of each update that it makes: its clock plus one. That count is what an asynchronous run has
in place of a step: it is in every checkpoint and in every recorded schedule, goes on through a warmstart, and needs nobody to be
asked. It is turned into epochs by the run's own updates per epoch, U: the minibatches that all replicas together have in their
subsets, divided by n_push (all replicas' minibatches of a step are one update where steps are synchronous). So

    rate of update t = rule.rate * s(e),   e = (t - 1) / U,   times (e + 1 / U) / warmup as long as that is below 1

The factor is one number per update; nothing is computed per parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.core.registry import Member
from dbnet.shards.rules.base import Arrival, Rule


class Horizon(NamedTuple):
    """What of a run a schedule depends on.

    Attributes
    ----------
    per_epoch
        Updates that each shard makes in one epoch.
    epochs
        Epochs after which the run stops; None: it goes by other things.
    """

    per_epoch: float
    epochs: float | None


class Schedule(Member):
    """Base of all schedules.

    Parameters
    ----------
    warmup
        Epochs in which the rate first grows in proportion to the updates, up to what the schedule says.
    """

    family: ClassVar[str] = "shards.rules.schedules"
    warmup: float = Field(default=0.0, ge=0)

    def check(self, horizon: Horizon) -> None:
        """Raise UserError where the schedule does not fit the run."""

    def share(self, e: float, horizon: Horizon) -> float:
        """Return the share of the rate after `e` epochs, but for the warm-up."""
        raise NotImplementedError

    def words(self, horizon: Horizon) -> str:
        """Return what it does, for a plan."""
        raise NotImplementedError

    def factor(self, t: float, horizon: Horizon) -> float:
        """Return what the rate of update `t` = 1, 2, ... is multiplied with."""
        e = (t - 1) / horizon.per_epoch
        rising = (e + 1 / horizon.per_epoch) / self.warmup if self.warmup else 1.0
        return min(1.0, rising) * self.share(e, horizon)


class Falling(Schedule):
    """Base of the schedules that fall from the warm-up's end to a last share.

    Parameters
    ----------
    length
        Epochs from the run's beginning to the schedule's end, after which the rate stays; default: those of [stop].
    last
        Share of the rate that it ends with.
    """

    length: float | None = Field(default=None, gt=0)
    last: float = Field(default=0.0, ge=0)

    def _end(self, horizon: Horizon) -> float | None:
        return horizon.epochs if self.length is None else self.length

    def check(self, horizon: Horizon) -> None:
        end = self._end(horizon)
        if end is None:
            raise UserError(
                f"rule.schedule.kind = '{self.kind}' must know its end: give rule.schedule.length (epochs), or stop.epochs or "
                "stop.steps."
            )
        if self.warmup >= end > 0:
            raise UserError(
                f"rule.schedule.warmup = {self.warmup:g} leaves nothing of the {end:g} epochs that the schedule lasts; make it "
                "smaller."
            )

    def share(self, e: float, horizon: Horizon) -> float:
        end = self._end(horizon)
        x = min(1.0, max(0.0, (e - self.warmup) / (end - self.warmup))) if end > self.warmup else 1.0
        return self.last + (1 - self.last) * self.fall(x)

    def fall(self, x: float) -> float:
        """Return 1 at x = 0, falling to 0 at x = 1."""
        raise NotImplementedError

    def words(self, horizon: Horizon) -> str:
        end = self._end(horizon)
        return f"{self.kind} fall to {self.last:g} of it at epoch {end:g} (update {round(end * horizon.per_epoch):,})"


class ScheduledRule:
    """An update rule whose rate follows its schedule; all else is the rule's.

    Parameters
    ----------
    rule, horizon
        The rule, and what its schedule depends on.
    """

    def __init__(self, rule: Rule, horizon: Horizon) -> None:
        self.rule, self._horizon = rule, horizon
        # A copy that nobody else sees; making one for every update would take longer than a small one does.
        self._t, self._now = 0, rule.model_copy()

    def factor(self, t: float) -> float:
        """Return what the rate of update `t` is multiplied with."""
        return self.rule.schedule.factor(t, self._horizon)

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int, *arrival: Arrival) -> None:
        # A push comes in slices; all of them are applied with one rate.
        if t != self._t:
            self._t = t
            vars(self._now)["rate"] = self.rule.rate * self.factor(t)
        self._now.apply(w, g, state, t, *arrival)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)


def scheduled(rule: Rule, horizon: Horizon) -> tuple[Any, Callable[[float], float]]:
    """Return the rule as a shard applies it, and what the rate of an update is multiplied with; UserError where they do not fit."""
    rule.schedule.check(horizon)
    if rule.schedule.kind == "constant" and not rule.schedule.warmup:
        return rule, lambda t: 1.0
    follows = ScheduledRule(rule, horizon)
    return follows, follows.factor


def words(rule: Rule, horizon: Horizon) -> str:
    """Return how the rate changes, in words."""
    schedule = rule.schedule
    rising = f"warm-up over {schedule.warmup:g} epochs ({round(schedule.warmup * horizon.per_epoch):,} updates), then "
    return f"rate {rule.rate:g}: {rising if schedule.warmup else ''}{schedule.words(horizon)}"
