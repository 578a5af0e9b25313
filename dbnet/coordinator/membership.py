"""Membership: which replicas take part, which wait as spares, which are lost, and what was lost with them.

A replica one of whose ranks gives no sign of life for the bound (`heartbeat`) is lost. Its order row says so, in case it only
slept; the shards apply what is complete in its rings, close them for good, and report how many of its gradients they have
applied. So of what it computed everything is either applied or counted as lost, and nothing is counted twice. What it was to
train on goes to a spare replica, which takes its place, or else to all that are left; how is the method's business
(`Coordinator.inherit`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.channel import Channel
from dbnet.comm.topology import Role
from dbnet.coordinator.crashes import Crashes
from dbnet.coordinator.duty import Duty, RunTime
from dbnet.coordinator.heartbeat import HeartbeatWatch
from dbnet.coordinator.orders import OrderBook, Status
from dbnet.core.errors import Lost

_NAMED = 8  # of those that take over; more are counted


class LostReplica(NamedTuple):
    """A replica that was lost: when, its steps of this run as far as known, how many of them were applied by every shard."""

    replica: int
    seconds: float
    steps: int
    applied: int


class Departure(NamedTuple):
    """A replica that was lost, who goes on with its work, and whether it was evaluating."""

    replica: int
    heirs: list[int]
    evaluating: bool


def _taking(heirs: Sequence[int]) -> str:
    """Return in words that these, a spare replica or all that are left, take over."""
    if len(heirs) > _NAMED:
        return f"the other {len(heirs)} replicas take over"
    if len(heirs) > 1:
        return f"replicas {', '.join(map(str, heirs[:-1]))} and {heirs[-1]} take over"
    return f"replica {heirs[0]} takes over" if heirs else "nobody is left"


class Membership(Duty):
    """Who takes part.

    Parameters
    ----------
    replicas, channel, watch
        Orders to replicas, messages to shards, signs of life; without a watch nobody is ever lost.
    made
        Returns from the status how many gradients of a replica were pushed or may have been on their way, in this run.
    time
        The time of the run.
    say, record
        Print a sentence; record a loss.
    crashes
        Who crashed; by default nobody.

    Attributes
    ----------
    repeated
        The signal that two have died of, for which the run stops; nothing where none did.
    """

    def __init__(
        self, replicas: OrderBook, channel: Channel, watch: HeartbeatWatch | None, made: Callable[[Status, int], int],
        time: RunTime, say: Callable[[str], None], record: Callable[[LostReplica], None],
        crashes: Crashes | None = None,
    ) -> None:  # fmt: skip
        world, self._status = replicas.topology, replicas.status()
        self._replicas, self._channel, self._watch, self._made, self._time = replicas, channel, watch, made, time
        self._say, self._record, self._world = say, record, world
        self.active, self.spares = list(range(world.replicas)), list(range(world.replicas, world.copies))
        self.crashes, self.repeated = crashes or Crashes(None, world), ""
        self.lost: dict[int, float] = {}
        self._next = -np.inf
        self._known: list[LostReplica] = []
        self._handed_on: set[int] = set()
        self._follower: dict[int, int] = {}
        self._closing: dict[int, dict[int, tuple[int, int] | None]] = {}
        self._departed: list[Departure] = []

    def messages(self) -> dict[str, Callable[[int, Any], None]]:
        return {"closed": self.closed}

    def go_by(self, watch: HeartbeatWatch) -> None:
        """Go by these signs of life from now on."""
        self._watch = watch

    def act(self, status: Status) -> bool:
        """Look who gives a sign of life.

        Raises
        ------
        Lost
            A shard is lost, and with it parameters.
        """
        self._status = status
        for rank in self._silent():
            role = self._world.role(rank)
            if role is Role.SERVE:
                raise Lost(
                    f"{self._world.name(rank)} is lost, there was no sign of its life for {self._watch.bound:g} s, and its "
                    "parameters with it; go on from the newest checkpoint with --resume auto."
                )
            if role is Role.WORK:
                self._give_up(*self._world.place(rank))
        return False

    def _silent(self) -> list[int]:
        """Return the ranks that are lost, if it is time to look: rounds come oftener than anybody can be lost."""
        if self._watch is None or (now := self._time.clock()) < self._next:
            return []
        self._next = now + self._watch.period
        return self._watch.look()

    def departed(self) -> list[Departure]:
        """Return who was lost since the last call, for the method to hand on their work."""
        departed, self._departed = self._departed, []
        return departed

    @property
    def heard(self) -> np.ndarray | float:
        """When each replica was heard of last, [copies]; 0 where nobody can be lost."""
        return 0.0 if self._watch is None else self._watch.heard

    @property
    def asked(self) -> bool:
        """Whether a signal has asked any rank to stop, or a defect is no single case."""
        return bool(self.repeated) or (self._watch is not None and self._watch.asked)

    def _give_up(self, replica: int, partition: int) -> None:
        if replica in self.lost:
            return
        self.lost[replica] = self._time.seconds
        if not self.repeated and (repeated := self.crashes.repeated()):
            self._say(f"Two processes crashed ({repeated}): the run stops.")
            self.repeated = repeated
        if replica in self.spares:
            self.spares.remove(replica)
            self._replicas.give_up(replica)
            self._say(f"Spare replica {replica} is lost.")
            return
        self.active.remove(replica)
        evaluating = self._replicas.give_up(replica)
        where = f" (partition {partition})" if self._world.partitions > 1 else ""
        spare = self._call_spare()
        self._follower.update((replica, follower) for follower in spare)
        heirs = spare or list(self.active)
        self._say(f"Replica {replica} is lost: no sign of life{where} for {self._watch.bound:g} s; {_taking(heirs)}.")
        self._closing[replica] = {}
        for shard in range(self._world.shards):
            self._channel.send(self._world.shard_rank(shard), "close", replica)
        self._handed_on.update([replica] if heirs else [])
        self._departed.append(Departure(replica, heirs, evaluating))

    def _call_spare(self) -> list[int]:
        """Let a spare replica take part; return it, if there is one."""
        if not self.spares:
            return []
        spare = self.spares.pop(0)
        self.active.append(spare)
        return [spare]

    def line(self, replica: int) -> list[int]:
        """Return a replica and the spare ones that have taken its place, one after another."""
        out = [replica]
        while out[-1] in self._follower:
            out.append(self._follower[out[-1]])
        return out

    def handed_on(self, replica: int) -> bool:
        """Whether others have got what a replica was to train on."""
        return replica in self._handed_on

    def closed(self, shard: int, content: tuple[int, tuple[int, int] | None]) -> None:
        """Take a shard's report of how many gradients of a lost replica it has applied, see `Inbox.close`."""
        replica, counts = content
        self._closing[replica][shard] = counts
        if len(self._closing[replica]) < self._world.shards:
            return
        counts = [pair for pair in self._closing.pop(replica).values() if pair is not None]
        applied = min((least for least, _ in counts), default=0)
        # What it reported last may be older than what it pushed last.
        steps = max([self._made(self._status, replica), *(most for _, most in counts)])
        loss = LostReplica(replica, self.lost[replica], steps, applied)
        self._known.append(loss)
        self._record(loss)

    def summary(self) -> str:
        """Return what was lost, a line for each replica; nothing where nobody was."""
        known = {loss.replica: loss for loss in self._known}
        lines = []
        for replica, seconds in self.lost.items():
            line = f"Lost: replica {replica} at {seconds:.1f} s"
            if replica in known:
                loss = known[replica]
                went = f"; of its {loss.steps} gradients {loss.applied} were applied, {loss.steps - loss.applied} went with it"
                line += went if loss.steps else ", before its first gradient"
            lines.append(line + ".")
        return "\n".join(lines)

    # --- the end --------------------------------------------------------------------------------------------------------------

    @property
    def broken(self) -> bool:
        """Whether anybody was lost, so that nothing may wait for everybody any more."""
        return bool(self.lost)

    def part(self) -> None:
        """Before the last order: tell how to leave."""
        if self._watch is not None and self.broken:
            self._watch.tell()

    def replicas_left(self) -> bool:
        """Whether all living replicas have left."""
        living = [r for r in range(self._world.copies) if r not in self.lost]
        return all(self._watch.left(rank) for r in living for rank in self._world.replica_ranks(r))

    def shards_left(self) -> bool:
        """Whether all shards have left."""
        self._watch.look()
        return all(self._watch.left(self._world.shard_rank(s)) for s in range(self._world.shards))
