"""What a run is played with: a coordinator, a server, a worker, each built in one way whatever the world."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from dbnet.checkpoint.format import REPLICA, texts
from dbnet.checkpoint.master import Checkpoints, Unsaved
from dbnet.checkpoint.parts import PartWriter
from dbnet.checkpoint.weights import begun
from dbnet.comm.channel import Channel, Shards
from dbnet.comm.link import Link
from dbnet.comm.topology import Role
from dbnet.comm.turns import Turns
from dbnet.comm.window import Field, Window, WindowLayout
from dbnet.coordinator.coordinator import Coordinator, Duties, Ending
from dbnet.coordinator.crashes import Crashes
from dbnet.coordinator.duty import RunTime
from dbnet.coordinator.evaluation import Evaluation
from dbnet.coordinator.guard import Guard
from dbnet.coordinator.heartbeat import HeartbeatWatch, heartbeat_fields
from dbnet.coordinator.membership import Membership
from dbnet.coordinator.orders import OrderBook, Orders, Status, coordinator_fields
from dbnet.coordinator.progress import Progress
from dbnet.coordinator.recording import RecordingOrders
from dbnet.core import jit
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.files import why
from dbnet.core.ranges import Range
from dbnet.data.batches import Batches
from dbnet.monitor import runfile, tensorboard
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import RunFile
from dbnet.monitor.tensorboard import EventFiles
from dbnet.monitor.trace import attach, servers
from dbnet.monitor.trace.lane import Sampling, Trace, trace_of
from dbnet.network.replica import Replica
from dbnet.run.setup import EVALUATION_BATCH, Setup, first_shares
from dbnet.shards.accrual import Accrual
from dbnet.shards.local_store import Store
from dbnet.shards.push import Receiver, Receiving
from dbnet.shards.schedule.log import PartLog
from dbnet.shards.schedule.paths import part_of_schedule, schedule_of
from dbnet.shards.schedule.serving import RecordingWriter
from dbnet.shards.server import NoInbox, Server
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox

if TYPE_CHECKING:
    from dbnet.methods.worker import Worker


def coordinator_layout(ready: Setup) -> WindowLayout:
    """Return the coordinator's window layout."""
    world = ready.topology
    return WindowLayout([*coordinator_fields(world), *heartbeat_fields(world), *ready.config.method.coordinator.fields(world)])


def window_layouts(ready: Setup) -> list[WindowLayout]:
    """Return the window layout of every rank."""
    world = ready.topology
    pieces = ready.pieces(whole=False) if ready.versioned else None
    versions = [[] if pieces is None else [Field("version", "int64", (len(mine),))] for mine in pieces or [()] * world.shards]
    shards = [WindowLayout([*ready.rings.fields(s, world), *versions[s]]) for s in range(world.shards)]
    return [coordinator_layout(ready), *shards, *(WindowLayout(()) for _ in range(world.origins))]


class World(Protocol):
    """Where roles are played: on MPI ranks, or all in one process.

    Attributes
    ----------
    clock, due, period
        Seconds of the run; by what recurring work falls due; seconds between a replica's looks at its orders, 0: at every turn.
    saves, inline
        Whether there is something to save; whether files are written by a rank's turns, not by a thread of its own.
    """

    clock: Callable[[], float]
    due: Callable[[], float]
    period: float
    saves: bool
    inline: bool

    def asked(self) -> bool:
        """Return whether a signal has asked this process to stop."""

    def watch(self) -> HeartbeatWatch | None:
        """Return the signs of life of all ranks; None where none can be lost."""

    def window(self, rank: int) -> Window: ...
    def channel(self, rank: int) -> Channel: ...

    def memory(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Return where a shard's parameters and clock lie, and the parameters as bfloat16, if they are fetched so."""

    def inbox(self, shard: int, receiver: Receiver) -> Inbox | NoInbox:
        """Return what takes the pushes to a shard out of their rings."""

    def store(self, rank: int, replica: Replica) -> Store:
        """Return how a working rank fetches and pushes."""

    def beat(self, rank: int) -> Callable[[], None]:
        """Return what else is due whenever a replica looks at its orders."""

    def log(self, rank: int) -> PartLog | None:
        """Return where a rank writes its part of the schedule; None where none is recorded."""

    def counting(self, shard: int, *parts: Any) -> Shard:
        """Return a shard, made of `parts`, that counts the changes of its slices."""


def load_replica(
    ready: Setup, index: int, partition: int = 0, link: Link | None = None, make: Callable[..., Replica] = Replica,
    watched: dict[str, Batches] | None = None,
) -> Replica:  # fmt: skip
    """Return one partition of a replica, with its part of the subset and of what it evaluates in memory.

    Parameters
    ----------
    index, partition
        Which one.
    link
        The replica's other partitions; None: the network is not cut.
    make, watched
        Makes the replica; what it evaluates, where that has been read before.
    """
    config, data, model = ready.config, ready.data, ready.model
    seed = config.run.seed
    columns = model.columns(model.boxes() if link is None else ready.cut.boxes[partition])
    train = ready.config.method.worker.examples(data, config, first_shares(ready, index), columns)
    watched = read_watched(ready, columns) if watched is None else watched
    # Replicas at the same step must not draw the same numbers; the partitions of one must.
    own = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return make(model, train, watched, own, None if link is None else (ready.cut, link), clipping=config.method.clipping)


def read_watched(ready: Setup, columns: list[Range] | None) -> dict[str, Batches]:
    """Return what is evaluated: the test or validation set, a portion of the training set; of each example the units `columns`."""
    config, data, dtype, watched = ready.config, ready.data, ready.model.dtype, {}
    if data.sizes.get(config.evaluate.part):
        watched["judged"] = Batches(data.read(config.evaluate.part, None, columns), EVALUATION_BATCH, data.scale, dtype, None)
    if len(ready.watched):
        watched["train"] = Batches(data.read("train", ready.watched, columns), EVALUATION_BATCH, data.scale, dtype, None)
    return watched


def use(config: Config, threads: int, role: Role | None = None) -> None:
    """Give BLAS and the kernels their threads, and have kernels ready: what a role needs, or what the whole run does, compiled."""
    threadpool_limits(limits=threads, user_api="blas")
    jit.set_threads(threads)
    work = _working(config)
    serve = {type(config.rule).__module__, "dbnet.core.kernels.vector"}
    needs = {Role.WORK: work, Role.SERVE: serve, Role.COORDINATE: {"dbnet.core.jit"}, None: work | serve}[role]
    jit.warm(config.model.dtype, jit.reached(needs).__contains__, role is None)


def _working(config: Config) -> set[str]:
    """Return the modules that computing takes kernels from."""
    return {"dbnet.network.replica", *(type(member).__module__ for member in (*config.model.layers, config.model.loss))}


def compiles(config: Config) -> bool:
    """Return whether computing needs the compiler at every start: for kernels over threads, and for a user's own."""
    kernels, reached = [made for _, made in jit.KERNELS], jit.reached(_working(config))
    return any(k.__module__ in reached and (not k.__module__.startswith("dbnet.") or k.parallel) for k in kernels)


def open_record(ready: Setup, about: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Setup, RunFile]:
    """Create the run file, whose rows wait by `clock`, and folders for schedule and trace; return the run with its name, too."""
    if ready.checkpoint is not None:
        about = {**about, "resumed_from": str(ready.checkpoint.path)}
    about = {**about, "parameters": ready.model.layout.size, "errors": ready.error_names, "class_names": ready.data.class_names}
    config, record = runfile.begin(ready.config, about, clock)
    for folder in [schedule_of(config)] * ("schedule" in about) + [trace_of(config)] * config.record.trace:
        try:
            folder.mkdir()
        except OSError as error:
            raise UserError(f"Cannot make '{folder}' ({why(error)}); set run.folder to another.") from None
    if config.record.tensorboard:
        record.beside = EventFiles(config.output(tensorboard.ENDING), about.get("world") == "simulated", config.evaluate.part)
    return replace(ready, config=config), record


def schedule(ready: Setup) -> dict[str, Any]:
    """Return what the run file says of a schedule that is recorded: its identity, and the checkpoint that the run goes on from."""
    point = ready.checkpoint
    origin = ["", ""] if point is None else [str(point.path), point.id]
    return {"schedule": {"id": secrets.token_hex(8), "from": origin}} if ready.config.record.schedule else {}


def open_log(
    ready: Setup, identity: str, rank: int, threads: int, say: Callable[[str], None], here: bool = False
) -> PartLog | None:
    """Create a rank's part of the schedule; None where it writes none, as whoever decides nothing.

    `here`: all roles are in this process.
    """
    world, limit, by_pass = ready.topology, ready.config.record.limit, not ready.versioned
    if not rank and not by_pass:
        return None
    about = {"run": identity, "here": here, "threads": threads, "machine": runfile.machine()}
    log = PartLog(part_of_schedule(ready.config, world, rank), about, limit // (world.size - 1), say)
    if by_pass and world.role(rank) is Role.WORK:
        log.close()
        return None
    return log


def coordinator(ready: Setup, world: World, record: RunFile, display: Display) -> Coordinator:
    """Return the method's coordinator of this run, with its duties."""
    for doubt in ready.doubts():
        display.warn(doubt)
    config, kind, facts, watch = ready.config, ready.config.method.coordinator, ready.beginning(), world.watch()
    # Read while the data file is there.
    _ = ready.variances
    channel, point = world.channel(0), ready.checkpoint
    time = RunTime(world.clock, world.due, 0.0 if point is None else point.seconds)
    replicas, shards = OrderBook(world.window(0), ready.topology), Shards(channel, ready.topology)
    for replica in range(0 if point is None else ready.topology.replicas):
        row = point.replica(replica, ready.topology.replicas)
        replicas.resume(replica, **{name: int(row[name]) for name in REPLICA.names})

    def made(status: Status, replica: int) -> int:
        return kind.made(status, facts, replica)

    crashes = None if watch is None else Crashes.of_launch(ready.topology)
    members = Membership(replicas, channel, watch, made, time, display.say, lambda loss: record.lost(*loss), crashes)
    evaluation = Evaluation(facts, replicas, members, record, time)
    keeper = Checkpoints if world.saves else Unsaved
    about = texts(config, ready.name, ready.model.layout, ready.data.described, ready.chain, ready.data.scale)
    duties = Duties(
        keeper(channel, display.warn, config, about, world.clock, world.inline, point is not None),
        members,
        Guard(config, ready.model.layout, record, display, time, kind.by_pass),
        evaluation,
        Progress(facts, record, display, evaluation, time, kind.rows),
    )
    parts = (facts, replicas, shards, duties, Ending(config, world.asked, duties, time), time)
    log = world.log(0) if config.record.schedule else None
    return kind(*parts) if log is None else config.method.recorder(log, *parts)


def receiver(ready: Setup, world: World, index: int) -> Receiver:
    """Return a shard with its initial or loaded registers, or what the method puts in front of it."""
    part, point, (params, clock, rounded) = ready.ranges[index], ready.checkpoint, world.memory(index)
    parts = (part, ready.rule[0], params, clock, world.clock, rounded)
    shard = world.counting(index, *parts) if ready.versioned else Shard(*parts)
    if point is not None:
        for name, register in shard.registers().items():
            point.read(name, part, register)
        clock[:] = point.clock_of(part, len(clock))
    elif ready.config.run.start is not None:
        begun(ready.config.run.start, ready.model).read("params", part, params)
    else:
        ready.model.layout.draw(part, ready.config.run.seed, params)
    shard.round(slice(None))

    def saved() -> dict[str, np.ndarray]:
        names = [name for name in (point.registers if point is not None else ()) if name.startswith("vector.")]
        out = {name.removeprefix("vector."): np.zeros_like(params) for name in names}
        for name, register in out.items():
            point.read(f"vector.{name}", part, register)
        return out

    origins = [divmod(origin, ready.topology.partitions) for origin in ready.users[index]]
    return ready.config.method.receiver.over(shard, Receiving(ready.config, ready.model.layout, origins, saved))


def server(ready: Setup, world: World, index: int, takes: Receiver) -> Server:
    """Return the server of one shard."""
    rank = ready.topology.shard_rank(index)
    channel, log = world.channel(rank), world.log(rank) if ready.config.record.schedule else None
    parts = (takes, channel, world.due, world.inline)
    saver = PartWriter(*parts) if log is None else RecordingWriter(log, *parts)
    if isinstance(takes, Accrual):
        takes.log = log
    return Server(takes, world.inbox(index, takes), channel, saver, world.due, ready.config.record)


def worker(ready: Setup, world: World, rank: int, replica: Replica) -> Worker:
    """Return one partition of a replica, with its counters from the checkpoint if there is one."""
    index, store = ready.topology.place(rank)[0], world.store(rank, replica)
    log, beat = world.log(rank) if ready.config.record.schedule else None, world.beat(rank)
    parts = (world.window(rank), ready.topology, index, world.due, replica.link, world.period, beat)
    orders = Orders(*parts) if log is None else RecordingOrders(log, *parts)
    if ready.checkpoint is not None and index < ready.topology.replicas:
        row = ready.checkpoint.replica(index, ready.topology.replicas)
        replica.steps, replica.examples = int(row["steps"]), int(row["examples"])
        store.resume(int(row["pushes"]))
    return ready.config.method.worker(replica, store, orders, ready.config, ready.rule[1])


def open_trace(
    ready: Setup, ranks: Iterable[int], about: dict[str, Any], now: Callable[[], int], say: Callable[[str], None],
    idle: bool = True, threads: bool = False, free: bool = False,
) -> Trace | None:  # fmt: skip
    """Make the lanes of these ranks if the run is traced; see `Trace`.

    `threads`: data may be moved on threads; `free`: spans cost none of the run's seconds.
    """
    if not ready.config.record.trace:
        return None
    world, trace = ready.topology, Trace(ready.config, about, now, say, idle, sampling(ready, free))
    for rank in ranks:
        name, role = world.name(rank), world.role(rank)
        if role is Role.COORDINATE:
            trace.open(rank, name, "coordinator")
            for track in ("evaluations", "checkpoints"):
                trace.open(rank, name, track, beside=True)
        elif role is Role.SERVE:
            trace.open(rank, name, "shard", shard=world.shard_of(rank), partitions=world.partitions)
        else:
            replica, partition = world.place(rank)
            for track in ("replica", "transfers")[: 1 + (threads and ready.config.method.overlap)]:
                trace.open(rank, name, track, origin=replica * world.partitions + partition)
    return trace


def sampling(ready: Setup, free: bool) -> Sampling:
    """Return what is left out of a trace, so that it costs a hundredth of a step; nothing where that is `free`."""
    config = ready.config
    # Of a step there are six spans and two for each layer, 3 us each, beside 0.1 ms that it takes without its arithmetic.
    cost, step = 3e-6 * (6 + 2 * len(config.model.layers)), 1e-4 + ready.cut.seconds
    steps = config.record.steps or (1 if free else math.ceil(100 * cost / step))
    fetch, push = config.method.worker.intervals(config, ready.data.sizes["train"])
    return Sampling(steps, max(1, steps // fetch), max(1, steps // push))


def traced(trace: Trace | None, rank: int, player: Coordinator | Server | Worker, by_layer: bool = True) -> Turns:
    """Return a role's turns; of a traced run they are put down in the rank's lanes, `by_layer` or by gradient."""
    if trace is not None:
        lanes = trace.lanes[rank]
        if isinstance(player, Coordinator):
            servers.coordinator(player, lanes["coordinator"], lanes["evaluations"], lanes["checkpoints"])
        elif isinstance(player, Server):
            servers.server(player, lanes["shard"])
        else:
            attach.worker(player, lanes["replica"], lanes.get("transfers"), by_layer)
    return player.run()
