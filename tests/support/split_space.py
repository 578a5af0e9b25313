"""A space of registers that lie in several ranges, as on shards, without ranks."""

from __future__ import annotations

import pickle

import numpy as np

from dbnet.comm.turns import Turns, Wait
from dbnet.core.ranges import split
from dbnet.shards.space import Command, Registers, Space, perform


class SplitSpace(Space):
    """Registers cut into ranges, commands performed range by range, scalars summed: what shards do."""

    def __init__(self, registers: Registers, parts: int) -> None:
        super().__init__()
        ranges = split(registers["params"].size, parts)
        self.parts = [{name: v[r.slice] for name, v in registers.items()} for r in ranges]

    def totals(self, commands: list[Command]) -> Turns[list[float]]:
        # Through pickle, as a command that is sent would go.
        commands = pickle.loads(pickle.dumps(commands))
        answers = [[x for command in commands for x in perform(part, command)] for part in self.parts]
        yield Wait("the answers of the other ranges")
        return [sum(column) for column in zip(*answers, strict=True)]

    def whole(self, name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in self.parts])
