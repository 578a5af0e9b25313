"""How fast a shard carries out commands: bytes that must move per second, beside a plain copy loop over vectors of the same size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dbnet.jit import kernel
from dbnet.space import Axpy, Combine, Command, Copy, Dot, Gram, Scale, perform

SIZE = 1 << 24


class Speed(NamedTuple):
    """A command's rate in GB/s, and the copy loop's: best of the repetitions, both measured in turns."""

    name: str
    rate: float
    copy: float


@kernel("T[:];T[:]")
def plain_copy(x: np.ndarray, y: np.ndarray) -> None:
    for i in range(x.size):
        y[i] = x[i]


def measure(repeat: int, size: int = SIZE, pairs: int = 10) -> list[Speed]:
    """Time commands on float32 registers of `size` elements; the history has `pairs` pairs."""
    history = [f"{letter}_{i}" for letter in "sy" for i in range(pairs)]
    names = ["params", "gradient", "direction", *history]
    registers = {name: np.full(size, 1e-3 * i, np.float32) for i, name in enumerate(names)}
    terms = tuple((0.1, name) for name in (*history, "gradient"))
    new = ("s_0", "y_0", "gradient")
    # Command, and how many vectors it must read and write.
    commands: list[tuple[str, Command, int]] = [
        ("copy", Copy("gradient", "direction"), 2),
        ("scale", Scale("direction", 1.0), 2),
        ("axpy", Axpy(1e-9, "gradient", "direction"), 3),
        ("dot", Dot("gradient", "params"), 2),
        (f"gram of 3 x {2 * pairs + 1}", Gram(new, (*history, "gradient")), 2 * pairs + 1),
        (f"combine {2 * pairs + 1}", Combine(terms, "direction"), 2 * pairs + 2),
    ]
    out = []
    for name, command, vectors in commands:
        best, copied = _alternate(
            repeat, lambda c=command: perform(registers, c), lambda: plain_copy(registers["gradient"], registers["direction"])
        )
        out.append(Speed(name, vectors * 4 * size / best / 1e9, 8 * size / copied / 1e9))
    return out


def _alternate(repeat: int, *functions: Callable[[], object]) -> list[float]:
    """Return each function's shortest time; they run in turns, after one unmeasured round."""
    best = [np.inf] * len(functions)
    for i in range(repeat + 1):
        for j, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if i:
                best[j] = min(best[j], time.perf_counter() - start)
    return best
