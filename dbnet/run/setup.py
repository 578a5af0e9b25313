"""What every rank knows before roles part: configuration, data, model, topology, and the checkpoint that it goes on from.

All of it is a function of the configuration and of files on disk, so each rank computes it and all come to the same: ranges of
shards, the cut of a replica, who pushes where by which route, and what each replica trains on at first. What does not fit together
is refused here, before anything is written and before other ranks wait.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, nan
from typing import Any

import numpy as np

from dbnet.checkpoint.reader import Checkpoint, alike, require_data
from dbnet.checkpoint.weights import begun
from dbnet.comm.threads import Mover
from dbnet.comm.topology import Role, Topology
from dbnet.comm.window import Window
from dbnet.coordinator.duty import Facts
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, piece, split
from dbnet.data.file import DataFile
from dbnet.data.subsets import Share
from dbnet.monitor import tensorboard
from dbnet.monitor.tables import EVALUATION, column
from dbnet.network.model import Model, footprint
from dbnet.network.partition import Boxes, Cut
from dbnet.network.replica import Score
from dbnet.shards.push import Intake, Receiver
from dbnet.shards.routes import Rings, Route, routes
from dbnet.shards.rules.schedules.base import Horizon, scheduled
from dbnet.shards.schedule.fetching import RecordingStore
from dbnet.shards.schedule.log import PartLog
from dbnet.shards.schedule.serving import RecordingInbox, RecordingIntake
from dbnet.shards.schedule.slices import SlicePiece, slice_pieces
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox, WindowStore

EVALUATION_BATCH = 250


@dataclass(frozen=True)
class Setup:
    """What every rank knows: the run, its data, its model, its world, what it goes on from, and the name it was asked to have."""

    config: Config
    data: DataFile
    model: Model
    topology: Topology
    checkpoint: Checkpoint | None
    name: str = ""

    @property
    def ranges(self) -> list[Range]:
        return self.topology.shard_ranges(self.model.layout.size)

    @cached_property
    def cut(self) -> Cut:
        """The network over the partitions of a replica."""
        return Cut(self.model, self.topology.partitions, self.config.method.minibatch)

    @cached_property
    def routes(self) -> list[dict[int, Route]]:
        """By which route each origin pushes to each shard."""
        out, ranges = [], self.ranges
        for partition in range(self.topology.partitions):
            pushed = footprint(self.model, self.cut.boxes[partition], leads=partition == 0).pushed
            out.append({route.shard: route for route in routes(pushed, ranges)})
        return out * self.topology.copies

    @cached_property
    def users(self) -> list[list[int]]:
        """For each shard the origins that have a ring there."""
        return [[o for o, way in enumerate(self.routes) if s in way] for s in range(self.topology.shards)]

    @cached_property
    def rings(self) -> Rings:
        """The shards' ranges and rings; a slice is no longer than the longest that any origin sends."""
        narrow, longest = self.config.method.narrow, max((route.size for ways in self.routes for route in ways.values()), default=1)
        most = longest * (2 if narrow else self.model.dtype.itemsize)
        ring = self.config.method.ring(max(map(len, self.users), default=1), most)
        return Rings(self.ranges, self.users, self.model.dtype, *ring, narrow)

    @cached_property
    def horizon(self) -> Horizon:
        """What of the run the rate's schedule depends on."""
        config, examples = self.config, self.data.sizes["train"]
        batch = config.method.worker.batch(config, examples)
        parts = split(examples, config.topology.replicas)
        steps = sum(-(-part.size // batch) for part in parts) / len(parts)
        ends = [config.stop.epochs, None if config.stop.steps is None else config.stop.steps / steps]
        return Horizon(steps * config.method.updates(config), min((end for end in ends if end is not None), default=None))

    @cached_property
    def watched(self) -> np.ndarray:
        """The training examples that are evaluated, too, evenly spread."""
        size = self.data.sizes["train"]
        return np.linspace(0, size - 1, min(self.config.evaluate.train, size)).astype(np.int64)

    @cached_property
    def variances(self) -> tuple[float, float]:
        """The variances, summed over the units, of the vectors that are evaluated and of the watched ones; NaN for labels."""
        return self.data.variance(self.config.evaluate.part), self.data.variance("train", self.watched)

    @cached_property
    def error_names(self) -> list[str]:
        """What the loss says of vectors besides; nothing of labels."""
        return list(self.config.model.loss.errors(1.0, self.data.targets, 1.0)) if self.data.targets else []

    def errors(self, score: Score) -> dict[str, float]:
        """Return these numbers for what is evaluated, then for the watched training examples (`train ...`); NaN without a loss."""
        out: dict[str, float] = {}
        if not self.error_names:
            return out
        for part, loss, variance in zip(("", "train "), (score.loss, score.train_loss), self.variances, strict=True):
            found = self.config.model.loss.errors(loss, self.data.targets, variance) if isfinite(loss) else {}
            out |= {f"{part}{name}": found.get(name, nan) for name in self.error_names}
        return out

    @cached_property
    def rule(self) -> tuple[Any, Callable[[float], float]]:
        """The update rule as shards apply it, and what the rate of an update is multiplied with."""
        return scheduled(self.config.rule, self.horizon)

    @property
    def versioned(self) -> bool:
        """Whether it is recorded which version of every slice is fetched: where parameters change between two fetches."""
        return self.config.record.schedule and self.config.method.recorder is None

    def beginning(self) -> Facts:
        """Return what is known when the run begins."""
        point, world, examples = self.checkpoint, self.topology, self.data.sizes["train"]
        subsets, steps = [first_shares(self, replica) for replica in range(world.replicas)], np.zeros(world.copies)
        if point is None:
            return Facts(self.config, examples, subsets, {}, steps, errors=self.errors)
        steps[: world.replicas] = [point.replica(r, world.replicas)["steps"] for r in range(world.replicas)]
        return Facts(self.config, examples, subsets, point.state, steps, point.steps - int(steps.sum()), self.errors)

    def pieces(self, whole: bool) -> list[list[SlicePiece]]:
        """Return of every shard the pieces of the slices in which pushes come; `whole`: each push is one."""
        longest = None if whole else self.rings.elements
        ways = self.routes[: self.topology.partitions]
        return [slice_pieces([way.get(shard) for way in ways], longest) for shard in range(self.topology.shards)]

    def clocks(self, partition: int) -> np.ndarray:
        """Return every shard's clock when the run begins."""
        point, parts = self.checkpoint, self.topology.partitions
        return np.array([0 if point is None else point.clock_of(part, parts)[partition] for part in self.ranges], np.int64)

    def inbox(self, window: Window, shard: int, receiver: Receiver, log: PartLog | None = None) -> Inbox:
        """Return what takes the pushes to a shard out of the rings in its window, and writes down which."""
        users = self.users[shard]
        by_pass, finite = self.config.method.recorder is not None, self.config.guard.finite
        intakes = [Intake(receiver, finite) if log is None else RecordingIntake(log, by_pass, o, receiver, finite) for o in users]
        parts = (window, intakes, self.topology, users, [self.routes[origin][shard] for origin in users])
        return Inbox(*parts) if log is None else RecordingInbox(log, *parts)

    def store(
        self, window: Window, rank: int, boxes: Boxes, turns: Callable[[], float] | None = None, log: PartLog | None = None,
        make: type[WindowStore] = WindowStore, mover: Callable[[], Mover] | None = None,
    ) -> WindowStore:  # fmt: skip
        """Return how a working rank fetches and pushes over the window.

        Within one process by `turns`, and beside the gradients only where `mover` makes what does so.
        """
        replica, partition = self.topology.place(rank)
        mine = footprint(self.model, boxes, leads=partition == 0)
        overlap, clock = self.config.method.overlap and (turns is None or mover is not None), turns or time.perf_counter
        parts = (window, self.topology, (replica, partition), mine, self.rings, overlap, clock, mover or Mover)
        if log is None:
            return make(*parts)
        counted = self.config.method.receiver is Shard
        return RecordingStore(log, mine.used, self.pieces(whole=False), self.clocks(partition), counted, *parts)

    @property
    def turn(self) -> float:
        """What a round of turns in one process counts as: about the seconds of its arithmetic, but never measured."""
        work = 6 * self.model.layout.size * self.config.method.minibatch * self.topology.replicas
        return min(0.05, max(2e-4, work / 1e11))

    @property
    def chain(self) -> list[dict[str, Any]]:
        """Configurations of the runs that this one came from, oldest first."""
        start = self.config.run.start
        origin = self.checkpoint or (None if start is None else begun(start, self.model))
        return [*origin.chain, json.loads(origin.config.text())] if isinstance(origin, Checkpoint) else []

    def check(self, rank: int | None) -> None:
        """Raise UserError where a run would go on with other data, or where this machine has not even the memory for its vectors.

        `rank` is this one's; None: all roles are in this process.
        """
        world, model = self.topology, self.model
        if self.checkpoint is not None and not rank:
            require_data(self.checkpoint, self.data)
        held, needed, have = 1 + self.config.method.receiver.vectors(self.config), 0, memory() / 2**30
        if rank is None:
            needed = (held + 2 * world.replicas) * model.layout.size
        elif world.role(rank) is Role.SERVE:
            needed = held * self.ranges[rank - 1].size
        needed = needed * model.dtype.itemsize / 2**30
        if needed > have:
            who = "the run" if rank is None else world.name(rank)
            fix = "take more shards, a smaller method.descent.history, or a smaller network"
            raise UserError(
                f"Not enough memory: {who} needs {needed:,.1f} GiB for vectors alone, this machine has {have:,.1f} GiB; {fix}."
            )

    def doubts(self) -> list[str]:
        """Return what is allowed but seldom meant, of the data and of how they are divided, in sentences."""
        config, examples, replicas = self.config, self.data.sizes["train"], self.config.topology.replicas
        idle = replicas - examples
        out = [*self.data.doubts, *config.method.doubts(config, examples)]
        origin = None if self.checkpoint is not None or config.run.start is None else begun(config.run.start, self.model)
        if isinstance(origin, Checkpoint) and not alike(origin, self.data):
            out.append(
                f"run.start: '{config.run.start}' was trained on data that were normalized in another way than '{self.data.path}', "
                "so its parameters meet other inputs here; prepare the data as those were."
            )
        if idle > 0:
            out.append(
                f"topology.replicas = {replicas} is more than the {examples} training examples: {idle} have nothing to train on."
            )
        if self._another_epoch:
            out.append(
                "An epoch has another number of updates than before (method.kind, minibatch, n_push, or how many replicas make a "
                "step together), and rule.schedule goes by updates: the rate jumps. Set rule.schedule.length anew."
            )
        return out

    @property
    def _another_epoch(self) -> bool:
        """Whether a rate's schedule counts on with epochs of another length than those of the checkpoint."""
        schedule = self.config.rule.schedule
        if self.checkpoint is None or (schedule.kind == "constant" and not schedule.warmup):
            return False
        now, before = (json.loads(config.text()) for config in (self.config, self.checkpoint.config))
        same = all(now["method"].get(key) == before["method"].get(key) for key in ("kind", "minibatch", "n_push"))
        together = self.config.method.kind == "synchronous"
        return not same or (together and now["topology"]["replicas"] != before["topology"]["replicas"])


def setup(config: Config, resume: str | None = None, labels: bool = True) -> Setup:
    """Check a configuration against its data (all `labels`, too) and make the model; UserError where something does not fit."""
    data = DataFile(config.data.path, labels)
    if data.one_hot and not config.model.loss.vectors:
        raise UserError(
            f"'{data.path}': /train/y holds one-hot vectors of {data.targets} classes; store the labels themselves, "
            f"y.argmax(axis=1), which the {config.model.loss.kind} loss wants."
        )
    model = make_model(config, data.shape, data.targets or data.classes, bool(data.targets))
    checkpoint = None
    if resume is not None:
        checkpoint = Checkpoint(resume)
        checkpoint.require(model, config.method.receiver.rule_state(config))
    if config.run.start is not None:
        begun(config.run.start, model)
    stop = config.stop
    if config.evaluate.part not in data.sizes and config.evaluate.part != "test":
        raise UserError(
            f"'{data.path}' has no validation set to evaluate; make it with 'dbnet data ... --validation 0.1', or leave "
            "evaluate.part out."
        )
    blind = bool(data.targets) or not data.sizes.get(config.evaluate.part)
    if blind and stop.accuracy is not None and stop.epochs is stop.steps is stop.seconds is stop.iterations is None:
        raise UserError(f"stop.accuracy needs labelled test examples, which '{data.path}' does not have; give stop.epochs too.")
    out = Setup(config, data, model, Topology.of(config.topology), checkpoint, config.run.name)
    config.method.check(config)
    if config.record.schedule and config.method.recorder and not issubclass(config.method.recorder, config.method.coordinator):
        raise UserError(
            f"method.kind = '{config.method.kind}' has a coordinator of its own, which is not recorded; leave record.schedule out."
        )
    if taken := set(map(column, out.error_names)) & set(EVALUATION.names):
        raise UserError(
            f"The {config.model.loss.kind} loss calls an error '{min(taken)}', as a column of the run file is; rename it."
        )
    tensorboard.require(config)
    config.rule.schedule.check(out.horizon)
    return out


def memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def make_model(config: Config, shape: tuple[int, ...], outputs: int, vectors: bool) -> Model:
    """Return the model of a configuration for examples of this shape."""
    layers, loss = config.model.layers, config.model.loss
    if vectors and not loss.vectors:
        raise UserError(f"The data have vector targets, which the {loss.kind} loss cannot use; set model.loss = 'squared'.")
    decay = config.method.receiver.decay(config)
    return Model(layers, loss, shape, outputs, config.model.dtype, decay)


def first_shares(ready: Setup, index: int) -> list[Share]:
    """Return what a replica trains on at first: its subset, from where the checkpoint left it; a spare one nothing."""
    parts = ready.topology.replicas
    if index >= parts:
        return []
    point = ready.checkpoint
    subset = Share(index, 0, piece(ready.data.sizes["train"], parts, index).size)
    if point is None:
        return [subset]
    left = [Share(*row) for row in point.tables["shares"].tolist()] if "shares" in point.tables else []
    mine = [share for share in left if share.subset == index]
    # Of another number of replicas, or other data, the subsets are others too: each goes on at the mean progress.
    if point.subsets == parts and sum(share.size for share in mine) == subset.size:
        return mine
    epoch, rest = divmod(point.progress, 1)
    return [subset._replace(epoch=int(epoch), position=int(rest * subset.size))]


def stopwatch() -> Callable[[], float]:
    """Return a clock that starts at 0 now."""
    start = time.perf_counter()
    return lambda: time.perf_counter() - start
