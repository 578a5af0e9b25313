"""What is measured on two ranks: fetch and push over MPI windows against bare Put and Get, and two partitions against one."""

from __future__ import annotations

import os
from typing import ClassVar

from dbnet.commands.bench.base import Bench, Row, on_ranks


class Wire(Bench):
    """Push and fetch of 42 million parameters between two ranks, against bare Put and Get."""

    kind: ClassVar[str] = "wire"

    def rows(self, repeat: int) -> list[Row]:
        return on_ranks("wire", 2, "dbnet.commands.bench.ranks.wire", repeat)


class Partitions(Bench):
    """One gradient on two partitions and two cores, against one partition on one core; and where the time goes."""

    kind: ClassVar[str] = "partitions"

    def rows(self, repeat: int) -> list[Row]:
        if len(os.sched_getaffinity(0)) < 2:
            print("partitions: left out, there are not two cores")
            return []
        return on_ranks("partitions", 2, "dbnet.commands.bench.ranks.partitions", repeat)
