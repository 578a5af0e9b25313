"""A shard whose schedule is recorded: it counts the changes of its slices and writes down, in order, what it does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.checkpoint.parts import PartWriter
from dbnet.core.jit import fence
from dbnet.core.kernels.vector import checked
from dbnet.core.ranges import Range
from dbnet.shards.push import Intake, Push, Receiver
from dbnet.shards.rules.base import Arrival, Rule
from dbnet.shards.schedule.log import CLOSE, COPY, SAVE, SAVED, PartLog
from dbnet.shards.schedule.slices import SlicePiece
from dbnet.shards.shard import Shard, View
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
        # Pushes come in the same slices again and again: (number, where it begins and ends in the slice, its view) of each piece.
        self._cuts: dict[tuple[int, int], list[tuple[int, int, int, View]]] = {}
        # Quicker than the array itself, of which every number is an object first.
        self._counts = memoryview(versions)

    def apply(self, lo: int, g: np.ndarray, t: int, arrival: Arrival | None = None) -> None:
        for number, begin, end, view in self._cuts.get((lo, g.size)) or self._cut(lo, g.size):
            self.change(number, view, g[begin:end], t, arrival)

    def _cut(self, lo: int, size: int) -> list[tuple[int, int, int, View]]:
        """Return the pieces of the slice that begins at `lo`."""
        within = [(number, piece) for number, piece in enumerate(self.pieces) if lo <= piece.lo < lo + size]
        cuts = [(number, piece.lo - lo, piece.range.hi - lo, self.view(piece.lo, piece.size)) for number, piece in within]
        self._cuts[lo, size] = cuts
        return cuts

    def change(self, number: int, view: View, g: np.ndarray, t: int, arrival: Arrival | None) -> None:
        """Apply one piece [size] of a slice."""
        counts = self._counts
        counts[number] += 1
        fence()
        self.update(view, g, t, arrival)
        fence()
        counts[number] += 1


class RecordingIntake(Intake):
    """Takes the slices of one origin and writes down that it does.

    Parameters
    ----------
    log, by_pass
        Where to; whether what was not computed in the present pass is dropped, and need not be known.
    origin
        Whose.
    """

    def __init__(self, log: PartLog, by_pass: bool, origin: int, receiver: Receiver, finite: bool) -> None:
        super().__init__(receiver, finite)
        self._log, self._by_pass, self._origin = log, by_pass, origin

    def look(self, push: Push, g: np.ndarray, wanted: bool) -> int:
        if self._by_pass and push.fetched != self._receiver.clock[push.partition]:
            return super().look(push, g, wanted)
        bad, check = checked(g, self._receiver.largest)
        self._log.take(self._origin, check)
        return bad if wanted else -1


class RecordingInbox(Inbox):
    """Takes slices out of its rings; writes down when a replica is lost."""

    def __init__(self, log: PartLog, *parts: Any) -> None:
        super().__init__(*parts)
        self._log = log

    def close(self, replica: int) -> tuple[int, int] | None:
        out = super().close(replica)
        self._log.add(CLOSE, replica)
        return out


class RecordingWriter(PartWriter):
    """Writes a shard's part of checkpoints, and down when it copied what."""

    def __init__(self, log: PartLog, *parts: Any) -> None:
        super().__init__(*parts)
        self._log = log

    def _jobs(self, path: Path, number: int) -> Iterator[Callable[[], None]]:
        self._log.add(SAVE, path.name)
        for job in super()._jobs(path, number):
            self._log.add(COPY)
            yield job

    def _answer(self, failure: str, clock: np.ndarray, sound: bool = True) -> None:
        if not failure:
            self._log.add(SAVED, {"digests": self._part.digests, "clock": clock.tolist()})
        super()._answer(failure, clock, sound)

    def close(self) -> None:
        super().close()
        self._log.close({"digests": digests(self._shard), "clock": self._shard.clock.tolist()})


def digests(shard: Any) -> dict[str, str]:
    """Return the SHA-256 of each register that a checkpoint of a shard holds."""
    return {name: hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for name, x in shard.registers().items() if x.size}
