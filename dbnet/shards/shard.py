"""One shard, Downpour's server: its range of the parameters, the registers of its rule, its clock, and the events of its updates.

Only `apply` changes parameters. A push may come in slices, between those of other pushes; when its last slice is applied the
clock of its partition index goes up by one and the update becomes an event. Every replica pushes each partition index once per
push, so clocks and staleness mean the same for any number of partitions. An event tells the clock that was fetched and the one
that was found: their difference is the staleness. A push that is refused (`push`) is neither. `server` is the loop around it.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.channel import Channel
from dbnet.core.config import Config
from dbnet.core.kernels.vector import narrow
from dbnet.core.ranges import Range
from dbnet.shards.push import Push, Receiving, Refusal
from dbnet.shards.rules.base import Arrival, Rule

EVENT = np.dtype(
    [
        ("replica", "i4"),
        ("partition", "i4"),
        ("push", "i8"),
        ("fetched", "i8"),
        ("applied", "i8"),
        ("steps", "i4"),
        ("seconds", "f8"),
    ]
)
_ROW = Struct("=iiqqqid")  # the same: an event costs no more than its bytes


class View(NamedTuple):
    """A place within a shard, and the parameters and the registers of the rule that lie there."""

    here: slice
    params: np.ndarray
    state: dict[str, np.ndarray]


class Shard:
    """The state of one shard.

    Parameters
    ----------
    part
        Its range of the flat vector.
    rule
        The update rule.
    params, clock
        Window memory: [part.size] and [partitions].
    seconds
        The time of the run, for events.
    rounded
        Window memory [part.size] for the parameters as bfloat16, if that is what is fetched.
    """

    def __init__(
        self, part: Range, rule: Rule, params: np.ndarray, clock: np.ndarray, seconds: Callable[[], float],
        rounded: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self._rounded = rounded
        self.range, self.rule, self.params, self.clock = part, rule, params, clock
        self.largest, self.informed = rule.largest(params.dtype), rule.informed
        self.state = {name: np.full(part.size, rule.initial(name), params.dtype) for name in rule.state}
        self._begun = [0] * len(clock)
        self._seconds = seconds
        self._refused: list[Refusal] = []
        self._events = bytearray(1024 * EVENT.itemsize)
        self._count = 0

    @classmethod
    def over(cls, shard: Shard, receiving: Receiving) -> Any:
        """Return what takes the pushes at this shard: itself, or for a subclass of `Front` something in front of it."""
        return shard

    @classmethod
    def rule_state(cls, config: Config) -> tuple[str, ...]:
        return config.rule.state

    @classmethod
    def vectors(cls, config: Config) -> int:
        return len(cls.rule_state(config))

    @classmethod
    def decay(cls, config: Config) -> float:
        return config.model.decay

    def begin(self, partition: int, fetched: int = 0) -> int:
        """Return the number of a push whose first slice has come: 1, 2, ...; all of its slices are applied with it."""
        begun, clock = self._begun[partition], int(self.clock[partition])
        self._begun[partition] = t = (begun if begun > clock else clock) + 1
        return t

    def apply(self, lo: int, g: np.ndarray, t: int, arrival: Arrival | None = None) -> None:
        """Apply the rule to the parameters from `lo` (counted within the shard) on with the slice `g` [n] of push `t`."""
        self.update(self.view(lo, g.size), g, t, arrival)

    def view(self, lo: int, size: int) -> View:
        """Return what lies in so many elements from `lo` on."""
        here = slice(lo, lo + size)
        return View(here, self.params[here], {name: register[here] for name, register in self.state.items()})

    def update(self, view: View, g: np.ndarray, t: int, arrival: Arrival | None) -> None:
        """Apply the rule to what lies there with the gradient `g` [its size]."""
        here, w, state = view
        self.rule.apply(w, g, state, t, *((arrival,) if self.informed else ()))
        self.round(here)

    def round(self, here: slice) -> None:
        """Bring what is fetched of the parameters up to date, where it is not these themselves."""
        if self._rounded is not None:
            narrow(self.params[here], self._rounded[here])

    def finish(self, push: Push) -> None:
        """Count a push whose last slice has been applied."""
        applied = int(self.clock[push.partition])
        self.record(push, applied)
        self.clock[push.partition] = applied + 1

    def refuse(self, refusal: Refusal) -> None:
        """Note a push that was refused: the clock stays, and there is no event."""
        self._refused.append(refusal)

    def leave(self, replica: int) -> None:
        """A lost replica pushes no more."""

    def heeds(self) -> dict[str, Callable[[Any], None]]:
        """Return what else the coordinator may ask for, by kind of message."""
        return {}

    def advance(self, channel: Channel) -> bool:
        """Go on with what was asked for; return whether there was something to do."""
        return False

    def take_refused(self) -> list[Refusal]:
        """Return what was refused since the last call."""
        if not self._refused:
            return []
        refused, self._refused = self._refused, []
        return refused

    def record(self, push: Push, applied: int) -> None:
        """Make an event of a push that was applied when the clock was `applied`."""
        at = self._count * EVENT.itemsize
        if at == len(self._events):
            self._events += bytes(at)
        replica, partition, number, fetched, steps, _ = push
        _ROW.pack_into(self._events, at, replica, partition, number, fetched, applied, steps, self._seconds())
        self._count += 1

    def take_events(self) -> np.ndarray:
        """Return the events since the last call, in the order of the updates."""
        events = np.frombuffer(self._events, EVENT, self._count).copy()
        self._count = 0
        return events

    def registers(self) -> dict[str, np.ndarray]:
        """Return all named vectors that a checkpoint must hold."""
        return {"params": self.params, **{f"state.{name}": register for name, register in self.state.items()}}

    def describe(self) -> dict[str, Any]:
        return {"range": tuple(self.range), "rule": self.rule.kind, "clock": self.clock.tolist()}


class Front:
    """What stands in front of a shard and takes its pushes: base of a method's own way to update."""

    def __init__(self, shard: Shard, receiving: Receiving) -> None:
        self.shard = shard
        self.range, self.params, self.clock, self.largest = shard.range, shard.params, shard.clock, shard.largest
        self.informed = False

    @classmethod
    def over(cls, shard: Shard, receiving: Receiving) -> Any:
        return cls(shard, receiving)

    rule_state, vectors, decay = Shard.rule_state, Shard.vectors, Shard.decay

    def refuse(self, refusal: Refusal) -> None:
        self.shard.refuse(refusal)

    def leave(self, replica: int) -> None:
        """A lost replica pushes no more."""

    def heeds(self) -> dict[str, Callable[[Any], None]]:
        return {}

    def advance(self, channel: Channel) -> bool:
        return False

    def take_events(self) -> np.ndarray:
        return self.shard.take_events()

    def take_refused(self) -> list[Refusal]:
        return self.shard.take_refused()

    def registers(self) -> dict[str, np.ndarray]:
        return self.shard.registers()
