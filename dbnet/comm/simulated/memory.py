"""The memory of all ranks' windows in simulated time: fields in one process, and rings that hold slices only where some lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dbnet.comm.window import WindowLayout

# What has no contents where nothing is computed: bytes go over the wire all the same.
_CONTENTS = frozenset({"params", "rounded", "ring"})


class SparseRing:
    """A shard's rings, [rows, slots, elements], of which a slice is held from its arrival until it is read.

    Parameters
    ----------
    shape, dtype
        Of the whole.
    hollow
        Whether slices have no contents.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, hollow: bool) -> None:
        self.shape, self._hollow = shape, hollow
        self._held: dict[tuple[int, int], np.ndarray] = {}
        self._nothing = np.broadcast_to(np.zeros((), dtype), shape[2:])

    def put(self, start: int, data: np.ndarray) -> None:
        """Take the slice whose first element is number `start` of the whole, as it is: it must not change until it is read."""
        if not self._hollow:
            self._held[divmod(start // self.shape[2], self.shape[1])] = data

    def __getitem__(self, key: tuple[int, int, slice]) -> np.ndarray:
        """Return what lies in (row, slot), once; the key's third part says of how many elements."""
        return self._nothing[key[2]] if self._hollow else self._held.pop(key[:2])[key[2]]


class SimulatedMemory:
    """All ranks' window memory.

    Parameters
    ----------
    layouts
        Of every rank.
    hollow
        Whether parameters and gradients have no contents.

    Attributes
    ----------
    local, flat
        The fields of each rank, as they are and flat.
    counted
        For each rank the numbers of the origins whose head has arrived there; who looks takes them out.
    """

    def __init__(self, layouts: Sequence[WindowLayout], hollow: bool = False) -> None:
        self.local: list[dict[str, np.ndarray | SparseRing]] = []
        self.hollow = _CONTENTS if hollow else frozenset()
        self.counted: list[set[int]] = [set() for _ in layouts]
        for layout in layouts:
            ring = layout.fields.get("ring")
            bare = WindowLayout([field for name, field in layout.fields.items() if name != "ring"])
            fields: dict[str, np.ndarray | SparseRing] = dict(bare.views(np.zeros(bare.nbytes, np.uint8)))
            if ring is not None:
                fields["ring"] = SparseRing(ring.shape, ring.dtype, hollow)
            self.local.append(fields)
        self.flat = [{n: x if isinstance(x, SparseRing) else x.reshape(-1) for n, x in fields.items()} for fields in self.local]
