"""A run on MPI ranks: every rank is one role.

From the barrier before the first turn to the end of the run no collective includes a replica.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dbnet.comm import communicators, mpi
from dbnet.comm.channel import MpiChannel
from dbnet.comm.communicators import Communicators, crowded
from dbnet.comm.link import Gone, MpiLink
from dbnet.comm.topology import Role
from dbnet.comm.turns import drive
from dbnet.comm.window import Bells, MpiWindow, Window
from dbnet.coordinator.heartbeat import GivenUp, Heartbeat, HeartbeatWatch, Watchdog, polling
from dbnet.coordinator.orders import POLL
from dbnet.monitor import runfile
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import RunFile
from dbnet.monitor.trace.lane import Trace
from dbnet.network.replica import Replica
from dbnet.run import roles
from dbnet.run.outcome import Marker, Outcome, outcome
from dbnet.run.setup import Setup
from dbnet.run.signals import Interrupt
from dbnet.run.starting import Starting
from dbnet.shards.push import Receiver
from dbnet.shards.schedule.log import PartLog
from dbnet.shards.schedule.serving import CountingShard
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox, WindowStore

if TYPE_CHECKING:
    from dbnet.coordinator.coordinator import Coordinator
    from dbnet.methods.worker import Worker
    from dbnet.shards.server import Server


def train_ranks(
    ready: Setup, comm: Any, display: Display, marker: Marker, starting: Starting
) -> tuple[Outcome | None, Sequence[Any]]:
    """This rank's role; from the barrier to the end of the run no collective includes a replica."""
    world, config = ready.topology, ready.config
    comms = communicators.connect(comm, world)
    role = world.role(comm.rank)
    computes = role is not Role.COORDINATE
    threads, cores = mpi.together(comm, lambda: communicators.threads_for(comms.node, computes, config.run.threads))

    def load() -> Replica | None:
        if role is not Role.WORK:
            return None
        signs = (starting.beat, starting.graph)
        link = MpiLink(comms.replica, config.run.deadline, crowded(comms.node), *signs) if world.partitions > 1 else None
        with starting.works():
            return roles.load_replica(ready, *world.place(comm.rank), link)

    replica = mpi.together(comm, load)
    mpi.together(comm, lambda: runfile.make_folder(config) if role is Role.COORDINATE else None)
    # One rank of each node fills the cache of compiled kernels, the others load what they need from it.
    for turn in (True, False):
        if (comms.node.rank == 0) is turn:
            with starting.works():
                roles.use(ready.config, threads, None if turn else role)
        mpi.meet(comms.node)
    # Not removed in the end: a request that comes twice must not kill a rank that is just obeying it.
    interrupt = Interrupt().install()
    hosts = comm.gather(socket.gethostname())
    everyone = comm.gather((role, threads))
    bells = Bells(comms.world, comms.node)
    window = mpi.together(comm, lambda: MpiWindow(comms.world, roles.window_layouts(ready), bells))
    bells, idle = woken(comms, window, bells)
    about = {"mpi": mpi.library_version(), "hosts": hosts, "idle": idle, **roles.schedule(ready)}
    ready, record = mpi.together(comm, lambda: roles.open_record(ready, about) if role is Role.COORDINATE else (ready, None))
    offset, error = communicators.clock_offset(comms.world, comms.node)
    ready, log, trace = _open(ready, comms, about.get("schedule", {}).get("id", ""), threads, display, offset, error)
    if everyone is not None:
        used = "/".join(map(str, sorted({n for r, n in everyone if r is Role.WORK})))
        display.say(
            f"{comm.size} ranks on {', '.join(sorted(set(hosts)))}: {world.words()}; {used} of {cores} cores for each working "
            f"rank's kernels. {mpi.library_version()}."
        )
    if role is Role.COORDINATE:
        marker.running()
    dog = Watchdog(window, world.name(comm.rank), world, config.run.deadline, lambda words: mpi.stop_all(comm, words))
    clock = _common_clock(comms, offset)
    rank, done = Rank(ready, comms, window, bells, interrupt, starting, clock, log, trace), None
    try:
        if role is Role.COORDINATE:
            done, broken = _coordinate(ready, rank, record, display)
        else:
            broken = _serve(ready, rank, starting) if role is Role.SERVE else _work(ready, rank, replica)
    finally:
        if trace is not None:
            trace.close()
    dog.stop()
    if broken and done is None:
        mpi.leave(0)
    return done, () if broken else (window, starting)


def woken(comms: Communicators, window: MpiWindow, bells: Bells) -> tuple[Bells | None, str]:
    """Return what wakes ranks that rest, None where nobody may, and what idle servers do, in words; collective."""
    if comms.node.size == comms.world.size and window.direct(comms.world):
        return bells, "rest until they are woken" if bells.everywhere else "rest for 10 ms at a time: ranks cannot wake each other"
    bells.close()
    alone = comms.node.size == comms.world.size
    return None, f"look without rest: {'transfers wait for the looks of their target' if alone else 'ranks are on several hosts'}"


def _common_clock(comms: Communicators, offset: int) -> Callable[[], float]:
    """Return a clock that starts at 0 now and shows the same on all ranks, from host to host as well as the offset is known."""
    start = comms.world.bcast(time.perf_counter_ns()) - offset
    return lambda: 1e-9 * (time.perf_counter_ns() - start)


def _open(
    ready: Setup, comms: Communicators, identity: str, threads: int, display: Display, offset: int, error: int
) -> tuple[Setup, PartLog | None, Trace | None]:
    """Create this rank's part of a schedule and of a trace; return the run with the name that the coordinator has found for it."""
    world, config = comms.world, ready.config
    if not config.record.schedule and not config.record.trace:
        return ready, None, None
    name, identity = world.bcast((config.run.name, identity))
    named = replace(ready, config=config.model_copy(update={"run": config.run.model_copy(update={"name": name})}))
    log = trace = None
    if config.record.schedule:
        log = mpi.together(world, lambda: roles.open_log(named, identity, world.rank, threads, display.warn))
    if config.record.trace:
        about = {"host": socket.gethostname(), "offset": offset, "error": error}
        parts = (named, [world.rank], about, time.perf_counter_ns, display.warn)
        trace = mpi.together(world, lambda: roles.open_trace(*parts, threads=True))
    return named, log, trace


class Rank:
    """The world as one MPI rank sees it.

    Parameters
    ----------
    ready, comms, window, bells
        The run, communicators, the window, and what wakes who rests on it; None where nobody may rest, since looks move transfers.
    interrupt, starting
        Signals, and the start of the run.
    clock
        Seconds of the run, the same on all ranks.
    log, trace
        Its part of the schedule, if that is recorded; its lanes, if the run is traced.
    """

    saves, inline = True, False

    def __init__(
        self, ready: Setup, comms: Communicators, window: Window, bells: Bells | None, interrupt: Interrupt,
        starting: Starting, clock: Callable[[], float], log: PartLog | None = None, trace: Trace | None = None,
    ) -> None:  # fmt: skip
        self._log, self.trace, self._bells = log, trace, bells
        self._ready, self._comms, self._window, self._interrupt, self._starting = ready, comms, window, interrupt, starting
        self.clock = self.due = clock
        self.rank, self._watch = comms.world.rank, None
        topology, bound = ready.topology, ready.config.run.bound
        self.period = polling(topology)
        if topology.role(self.rank) is Role.COORDINATE:
            self._watch = HeartbeatWatch(window, topology, bound)
        else:
            self.heartbeat = Heartbeat(window, topology, self.rank, bound, self.asked)

    def asked(self) -> bool:
        return self._interrupt.asked

    @property
    def signal(self) -> str:
        """Name of the signal that this rank got; nothing where there was none."""
        return self._interrupt.by

    def watch(self) -> HeartbeatWatch | None:
        return self._watch

    def beat(self, rank: int) -> Callable[[], None]:
        return self.heartbeat.beat

    def window(self, rank: int) -> Window:
        return self._window

    def channel(self, rank: int) -> MpiChannel:
        # Four times a second every shard tells of its updates.
        self._channel = MpiChannel(self._comms.servers, self._window.wake, ("events",))
        return self._channel

    def memory(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        local = self._window.local
        return local["params"], local["clock"], local.get("rounded")

    def inbox(self, shard: int, receiver: Receiver) -> Inbox:
        return self._ready.inbox(self._window, shard, receiver, self._log)

    def store(self, rank: int, replica: Replica) -> WindowStore:
        return self._ready.store(self._window, rank, replica.network.boxes, log=self._log)

    def log(self, rank: int) -> PartLog | None:
        return self._log

    def counting(self, shard: int, *parts: Any) -> Shard:
        return CountingShard(*parts, self._ready.pieces(whole=False)[shard], self._window.local["version"])

    def play(self, player: Coordinator | Server | Worker) -> None:
        """Begin together, since nobody may fetch before every shard has its parameters; then play the role to its end."""
        role = roles.traced(self.trace, self.rank, player)
        mpi.meet(self._comms.world)
        self._starting.lift(self.heartbeat if self._watch is None else None)
        config, name = self._ready.config.run, self._ready.topology.name(self.rank)
        beat, graph = (self.heartbeat.beat, self.heartbeat.graph) if self._watch is None else (self._watch.say, self._watch.graph)
        with mpi.blaming_others(name):
            drive(role, config.deadline, crowded(self._comms.node), beat=beat, graph=graph, **self._idle(config.deadline))

    def _idle(self, deadline: float) -> dict[str, Any]:
        """Return how seldom this rank looks when idle; as often as ever where its looks move transfers, as over several hosts.

        Coordinator and shards are woken by whoever has something for them; replicas are addressed by nobody.
        """
        if self._bells is None:
            return {}
        role, lazy = self._ready.topology.role(self.rank), {"lazy": min(POLL / 2, deadline / 1000)}
        if self._bells.everywhere and role is not Role.WORK:
            longest = 4 * POLL if role is Role.COORDINATE else 2 * POLL
            lazy |= {"lazy": min(longest, deadline / 1000), "rest": self._rest}
        return lazy

    def _rest(self, seconds: float) -> None:
        self._channel.rest(seconds, self._bells.rest)


def _coordinate(ready: Setup, rank: Rank, record: RunFile, display: Display) -> tuple[Outcome, bool]:
    coordinator = roles.coordinator(ready, rank, record, display)
    try:
        rank.play(coordinator)
    finally:
        coordinator.close()
    return outcome(ready, coordinator, rank.signal), coordinator.duties.membership.broken


def _serve(ready: Setup, rank: Rank, starting: Starting) -> bool:
    index = ready.topology.shard_of(rank.rank)
    with starting.works():
        receiver = roles.receiver(ready, rank, index)
    rank.play(roles.server(ready, rank, index, receiver))
    return rank.heartbeat.leave()


def _work(ready: Setup, rank: Rank, replica: Replica) -> bool:
    number, partition = ready.topology.place(rank.rank)
    link, heartbeat = replica.link, rank.heartbeat
    try:
        rank.play(roles.worker(ready, rank, rank.rank, replica))
    except (GivenUp, Gone) as why:
        if partition == 0 and isinstance(why, GivenUp):
            print(f"dbnet: replica {number} was given up, since it gave no sign of life for too long; it leaves.", file=sys.stderr)
        heartbeat.leave()
        return True
    broken = heartbeat.leave()
    if link is not None and not broken:
        link.close()
    return broken
