"""Build this rank's objects from a configuration and run the method's function for its role.

With MPI every rank is one role. In one process all roles take turns; pushes are applied straight to the shards' memory.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet import config as configuration
from dbnet import monitor, mpi, topology
from dbnet.build import Setup, coordinator_layout, first_shares, load_replica, make_shard, resumed, setup, use, window_layouts
from dbnet.channel import Channel, Mailboxes, MpiChannel
from dbnet.checkpoint import Checkpoint, texts
from dbnet.config import Config
from dbnet.direct import DirectStore
from dbnet.display import Display
from dbnet.errors import Stopped
from dbnet.guard import Guard
from dbnet.intake import Intake
from dbnet.interrupt import Interrupt
from dbnet.keeper import Keeper
from dbnet.link import Gone, MpiLink
from dbnet.marker import Marker
from dbnet.model import footprint
from dbnet.monitor import RunFile
from dbnet.orders import Desk, Orders
from dbnet.outcome import Outcome, outcome
from dbnet.pace import Pace
from dbnet.pulse import GivenUp, Pulse, Watch, Watchdog
from dbnet.replica import Replica
from dbnet.resume import choose
from dbnet.starting import Guardian, Starting
from dbnet.store import Inbox, WindowStore
from dbnet.topology import Communicators, Role, Topology, crowded
from dbnet.waiting import Rounds, Turns, drive, take_turns
from dbnet.window import Memory, MpiWindow, Window


def train(
    run_file: str | Path | Config,
    overrides: Iterable[str] = (),
    *,
    resume: str | None = None,
    comm: Any = None,
    quiet: bool = False,
    marker: Marker | None = None,
    guardian: Guardian | None = None,
    conclude: Callable[[Outcome], int] = lambda done: 0,
) -> Outcome | None:
    """Train as the run file says, on the ranks of `comm` or in this process.

    Parameters
    ----------
    run_file
        Path of a TOML file, or a configuration.
    overrides
        Changes like "topology.replicas=4".
    resume
        Path of a checkpoint to go on from; "" for the newest of this name, "auto" for that or none.
    comm
        MPI's world communicator; None trains in this process.
    marker
        Where the coordinator says that training begins.
    guardian
        Is dismissed when ranks give signs of life.
    conclude
        Told on the coordinator when everything is done and saved; returns its exit code, whoever may be lost by then.

    Returns
    -------
    The outcome, on the coordinator; None on other ranks.

    Raises
    ------
    Stopped
        On the coordinator, when all ranks have ended: too many gradients were not finite. The message is the diagnosis.
    """

    display = Display(quiet or (comm is not None and comm.rank > 0))
    say = display.warn if comm is None or comm.rank == 0 else lambda sentence: None
    config = mpi.together(comm, lambda: configuration.load(run_file, overrides, say))
    marker, shared = marker or Marker(None), ()
    if comm is None:
        done = _train_here(_prepare(config, choose(config, resume, display), display), display, marker)
    else:
        launch = f"dbnet train {run_file} {' '.join(overrides)}".strip()
        mpi.together(comm, lambda: Topology.of(config.topology).check(comm.size, launch))
        starting = mpi.together(comm, lambda: Starting(comm, Topology.of(config.topology), config.run))
        with starting.after(guardian):
            done, shared = _train_ranks(_prepare_ranks(config, comm, resume, display, starting), comm, display, marker, starting)
    code = 0 if done is None else 2 if done.diagnosis else conclude(done)
    mpi.part(shared, config.run.deadline, code)
    if done is not None and done.diagnosis:
        raise Stopped(done.diagnosis, bool(done.losses))
    return done


def _prepare(config: Config, point: str | None, display: Display, rank: int | None = None) -> Setup:
    """Return the run that goes on from `point`; all labels are looked at by one rank."""
    ready = setup(config, point, not rank)
    ready.check(rank)
    if ready.checkpoint is not None:
        display.say(f"Goes on from '{point}': {ready.checkpoint.seconds:.1f} s and {ready.checkpoint.steps} steps of training.")
    return ready


# --- one process --------------------------------------------------------------------------------------------------------------


def _train_here(ready: Setup, display: Display, marker: Marker) -> Outcome:
    """All roles in this process, taking turns; replicas are not cut."""
    config, world = ready.config, replace(ready.topology, partitions=1, spares=0)
    threads, cores = topology.cores_for(None, True)
    parts = [load_replica(ready, r) for r in range(world.replicas)]
    monitor.make_folder(config)
    use(ready.config, threads)
    ready = replace(ready, topology=world)
    clock, rounds = _stopwatch(), Rounds(ready.turn)
    flat = np.zeros(ready.model.layout.size, ready.model.dtype)
    boxes = Mailboxes(1 + world.shards)
    shards = [make_shard(ready, s, flat[part.slice], np.zeros(1, np.int64), clock) for s, part in enumerate(ready.ranges)]
    memory = Memory([coordinator_layout(ready)])
    ready, record = open_record(ready, {"mpi": "none, one process", "hosts": [socket.gethostname()]})
    display.say(f"One process, all roles taking turns: {world.words()}; {threads} of {cores} cores for the kernels.")
    pace = make_pace(ready, memory, boxes.at(0), record, display, clock, due=rounds)
    roles = [ready.method.coordinate(pace)]
    roles += [ready.method.serve(shard, None, boxes.at(1 + s), rounds) for s, shard in enumerate(shards)]
    for r, replica in enumerate(parts):
        store = DirectStore(flat, shards, r, config.method.n_fetch == 1, config.guard.finite)
        orders = Orders(memory, world, r, rounds, period=0.0)
        roles.append(ready.method.work(replica, resumed(ready, store, replica, r), orders, config))
    try:
        with pace.interrupt:
            marker.running()
            take_turns(roles, rounds)
    finally:
        pace.close()
    return outcome(ready, pace, flat)


# --- MPI ----------------------------------------------------------------------------------------------------------------------


def _prepare_ranks(config: Config, comm: Any, resume: str | None, display: Display, starting: Starting) -> Setup:
    """Return the run; one rank reads the checkpoints through, and all take the same."""
    with starting.works():
        point = mpi.together(comm, lambda: choose(config, resume, display) if comm.rank == 0 else None)
        point = comm.bcast(point)
        return mpi.together(comm, lambda: _prepare(config, point, display, comm.rank))


def _train_ranks(
    ready: Setup, comm: Any, display: Display, marker: Marker, starting: Starting
) -> tuple[Outcome | None, Sequence[Any]]:
    """This rank's role; from the barrier to the end of the run no collective includes a replica."""
    world, config = ready.topology, ready.config
    comms = topology.connect(comm, world)
    role = world.role(comm.rank)
    threads, cores = topology.cores_for(comms.node, role is not Role.COORDINATE)

    def load() -> Replica | None:
        if role is not Role.WORK:
            return None
        link = MpiLink(comms.replica, config.run.deadline, crowded(comms.node)) if world.partitions > 1 else None
        with starting.works():
            return load_replica(ready, *world.place(comm.rank), link)

    replica = mpi.together(comm, load)
    mpi.together(comm, lambda: monitor.make_folder(config) if role is Role.COORDINATE else None)
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
    clock = _stopwatch()
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

    def pulse(self) -> Pulse:
        """Return this rank's signs of life."""
        config = self.ready.config.run
        return Pulse(self.window, self.ready.topology, self.comms.world.rank, config.bound, lambda: self.interrupt.asked)


def _coordinate(rank: Rank, record: RunFile, display: Display, _: Any) -> tuple[Outcome, bool]:
    ready, window, clock = rank.ready, rank.window, rank.clock
    watch = Watch(window, ready.topology, ready.config.run.bound)
    pace = make_pace(ready, window, MpiChannel(rank.comms.servers), record, display, clock, watch)
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


def open_record(ready: Setup, about: dict[str, Any]) -> tuple[Setup, RunFile]:
    """Create the run file; return the run with the name that it got, and the file."""
    if ready.checkpoint is not None:
        about = {**about, "resumed_from": str(ready.checkpoint.path)}
    config, record = monitor.begin(ready.config, {**about, "parameters": ready.model.layout.size})
    return replace(ready, config=config), record


def make_pace(
    ready: Setup, window: Window, channel: Channel, record: RunFile, display: Display, clock: Callable[[], float],
    watch: Watch | None = None, due: Callable[[], float] | None = None,
) -> Pace:  # fmt: skip
    """Return the coordinator's everyday work for this run."""
    for doubt in ready.doubts():
        display.warn(doubt)
    data, config, start = ready.data, ready.config, ready.config.run.start
    origin = ready.checkpoint or (None if start is None else Checkpoint(start))
    keeper = Keeper(channel, display, config, texts(config, ready.name, ready.model, data.described, origin), clock, watch is None)
    guard, desk = Guard(config, ready.model.layout, record, display), Desk(window, ready.topology)
    pace = Pace(desk, channel, record, display, config, data.sizes["train"], keeper, clock, guard, watch, due)
    pace.first_shares = [first_shares(ready, replica) for replica in range(ready.topology.replicas)]
    if ready.checkpoint is not None:
        pace.resume(ready.checkpoint)
    return pace


def _stopwatch() -> Callable[[], float]:
    """Return a clock that starts at 0 now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
