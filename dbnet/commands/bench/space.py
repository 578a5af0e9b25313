"""A shard's commands: bytes that must move per second, beside a plain copy loop over vectors of the same size."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dbnet.commands.bench.base import Bench, Row, alternate
from dbnet.core.jit import kernel
from dbnet.shards.space import Axpy, Combine, Command, Copy, Dot, Gram, Scale, perform

SIZE, PAIRS = 1 << 24, 10


@kernel("T[:];T[:]")
def plain_copy(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(x.size):
        y[i] = x[i]


class ShardCommands(Bench):
    """Commands on registers of 16 million parameters with a history of ten pairs, against a copy loop over as many vectors."""

    kind: ClassVar[str] = "space"

    def rows(self, repeat: int) -> list[Row]:
        history = [f"{letter}_{i}" for letter in "sy" for i in range(PAIRS)]
        names = ["params", "gradient", "direction", *history]
        registers = {name: np.full(SIZE, 1e-3 * i, np.float32) for i, name in enumerate(names)}
        basis = (*history, "gradient")
        # Command, the vectors that it must read and write, and the bar.
        commands: list[tuple[str, Command, int, str]] = [
            ("copy", Copy("gradient", "direction"), 2, ">= 0.8"),
            ("scale", Scale("direction", 1.0), 2, ">= 0.8"),
            ("axpy", Axpy(1e-9, "gradient", "direction"), 3, ">= 0.8"),
            ("dot", Dot("gradient", "params"), 2, ">= 0.8"),
            (f"gram of 3 x {len(basis)}", Gram(("s_0", "y_0", "gradient"), basis), len(basis), ">= 0.8"),
            (f"combine {len(basis)}", Combine(tuple((0.1, name) for name in basis), "direction"), len(basis) + 1, ">= 0.8"),
        ]
        out = []
        for name, command, vectors, bar in commands:

            def carry_out(command: Command = command) -> None:
                perform(registers, command)

            # A history is read from memory, and two vectors may stay in a large cache: what is copied is no less than what is read.
            pairs = list(zip(*[iter(history)] * 2, strict=True)) if vectors > 3 else [("gradient", "direction")]

            def copy_all(pairs: list[tuple[str, str]] = pairs) -> None:
                for source, target in pairs:
                    plain_copy(registers[source], registers[target])

            mine, copy = alternate(repeat, carry_out, copy_all)
            rate, other = (count * 4 * SIZE / times.min() / 1e9 for count, times in ((vectors, mine), (2 * len(pairs), copy)))
            out.append(Row("space", name, rate, "GB/s", "plain copy", other, rate / other, bar, mine.max() / mine.min()))
        return out
