"""One example is read as NaN, which no check of the file can see; called by `several.py`."""

from __future__ import annotations

import numpy as np

from dbnet.data.batches import Batches
from dbnet.data.portions import Reader


def spoil(example: int) -> None:
    """Spoil one example of all that is trained from now on."""

    def spoil_kind(kind: type) -> None:
        right = kind.next

        def spoiled(self: object, x: np.ndarray) -> int:
            count = right(self, x)
            # A partition may have no input of its own.
            x[:1, [j for j in range(count) if self.example(j) == example]] = np.nan
            return count

        kind.next = spoiled

    spoil_kind(Batches)
    spoil_kind(Reader)
