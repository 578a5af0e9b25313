"""Build this rank's objects from a configuration and run the method's function for its role.

With MPI every rank is one role. In one process all roles take turns; pushes are applied straight to the shards' memory.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet import config as configuration
from dbnet import monitor, mpi, topology
from dbnet.build import Setup, coordinator_layout, first_shares, load_replica, make_shard, resumed, setup, use, window_layouts
from dbnet.channel import Channel, Mailboxes, MpiChannel
from dbnet.checkpoint import Checkpoint, link_of, texts
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
from dbnet.pace import Pace
from dbnet.pulse import GivenUp, Pulse, Watch, Watchdog
from dbnet.replica import Replica
from dbnet.resume import choose
from dbnet.store import Inbox, WindowStore
from dbnet.topology import Communicators, Role, crowded
from dbnet.waiting import Rounds, Turns, drive, take_turns
from dbnet.window import Memory, MpiWindow, Window

_START = 10  # deadlines that starting may take: data are read, kernels compiled


@dataclass(frozen=True)
class Outcome:
    """What a run has produced.

    Attributes
    ----------
    run_file, checkpoint
        Paths of the outputs.
    accuracy
        Last accuracy on the test set; NaN without a test set.
    picture
        Where to draw the run; None: nowhere.
    unsaved
        Why the last checkpoint could not be written; nothing if it was.
    params
        The trained parameters, [parameters]; only after a run in one process.
    finished, stopped
        Whether the run came to its own end; whether a signal has stopped it: the checkpoint is to go on from.
    losses
        What was lost on the way, a line for each replica; then this rank must end by `mpi.leave`.
    diagnosis
        Why the run was stopped for its numbers.
    signal
        Name of the signal that this process got meanwhile; nothing where there was none.
    """

    run_file: Path
    checkpoint: Path
    accuracy: float
    picture: Path | None = None
    unsaved: str = ""
    params: np.ndarray | None = None
    finished: bool = True
    stopped: bool = False
    losses: str = ""
    diagnosis: str = ""
    signal: str = ""


def train(
    run_file: str | Path | Config,
    overrides: Iterable[str] = (),
    *,
    resume: str | None = None,
    comm: Any = None,
    quiet: bool = False,
    marker: Marker | None = None,
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

    Returns
    -------
    The outcome, on the coordinator; None on other ranks.

    Raises
    ------
    Stopped
        On the coordinator, when all ranks have ended: too many gradients were not finite. The message is the diagnosis.
    """

    def load() -> Config:
        return run_file if isinstance(run_file, Config) else configuration.load(run_file, overrides, say)

    def prepare() -> Setup:
        # All labels are looked at by one rank.
        ready = setup(config, point, comm is None or comm.rank == 0)
        if comm is not None:
            ready.topology.check(comm.size, f"dbnet train {run_file} {' '.join(overrides)}".strip())
        ready.check(None if comm is None else comm.rank)
        return ready

    display = Display(quiet or (comm is not None and comm.rank > 0))
    say = display.warn if comm is None or comm.rank == 0 else lambda sentence: None
    config = mpi.together(comm, load)
    # One rank reads the checkpoints through; all take the same.
    point = mpi.together(comm, lambda: choose(config, resume, display) if comm is None or comm.rank == 0 else None)
    point = point if comm is None else comm.bcast(point)
    ready = mpi.together(comm, prepare)
    if ready.checkpoint is not None:
        display.say(f"Goes on from '{point}': {ready.checkpoint.seconds:.1f} s and {ready.checkpoint.steps} steps of training.")
    marker = marker or Marker(None)
    done = _train_here(ready, display, marker) if comm is None else _train_ranks(ready, comm, display, marker)
    if done is not None and done.diagnosis:
        raise Stopped(done.diagnosis, bool(done.losses))
    return done


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


def _train_ranks(ready: Setup, comm: Any, display: Display, marker: Marker) -> Outcome | None:
    """This rank's role; from the barrier to the end of the run no collective includes a replica."""
    world, config = ready.topology, ready.config
    words = f"{world.name(comm.rank)} waited in vain for others to {{}}: a rank is lost or hangs; go on with --resume auto."
    starting = mpi.Limit(comm, _START * config.run.deadline, words.format("start"))
    comms = topology.connect(comm, world)
    role = world.role(comm.rank)
    threads, cores = topology.cores_for(comms.node, role is not Role.COORDINATE)

    def load() -> Replica | None:
        if role is not Role.WORK:
            return None
        link = MpiLink(comms.replica, config.run.deadline, crowded(comms.node)) if world.partitions > 1 else None
        return load_replica(ready, *world.place(comm.rank), link)

    replica = mpi.together(comm, load)
    mpi.together(comm, lambda: monitor.make_folder(config) if role is Role.COORDINATE else None)
    # One rank of each node fills the cache of compiled kernels, the others load it.
    for turn in (True, False):
        if (comms.node.rank == 0) is turn:
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
    if not broken:
        ending = mpi.Limit(comm, config.run.deadline, words.format("end"))
        window.free()
        ending.lift()
    elif done is None:
        mpi.leave(0)
    return done


class Rank(NamedTuple):
    """What a role is played with: the run, communicators, window, the time of the run, signals, the limit of the start."""

    ready: Setup
    comms: Communicators
    window: Window
    clock: Callable[[], float]
    interrupt: Interrupt
    starting: mpi.Limit

    def play(self, role: Turns, beat: Callable[[str], None], graph: Callable[[], str]) -> None:
        """Begin together, since nobody may fetch before every shard has its parameters; then play the role to its end."""
        self.comms.world.Barrier()
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


def outcome(ready: Setup, pace: Pace, params: np.ndarray | None = None) -> Outcome:
    """Return what the run has produced."""
    accuracy = pace.last_score.test_accuracy if pace.last_score else float("nan")
    diagnosis = pace.guard.diagnosis() if pace.guard.stopped else ""
    config, ending = ready.config, (pace.finished, pace.stopped, pace.roll.summary(), diagnosis, pace.interrupt.by)
    picture = config.output(".png") if config.run.picture else None
    return Outcome(config.output(".h5"), link_of(config), accuracy, picture, pace.keeper.failure, params, *ending)


def _stopwatch() -> Callable[[], float]:
    """Return a clock that starts at 0 now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
