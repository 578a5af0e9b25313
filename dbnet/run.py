"""Build this rank's objects from a configuration and run the method's function for its role.

With MPI every rank is one role. In one process all roles take turns; pushes are applied straight to the shards' memory.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from dbnet import config as configuration
from dbnet import jit, monitor, mpi, topology
from dbnet.batches import Batches, Cursor
from dbnet.channel import Channel, Mailboxes, MpiChannel
from dbnet.checkpoint import Checkpoint, Writer
from dbnet.config import Config
from dbnet.data.base import DataFile
from dbnet.display import Display
from dbnet.errors import UserError
from dbnet.model import Model, footprint
from dbnet.monitor import RunFile
from dbnet.orders import Desk, Orders, coordinator_fields
from dbnet.pace import Pace
from dbnet.ranges import Range
from dbnet.registry import make, reached
from dbnet.replica import Replica
from dbnet.shard import Shard
from dbnet.store import DirectStore, Inbox, WindowStore, routes, shard_fields
from dbnet.topology import Communicators, Role, Topology
from dbnet.waiting import Turns, drive, take_turns
from dbnet.window import Layout, Memory, MpiWindow, Window

EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Setup:
    """What every rank knows: the run, its data, its model, its world, and what it goes on from."""

    config: Config
    data: DataFile
    model: Model
    topology: Topology
    checkpoint: Checkpoint | None

    @property
    def ranges(self) -> list[Range]:
        return self.topology.shard_ranges(self.model.layout.size)

    @property
    def method(self) -> Any:
        return make("methods", {"kind": self.config.method.kind}, "method")


def setup(config: Config, resume: str | None = None) -> Setup:
    """Check a configuration against its data and make the model; UserError where something does not fit."""
    data = DataFile(config.data.path)
    model = make_model(config, data.shape, data.targets or data.classes, bool(data.targets))
    shape = config.topology
    checkpoint = None
    if resume is not None:
        checkpoint = Checkpoint(config.output(".checkpoint.h5") if resume == "" else resume)
        checkpoint.require(model)
    out = Setup(config, data, model, Topology(shape.shards, shape.replicas, shape.partitions), checkpoint)
    out.method.check(config)
    return out


def make_model(config: Config, shape: tuple[int, ...], outputs: int, vectors: bool) -> Model:
    """Return the model of a configuration for examples of this shape."""
    layers, loss, _ = config.members()
    if vectors and not loss.vectors:
        raise UserError(f"The data have vector targets, which the {loss.kind} loss cannot use; set model.loss = 'squared'.")
    return Model(layers, loss, shape, outputs, config.model.dtype, config.model.decay)


@dataclass(frozen=True)
class Outcome:
    """What a run has produced.

    Attributes
    ----------
    run_file, checkpoint
        Paths of the outputs.
    accuracy
        Last accuracy on the test set; NaN without a test set.
    params
        The trained parameters, [parameters]; only after a run in one process.
    """

    run_file: Path
    checkpoint: Path
    accuracy: float
    params: np.ndarray | None = None


def train(
    run_file: str | Path | Config,
    overrides: Iterable[str] = (),
    *,
    resume: str | None = None,
    comm: Any = None,
    quiet: bool = False,
) -> Outcome | None:
    """Train as the run file says, on the ranks of `comm` or in this process.

    Parameters
    ----------
    run_file
        Path of a TOML file, or a configuration.
    overrides
        Changes like "topology.replicas=4".
    resume
        Path of a checkpoint to go on from; "" for the run's own.
    comm
        MPI's world communicator; None trains in this process.

    Returns
    -------
    The outcome, on the coordinator; None on other ranks.
    """

    def prepare() -> Setup:
        config = run_file if isinstance(run_file, Config) else configuration.load(run_file, overrides)
        ready = setup(config, resume)
        if comm is not None:
            ready.topology.check(comm.size, f"dbnet train {run_file} {' '.join(overrides)}".strip())
        return ready

    ready = mpi.together(comm, prepare)
    if comm is None:
        return _train_here(ready, Display(quiet))
    return _train_ranks(ready, comm, Display(quiet or comm.rank > 0))


# --- one process --------------------------------------------------------------------------------------------------------------


def _train_here(ready: Setup, display: Display) -> Outcome:
    """All roles in this process, taking turns."""
    config, world = ready.config, ready.topology
    threads, cores = topology.cores_for(None, True)
    parts = [load_replica(ready, r) for r in range(world.replicas)]
    config = monitor.free_name(config)
    _use(ready, threads)
    ready = Setup(config, ready.data, ready.model, world, ready.checkpoint)
    clock = _stopwatch()
    flat = np.zeros(ready.model.layout.size, ready.model.dtype)
    boxes = Mailboxes(1 + world.shards)
    shards = [make_shard(ready, s, flat[part.slice], np.zeros(1, np.int64), clock) for s, part in enumerate(ready.ranges)]
    memory = Memory([Layout(coordinator_fields(world))])
    record = open_record(ready, {"mpi": "none, one process", "hosts": [socket.gethostname()]})
    display.say(
        f"One process, {world.shards} shards and {world.replicas} replicas taking turns; {threads} of {cores} cores for kernels."
    )
    pace = make_pace(ready, memory, boxes.at(0), record, display, clock)
    roles = [ready.method.coordinate(pace)]
    roles += [ready.method.serve(shard, None, boxes.at(1 + s), clock) for s, shard in enumerate(shards)]
    for r, replica in enumerate(parts):
        store = DirectStore(flat, shards, r, share=config.method.n_fetch == 1)
        roles.append(ready.method.work(replica, resumed(ready, store, replica, r), Orders(memory, r, clock), config))
    try:
        take_turns(roles)
    finally:
        pace.close()
    return outcome(ready, pace, flat)


# --- MPI ----------------------------------------------------------------------------------------------------------------------


def _train_ranks(ready: Setup, comm: Any, display: Display) -> Outcome | None:
    """This rank's role; from the barrier to the end of the run no collective includes a replica."""
    world, config = ready.topology, ready.config
    comms = topology.connect(comm, world)
    role = world.role(comm.rank)
    threads, cores = topology.cores_for(comms.node, role is not Role.COORDINATE)
    replica = mpi.together(comm, lambda: load_replica(ready, world.place(comm.rank)[0]) if role is Role.WORK else None)
    if role is Role.COORDINATE:
        config = mpi.together(comm, lambda: monitor.free_name(config))
    else:
        mpi.together(comm, lambda: None)
    # One rank of each node fills the cache of compiled kernels, the others load it.
    for turn in (True, False):
        if (comms.node.rank == 0) is turn:
            _use(ready, threads)
        comms.node.Barrier()
    ready = Setup(config, ready.data, ready.model, world, ready.checkpoint)
    hosts = comm.gather(socket.gethostname())
    everyone = comm.gather((role, threads))
    record = mpi.together(
        comm, lambda: open_record(ready, {"mpi": mpi.library_version(), "hosts": hosts}) if role is Role.COORDINATE else None
    )
    if everyone is not None:
        used = sorted({n for r, n in everyone if r is Role.WORK})
        display.say(
            f"{comm.size} ranks on {len(set(hosts))} host(s): 1 coordinator, {world.shards} shards, {world.replicas} replicas; "
            f"{'/'.join(map(str, used))} of {cores} cores for each replica's kernels. {mpi.library_version()}."
        )
    window = MpiWindow(comms.world, window_layouts(ready))
    clock = _stopwatch()
    done = _ROLES[role](ready, comms, window, clock, record, display, replica)
    window.free()
    return done


def _coordinate(
    ready: Setup, comms: Communicators, window: Window, clock: Callable[[], float], record: RunFile, display: Display, _: Any
) -> Outcome:
    pace = make_pace(ready, window, MpiChannel(comms.servers), record, display, clock)
    try:
        _start(ready.method.coordinate(pace), ready, comms)
    finally:
        pace.close()
    return outcome(ready, pace)


def _serve(ready: Setup, comms: Communicators, window: Window, clock: Callable[[], float], *_: Any) -> None:
    index = comms.world.rank - 1
    shard = make_shard(ready, index, window.local["params"], window.local["clock"], clock)
    users, ways = ring_users(ready)
    inbox = Inbox(window, shard, ready.topology, users[index], [ways[o][index] for o in users[index]])
    _start(ready.method.serve(shard, inbox, MpiChannel(comms.servers), clock), ready, comms)


def _work(
    ready: Setup, comms: Communicators, window: Window, clock: Callable[[], float], _: Any, __: Any, replica: Replica
) -> None:
    number, partition = ready.topology.place(comms.world.rank)
    method = ready.config.method
    store = WindowStore(
        window, ready.topology, (number, partition), replica.network.footprint, replica.size, ready.model.dtype, ready.ranges,
        ring_users(ready)[0], (method.slot, method.slots), method.overlap,
    )  # fmt: skip
    orders = Orders(window, number, clock)
    _start(ready.method.work(replica, resumed(ready, store, replica, number), orders, ready.config), ready, comms)


def _start(role: Turns, ready: Setup, comms: Communicators) -> None:
    """Begin together, since nobody may fetch before every shard has its parameters; then play the role to its end."""
    comms.world.Barrier()
    drive(role, ready.config.run.deadline)


_ROLES: dict[Role, Callable[..., Outcome | None]] = {Role.COORDINATE: _coordinate, Role.SERVE: _serve, Role.WORK: _work}


# --- parts --------------------------------------------------------------------------------------------------------------------


def ring_users(ready: Setup) -> tuple[list[list[int]], list[dict[int, Any]]]:
    """Return for each shard the origins that have a ring there, and for each origin its routes by shard."""
    used, _ = footprint(ready.model, ready.model.boxes())
    ways = [{route.shard: route for route in routes(used, ready.ranges)} for _ in range(ready.topology.origins)]
    return [[o for o, way in enumerate(ways) if s in way] for s in range(ready.topology.shards)], ways


def window_layouts(ready: Setup) -> list[Layout]:
    """Return the window layout of every rank."""
    method, world = ready.config.method, ready.topology
    users = ring_users(ready)[0]
    shards = [
        Layout(shard_fields(part, ready.model.dtype, world, users[s], method.slot, method.slots))
        for s, part in enumerate(ready.ranges)
    ]
    return [Layout(coordinator_fields(world)), *shards, *(Layout(()) for _ in range(world.origins))]


def make_shard(ready: Setup, index: int, params: np.ndarray, clock: np.ndarray, seconds: Callable[[], float]) -> Shard:
    """Return a shard with its initial or loaded registers."""
    part = ready.ranges[index]
    shard = Shard(part, ready.config.members()[2], params, clock, seconds)
    if ready.checkpoint is None:
        ready.model.layout.draw(part, ready.config.run.seed, params)
    else:
        for name, register in shard.registers().items():
            ready.checkpoint.read(name, part, register)
        clock[:] = ready.checkpoint.clock_of(part, len(clock))
    return shard


def load_replica(ready: Setup, index: int) -> Replica:
    """Return a replica with its subset and what it evaluates, in memory."""
    config, data, model = ready.config, ready.data, ready.model
    rows = data.subset(index, config.topology.replicas, config.run.seed)
    seed, dtype = config.run.seed, model.dtype
    minibatch = max(1, min(config.method.minibatch, len(rows)))
    train = Batches(data.read("train", rows), minibatch, data.scale, dtype, (seed, index))
    watched = {}
    if data.sizes.get("test"):
        watched["test"] = Batches(data.read("test"), EVALUATION_BATCH, data.scale, dtype, None)
    portion = min(config.evaluate.train, data.sizes["train"])
    if portion:
        chosen = np.linspace(0, data.sizes["train"] - 1, portion).astype(np.int64)
        watched["train"] = Batches(data.read("train", chosen), EVALUATION_BATCH, data.scale, dtype, None)
    return Replica(model, train, watched, seed)


def resumed(ready: Setup, store: Any, replica: Replica, index: int) -> Any:
    """Set a replica's counters and cursor from the checkpoint, if there is one for it; return its store."""
    if ready.checkpoint is not None and index < len(ready.checkpoint.replicas):
        row = ready.checkpoint.replicas[index]
        replica.steps, replica.examples = int(row["steps"]), int(row["examples"])
        position = min(int(row["position"]), max(0, len(replica.train) - 1))
        replica.train.seek(Cursor(int(row["epoch"]), position))
        store.resume(int(row["pushes"]))
    return store


def open_record(ready: Setup, about: dict[str, Any]) -> RunFile:
    """Create the run file."""
    if ready.checkpoint is not None:
        about = {**about, "resumed_from": str(ready.checkpoint.path)}
    return RunFile(ready.config.output(".h5"), ready.config, {**about, "parameters": ready.model.layout.size})


def make_pace(
    ready: Setup, window: Window, channel: Channel, record: RunFile, display: Display, clock: Callable[[], float]
) -> Pace:
    """Return the coordinator's everyday work for this run."""

    def begin() -> Writer:
        described = {
            "shape": ready.data.shape,
            "outputs": ready.data.targets or ready.data.classes,
            "vectors": bool(ready.data.targets),
        }
        return Writer(ready.config.output(".checkpoint.h5"), ready.config, ready.model, described)

    examples = ready.data.sizes["train"]
    pace = Pace(Desk(window, ready.topology), channel, record, display, ready.config, examples, begin, clock)
    if ready.checkpoint is not None:
        pace.resume(ready.checkpoint)
    return pace


def outcome(ready: Setup, pace: Pace, params: np.ndarray | None = None) -> Outcome:
    """Return what the run has produced."""
    accuracy = pace.last_score.test_accuracy if pace.last_score else float("nan")
    return Outcome(ready.config.output(".h5"), ready.config.output(".checkpoint.h5"), accuracy, params)


def _use(ready: Setup, threads: int) -> None:
    """Give BLAS and the kernels their threads and have the kernels this run needs ready."""
    threadpool_limits(limits=threads, user_api="blas")
    jit.set_threads(threads)
    layers, loss, rule = ready.config.members()
    used = reached({"dbnet.replica", *(type(member).__module__ for member in (*layers, loss, rule))})
    jit.warm(ready.config.model.dtype, used.__contains__)


def _stopwatch() -> Callable[[], float]:
    """Return a clock that starts at 0 now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
