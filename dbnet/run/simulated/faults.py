"""Machines that die in simulated time: who dies when, how the coordinator hears of it, and what ends the run.

Whoever dies takes no turn any more (`MortalTime`). All else is the code of an MPI run: its signs of life stop, the coordinator
gives its replica up after `run.heartbeat` virtual seconds, hands on its work, has its rings closed. Signs of life alone take no
virtual time, so a run in which nobody dies is as without faults, to the byte (if it has no spare replicas, which ask for orders).
A rank that computes for longer than that is not taken for a dead one here; over MPI it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path

import numpy as np

from dbnet.comm.simulated.mortal import MortalTime
from dbnet.comm.topology import Role, Topology
from dbnet.comm.turns import Turns
from dbnet.comm.window import Window
from dbnet.coordinator.coordinator import Coordinator
from dbnet.coordinator.heartbeat import BEAT, Heartbeat, HeartbeatWatch, beating, without_coordinator
from dbnet.core.errors import Lost, UserError
from dbnet.network.cost import FaultsTable
from dbnet.run.simulated.noise import Noise

_SERVER = 1 << 48  # Added to a server's rank, so that it is no partition of a replica (`entity`).


def entity(topology: Topology, rank: int) -> int:
    """Return by what number a rank's draws are known: the same however many others there are."""
    if topology.role(rank) is not Role.WORK:
        return _SERVER | rank
    replica, partition = topology.place(rank)
    return replica << 16 | partition


def ends(faults: FaultsTable, topology: Topology, ranks: int, noise: Noise, start: int) -> list[float]:
    """Return when each rank dies, [ranks]; inf: never.

    Parameters
    ----------
    faults, topology
        The machine's table; who is where.
    ranks
        On a host, which die together; 0: each by itself.
    noise, start
        What draws; how often the run has been begun before.

    Raises
    ------
    UserError
        Somebody is to die who is not there.
    """
    out, ranks = [inf] * topology.size, ranks or 1
    machines = [range(first, min(first + ranks, topology.size)) for first in range(0, topology.size, ranks)]
    for machine in machines if faults.mtbf is not None else ():
        if faults.servers or topology.role(machine[0]) is Role.WORK:
            moment = faults.mtbf * noise.life(entity(topology, machine[0]), start)
            for rank in machine:
                out[rank] = moment
    for death in faults.deaths:
        rank = 0
        if death.shard is not None:
            rank = _there("shard", death.shard, topology.shards) + 1
        elif death.replica is not None:
            partition = _there("partition", death.partition, topology.partitions)
            rank = topology.origin_rank(_there("replica", death.replica, topology.copies), partition)
        for other in machines[rank // ranks]:
            out[other] = min(out[other], death.at)
    return out


def _there(what: str, number: int, count: int) -> int:
    if number >= count:
        raise UserError(
            f"faults.deaths names {what} {number}, but the highest is {count - 1}; name another, or leave that death out."
        )
    return number


class SignsOfLife(HeartbeatWatch):
    """The coordinator's half, where all who live give their signs at their moments, and that takes nobody any time."""

    def __init__(self, window: Window, topology: Topology, bound: float, time: MortalTime) -> None:
        super().__init__(window, topology, bound, time)
        self._time, self._every, self._topology = time, beating(topology, bound), topology
        self.noticed: set[int] = set()

    def look(self) -> list[int]:
        last = np.minimum(self._time.ends, self._time.now)
        self._pulse[1:, BEAT] = last[1:] // self._every
        lost, world = super().look(), self._topology
        for rank in lost:
            if rank not in self.noticed:
                # The other partitions of a replica find with their next sign of life that it is given up.
                whole = world.replica_ranks(world.place(rank)[0]) if world.role(rank) is Role.WORK else [rank]
                self.noticed.update(whole)
                for other in whole:
                    self._time.end(other)
        return lost

    @property
    def heard(self) -> np.ndarray:
        """Nothing more than replicas tell when they look at their orders, as where nobody can be lost."""
        return np.zeros(self._topology.copies)

    def left(self, rank: int) -> bool:
        """Of a shard also whether it has died: it is waited for only when all is saved."""
        return super().left(rank) or (self._topology.role(rank) is Role.SERVE and self._time.now >= self._time.ends[rank])


class Faults:
    """What follows when somebody dies.

    Parameters
    ----------
    time, topology, bound
        The clocks, who is where, and the seconds without a sign of life after which a rank is lost.
    window
        Returns a rank's end of the window.
    """

    def __init__(self, time: MortalTime, topology: Topology, bound: float, window: Callable[[int], Window]) -> None:
        self.time, self._topology, self._bound, self._window = time, topology, bound, window
        self.watch = SignsOfLife(window(0), topology, bound, time)
        self._reminding = False
        self._coordinator: Coordinator | None = None
        time.died = self._died

    def doubt(self, step: float) -> str:
        """Return what is unlike a run over MPI whose steps take so many seconds, as a sentence; nothing where all is alike."""
        if step <= self._bound:
            return ""
        return (
            f"A step takes {step:.3g} s on this machine, longer than run.heartbeat = {self._bound:g}: over MPI whoever makes one "
            "would be taken for dead. Raise run.heartbeat."
        )

    def begin(self, coordinator: Coordinator, players: Mapping[int, Turns]) -> dict[int, Turns]:
        """Have the coordinator go by the signs of life; return the roles of all ranks with how they leave."""
        self._coordinator = coordinator
        coordinator.duties.membership.go_by(self.watch)
        return {rank: self._leaving(rank, role) for rank, role in players.items()}

    def _leaving(self, rank: int, role: Turns) -> Turns:
        """Play a role; in the end its rank says that it leaves, which matters where somebody was lost."""
        yield from role
        if not rank:
            # All is saved, and nobody is missed any more.
            for other in list(self.time.dead):
                self._end_replica(other)
        if rank and self._coordinator.duties.membership.broken:
            Heartbeat(self._window(rank), self._topology, rank, self._bound, lambda: False, self.time).leave()

    def _died(self, rank: int) -> None:
        if not rank:
            self.time.at(self.time.now + self._bound + 0.1, 1, self._alone)
        elif not self.time.playing(0):
            self._end_replica(rank)
        elif not self._reminding:
            self._reminding = True
            self._remind()

    def _end_replica(self, rank: int) -> None:
        """Let nobody wait for a partition that has died."""
        if self._topology.role(rank) is Role.WORK:
            for other in self._topology.replica_ranks(self._topology.place(rank)[0]):
                self.time.end(other)

    def _remind(self) -> None:
        """Have the coordinator look until it has noticed who died: where nothing arrives it would rest."""
        time = self.time
        self._reminding = time.playing(0) and not self.watch.noticed.issuperset(time.dead)
        if self._reminding:
            time.notify(0, 0)
            time.at(time.now + self.watch.period, 0, self._remind)

    def _alone(self) -> None:
        """The first rank notices that the coordinator is dead."""
        first = next((rank for rank in range(1, self._topology.size) if self.time.playing(rank)), None)
        if first is not None:
            # As over MPI nobody is there to write that the run has finished, should all have been told to leave.
            self._coordinator.duties.membership.active.clear()
            raise without_coordinator(self._topology.name(first), self._bound)

    def conclude(self) -> None:
        """Raise Lost where nobody is left to notice that the coordinator is dead, unless it had let everyone go."""
        if 0 in self.time.dead and not self._coordinator.replicas.ended:
            raise Lost("All ranks have died; go on from the newest checkpoint with --resume auto.")

    def words(self) -> str:
        """Return how many have died; nothing where nobody has."""
        world, dead = self._topology, self.time.dead
        replicas = {world.place(rank)[0] for rank in dead if world.role(rank) is Role.WORK}
        used = sum(replica < world.replicas for replica in replicas)
        spare = f", {len(replicas) - used} of {world.spares} spare ones" if len(replicas) > used else ""
        return f"{used} of {world.replicas} replicas{spare}" if replicas else ""


def gone_on_with(error: Lost, link: Path) -> Lost:
    """Return what is said where a run cannot go on: how to begin from its newest checkpoint in simulated time."""
    there = f"begin from the newest checkpoint with run.start={link}" if link.exists() else "there is no checkpoint yet"
    return Lost(str(error).replace("go on from the newest checkpoint with --resume auto", there))
