"""s(e) = last + (1 - last) (1 + cos(pi x)) / 2,  x = (e - warmup) / (length - warmup), between 0 and 1.

Loshchilov & Hutter 2017, equation 5, one period.

Update t of a shard, which makes U updates in an epoch, has the rate rule.rate s(e) with e = (t - 1) / U; in a warm-up times
(e + 1 / U) / warmup.
"""

from __future__ import annotations

from math import cos, pi
from typing import ClassVar

from dbnet.shards.rules.schedules.base import Falling


class Cosine(Falling):
    """A rate that falls along half a cosine, without restarts."""

    kind: ClassVar[str] = "cosine"

    def fall(self, x: float) -> float:
        return (1 + cos(pi * x)) / 2
