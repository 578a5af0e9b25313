"""Random networks whose first layer moves a field over an image, often without using all of it, and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dbnet.core.ranges import Range, whole
from dbnet.core.registry import make
from dbnet.data.file import write
from dbnet.network.layers.base import Layer

CLASSES = 3


def layer(rng: np.random.Generator, kinds: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, Any]:
    """Draw a layer that fits an image of this shape; its padding is below its stride."""
    field = [int(rng.integers(1, min(n, 5) + 1)) for n in shape[:2]]
    stride = [int(rng.integers(1, 5)) for _ in field]
    padding = [int(rng.integers(0, min(f, s))) for f, s in zip(field, stride, strict=True)]
    kind = str(rng.choice(kinds))
    more = {"over": "max"} if kind == "pool" else {"maps": int(rng.integers(1, 4)), "activation": "relu"}
    return {"kind": kind, "field": field, "stride": stride, "padding": padding, **more}


class Geometry:
    """One network with data of whole numbers.

    Attributes
    ----------
    layers
        The network, one or two image layers under a dense one.
    shape
        Of an example.
    used
        How many rows and columns of it the first layer looks at.
    """

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng([seed, 17])
        self.shape = (int(rng.integers(5, 14)), int(rng.integers(5, 14)), int(rng.integers(1, 3)))
        self.layers, shape = [], self.shape
        for kinds in (("conv", "local", "pool"), ("conv", "local"))[: rng.integers(1, 3)]:
            self.layers.append(layer(rng, kinds, shape))
            shape = made(self.layers[-1]).output_shape(shape)
        first = made(self.layers[0])
        need = first.needs(self.shape, whole(first.output_shape(self.shape)))
        self.used = need[0].hi, need[1].hi
        self.layers.append({"kind": "dense", "units": CLASSES})

    @property
    def fits(self) -> bool:
        """Whether the first layer looks at the whole image."""
        return self.used == self.shape[:2]

    def words(self) -> str:
        """Return the network as a change of a configuration."""
        entries = ("{" + ", ".join(f"{key} = {value!r}" for key, value in entry.items()) + "}" for entry in self.layers)
        return f"model.layers=[{', '.join(entries)}]"

    def data(self, path: Path, examples: int = 8, levels: int = 2, used_only: bool = False) -> Path:
        """Write a data file; with `used_only` its images hold just what the first layer looks at."""
        rng = np.random.default_rng(len(self.layers))
        x = rng.integers(0, levels, (2, examples, *self.shape), np.uint8)
        y = rng.integers(0, CLASSES, (2, examples))
        if used_only:
            x = np.ascontiguousarray(x[:, :, : self.used[0], : self.used[1]])
        write(path, {"train/x": x[0], "train/y": y[0], "test/x": x[1], "test/y": y[1], "classes": CLASSES, "scale": 1.0})
        return path


def made(entry: dict[str, Any]) -> Layer:
    return make("network.layers", dict(entry), "layer")


def whole_numbers(draw: Any) -> Any:
    """Return `Layout.draw` with its values rounded to -1, 0 and 1."""

    def rounded(self: Any, part: Range, seed: int, out: np.ndarray) -> None:
        draw(self, part, seed, out)
        np.copyto(out, np.sign(np.round(4 * out)))

    return rounded
