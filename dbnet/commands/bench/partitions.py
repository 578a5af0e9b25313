"""Two partitions on two cores against one on one core: a gradient of the paper's two kinds of network."""

from __future__ import annotations

import os
from typing import ClassVar

from dbnet.commands.bench.base import Bench, Row, on_ranks


class Partitions(Bench):
    """One gradient on two partitions and two cores, against one partition on one core; and where the time goes."""

    kind: ClassVar[str] = "partitions"

    def rows(self, repeat: int) -> list[Row]:
        if len(os.sched_getaffinity(0)) < 2:
            print("partitions: left out, there are not two cores")
            return []
        return on_ranks("partitions", 2, "dbnet.commands.bench.ranks.partitions", repeat)
