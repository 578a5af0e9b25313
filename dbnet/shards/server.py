"""One shard's rank: it takes what is pushed, does what the coordinator asks for, and writes its part of checkpoints.

coordinator -> shard    "drain"                apply what is in the rings, then answer "drained"
                        "close" replica        take nothing more of a lost replica; answer "closed" (replica, applied)
                        "checkpoint" ...       see `checkpoint`
                        "end" broken           leave; where somebody was lost, without waiting for what nobody listens to any more
                        what a receiver heeds  a batch method's questions, see `accrual`
shard -> coordinator    "events" rows, late,   updates since the last time: those recorded; all by staleness;
                        busy                   seconds of the run in which it had something to do
                        "refused"              pushes that were refused
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np

from dbnet.checkpoint.parts import PartWriter
from dbnet.comm.channel import Channel
from dbnet.comm.turns import BESIDE, IDLE, Turns, Wait
from dbnet.core.config import RecordTable
from dbnet.shards.push import Receiver
from dbnet.shards.store import Inbox

_REPORT = 0.25
_ALONE = 1e-3


class NoInbox:
    """Within one process pushes are applied where they are made."""

    def drain(self) -> bool:
        return False

    def close(self, replica: int) -> None:
        return None


class Server:
    """The server of one shard, whatever the method.

    Parameters
    ----------
    receiver
        What pushes are applied to.
    inbox
        Takes them out of their rings.
    channel
        To the coordinator.
    saver
        Writes its part of a checkpoint.
    clock
        Seconds of the run.
    record
        Which updates are recorded.

    Attributes
    ----------
    busy
        Seconds of the run in which there was something to do.
    """

    def __init__(
        self, receiver: Receiver, inbox: Inbox | NoInbox, channel: Channel, saver: PartWriter, clock: Callable[[], float],
        record: RecordTable,
    ) -> None:  # fmt: skip
        self._record = record
        self.receiver, self.inbox, self._channel, self.saver, self._clock = receiver, inbox, channel, saver, clock
        self._heard = self._draining = self._more = False
        self._next_report = 0.0
        self.busy = self._told = 0.0
        self._heed: dict[str, Callable[[Any], None]] = {
            "drain": self._drain,
            "close": self._close,
            "checkpoint": lambda content: saver.begin(*content),
            **receiver.heeds(),
        }

    def run(self) -> Turns:
        while True:
            began = self._clock()
            # The message first: after "drain" the rings must be seen empty once more.
            message, busy = self._channel.receive(), self._take()
            self._heard = message is not None
            # Before any answer: who hears that a pass has ended must have heard what was refused of it.
            if refused := self.receiver.take_refused():
                self._channel.send(0, "refused", refused)
            if message is not None and message.kind == "end":
                broken = bool(message.content)
                break
            if message is not None:
                self._heed[message.kind](message.content)
            busy = self.receiver.advance(self._channel) or busy
            self._report(busy)
            busy = self.saver.advance() or busy
            if busy:
                self.busy += self._clock() - began
            yield None if busy else BESIDE if self.saver.busy else IDLE
        self.saver.close()
        while not broken and self._channel.pending():
            yield Wait("a shard waits for the coordinator to take its last messages")

    def settled(self) -> float:
        """Return up to when it has nothing to do, unless something arrives; nothing is known while somebody waits for it."""
        return -inf if self._heard or self._draining or self._more or self.saver.busy else self._next_report

    def _take(self) -> bool:
        """Apply what has arrived, for at most the millisecond that MPI may be left alone; return whether there was anything."""
        self._more = self.inbox.drain()
        if not self._more:
            return False
        until = self._clock() + _ALONE
        while self._more and self._clock() < until:
            self._more = self.inbox.drain()
        return True

    def _drain(self, _: Any) -> None:
        self._draining = True

    def _close(self, replica: int) -> None:
        self._channel.send(0, "closed", (replica, self.inbox.close(replica)))
        self.receiver.leave(replica)

    def _report(self, busy: bool) -> None:
        """Send events when it is time, or when all is drained; then say that it is."""
        drained = self._draining and not busy
        if self._clock() >= self._next_report or drained:
            self._next_report = self._clock() + _REPORT
            events = self.receiver.take_events()
            if len(events) or self.busy > self._told:
                late, self._told = np.unique(events["applied"] - events["fetched"], return_counts=True), self.busy
                self._channel.send(0, "events", (events[sampled(events["applied"], self._record)], late, self.busy))
        if drained:
            self._draining = False
            self._channel.send(0, "drained")


def sampled(clock: np.ndarray, record: RecordTable) -> np.ndarray:
    """Return which updates become rows [updates], by the clock at each: the same ones however often a run is begun again."""
    if record.events == "counts":
        return np.zeros(len(clock), bool)
    return (clock < record.whole) | (clock % record.every == 0) | (record.events == "all")
