"""A run in one process: all roles take turns, in an order and by a count of turns that do not depend on any clock.

The parameters of an uncut network lie in one vector, of which the shards' parameters are slices; pushes are applied there at once.
Partitions of a cut one have windows, rings and links as over MPI, in this process's memory.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dbnet.comm import communicators
from dbnet.comm.channel import Channel, Mailboxes
from dbnet.comm.link import Link, LocalLink, Wires
from dbnet.comm.turns import Rounds, take_turns
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.monitor import runfile
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import HERE
from dbnet.monitor.trace import servers
from dbnet.monitor.trace.lane import Trace
from dbnet.network.replica import Replica
from dbnet.run import roles
from dbnet.run.outcome import Marker, Outcome, outcome
from dbnet.run.setup import Setup, stopwatch
from dbnet.run.signals import Interrupt
from dbnet.shards.local_store import LocalStore, Store
from dbnet.shards.push import Receiver
from dbnet.shards.schedule.fetching import RecordingLocalStore, TakingLocalStore
from dbnet.shards.schedule.log import PartLog
from dbnet.shards.schedule.serving import CountingShard
from dbnet.shards.server import NoInbox
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox

if TYPE_CHECKING:
    from dbnet.methods.worker import Worker


class Process:
    """The world of one process.

    Attributes
    ----------
    flat
        The parameters [parameters]; of a cut network, after the run.
    """

    period, saves, inline = 0.0, True, True

    def __init__(self, ready: Setup, interrupt: Interrupt) -> None:
        self.logs: dict[int, PartLog | None] = {}
        self._ready, self._interrupt, self.topology = ready, interrupt, ready.topology
        self.clock, self.due = stopwatch(), Rounds(ready.turn)
        self._cut = self.topology.partitions > 1
        bare = [roles.coordinator_layout(ready), *[WindowLayout(())] * (ready.topology.size - 1)]
        layouts = roles.window_layouts(ready) if self._cut else bare
        self._window, self._boxes = LocalWindow(layouts), Mailboxes(1 + self.topology.shards)
        self.flat = np.zeros(0 if self._cut else ready.model.layout.size, ready.model.dtype)
        self._clocks = [np.zeros(1, np.int64) for _ in ready.ranges]
        self._pieces = ready.pieces(whole=not self._cut) if ready.versioned else []
        self._versions = [np.zeros(len(pieces), np.int64) for pieces in self._pieces]
        self._wires = [Wires(self.topology.partitions) for _ in range(self.topology.replicas)]
        self._receivers: list[Receiver] = []

    def asked(self) -> bool:
        return self._interrupt.asked

    def watch(self) -> None:
        return None

    def beat(self, rank: int) -> Callable[[], None]:
        return lambda: None

    def window(self, rank: int) -> LocalWindow:
        return self._window.at(rank)

    def channel(self, rank: int) -> Channel:
        return self._boxes.at(rank)

    def link(self, rank: int) -> Link | None:
        replica, partition = self.topology.place(rank)
        return LocalLink(self._wires[replica], partition) if self._cut else None

    def memory(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        if not self._cut:
            return self.flat[self._ready.ranges[shard].slice], self._clocks[shard], None
        local = self.window(self.topology.shard_rank(shard)).local
        return local["params"], local["clock"], local.get("rounded")

    def inbox(self, shard: int, receiver: Receiver) -> Inbox | NoInbox:
        self._receivers.append(receiver)
        rank = self.topology.shard_rank(shard)
        return self._ready.inbox(self.window(rank), shard, receiver, self.log(rank)) if self._cut else NoInbox()

    def log(self, rank: int) -> PartLog | None:
        return self.logs.get(rank)

    def counting(self, shard: int, *parts: Any) -> Shard:
        rank = self.topology.shard_rank(shard)
        versions = self.window(rank).local["version"] if self._cut else self._versions[shard]
        return CountingShard(*parts, self._pieces[shard], versions)

    def store(self, rank: int, replica: Replica) -> Store:
        ready, config, log = self._ready, self._ready.config, self.log(rank)
        if self._cut:
            return ready.store(self.window(rank), rank, replica.network.boxes, self.due, log)
        share = not config.method.worker.steps_locally(config)
        parts = (self.flat, self._receivers, self.topology.place(rank)[0], share, config.guard.finite, config.method.narrow)
        if not config.record.schedule:
            return LocalStore(*parts)
        logs = [self.logs[self.topology.shard_rank(shard)] for shard in range(self.topology.shards)]
        if log is None:
            return TakingLocalStore(logs, True, *parts)
        return RecordingLocalStore(log, list(zip(logs, self._versions, strict=True)), *parts)

    def trace_direct(self, trace: Trace, workers: Sequence[Worker]) -> None:
        """Have the shards' lanes show what replicas apply directly, where they do."""
        taking = [(shard, receiver) for shard, receiver in enumerate(self._receivers) if receiver.range.size]
        for origin, worker in enumerate(() if self._cut else workers):
            for entry, (shard, receiver) in zip(worker.store.intakes, taking, strict=True):
                servers.direct(entry, receiver, trace.lanes[self.topology.shard_rank(shard)]["shard"], origin)

    def params(self) -> np.ndarray:
        """Return all parameters."""
        return np.concatenate([self.memory(shard)[0] for shard in range(self.topology.shards)])


def train_here(ready: Setup, display: Display, marker: Marker) -> Outcome:
    """Play all roles in this process."""
    ready, interrupt = replace(ready, topology=replace(ready.topology, spares=0)), Interrupt()
    threads, cores = communicators.threads_for(None, True, ready.config.run.threads)
    world, topology = Process(ready, interrupt), ready.topology
    working = [rank for rank in range(topology.size) if rank > topology.shards]
    replicas = [roles.load_replica(ready, *topology.place(rank), world.link(rank)) for rank in working]
    runfile.make_folder(ready.config)
    roles.use(ready.config, threads)
    about = {"mpi": HERE, "hosts": [socket.gethostname()], **roles.schedule(ready)}
    ready, record = roles.open_record(ready, about)
    for rank in range(topology.size) if "schedule" in about else ():
        world.logs[rank] = roles.open_log(ready, about["schedule"]["id"], rank, threads, display.warn, here=True)
    display.say(f"One process, all roles taking turns: {topology.words()}; {threads} of {cores} cores for the kernels.")
    about = {"host": socket.gethostname(), "offset": 0, "error": 0}
    trace = roles.open_trace(ready, range(topology.size), about, time.perf_counter_ns, display.warn, idle=False)
    world.clock = stopwatch()
    coordinator = roles.coordinator(ready, world, record, display)
    takers = [roles.receiver(ready, world, shard) for shard in range(topology.shards)]
    servers = [roles.server(ready, world, shard, taker) for shard, taker in enumerate(takers)]
    workers = [roles.worker(ready, world, rank, replica) for rank, replica in zip(working, replicas, strict=True)]
    if trace is not None:
        world.trace_direct(trace, workers)
    players = [roles.traced(trace, rank, player) for rank, player in enumerate([coordinator, *servers, *workers])]
    try:
        with interrupt:
            marker.running()
            take_turns(players, world.due)
    finally:
        coordinator.close()
        if trace is not None:
            trace.close()
    return outcome(ready, coordinator, interrupt.by, world.params())
