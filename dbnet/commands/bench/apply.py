"""A shard's update against a plain loop that moves the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np

from dbnet.commands.bench.base import Bench, Row, alternate, row
from dbnet.core import jit
from dbnet.core.ranges import Range
from dbnet.shards.push import Intake, Push
from dbnet.shards.rules.adagrad import Adagrad
from dbnet.shards.rules.sgd import Sgd
from dbnet.shards.shard import Shard


@jit.kernel("T[:];T[:];T[:];f8")
def plain(w: np.ndarray, g: np.ndarray, h: np.ndarray, a: float) -> None:
    """Read three vectors and write two, like Adagrad, with next to no arithmetic."""
    s = w.dtype.type(a)
    for i in range(w.size):
        h[i] += g[i]
        w[i] += s * g[i]


@jit.kernel("T[:];T[:];f8")
def plain_two(w: np.ndarray, g: np.ndarray, a: float) -> None:
    """Read two vectors and write one, like sgd."""
    s = w.dtype.type(a)
    for i in range(w.size):
        w[i] += s * g[i]


class Apply(Bench):
    """A shard's update of 16 million parameters, in slices of 1 MiB as they come, against a plain loop over the same bytes."""

    kind: ClassVar[str] = "apply"

    def rows(self, repeat: int) -> list[Row]:
        n, rng = 1 << 24, np.random.default_rng(1)
        rows = []
        for rule, loop, streams in ((Adagrad(), plain, 5), (Sgd(), plain_two, 3)):
            shard = Shard(Range(0, n), rule, np.zeros(n, np.float32), np.zeros(1, np.int64), time.perf_counter)
            g, w, h = rng.standard_normal(n, np.float32), np.zeros(n, np.float32), np.zeros(n, np.float32)

            def slices(shard: Shard = shard, g: np.ndarray = g) -> None:
                for lo in range(0, n, 1 << 18):
                    shard.apply(lo, g[lo : lo + (1 << 18)], 1)

            intakes = [Intake(shard, finite) for finite in (True, False)]

            def taken(intake: Intake, g: np.ndarray = g) -> None:
                for lo in range(0, n, 1 << 18):
                    piece = g[lo : lo + (1 << 18)]
                    intake.take(Push(0, 0, 0, 0, 1, 0), piece, [(0, lo, piece.size)], lo == 0, False)

            def bare(
                w: np.ndarray = w, g: np.ndarray = g, h: np.ndarray = h, loop: Callable = loop, three: bool = streams == 5
            ) -> None:
                loop(w, g, h, 1e-9) if three else loop(w, g, 1e-9)

            mine, other, guarded, unguarded = alternate(repeat, slices, bare, *(partial(taken, i) for i in intakes))
            rows.append(
                row("apply", f"{rule.kind}, 16.8 M float32", mine, "plain loop", other, ">= 0.8", streams * 4 * n / 1e9, "GB/s")
            )
            name = f"{rule.kind}, with NaN and Inf refused"
            rows.append(row("apply", name, guarded, "without", unguarded, ">= 0.8", streams * 4 * n / 1e9, "GB/s"))
        return rows
