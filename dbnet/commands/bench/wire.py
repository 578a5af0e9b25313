"""Fetch and push over MPI windows, against bare Put and Get through the same window."""

from __future__ import annotations

from typing import ClassVar

from dbnet.commands.bench.base import Bench, Row, on_ranks


class Wire(Bench):
    """Push and fetch of 42 million parameters between two ranks, against bare Put and Get."""

    kind: ClassVar[str] = "wire"

    def rows(self, repeat: int) -> list[Row]:
        return on_ranks("wire", 2, "dbnet.commands.bench.ranks.wire", repeat)
