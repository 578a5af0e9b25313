"""Shares: what a replica trains on, and how it is handed on when the replica is lost.

The training set is cut into one subset per replica. A share is a range of a subset with a cursor; at first each replica has one,
its whole subset. When a replica is lost, its shares are cut anew and go to others, cursors included, so that every example still
comes once per epoch, whoever trains on it.

The order of a subset in an epoch is a permutation drawn from (seed, subset, epoch) alone, and the order of a share is that of its
subset restricted to the share's examples. So a cursor is two integers: the epoch and the number of examples of it that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np

from dbnet.core.ranges import Range, split
from dbnet.data.batches import Batches, Cursor

_BEAT = 0.005


class Share(NamedTuple):
    """The examples lo .. hi - 1 of a subset, in epoch `epoch`, of which the first `position` in its order are used."""

    subset: int
    lo: int
    hi: int
    epoch: int = 0
    position: int = 0

    @property
    def size(self) -> int:
        return self.hi - self.lo


SHARE = np.dtype([(name, "i8") for name in Share._fields])
Order = Callable[[int], np.ndarray]


def order(seed: int, subset: int, size: int, part: Range) -> Order:
    """Return the function that gives the order, [part.size], of a part of a subset of `size` examples in an epoch."""

    def of(epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(key=[seed, subset], counter=[0, 0, epoch, 1]))
        whole = generator.permutation(size)
        return whole if part.size == size else whole[(whole >= part.lo) & (whole < part.hi)] - part.lo

    return of


def cut(share: Share, at: int, seed: int, size: int) -> tuple[Share, Share]:
    """Cut a share of a subset of `size` examples at example `at` of the subset; what is used stays used."""
    used = order(seed, share.subset, size, Range(share.lo, share.hi))(share.epoch)[: share.position] + share.lo
    first = int((used < at).sum())
    return share._replace(hi=at, position=first), share._replace(lo=at, position=share.position - first)


def hand_out(
    shares: Sequence[Share], heirs: int, seed: int, size: Callable[[int], int], cuts: int | None = None
) -> list[list[Share]]:
    """Return what each of `heirs` replicas gets of these shares: equal numbers of examples; `size(subset)` is a subset's.

    At most `cuts` of them are cut (None: any number); without more cuts they go whole, and the numbers differ.
    """
    out: list[list[Share]] = [[] for _ in range(heirs)]
    left = [share for share in shares if share.size]
    for heir, part in enumerate(split(sum(share.size for share in left), heirs)):
        wanted = part.size
        while wanted > 0 and left:
            share = left.pop(0)
            if share.size > wanted and cuts != 0:
                share, rest = cut(share, share.lo + wanted, seed, size(share.subset))
                left.insert(0, rest)
                cuts = None if cuts is None else cuts - 1
            out[heir].append(share)
            wanted -= share.size
    return out


class Shares:
    """All shares of one replica; each minibatch comes from the share that is least far.

    Parameters
    ----------
    load
        Reads the examples of a share.
    batch
        Columns of the network's input.
    shares
        Those to begin with.
    """

    def __init__(self, load: Callable[[Share], Batches], batch: int, shares: Iterable[Share]) -> None:
        self._load, self.batch = load, batch
        self._parts: list[Batches] = []
        self._present: Batches | None = None
        for share in shares:
            self._add(self._load_at_cursor(share))

    def take(self, share: Share, beat: Callable[[], None] = lambda: None) -> None:
        """Train on a share, too; while its examples are read, which may take long, `beat` is called again and again."""
        with ThreadPoolExecutor(1, thread_name_prefix="share") as reader:
            loading = reader.submit(self._load_at_cursor, share)
            while not wait([loading], _BEAT).done:
                beat()
            self._add(loading.result())

    def _add(self, part: Batches) -> None:
        self._parts.append(part)
        self._present = self._present or part

    def _load_at_cursor(self, share: Share) -> Batches:
        part = self._load(share)
        part.seek(Cursor(share.epoch, share.position))
        return part

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    @property
    def taken(self) -> int:
        """How many shares there are."""
        return len(self._parts)

    @property
    def present(self) -> Batches:
        """The share that the present minibatch is of."""
        assert self._present is not None
        return self._present

    @property
    def target(self) -> np.ndarray:
        """Labels or vectors of the present minibatch."""
        return self.present.target

    @property
    def cursor(self) -> Cursor:
        """The cursor of the share that is least far."""
        filled = [part for part in self._parts if len(part)]
        return min(filled, key=_progress).cursor if filled else Cursor(0, 0)

    @property
    def cursors(self) -> list[Cursor]:
        return [part.cursor for part in self._parts]

    def next(self, x: np.ndarray) -> int:
        """Fill `x` [units, batch] with the next minibatch; return its number of examples."""
        if len(self._parts) > 1:
            self._present = min((part for part in self._parts if len(part)), key=_progress)
        return self.present.next(x)

    def refill(self, x: np.ndarray) -> None:
        """Fill `x` with the present minibatch once more."""
        self.present.refill(x)

    def example(self, column: int) -> int:
        """Return which example of the file stands in a column of the minibatch that was filled last."""
        return self.present.example(column)

    @property
    def filled(self) -> int:
        """Examples of that minibatch."""
        return self.present.filled if self._present is not None else 0


def _progress(part: Batches) -> float:
    cursor = part.cursor
    return cursor.epoch + cursor.position / len(part)
