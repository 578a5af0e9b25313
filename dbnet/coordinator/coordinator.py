"""The coordinator: once a round it hears the shards, reads what the replicas have reported, and lets every duty act.

`Ending` says when a run is to end. It holds no parameters: the shards write their parts of a checkpoint themselves, and who is
evaluated is asked for by an order. What differs from method to method is a subclass: whom it lets begin, what it hands out,
what it does when a replica is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dbnet.checkpoint.format import REPLICA
from dbnet.checkpoint.master import Checkpoints
from dbnet.checkpoint.parts import Saved
from dbnet.comm.channel import Shards
from dbnet.comm.topology import Topology
from dbnet.comm.turns import IDLE, Turns, Wait
from dbnet.comm.window import Field
from dbnet.coordinator.duty import Facts, RunTime
from dbnet.coordinator.evaluation import Evaluation
from dbnet.coordinator.guard import Guard
from dbnet.coordinator.membership import Membership
from dbnet.coordinator.orders import OrderBook, Status
from dbnet.coordinator.progress import Progress
from dbnet.core.config import Config
from dbnet.data.subsets import SHARE
from dbnet.monitor.runfile import FINISHED, RUNNING, STOPPED


class Duties(NamedTuple):
    """What is seen to in every run, in the order of a round."""

    checkpoints: Checkpoints
    membership: Membership
    guard: Guard
    evaluation: Evaluation
    progress: Progress


class Ending:
    """When a run ends.

    Parameters
    ----------
    config
        Its stop conditions.
    signalled
        Says whether a signal has asked this rank to stop.
    duties, time
        What the run has come to.

    Attributes
    ----------
    stopped
        Whether it ends by a signal, with a checkpoint to go on from.
    """

    def __init__(self, config: Config, signalled: Callable[[], bool], duties: Duties, time: RunTime) -> None:
        self._stop, self._signalled, self._duties, self._time = config.stop, signalled, duties, time
        self.stopped = False

    @property
    def asked(self) -> bool:
        """Whether a signal asks the run to write a checkpoint and stop."""
        return self._signalled() or self._duties.membership.asked

    @property
    def reached(self) -> bool:
        """Whether the run is to end now: its time, its accuracy, too many gradients that were refused, or a signal."""
        stop, score = self._stop, self._duties.evaluation.last
        by_time = stop.seconds is not None and self._time.seconds >= stop.seconds
        by_accuracy = stop.accuracy is not None and score is not None and score.accuracy >= stop.accuracy
        return self.asked or by_time or by_accuracy or self._duties.guard.stops

    @property
    def halted(self) -> bool:
        """Whether the run cannot or shall not go on."""
        return self.asked or not self._duties.membership.active


class Coordinator:
    """One run as the coordinator sees it.

    Parameters
    ----------
    facts, time
        The run.
    replicas, shards
        Orders to replicas and what they report; messages to and from shards.
    duties, ending
        What is seen to in every run, and when it ends.

    Attributes
    ----------
    status
        What the replicas have reported, as of this round.
    news
        How often shards and disk were heard of: what a wait for them takes as progress.
    """

    # Whether refused gradients are counted by pass, and whether replicas' progress is shown as rows.
    by_pass: ClassVar[bool] = False
    rows: ClassVar[bool] = True

    def __init__(self, facts: Facts, replicas: OrderBook, shards: Shards, duties: Duties, ending: Ending, time: RunTime) -> None:
        self.facts, self.replicas, self.shards, self.duties, self.ending, self.time = facts, replicas, shards, duties, ending, time
        self.status, self.news = replicas.status(), 0
        self._drained: set[int] = set()
        own = {"drained": lambda shard, _: self._drained.add(shard), "saved": self._saved}
        self._take: dict[str, Callable[[int, Any], None]] = {**own, **self.messages()}
        for duty in duties:
            self._take |= duty.messages()

    # --- what a method's coordinator overrides --------------------------------------------------------------------------------

    @classmethod
    def fields(cls, topology: Topology) -> list[Field]:
        """Return more window fields of the coordinator."""
        return []

    @staticmethod
    def made(status: Status, facts: Facts, replica: int) -> int:
        """Return how many gradients a replica has reported in this run."""
        return max(0, int(status["steps"][replica] - facts.steps[replica]))

    def run(self) -> Turns:
        """Run the coordinator."""
        raise NotImplementedError

    def inherit(self, lost: int, heirs: list[int]) -> None:
        """Hand on the work of a lost replica."""

    @property
    def judged(self) -> bool:
        """Whether the last evaluation is of the parameters as they are when all is applied."""
        return False

    def evaluation_lost(self) -> None:
        """An evaluation was lost with its replica: ask anew."""
        self.duties.evaluation.ask()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the method."""
        return {}

    def messages(self) -> dict[str, Callable[[int, Any], None]]:
        """Return what takes more messages of shards."""
        return {}

    # --- one round ------------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Take in what has arrived and let every duty act."""
        for shard, kind, content in self.shards.hear():
            self._take[kind](shard, content)
            self.news += 1
        self.status = self.replicas.status()
        self.news += sum([duty.act(self.status) for duty in self.duties])
        for replica, heirs, evaluating in self.duties.membership.departed():
            if evaluating:
                self.evaluation_lost()
            if heirs:
                self.inherit(replica, heirs)

    def listen(self) -> bool:
        """One round; return whether anybody gave a sign of life."""
        before, news = self.beats, self.news
        self.tick()
        return self.news != news or bool((self.beats != before).any())

    def manage(self) -> Turns:
        """One round, and what recurs."""
        self.tick()
        # Where all is made the last one follows.
        if self.duties.evaluation.due and not self.ending.reached and not self.all_made:
            self.duties.evaluation.ask()
        if self.checkpoint_due:
            self.checkpoint()
        yield IDLE

    @property
    def beats(self) -> np.ndarray:
        """A number of each replica that changes while it lives, also while it moves data or reads, and polls no orders."""
        return self.status.beats + self.duties.membership.heard

    def until(self, done: Callable[[], bool], reason: str, sign: Callable[[], float] | None = None) -> Turns:
        """Wait; `sign` changes when whom it waits for was heard of, by default shards and disk: others may live as they like."""
        last = None
        while not done():
            self.tick()
            now = self.news if sign is None else sign()
            yield None if now != last else Wait(f"the coordinator waits for {reason}")
            last = now

    def evaluated(self, which: str = "") -> Turns:
        """Wait for an evaluation that is under way."""

        def sign() -> float:
            replica = self.replicas.evaluating
            return -1.0 if replica is None else float(self.beats[replica])

        reason = f"the {which}evaluation by replica {self.replicas.evaluating}"
        yield from self.until(lambda: not self.duties.evaluation.running, reason, sign)

    @property
    def all_done(self) -> bool:
        return all(self.replicas.done(replica) for replica in self.duties.membership.active)

    @property
    def all_made(self) -> bool:
        """Whether each replica has made its steps or its passes, be they applied or not."""
        stop, status = self.facts.config.stop, self.status

        def made(replica: int) -> bool:
            by_steps = stop.steps is not None and status["steps"][replica] + self.replicas.made(replica) >= stop.steps
            return by_steps or (stop.epochs is not None and status["epoch"][replica] >= stop.epochs) or self.replicas.done(replica)

        return all(made(replica) for replica in self.duties.membership.active)

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Steps of all replicas together, those before a checkpoint included."""
        return self.facts.beside + self.status.steps

    @property
    def checkpoint_due(self) -> bool:
        return self.duties.checkpoints.due(self.steps)

    @property
    def writing(self) -> bool:
        return self.duties.checkpoints.writing

    def checkpoint(self) -> None:
        """Have a checkpoint written while the run goes on."""
        self.duties.guard.unsound = False
        tables = {"replicas": self._cursors(), "table.shares": self._shares()}
        self.duties.checkpoints.begin(tables, self.state(), self.time.seconds, self.steps)

    def _saved(self, shard: int, saved: Saved) -> None:
        self.duties.guard.unsound = self.duties.guard.unsound or not saved.sound
        self.duties.checkpoints.take(shard, saved)

    def _shares(self) -> np.ndarray:
        """Return what is trained on, whoever does it, and how far each share is."""
        members = self.duties.membership
        copies = [r for r in range(self.replicas.topology.copies) if not members.handed_on(r)]
        return np.array([tuple(share) for r in copies for share in self.replicas.shares(r)], SHARE)

    def _cursors(self) -> np.ndarray:
        """Return a row per replica: its own counters and those of the spare ones that took its place, and where the last stands."""
        rows = np.zeros(self.replicas.topology.replicas, REPLICA)
        for replica, row in enumerate(rows):
            for copy in self.duties.membership.line(replica):
                for name in ("steps", "examples", "pushes"):
                    row[name] += int(self.status[name][copy])
                for name in ("epoch", "position"):
                    row[name] = int(self.status[name][copy])
        return rows

    # --- the end --------------------------------------------------------------------------------------------------------------

    def finish(self) -> Turns:
        """When all replicas are done: drain the rings, write the last checkpoint, evaluate (unless to stop), let everyone go."""
        guard, members = self.duties.guard, self.duties.membership
        self.shards.tell("drain")
        yield from self.until(lambda: len(self._drained) == len(self.shards), "the shards to apply what is in their rings")
        yield from self.evaluated()
        yield from self.until(lambda: not self.writing, "the shards to send a checkpoint")
        self.time.stop()
        if guard.conclude():
            self.checkpoint()
            yield from self.until(lambda: not self.writing, "the shards to send the last checkpoint")
        self.ending.stopped = self.ending.asked
        if guard.conclude() and not self.ending.stopped and not self.judged:
            self.duties.evaluation.ask()
        yield from self.evaluated("last ")
        members.part()
        self.replicas.end()
        if members.broken:
            yield from self.until(members.replicas_left, "the replicas to leave", lambda: float(self.beats.sum()))
        self.shards.tell("end", members.broken)
        while self.shards.channel.pending():
            yield IDLE
        while members.broken and not members.shards_left():
            # Nobody is listened to any more, since a probe fails once somebody has left.
            self.shards.channel.pending()
            yield Wait("the coordinator waits for the shards to leave")

    @property
    def finished(self) -> bool:
        """Whether the run has come to its own end."""
        well = not self.ending.stopped and not self.duties.guard.stopped and bool(self.duties.membership.active)
        return self.replicas.ended and well

    def close(self) -> None:
        """End the run's outputs."""
        try:
            self.duties.checkpoints.close()
        finally:
            self.duties.progress.conclude(STOPPED if self.ending.stopped else FINISHED if self.finished else RUNNING)
