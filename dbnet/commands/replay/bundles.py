"""A shard of a batch method's replay: it adds up the bundles of a pass, slice by slice, in the order in which it did so."""

from __future__ import annotations

from collections import deque
from typing import Any

from dbnet.commands.replay.outcome import Difference, Ended
from dbnet.commands.replay.shard import Parcel, Taker
from dbnet.shards.schedule.log import BEGIN, END, SAVE, SAVED, SUM, TAKE, TAKES, PartOfSchedule


class RecordedPass:
    """What a shard has recorded of one pass: (origin, check sum) of each slice; the check sum of the gradient when all had come."""

    def __init__(self) -> None:
        self.takes: list[tuple[int, int]] = []
        self.sum: int | None = None


class PassTaker(Taker):
    """A shard that adds up the bundles of a pass in the order in which it did so.

    Parameters
    ----------
    part
        What it has recorded.
    parts
        What takes its pushes.

    Attributes
    ----------
    passes, saved, end
        What it has recorded of each pass, of each checkpoint by name, and of the end.
    """

    def __init__(self, part: PartOfSchedule, *parts: Any) -> None:
        super().__init__(*parts)
        self._whole, self.passes, self.saved, self.end = part.whole, {}, {}, None
        self._left: deque[tuple[int, int]] = deque()
        named, recorded = "", RecordedPass()
        for entry in part.entries:
            if entry.kind == BEGIN:
                recorded = self.passes[int(entry.array("<i8")[0])] = RecordedPass()
            elif entry.kind == TAKES:
                recorded.takes += entry.array(TAKE).tolist()
            elif entry.kind == SUM:
                recorded.sum = int(entry.array("<i8")[1])
            elif entry.kind == SAVE:
                named = entry.value.split(".")[0]
            elif entry.kind == SAVED:
                self.saved[named] = entry.value
            elif entry.kind == END:
                self.end = entry.value

    def open(self, number: int) -> None:
        """Begin to take what was taken in a pass; Ended where the record does not reach to its end."""
        recorded = self.passes.get(number)
        if recorded is None or recorded.sum is None:
            if not self._whole:
                raise Ended
            raise Difference(f"pass {number}, shard {self.index}: it has not recorded that all bundles of this pass had come")
        self._number, self._left = number, deque(recorded.takes)
        strange = {origin for origin, _ in recorded.takes} - set(self.parcels)
        if strange:
            where = f"pass {number}, shard {self.index}"
            raise Difference(f"{where}: it takes a slice of origin {strange.pop()}, which never pushes here")

    def give(self, parcel: Parcel, origin: int) -> None:
        """Take what can be taken, now that another bundle is there."""
        if origin in self.parcels:
            self.parcels[origin].append(parcel)
        while self._left and self.parcels[self._left[0][0]]:
            self.take(*self._left.popleft())

    def shut(self) -> None:
        """All bundles are there: what was recorded must be taken, and nothing else be there."""
        where = f"pass {self._number}, shard {self.index}"
        if self._left:
            who = self._topology.name(self._topology.origin_rank(*divmod(self._left[0][0], self._topology.partitions)))
            raise Difference(f"{where}, {who}: its slice was taken next, but it has no more accepted bundles in this pass")
        for parcels in self.parcels.values():
            if parcels:
                raise Difference(f"{self._where(parcels[0], parcels[0].at)}: it was accepted, but has not been taken")
        if self._compared.exact and self.receiver.check() != self.passes[self._number].sum:
            raise Difference(f"{where}: the sum of its bundles is another")

    def _where(self, parcel: Parcel, at: int) -> str:
        push = parcel.push
        partition = f" partition {push.partition}" if self._topology.partitions > 1 else ""
        number = self._slice(parcel, at)
        return f"pass {push.fetched}, shard {self.index}, slice {number}, replica {push.replica}{partition}, {parcel.about}"
