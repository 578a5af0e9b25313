"""Build this rank's objects from a configuration and run the method's function for its role.

With MPI every rank is one role. In one process all roles take turns; pushes are applied straight to the shards' memory.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dbnet.comm import communicators, mpi
from dbnet.comm.channel import MpiChannel
from dbnet.comm.communicators import Communicators, crowded
from dbnet.comm.link import Gone, MpiLink
from dbnet.comm.topology import Role
from dbnet.comm.turns import Turns, drive
from dbnet.comm.window import MpiWindow, Window
from dbnet.coordinator.heartbeat import GivenUp, Heartbeat, HeartbeatWatch, Watchdog
from dbnet.coordinator.orders import Orders
from dbnet.monitor import runfile
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import RunFile
from dbnet.network.model import footprint
from dbnet.network.replica import Replica
from dbnet.run.outcome import Marker, Outcome, outcome
from dbnet.run.roles import (
    load_replica,
    make_coordinator,
    make_shard,
    open_record,
    resumed,
    use,
    window_layouts,
)
from dbnet.run.setup import Setup, stopwatch
from dbnet.run.signals import Interrupt
from dbnet.run.starting import Starting
from dbnet.shards.push import Intake
from dbnet.shards.store import Inbox, WindowStore


def train_ranks(
    ready: Setup, comm: Any, display: Display, marker: Marker, starting: Starting
) -> tuple[Outcome | None, Sequence[Any]]:
    """This rank's role; from the barrier to the end of the run no collective includes a replica."""
    world, config = ready.topology, ready.config
    comms = communicators.connect(comm, world)
    role = world.role(comm.rank)
    threads, cores = communicators.cores_for(comms.node, role is not Role.COORDINATE)

    def load() -> Replica | None:
        if role is not Role.WORK:
            return None
        link = MpiLink(comms.replica, config.run.deadline, crowded(comms.node)) if world.partitions > 1 else None
        with starting.works():
            return load_replica(ready, *world.place(comm.rank), link)

    replica = mpi.together(comm, load)
    mpi.together(comm, lambda: runfile.make_folder(config) if role is Role.COORDINATE else None)
    # One rank of each node fills the cache of compiled kernels, the others load it.
    for turn in (True, False):
        if (comms.node.rank == 0) is turn:
            with starting.works():
                use(ready.config, threads)
        mpi.meet(comms.node)
    # Not removed in the end: a request that comes twice must not kill a rank that is just obeying it.
    interrupt = Interrupt().install()
    hosts = comm.gather(socket.gethostname())
    everyone = comm.gather((role, threads))
    about = {"mpi": mpi.library_version(), "hosts": hosts}
    ready, record = mpi.together(comm, lambda: open_record(ready, about) if role is Role.COORDINATE else (ready, None))
    if everyone is not None:
        used = "/".join(map(str, sorted({n for r, n in everyone if r is Role.WORK})))
        display.say(
            f"{comm.size} ranks on {', '.join(sorted(set(hosts)))}: {world.words()}; {used} of {cores} cores for each working "
            f"rank's kernels. {mpi.library_version()}."
        )
    window = mpi.together(comm, lambda: MpiWindow(comms.world, window_layouts(ready)))
    clock = stopwatch()
    if role is Role.COORDINATE:
        marker.running()
    dog = Watchdog(window, world.name(comm.rank), world, config.run.deadline, lambda words: mpi.stop_all(comm, words))
    rank = Rank(ready, comms, window, clock, interrupt, starting)
    done, broken = _ROLES[role](rank, record, display, replica)
    dog.stop()
    if broken and done is None:
        mpi.leave(0)
    return done, () if broken else (window, starting)


class Rank(NamedTuple):
    """What a role is played with: the run, communicators, window, the time of the run, signals, the start."""

    ready: Setup
    comms: Communicators
    window: Window
    clock: Callable[[], float]
    interrupt: Interrupt
    starting: Starting

    def play(self, role: Turns, beat: Callable[[str], None], graph: Callable[[], str]) -> None:
        """Begin together, since nobody may fetch before every shard has its parameters; then play the role to its end."""
        mpi.meet(self.comms.world)
        self.starting.lift()
        with mpi.blaming_others(self.ready.topology.name(self.comms.world.rank)):
            drive(role, self.ready.config.run.deadline, crowded(self.comms.node), beat=beat, graph=graph)

    def pulse(self) -> Heartbeat:
        """Return this rank's signs of life."""
        config = self.ready.config.run
        return Heartbeat(self.window, self.ready.topology, self.comms.world.rank, config.bound, lambda: self.interrupt.asked)


def _coordinate(rank: Rank, record: RunFile, display: Display, _: Any) -> tuple[Outcome, bool]:
    ready, window, clock = rank.ready, rank.window, rank.clock
    watch = HeartbeatWatch(window, ready.topology, ready.config.run.bound)
    pace = make_coordinator(ready, window, MpiChannel(rank.comms.servers), record, display, clock, watch)
    pace.interrupt = rank.interrupt
    try:
        rank.play(ready.method.coordinate(pace), watch.say, watch.graph)
    finally:
        pace.close()
    return outcome(ready, pace), pace.roll.broken


def _serve(rank: Rank, *_: Any) -> tuple[None, bool]:
    ready, window, clock = rank.ready, rank.window, rank.clock
    index = rank.comms.world.rank - 1
    with rank.starting.works():
        shard = make_shard(ready, index, window.local["params"], window.local["clock"], clock)
    users = ready.users[index]
    ways = [ready.routes[origin][index] for origin in users]
    intakes = [Intake(shard, ready.config.guard.finite) for _ in users]
    inbox, pulse = Inbox(window, intakes, ready.topology, users, ways), rank.pulse()
    rank.play(ready.method.serve(shard, inbox, MpiChannel(rank.comms.servers), clock), pulse.beat, pulse.graph)
    return None, pulse.leave()


def _work(rank: Rank, _: Any, __: Any, replica: Replica) -> tuple[None, bool]:
    ready, window = rank.ready, rank.window
    number, partition = ready.topology.place(rank.comms.world.rank)
    mine = footprint(ready.model, replica.network.boxes, leads=partition == 0)
    store = WindowStore(window, ready.topology, (number, partition), mine, ready.rings, ready.config.method.overlap)
    orders, pulse = Orders(window, ready.topology, number, rank.clock, replica.link), rank.pulse()
    orders.beat = pulse.beat
    if replica.link is not None:
        replica.link.beat, replica.link.graph = pulse.beat, pulse.graph
    role = ready.method.work(replica, resumed(ready, store, replica, number), orders, ready.config)
    try:
        rank.play(role, pulse.beat, pulse.graph)
    except (GivenUp, Gone) as why:
        if partition == 0 and isinstance(why, GivenUp):
            print(f"dbnet: replica {number} was given up, since it gave no sign of life for too long; it leaves.", file=sys.stderr)
        pulse.leave()
        return None, True
    broken = pulse.leave()
    if replica.link is not None and not broken:
        replica.link.close()
    return None, broken


_ROLES: dict[Role, Callable[..., tuple[Outcome | None, bool]]] = {
    Role.COORDINATE: _coordinate, Role.SERVE: _serve, Role.WORK: _work,
}  # fmt: skip
