"""Random examples of any shape, each class around a centre of its own: to try a network's size and speed before there are data."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from dbnet.core.errors import UserError
from dbnet.data.formats.base import Format


class Random(Format):
    """Random examples of any shape and number of classes, to try sizes and speeds."""

    kind: ClassVar[str] = "random"
    shape: str = Field(description="units of one example: 440, or rows,columns,maps like 100,100,3")
    classes: int = Field(gt=0, description="number of classes")
    train: int = Field(default=1000, gt=0, description="training examples (default: 1000)")
    test: int = Field(default=200, ge=0, description="test examples (default: 200)")
    seed: int = Field(default=1, ge=0, description="seed (default: 1)")

    def read(self) -> dict[str, Any]:
        try:
            shape = tuple(int(n) for n in self.shape.split(","))
        except ValueError:
            raise UserError(f"--shape {self.shape} is not a shape; write 440 or 100,100,3.") from None
        if len(shape) not in (1, 2, 3) or min(shape) < 1:
            raise UserError(f"--shape {self.shape} is not a shape; give one, two or three positive numbers.")
        rng, out = np.random.default_rng(self.seed), {"classes": self.classes, "name": "random", "source": f"seed {self.seed}"}
        centres = rng.standard_normal((min(self.classes, 64), *shape), np.float32)
        for part, n in (("train", self.train), ("test", self.test)):
            labels = rng.integers(0, self.classes, n)
            out[f"{part}/x"] = centres[labels % len(centres)] + rng.standard_normal((n, *shape), np.float32)
            out[f"{part}/y"] = labels
        return out
