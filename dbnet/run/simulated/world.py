"""The world of simulated time: ends of windows, channels and links whose costs a machine's profile says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from dbnet.comm.channel import Channel
from dbnet.comm.link import LocalLink
from dbnet.comm.simulated.clock import VirtualTime
from dbnet.comm.simulated.cores import Cores
from dbnet.comm.simulated.interconnect import Interconnect, Way
from dbnet.comm.simulated.memory import SimulatedMemory
from dbnet.comm.simulated.messages import SimulatedMailboxes, SimulatedWires
from dbnet.comm.simulated.mortal import MortalTime
from dbnet.comm.simulated.movers import SharedWindow, VirtualMover
from dbnet.comm.simulated.window import SimulatedWindow
from dbnet.coordinator.heartbeat import polling
from dbnet.data.batches import Batches
from dbnet.data.portions import Reader
from dbnet.data.together import Together
from dbnet.network.cost import Profile, WayTable
from dbnet.network.model import footprint
from dbnet.run import roles
from dbnet.run.setup import EVALUATION_BATCH, Setup, first_shares
from dbnet.run.signals import Interrupt
from dbnet.run.simulated.faults import Faults, ends, entity
from dbnet.run.simulated.noise import Noise
from dbnet.run.simulated.replicas import AnyReplica, Counted, DryReplica, Pace, PacedLink, PacedReplica, Shared
from dbnet.run.simulated.shards import HollowInbox, HollowShard, HollowStore, PacedInbox, PacedReceiver, SharingStore
from dbnet.shards.push import Intake, Receiver
from dbnet.shards.store import WindowStore


class Simulation:
    """The world of simulated time.

    Parameters
    ----------
    ready, profile
        The run and the machine.
    dry
        Whether nothing is computed.
    interrupt
        Signals.

    Attributes
    ----------
    faults
        What follows when somebody dies; None where nobody does.
    """

    inline = True

    def __init__(self, ready: Setup, profile: Profile, dry: bool, interrupt: Interrupt) -> None:
        profile = profile.suited(ready.model.layout.size * ready.model.dtype.itemsize, ready.config.rule.kind)
        self._ready, self._profile, self._dry, self._interrupt = ready, profile, dry, interrupt
        self.topology, self.saves, self.period = ready.topology, not dry, polling(ready.topology)
        host = profile.host
        self._noise = Noise(profile, ready.config.run.seed)
        clocks, faults = (host.pause, host.turn, ready.config.run.deadline, host.late), profile.faults
        self.time = VirtualTime(*clocks)
        if faults is not None:
            self.time = MortalTime(ends(faults, self.topology, host.ranks, self._noise, len(ready.chain)), *clocks)
        self.clock = self.due = self.time
        hosts = [rank // host.ranks if host.ranks else 0 for rank in range(self.topology.size)]
        movers = self.topology.size if ready.config.method.overlap else 0
        for one in set(hosts) if host.cores else ():
            ranks = [rank for rank, where in enumerate(hosts) if where == one]
            # What moves a replica's data beside it takes a core, too.
            ranks += [movers + rank for rank in ranks if movers and rank > self.topology.shards]
            if len(ranks) > host.cores:
                self.time.cores |= dict.fromkeys(ranks, Cores(self.time, host.cores, host.switch, host.slice))
        cards = {hosts[self.topology.shard_rank(shard)]: host.shard_cards for shard in range(self.topology.shards)}
        ways = _way(profile.inside), _way(profile.between)
        self.wire = Interconnect(self.time, hosts, *ways, host.call, host.look, cards)
        self._memory = SimulatedMemory(roles.window_layouts(ready), dry)
        self._boxes = SimulatedMailboxes(1 + self.topology.shards, self.wire)
        self._cut = self.topology.partitions > 1
        if ready.config.method.overlap:
            # A rank may have two transfers under way, which share its host's card.
            self.wire.visited.update(range(self.topology.size))
            self.wire.crowded = [True] * self.topology.size
        # Examples lie in memory once: subsets, of each partition what anybody holds in blocks, and what is evaluated (`_watched`).
        self._reading = replace(ready, data=Together(ready.data, ready.model.dtype))
        self._blocks = [WeakValueDictionary() for _ in range(self.topology.partitions)]
        self._wires = [SimulatedWires(self.topology.replica_ranks(r), self.wire) for r in range(self.topology.copies)]
        self.faults = None if faults is None else Faults(self.time, self.topology, ready.config.run.bound, self.window)

    def asked(self) -> bool:
        return self._interrupt.asked

    def watch(self) -> None:
        return None

    def beat(self, rank: int) -> Callable[[], None]:
        return lambda: None

    def window(self, rank: int) -> SimulatedWindow:
        return SimulatedWindow(self._memory, self.wire, rank)

    def channel(self, rank: int) -> Channel:
        return self._boxes.at(rank)

    def link(self, rank: int) -> LocalLink | None:
        replica, partition = self.topology.place(rank)
        if not self._cut:
            return None
        if rank not in self.time.cores:
            return LocalLink(self._wires[replica], partition)
        passes = self._profile.pass_seconds(self._ready.model, self._ready.cut.boxes[partition], self._ready.cut.batch)
        return PacedLink(self._wires[replica], partition, self.time, passes)

    def memory(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        local = self._memory.local[self.topology.shard_rank(shard)]
        return local["params"], local["clock"], local.get("rounded")

    def inbox(self, shard: int, receiver: Receiver) -> PacedInbox:
        ready = self._ready
        users = ready.users[shard]
        intakes = [Intake(receiver, ready.config.guard.finite and not self._dry) for _ in users]
        ways = [ready.routes[origin][shard] for origin in users]
        rank, make = self.topology.shard_rank(shard), HollowInbox if self._dry else PacedInbox
        counted = self._memory.counted[rank]
        return make(self.time, self._profile, counted, self.window(rank), intakes, self.topology, users, ways)

    def store(self, rank: int, replica: AnyReplica) -> WindowStore:
        partition = self.topology.place(rank)[1]
        boxes, make, config = self._ready.cut.boxes[partition], HollowStore if self._dry else WindowStore, self._ready.config
        if not config.method.overlap:
            if not (self._dry or self._cut or config.method.worker.accrues(config)):
                make = partial(SharingStore, self._shared.gradient)
            return self._ready.store(self.window(rank), rank, boxes, self.time, make=make)
        window = SharedWindow(self._memory, self.wire, rank)
        mover = partial(VirtualMover, self.time, self.topology.size + rank, self.topology.name(rank))
        return self._ready.store(window, rank, boxes, self.time, make=make, mover=mover)

    def receiver(self, shard: int) -> Any:
        """Return a shard with its registers."""
        if self._dry:
            return HollowShard(self._ready.ranges[shard], self._ready.config.rule, *self.memory(shard)[:2], self.time)
        return PacedReceiver(roles.receiver(self._ready, self, shard), self.time, self._profile)

    # --- replicas -------------------------------------------------------------------------------------------------------------

    def replica(self, rank: int) -> AnyReplica:
        """Return one partition of a replica."""
        ready, (index, partition), link = self._ready, self.topology.place(rank), self.link(rank)
        pace = self._pace(index, partition)
        if self._dry:
            sizes, watched = ready.data.sizes, ready.config.evaluate.train
            train = Counted(self._batch, first_shares(ready, index))
            evaluated = [sizes.get(ready.config.evaluate.part, 0), min(watched, sizes["train"])]
            cut, clips = (ready.cut, link) if link else None, ready.config.method.clipping.norm is not None
            return DryReplica(pace, train, cut, ready.model, (evaluated, EVALUATION_BATCH), clips)
        if link is not None:
            watched = {name: batches.again() for name, batches in self._watched[partition].items()}
            replica = roles.load_replica(self._reading, index, partition, link, partial(PacedReplica, pace, None), watched)
        else:
            make = partial(PacedReplica, pace, self._shared)
            replica = roles.load_replica(self._reading, index, make=make, watched=self._shared.watched)
        if isinstance(replica.train, Reader):
            replica.train.at_once(self._blocks[partition])
        return replica

    @cached_property
    def _shared(self) -> Shared:
        return Shared(self._ready.model, self._batch, self._watched[0], EVALUATION_BATCH)

    @cached_property
    def _watched(self) -> list[dict[str, Batches]]:
        """For each partition what it evaluates, whichever replica's it is."""
        model = self._ready.model
        return [roles.read_watched(self._ready, model.columns(boxes)) for boxes in self._ready.cut.boxes]

    @property
    def _batch(self) -> int:
        config = self._ready.config
        return config.method.worker.batch(config, self._ready.data.sizes["train"])

    @cached_property
    def _seconds(self) -> list[tuple[float, float, float]]:
        """For each partition the seconds of a step, of a minibatch of an evaluation, and of a step of its own."""
        model, profile, out = self._ready.model, self._profile, []
        for partition, boxes in enumerate(self._ready.cut.boxes):
            nbytes = footprint(model, boxes, partition == 0).size * model.dtype.itemsize
            step = profile.step_seconds(model, boxes, self._batch)
            out.append((step, profile.forward_seconds(model, boxes, EVALUATION_BATCH), profile.local_seconds(nbytes)))
        return out

    def _pace(self, replica: int, partition: int) -> Pace:
        # Other replicas, however many, change nobody's numbers.
        own = entity(self.topology, self.topology.origin_rank(replica, partition))
        return Pace(self.time, self._noise, own, self._noise.speed(replica), *self._seconds[partition])

    @property
    def longest(self) -> float:
        """Seconds that a step takes of whoever takes longest, but for noise, and on a core of its own."""
        speeds = [self._noise.speed(replica) for replica in range(self.topology.copies)]
        return max(speeds) * max(step + local for step, _, local in self._seconds)

    def params(self) -> np.ndarray:
        """Return all parameters."""
        return np.concatenate([self.memory(shard)[0] for shard in range(self.topology.shards)])


def _way(table: WayTable) -> Way:
    return Way(table.latency, table.bandwidth * 1e9)
