"""Train on several ranks while one example is read as NaN, which no check of the file can see: spoiled.py EXAMPLE command..."""

import sys

import numpy as np

from dbnet.__main__ import main
from dbnet.data.batches import Batches
from dbnet.data.portions import Reader

example = int(sys.argv[1])


def spoil(kind):
    right = kind.next

    def spoiled(self, x):
        count = right(self, x)
        # A partition may have no input of its own.
        x[:1, [j for j in range(count) if self.example(j) == example]] = np.nan
        return count

    kind.next = spoiled


spoil(Batches)
spoil(Reader)
sys.exit(main(sys.argv[2:]))
