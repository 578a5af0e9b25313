"""s(e) = 1.

Update t of a shard, which makes U updates in an epoch, has the rate rule.rate s(e) with e = (t - 1) / U; in a warm-up times
(e + 1 / U) / warmup.
"""

from __future__ import annotations

from typing import ClassVar

from dbnet.shards.rules.schedules.base import Horizon, Schedule


class Constant(Schedule):
    """The same rate all the time, but for a warm-up (Goyal et al. 2017, section 2.2)."""

    kind: ClassVar[str] = "constant"

    def share(self, e: float, horizon: Horizon) -> float:
        return 1.0

    def words(self, horizon: Horizon) -> str:
        return "constant"
