"""A shard whose schedule is recorded: it counts the changes of its slices and writes down, in order, what it does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.checkpoint.parts import PartWriter
from dbnet.core.jit import fence
from dbnet.core.ranges import Range
from dbnet.core.vector import check_sum
from dbnet.shards.push import Push
from dbnet.shards.rules.base import Arrival, Rule
from dbnet.shards.schedule.log import CLOSE, COPY, SAVE, SAVED, PartLog
from dbnet.shards.schedule.slices import SlicePiece
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox


class CountingShard(Shard):
    """A shard that counts the changes of its slices.

    Parameters
    ----------
    pieces, versions
        Its pieces of slices; window memory, [pieces].
    """

    def __init__(
        self, part: Range, rule: Rule, params: np.ndarray, clock: np.ndarray, seconds: Callable[[], float],
        rounded: np.ndarray | None, pieces: Sequence[SlicePiece], versions: np.ndarray,
    ) -> None:  # fmt: skip
        super().__init__(part, rule, params, clock, seconds, rounded)
        self.pieces, self.versions = pieces, versions
        self.piece_at = {piece.lo: number for number, piece in enumerate(pieces)}

    def apply(self, lo: int, g: np.ndarray, t: int, arrival: Arrival | None = None) -> None:
        number = self.piece_at[lo]
        self.versions[number] += 1
        fence()
        super().apply(lo, g, t, arrival)
        fence()
        self.versions[number] += 1


class RecordingInbox(Inbox):
    """Takes slices out of its rings and writes down which.

    Parameters
    ----------
    log, by_pass
        Where to; whether what was not computed in the present pass is dropped, and need not be known.
    """

    def __init__(self, log: PartLog, by_pass: bool, *parts: Any) -> None:
        super().__init__(*parts)
        self._log, self._by_pass = log, by_pass

    def let_in(self, row: int, push: Push, g: np.ndarray, *more: Any) -> bool:
        if not self._by_pass or push.fetched == self._window.local["clock"][push.partition]:
            self._log.take(self._users[row], check_sum(g))
        return super().let_in(row, push, g, *more)

    def close(self, replica: int) -> tuple[int, int] | None:
        out = super().close(replica)
        self._log.add(CLOSE, replica)
        return out


class RecordingWriter(PartWriter):
    """Writes a shard's part of checkpoints, and down when it copied what; sees to it that the record is flushed."""

    def __init__(self, log: PartLog, *parts: Any) -> None:
        super().__init__(*parts)
        self._log, self._flushed = log, 0.0

    def _jobs(self, path: Path, number: int) -> Iterator[Callable[[], None]]:
        self._log.add(SAVE, path.name)
        for job in super()._jobs(path, number):
            self._log.add(COPY)
            yield job

    def _answer(self, failure: str, clock: np.ndarray, sound: bool = True) -> None:
        if not failure:
            self._log.add(SAVED, {"digests": self._part.digests, "clock": clock.tolist()})
        super()._answer(failure, clock, sound)

    def advance(self) -> bool:
        if self._clock() - self._flushed >= FLUSH:
            self._flushed = self._clock()
            self._log.flush()
        return super().advance()

    def close(self) -> None:
        super().close()
        self._log.close({"digests": digests(self._shard), "clock": self._shard.clock.tolist()})


FLUSH = 0.1


def digests(shard: Any) -> dict[str, str]:
    """Return the SHA-256 of each register that a checkpoint of a shard holds."""
    return {name: hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for name, x in shard.registers().items() if x.size}
