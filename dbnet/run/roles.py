"""Build a rank's objects from a configuration: the model and its cut, window layouts, shards, replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from dbnet.checkpoint.format import texts
from dbnet.checkpoint.master import Checkpoints
from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm.channel import Channel
from dbnet.comm.link import Link
from dbnet.comm.window import Window, WindowLayout
from dbnet.coordinator.coordinator import Coordinator
from dbnet.coordinator.guard import Guard
from dbnet.coordinator.heartbeat import HeartbeatWatch, heartbeat_fields
from dbnet.coordinator.orders import OrderBook, coordinator_fields
from dbnet.core import jit
from dbnet.core.config import Config
from dbnet.core.registry import reached
from dbnet.data.batches import Batches
from dbnet.monitor import runfile
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import RunFile
from dbnet.network.replica import Replica
from dbnet.run.setup import EVALUATION_BATCH, Setup, first_shares
from dbnet.shards.shard import Shard


def coordinator_layout(ready: Setup) -> WindowLayout:
    """Return the coordinator's window layout."""
    world = ready.topology
    return WindowLayout([*coordinator_fields(world), *heartbeat_fields(world), *ready.method.fields(world)])


def window_layouts(ready: Setup) -> list[WindowLayout]:
    """Return the window layout of every rank."""
    world = ready.topology
    shards = [WindowLayout(ready.rings.fields(s, world)) for s in range(world.shards)]
    return [coordinator_layout(ready), *shards, *(WindowLayout(()) for _ in range(world.origins))]


def make_shard(ready: Setup, index: int, params: np.ndarray, clock: np.ndarray, seconds: Callable[[], float]) -> Any:
    """Return a shard with its initial or loaded registers, or what the method puts in front of it."""
    part = ready.ranges[index]
    shard = Shard(part, ready.config.members()[2], params, clock, seconds)
    point = ready.checkpoint
    if point is not None:
        for name, register in shard.registers().items():
            point.read(name, part, register)
        clock[:] = point.clock_of(part, len(clock))
    elif ready.config.run.start is not None:
        Checkpoint(ready.config.run.start).read("params", part, params)
    else:
        ready.model.layout.draw(part, ready.config.run.seed, params)

    def saved() -> dict[str, np.ndarray]:
        names = [name for name in (point.registers if point is not None else ()) if name.startswith("vector.")]
        out = {name.removeprefix("vector."): np.zeros_like(params) for name in names}
        for name, register in out.items():
            point.read(f"vector.{name}", part, register)
        return out

    origins = [divmod(origin, ready.topology.partitions) for origin in ready.users[index]]
    return ready.method.receiver(shard, ready.model.layout, ready.config, origins, saved)


def load_replica(ready: Setup, index: int, partition: int = 0, link: Link | None = None) -> Replica:
    """Return one partition of a replica, with its part of the subset and of what it evaluates in memory.

    Parameters
    ----------
    index, partition
        Which one.
    link
        The replica's other partitions; None: the network is not cut.
    """
    config, data, model = ready.config, ready.data, ready.model
    seed, dtype = config.run.seed, model.dtype
    columns = model.columns(model.boxes() if link is None else ready.cut.boxes[partition])
    train = ready.method.examples(data, config, first_shares(ready, index), columns)
    watched = {}
    if data.sizes.get("test"):
        watched["test"] = Batches(data.read("test", None, columns), EVALUATION_BATCH, data.scale, dtype, None)
    portion = min(config.evaluate.train, data.sizes["train"])
    if portion:
        chosen = np.linspace(0, data.sizes["train"] - 1, portion).astype(np.int64)
        watched["train"] = Batches(data.read("train", chosen, columns), EVALUATION_BATCH, data.scale, dtype, None)
    # Replicas at the same step must not draw the same numbers; the partitions of one must.
    own = int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return Replica(model, train, watched, own, None if link is None else (ready.cut, link))


def resumed(ready: Setup, store: Any, replica: Replica, index: int) -> Any:
    """Set a replica's counters from the checkpoint, if there is one; return its store."""
    if ready.checkpoint is not None and index < ready.topology.replicas:
        row = ready.checkpoint.replica(index, ready.topology.replicas)
        replica.steps, replica.examples = int(row["steps"]), int(row["examples"])
        store.resume(int(row["pushes"]))
    return store


def use(config: Config, threads: int) -> None:
    """Give BLAS and the kernels their threads, and have the kernels that this run needs compiled or loaded."""
    threadpool_limits(limits=threads, user_api="blas")
    jit.set_threads(threads)
    layers, loss, rule = config.members()
    used = reached({"dbnet.network.replica", *(type(member).__module__ for member in (*layers, loss, rule))})
    jit.warm(config.model.dtype, used.__contains__)


def open_record(ready: Setup, about: dict[str, Any]) -> tuple[Setup, RunFile]:
    """Create the run file; return the run with the name that it got, and the file."""
    if ready.checkpoint is not None:
        about = {**about, "resumed_from": str(ready.checkpoint.path)}
    config, record = runfile.begin(ready.config, {**about, "parameters": ready.model.layout.size})
    return replace(ready, config=config), record


def make_coordinator(
    ready: Setup, window: Window, channel: Channel, record: RunFile, display: Display, clock: Callable[[], float],
    watch: HeartbeatWatch | None = None, due: Callable[[], float] | None = None,
) -> Coordinator:  # fmt: skip
    """Return the coordinator's everyday work for this run."""
    for doubt in ready.doubts():
        display.warn(doubt)
    data, config, start = ready.data, ready.config, ready.config.run.start
    origin = ready.checkpoint or (None if start is None else Checkpoint(start))
    keeper = Checkpoints(
        channel, display, config, texts(config, ready.name, ready.model, data.described, origin), clock, watch is None
    )
    guard, desk = Guard(config, ready.model.layout, record, display), OrderBook(window, ready.topology)
    pace = Coordinator(desk, channel, record, display, config, data.sizes["train"], keeper, clock, guard, watch, due)
    pace.first_shares = [first_shares(ready, replica) for replica in range(ready.topology.replicas)]
    if ready.checkpoint is not None:
        pace.resume(ready.checkpoint)
    return pace
