"""s(e) = last + (1 - last) (1 - x),  x = (e - warmup) / (length - warmup), between 0 and 1.

Update t of a shard, which makes U updates in an epoch, has the rate rule.rate s(e) with e = (t - 1) / U; in a warm-up times
(e + 1 / U) / warmup.
"""

from __future__ import annotations

from typing import ClassVar

from dbnet.shards.rules.schedules.base import Falling


class Linear(Falling):
    """A rate that falls in proportion to the updates."""

    kind: ClassVar[str] = "linear"

    def fall(self, x: float) -> float:
        return 1 - x
