"""What a push is, who receives it, and how it is let in: one with NaN or Inf is refused. How it travels: `store`.

Each slice is looked at before it is applied. From its first bad slice on a push is refused at this shard: nothing more of it is
applied, the clock stays, no event is made; its slices before that one were finite and stay applied, and other shards may have
taken theirs. With the last slice every push has either been finished or refused, so per shard, replica and partition

    gradients computed = gradients in events + gradients refused + gradients in flight
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dbnet.comm.channel import Channel
from dbnet.core.config import Config
from dbnet.core.kernels.vector import first_bad
from dbnet.core.ranges import Range
from dbnet.network.parameters.layout import FlatLayout
from dbnet.shards.rules.base import Arrival


class Intake:
    """One origin's way into a shard.

    Parameters
    ----------
    receiver
        What the slices are applied to.
    finite
        Whether pushes with NaN or Inf are refused.
    """

    def __init__(self, receiver: Receiver, finite: bool = True) -> None:
        self._receiver, self._finite = receiver, finite
        self._t = 0
        self._arrival: Arrival | None = None
        self._bad: tuple[int, float] | None = None

    def take(
        self, push: Push, g: np.ndarray, pieces: Sequence[tuple[int, int, int]], first: bool, last: bool,
        sync: Callable[[], None] = lambda: None,
    ) -> bool:  # fmt: skip
        """Take one slice of a push; return whether with it the whole push has been applied.

        Parameters
        ----------
        g
            The slice.
        pieces
            (element within the slice, place in the shard, length) of each contiguous piece of it.
        first, last
            Whether it is the first and the last slice of its push.
        sync
            Orders the parameters before the clock, where others read both while they change.
        """
        receiver = self._receiver
        if first:
            self._bad = None
        at = self.look(push, g, self._finite and self._bad is None)
        if at >= 0:
            place = next(target + at - start for start, target, length in pieces if start <= at < start + length)
            self._bad = receiver.range.lo + place, float(g[at])
        if self._bad is None:
            if first:
                self._t = receiver.begin(push.partition, push.fetched)
                if receiver.informed:
                    late = int(receiver.clock[push.partition]) - push.fetched
                    self._arrival = Arrival(late, push.replica, push.steps)
            for start, target, length in pieces:
                receiver.apply(target, g[start : start + length], self._t, self._arrival)
        whole = last and self._bad is None
        if whole:
            sync()
            receiver.finish(push)
        elif last:
            receiver.refuse(Refusal(push, *self._bad))
        return whole

    def look(self, push: Push, g: np.ndarray, wanted: bool) -> int:
        """Return the place of the first value of a slice that is refused, if that is `wanted`; -1: none."""
        return first_bad(g, self._receiver.largest) if wanted else -1


class Push(NamedTuple):
    """What is known of one push at one shard: who, its number, the clock its oldest gradient was fetched at, its gradients.

    `step` is the replica's step that made the newest of them.
    """

    replica: int
    partition: int
    number: int
    fetched: int
    steps: int
    step: int


class Counts:
    """What went over the wire: fetches, pushes, bytes each way, seconds the replica waited for a ring."""

    def __init__(self) -> None:
        self.fetches = self.pushes = self.bytes_fetched = self.bytes_pushed = 0
        self.waited = 0.0


class Refusal(NamedTuple):
    """A push that a shard did not take: the flat index of its first value that is not finite, and that value."""

    push: Push
    index: int
    value: float


class Receiving(NamedTuple):
    """What a receiver may need to know of the run.

    Attributes
    ----------
    config, layout
        The run, and the names of its parameters.
    origins
        The (replica, partition) pairs that push to the shard.
    saved
        Reads the registers that a checkpoint holds beside the shard's own.
    """

    config: Config
    layout: FlatLayout
    origins: Sequence[tuple[int, int]]
    saved: Callable[[], dict[str, np.ndarray]]


class Receiver(Protocol):
    """What takes pushes at a shard, and what else its coordinator asks for."""

    range: Range
    params: np.ndarray
    clock: np.ndarray

    @classmethod
    def rule_state(cls, config: Config) -> tuple[str, ...]:
        """Return the registers of the update rule that a checkpoint must hold."""

    @classmethod
    def vectors(cls, config: Config) -> int:
        """Return how many registers a shard holds beside the parameters."""

    @classmethod
    def decay(cls, config: Config) -> float:
        """Return the decay that the replicas add to their gradients."""

    largest: float  # of a gradient; what is beyond is refused as Inf is
    informed: bool  # whether `apply` wants the push's Arrival

    def begin(self, partition: int, fetched: int = 0) -> int: ...
    def apply(self, lo: int, g: np.ndarray, t: int, arrival: Arrival | None = None) -> None: ...
    def finish(self, push: Push) -> None: ...
    def refuse(self, refusal: Refusal) -> None: ...
    def leave(self, replica: int) -> None: ...
    def heeds(self) -> dict[str, Callable[[Any], None]]: ...
    def advance(self, channel: Channel) -> bool: ...
    def take_events(self) -> np.ndarray: ...
    def take_refused(self) -> list[Refusal]: ...
    def registers(self) -> dict[str, np.ndarray]: ...
