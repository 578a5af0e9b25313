"""The examples of all replicas of one process, read together: one pass over the file instead of one for each replica.

They lie in memory once, subset after subset, as the replicas hold them anyway: what one is given is a view.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from dbnet.core.ranges import Range, split
from dbnet.data.batches import fitting
from dbnet.data.file import DataFile, Examples

_BLOCK = 1 << 25  # bytes read at a time


class Together:
    """A data file whose training set is read once, for whoever asks for its subsets; all else is the file's.

    Until somebody does, as where replicas are given portions that none of them holds all of, examples come from the file.

    Parameters
    ----------
    data
        The file.
    dtype
        Of the network: inputs of other floating-point types, and vectors, are held so.
    """

    def __init__(self, data: DataFile, dtype: np.dtype) -> None:
        self._data, self._dtype = data, np.dtype(dtype)
        self._subsets = lru_cache(1)(self._cut)
        # For each example where it lies; by the units that are wanted the examples.
        self._place: np.ndarray | None = None
        self._held: dict[tuple[Range, ...] | None, Examples] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def subset(self, index: int, parts: int, seed: int) -> np.ndarray:
        """Return the sorted example indices of one replica's subset, see `DataFile.subset`."""
        return self._subsets(parts, seed)[index]

    def _cut(self, parts: int, seed: int) -> list[np.ndarray]:
        order = self._data.shuffled(seed)
        subsets = [np.sort(order[mine.slice]) for mine in split(len(order), parts)]
        self._place, self._held = np.empty(len(order), np.int64), {}
        self._place[np.concatenate(subsets)] = np.arange(len(order))
        return subsets

    def read(self, part: str, rows: np.ndarray | None = None, columns: list[Range] | None = None) -> Examples:
        """Return the examples `rows` of `part`, of each the units `columns`, see `DataFile.read`; one subset's are not copied.

        Raises
        ------
        UserError
            A value is not finite, or too large for the network's type; the file is cut off.
        """
        if part != "train" or rows is None or self._place is None:
            return self._data.read(part, rows, columns)
        key = None if columns is None else tuple(columns)
        if key not in self._held:
            self._held[key] = self._read(columns)
        held, places = self._held[key], self._place[rows]
        if (np.diff(places) == 1).all():
            places = slice(places[0], places[-1] + 1) if len(places) else slice(0)
        return Examples(held.x[places], held.y[places], rows)

    def _read(self, columns: list[Range] | None) -> Examples:
        n, size = self._data.sizes["train"], self._data.dtype.itemsize * prod(self._data.shape)
        x = y = None
        for lo in range(0, n, most := max(1, _BLOCK // size)):
            part = self._data.read("train", np.arange(lo, min(lo + most, n)), columns)
            inputs, places = fitting(part, self._dtype, self._data.scale), self._place[part.rows]
            if x is None:
                x = np.empty((n, *inputs.shape[1:]), inputs.dtype)
                y = np.empty((n, *part.y.shape[1:]), self._dtype if part.y.ndim == 2 else part.y.dtype)
            x[places], y[places] = inputs, part.y
        return Examples(x, y)
