"""s(e) = gamma^n with n the number of drops so far: floor(e / every), or the entries of `at` that are not above e.

`at` is the schedule of ResNets (He et al. 2016: divided by 10 at two epochs), `every` that of Krizhevsky's "step" policy.

Update t of a shard, which makes U updates in an epoch, has the rate rule.rate s(e) with e = (t - 1) / U; in a warm-up times
(e + 1 / U) / warmup.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.shards.rules.schedules.base import Horizon, Schedule

# An epoch's first update may come out a rounding error before it.
_NEARLY = 1e-9


class Stepwise(Schedule):
    """A rate that drops at certain epochs.

    Parameters
    ----------
    every
        Epochs between drops.
    at
        Epochs of the drops, in place of `every`.
    gamma
        What the rate is multiplied with at each drop.
    """

    kind: ClassVar[str] = "step"
    every: float | None = Field(default=None, gt=0)
    at: tuple[float, ...] = ()
    gamma: float = Field(default=0.1, gt=0, le=1)

    def check(self, horizon: Horizon) -> None:
        if (self.every is None) == (not self.at):
            raise UserError(
                "rule.schedule.kind = 'step' needs every (epochs between drops, like every = 30) or at (epochs of the drops, like "
                "at = [30, 60]), one of them."
            )
        if any(epoch <= 0 for epoch in self.at) or list(self.at) != sorted(set(self.at)):
            raise UserError(f"rule.schedule.at = {list(self.at)} must be epochs above 0 that grow, like [30, 60].")

    def share(self, e: float, horizon: Horizon) -> float:
        drops = int(e / self.every + _NEARLY) if self.every else sum(epoch <= e + _NEARLY for epoch in self.at)
        return self.gamma**drops

    def words(self, horizon: Horizon) -> str:
        when = f"every {self.every:g} epochs" if self.every else f"at epochs {', '.join(f'{epoch:g}' for epoch in self.at)}"
        return f"times {self.gamma:g} {when}"
