"""What is done to examples before they become a data file: some are held out, and inputs are normalized.

Normalized inputs have mean 0 and spread (standard deviation) 1 over the training set, of every unit or of every map (colour
channel):

    x' = (scale x - mean) / spread

The numbers are in the file, /normalize/mean and /normalize/spread with the attribute scale, and go from there into every
checkpoint: a network that was trained on normalized data normalizes raw ones by the same numbers. What never changes over the
training set, or by less than 1e-6 of its largest value, has spread 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet.core.errors import UserError

HOW = ("no", "unit", "map")
_ROWS = 4096
_READ = 1 << 22  # bytes
_CONSTANT = 1e-6


def variance(y: np.ndarray) -> float:
    """Return the variance of vectors [n, units], summed over their units; some are in memory as float64 at a time."""
    rows, n, mean, squares = max(1, _READ // (8 * max(1, prod(y.shape[1:])))), 0, 0.0, 0.0
    for lo in range(0, len(y), rows):
        block = y[lo : lo + rows].astype(np.float64)
        k, middle = len(block), block.mean(axis=0)
        # Chan, Golub, LeVeque 1979: nothing cancels, whatever the order of the examples.
        squares += np.square(block - middle).sum(axis=0) + np.square(middle - mean) * (n * k / (n + k))
        mean, n = mean + (middle - mean) * (k / (n + k)), n + k
    return float(np.sum(squares / n))


class Normalization(NamedTuple):
    """How inputs were normalized.

    Attributes
    ----------
    scale
        What they were multiplied with before.
    mean, spread
        Of each unit, in the shape of an example, or of each map, [maps]; float32.
    """

    scale: float
    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, stored: Any, shape: Sequence[int]) -> Normalization | None:
        """Return what a file or a checkpoint says (scale, mean, spread) for examples of `shape`; ValueError where it cannot be."""
        if stored is None:
            return None
        scale, mean, spread = (np.asarray(stored[key], np.float32 if key != "scale" else float) for key in cls._fields)
        if mean.shape != spread.shape or mean.shape not in (tuple(shape), tuple(shape[-1:])) or scale.shape:
            raise ValueError(f"mean {mean.shape} and spread {spread.shape} do not fit examples of shape {tuple(shape)}")
        if not (np.isfinite(mean).all() and np.isfinite(spread).all() and (spread > 0).all() and isfinite(scale) and scale):
            raise ValueError("mean, spread and scale must be finite, and spread above 0")
        return cls(float(scale), mean, spread)

    def same(self, other: Normalization | None) -> bool:
        """Return whether another one is by the same numbers."""
        return other is not None and self.plain() == other.plain()

    def plain(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {"scale": self.scale, "mean": self.mean.tolist(), "spread": self.spread.tolist()}

    def apply(self, x: np.ndarray, shape: Sequence[int], units: np.ndarray | None = None) -> np.ndarray:
        """Return raw inputs [n, units] normalized, float32; `units` says which of an example they are, None: all."""
        mean, spread = (np.broadcast_to(v, shape).ravel() for v in (self.mean, self.spread))
        if units is not None:
            mean, spread = mean[units], spread[units]
        out = np.empty(x.shape, np.float32)
        for lo in range(0, len(x), _ROWS):
            here = slice(lo, lo + _ROWS)
            out[here] = (x[here] * np.float32(self.scale) - mean) / spread
        return out


def suited(
    x: np.ndarray, scale: float, done: Normalization | None, wanted: Normalization | None, where: str | Path,
    shape: Sequence[int], units: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Return inputs and what they are to be multiplied with as a network takes them that was trained on `wanted` ones.

    Parameters
    ----------
    x, scale
        Inputs [n, units], and what they are to be multiplied with.
    done, where
        How they were normalized; where they come from, for messages.
    wanted
        How the training data were: raw inputs are normalized by the same numbers.
    shape, units
        Of an example; which units of it x holds, None: all.

    Raises
    ------
    UserError
        They were normalized in another way.
    """
    if wanted is None and done is not None:
        raise UserError(f"'{where}' is normalized, but the training data were not; prepare it without --normalize.")
    if wanted is None or wanted.same(done):
        return x, scale
    if done is not None:
        raise UserError(
            f"'{where}' was normalized by other numbers than the training data; prepare it without --normalize, and those are used."
        )
    return wanted._replace(scale=scale).apply(x, shape, units), 1.0


def normalized(contents: dict[str, Any], how: str) -> dict[str, Any]:
    """Return the arrays of a data file with normalized inputs, and the numbers that did it.

    Parameters
    ----------
    contents
        As `Format.read` returns it.
    how
        "unit": each unit by its own mean and spread; "map": all positions of a map together; "no".

    Raises
    ------
    UserError
        Examples without maps have none to normalize by.
    """
    if how == "no":
        return contents
    x, scale = contents["train/x"], float(contents.get("scale", 1.0))
    if how == "map" and x.ndim < 3:
        raise UserError("--normalize map is for images, (rows, columns[, maps]); these examples have one axis: --normalize unit.")
    # Images without an axis of maps have one.
    shape = (*x.shape[1:], 1) if x.ndim == 3 else x.shape[1:]
    axes = 0 if how == "unit" else (0, 1, 2)
    count = len(x) if how == "unit" else len(x) * shape[0] * shape[1]
    pieces = [x[lo : lo + _ROWS].reshape(-1, *shape) for lo in range(0, len(x), _ROWS)]
    mean = sum((scale * piece.astype(np.float64)).sum(axis=axes) for piece in pieces) / max(1, count)
    square = sum(((scale * piece.astype(np.float64) - mean) ** 2).sum(axis=axes) for piece in pieces) / max(1, count)
    lowest, highest = (np.min([p.min(axis=axes) for p in pieces], axis=0), np.max([p.max(axis=axes) for p in pieces], axis=0))
    largest = abs(scale) * np.maximum(abs(lowest.astype(np.float64)), abs(highest.astype(np.float64)))
    # Sums are not exact: the spread of a constant is rounding, by which nothing must be divided.
    constant = (lowest == highest) | (np.sqrt(square) <= _CONSTANT * largest)
    spread = np.where(constant, 1, np.sqrt(square)).astype(np.float32)
    made = Normalization(scale, mean.astype(np.float32), spread)
    out = {**contents, "scale": 1.0, "normalize/mean": made.mean, "normalize/spread": made.spread, "normalize.scale": scale}
    for name in [name for name in contents if name.endswith("/x")]:
        part = contents[name]
        out[name] = made.apply(part.reshape(len(part), -1), shape).reshape(part.shape)
    return out


def held_out(contents: dict[str, Any], part: str, share: float, seed: int) -> dict[str, Any]:
    """Return the arrays of a data file with a share of the training examples, of every class alike, moved to another part.

    Raises
    ------
    UserError
        There is such a part already, or the share (between 0 and 1) leaves nothing on one side.
    """
    if f"{part}/x" in contents:
        raise UserError(f"The source has a {part} set of its own; leave --{part} out.")
    x, y = contents["train/x"], contents["train/y"]
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(y == label) for label in np.unique(y)] if y.ndim == 1 else [np.arange(len(y))]
    chosen = [rng.permutation(group)[: round(share * len(group))] for group in groups]
    taken = np.zeros(len(x), bool)
    taken[np.concatenate(chosen)] = True
    if not 0 < taken.sum() < len(x):
        raise UserError(f"--{part}: that share of {len(x)} training examples leaves none on one side; give another.")
    return {**contents, "train/x": x[~taken], "train/y": y[~taken], f"{part}/x": x[taken], f"{part}/y": y[taken]}
