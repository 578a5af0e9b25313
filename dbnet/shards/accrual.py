"""A batch method's questions to the shards, both halves: registers, rounds of commands, the gradient that accrues over a pass.

The coordinator asks all shards, each answers, one question at a time. A question may do three things, in this order:

    counts      wait until counts[r] bundles of this pass have come from every replica r
    begin       begin the pass of this number: clear the gradient, set the clock to the number; `iterate` is what a checkpoint of
                this pass takes for the parameters
    commands    carry them out on this shard's range; the answer holds their scalars, which the coordinator sums

A bundle is the sum of the gradients of some portions. It is added to the gradient slice by slice if it was computed from the
parameters of this pass, and dropped if it comes too late: its clock at the fetch says which. Parameters change only by commands,
and those come after a pass has been collected, so all replicas compute from the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.channel import Channel, Shards
from dbnet.comm.turns import Turns, Wait
from dbnet.core.config import Config
from dbnet.core.kernels import vector
from dbnet.shards.push import Push, Receiving, Refusal
from dbnet.shards.rules.base import Arrival
from dbnet.shards.schedule.log import BEGIN, SUM, PartLog
from dbnet.shards.shard import Front, Shard
from dbnet.shards.space import Command, Registers, Space, perform


class Question(NamedTuple):
    """What all shards are asked; `number` comes back with the answer."""

    number: int
    commands: tuple[Command, ...] = ()
    begin: int | None = None
    counts: tuple[int, ...] = ()
    iterate: str = "params"


class ShardSpace(Space):
    """The coordinator's half: registers that lie on the shards.

    Parameters
    ----------
    shards
        To whom questions go.
    tick
        The coordinator's everyday work, which hands answers to `take`; returns something that changes when a shard was heard of.
    dtype
        Type of the registers.
    """

    def __init__(self, shards: Shards, tick: Callable[[], object], dtype: np.dtype | str) -> None:
        super().__init__(dtype)
        self._shards, self._tick = shards, tick
        self._number = 0
        self._answers: dict[int, list[float]] = {}

    def take(self, shard: int, content: tuple[int, list[float]]) -> None:
        """Take an answer; one to a question that was given up is forgotten."""
        number, scalars = content
        if number == self._number:
            self._answers[shard] = scalars

    def totals(self, commands: Sequence[Command]) -> Turns[list[float]]:
        return (yield from self.ask(commands))

    def ask(
        self, commands: Sequence[Command] = (), *, begin: int | None = None, counts: Sequence[int] = (), iterate: str = "params",
        give_up: Callable[[], bool] = lambda: False,
    ) -> Turns[list[float] | None]:  # fmt: skip
        """Ask all shards and wait; return the sums of the scalars, or None where `give_up` said so."""
        self._number += 1
        self._answers = {}
        self._shards.tell("ask", Question(self._number, tuple(commands), begin, tuple(counts), iterate))
        last = None
        while len(self._answers) < len(self._shards):
            if give_up():
                return None
            news = self._tick()
            if len(self._answers) < len(self._shards):
                missing = [str(s) for s in range(len(self._shards)) if s not in self._answers]
                yield None if news != last else Wait(f"the coordinator waits for shard {', '.join(missing)} to answer")
            last = news
        yield None
        # In the order of the shards, so that a run can be repeated.
        return [sum(column) for column in zip(*(self._answers[s] for s in range(len(self._shards))), strict=True)]


class Accrual(Front):
    """The shard's half.

    Attributes
    ----------
    dropped
        Slices that came too late.
    log
        Where passes are written down, if the schedule is recorded.
    """

    def __init__(self, shard: Shard, receiving: Receiving) -> None:
        super().__init__(shard, receiving)
        shard.state.clear()
        self.largest = float(np.finfo(shard.params.dtype).max)
        # Registers that no checkpoint needs: the gradient, and the mask of the decay.
        self._passing = {"gradient": np.zeros_like(shard.params)}
        if _masked(receiving.config):
            self._passing["weights"] = receiving.layout.weights(shard.range, shard.params.dtype)
        self.held: Registers = {"params": shard.params, **receiving.saved(), **self._passing}
        self._arrived = dict.fromkeys(receiving.origins, 0)
        self._number, self._iterate = 0, "params"
        self.dropped = 0
        self.log: PartLog | None = None
        self._summed = 0
        self._asked: Question | None = None
        self._left: list[Command] = []
        self._scalars: list[float] = []

    @classmethod
    def rule_state(cls, config: Config) -> tuple[str, ...]:
        return ()

    @classmethod
    def vectors(cls, config: Config) -> int:
        return 1 + len(config.method.descent.registers()) + _masked(config)

    @classmethod
    def decay(cls, config: Config) -> float:
        """The shards add it: once per pass, whatever the portions are."""
        return 0.0

    # --- bundles --------------------------------------------------------------------------------------------------------------

    def begin(self, partition: int, fetched: int) -> int:
        """Return which pass a bundle belongs to; all of its slices are applied with it."""
        return fetched

    def apply(self, lo: int, g: np.ndarray, t: int, arrival: Arrival | None = None) -> None:
        """Add the slice `g` [n] of a bundle of pass `t` to the gradient from `lo` (counted within the shard) on."""
        if t == self._number:
            vector.axpy(1.0, g, self.held["gradient"][lo : lo + g.size])
        else:
            self.dropped += 1

    def finish(self, push: Push) -> None:
        """Count a bundle whose last slice has come."""
        if push.fetched == self._number:
            self._arrived[push.replica, push.partition] += 1
            self.shard.record(push, self._number)

    def refuse(self, refusal: Refusal) -> None:
        """Count a bundle that is not finite as arrived, so that its pass ends; the coordinator is told and discards the pass."""
        push = refusal.push
        if push.fetched == self._number:
            self._arrived[push.replica, push.partition] += 1
            self.shard.refuse(refusal)
        else:
            self.dropped += 1

    # --- questions ------------------------------------------------------------------------------------------------------------

    def heeds(self) -> dict[str, Callable[[Any], None]]:
        return {"ask": self.heed}

    def heed(self, question: Question) -> None:
        """Take a question; an older one that was not answered yet is forgotten."""
        self._asked, self._left, self._scalars = question, list(question.commands), []

    def advance(self, channel: Channel) -> bool:
        """Carry out one command of the question, or answer it; return whether there was something to do."""
        asked = self._asked
        if asked is None or (asked.counts and any(n < asked.counts[o[0]] for o, n in self._arrived.items())):
            return False
        if asked.begin not in (None, self._number):
            self._begin(asked.begin, asked.iterate)
        if asked.counts and self._summed != self._number:
            self._summed = self._number
            self._note(SUM, self._number, self.check)
        if self._left:
            self._scalars += perform(self.held, self._left.pop(0))
            return True
        channel.send(0, "answer", (asked.number, self._scalars))
        self._asked = None
        return True

    def _begin(self, number: int, iterate: str) -> None:
        self._number, self._iterate = number, iterate
        vector.fill(self.held["gradient"], 0.0)
        self._arrived = dict.fromkeys(self._arrived, 0)
        self.clock[:] = number
        self._note(BEGIN, number)

    def _note(self, kind: int, number: int, check: Callable[[], int] = int) -> None:
        if self.log is not None:
            self.log.add(kind, np.array([number, check()], "<i8"))

    def check(self) -> int:
        """Return the check sum of the gradient as it is now."""
        return int(vector.check_sum(self.held["gradient"]))

    # --- what a shard is asked for --------------------------------------------------------------------------------------------

    def registers(self) -> Registers:
        """Return what a checkpoint must hold: the iterate as params, whatever is tried now; each restart restores the gradient."""
        kept = {f"vector.{name}": x for name, x in self.held.items() if name != "params" and name not in self._passing}
        return {"params": self.held[self._iterate], **kept}

    def describe(self) -> dict[str, Any]:
        return {"range": tuple(self.range), "registers": sorted(self.held), "clock": self.clock.tolist()}


def _masked(config: Config) -> bool:
    """Return whether weights are told from biases."""
    return bool(config.model.decay or config.method.descent.reads())
