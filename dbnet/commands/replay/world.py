"""All roles of a recorded run in one process, but for the coordinator: what it said is in the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.comm.link import Link, LocalLink, Wires
from dbnet.comm.turns import IDLE, Turns, Wait, take_turns
from dbnet.commands.replay.moment import Gathered, Gradient, Headway, WatchedReplica, save
from dbnet.commands.replay.outcome import Compared, Difference, Ended
from dbnet.commands.replay.replica import Pages, ReplayedStore, ReplayedWindow, reads
from dbnet.commands.replay.shard import ReplayedShard, Timeline
from dbnet.core.errors import Lost, UserError
from dbnet.network.model import Footprint, footprint
from dbnet.network.replica import Replica
from dbnet.run import roles
from dbnet.run.setup import Setup
from dbnet.shards.schedule.log import CLOSE, FETCH, SNAPSHOT, PartOfSchedule
from dbnet.shards.schedule.slices import SlicePiece
from dbnet.shards.shard import Shard

_VAIN = 10000


class ReplayedWorld:
    """The world of a replay.

    Parameters
    ----------
    ready
        The run.
    parts
        What each rank has recorded, but the coordinator.
    whole
        Whether a push came to its shard as one slice: it was recorded in one process.
    compared
        Counts what is compared.
    quotas
        Of each shard the updates after which it stops; none: at its record's end.
    gradient
        One gradient that is wanted, if one is.
    """

    period = 0.0

    def __init__(
        self, ready: Setup, parts: dict[int, PartOfSchedule], whole: bool, compared: Compared,
        quotas: Sequence[int | None] = (), gradient: Gradient | None = None,
    ) -> None:  # fmt: skip
        self._stops, self.gradient = bool(quotas), gradient
        self._quotas = quotas or [None] * ready.topology.shards
        self._ready, self.parts, self.compared, self.topology = ready, parts, compared, ready.topology
        self.clock: Callable[[], float] = lambda: 0.0
        self.due = self.clock
        world = self.topology
        self._longest = None if whole else ready.rings.elements
        self._pieces = ready.pieces(whole)
        self._memory = [
            (np.zeros(part.size, ready.model.dtype), np.zeros(world.partitions, np.int64), None) for part in ready.ranges
        ]
        self._wires = [Wires(world.partitions) for _ in range(world.copies)]
        self._working = [rank for rank in range(world.size) if rank > world.shards]
        self._pages = {rank: Pages(parts[rank].entries, world.name(rank)) for rank in self._working}
        self._shards: list[ReplayedShard] = []
        self.timelines: list[Timeline] = []
        self._stores: dict[int, ReplayedStore] = {}
        self._replicas: dict[int, Replica] = {}
        self._gone = 0
        self._ended: list[int] = []

    # --- what roles ask for ---------------------------------------------------------------------------------------------------

    def memory(self, shard: int) -> tuple[np.ndarray, np.ndarray, None]:
        return self._memory[shard]

    def counting(self, shard: int, *parts: Any) -> Shard:
        versions = np.zeros(len(self._pieces[shard]), np.int64)
        self._shards.append(ReplayedShard(shard, self._due(shard), *parts, self._pieces[shard], versions))
        return self._shards[shard]

    def log(self, rank: int) -> None:
        """Nothing is recorded again."""

    def window(self, rank: int) -> ReplayedWindow:
        return ReplayedWindow(self._pages[rank], self.compared)

    def beat(self, rank: int) -> Callable[[], None]:
        return lambda: None

    def link(self, rank: int) -> Link | None:
        replica, partition = self.topology.place(rank)
        return LocalLink(self._wires[replica], partition) if self.topology.partitions > 1 else None

    def store(self, rank: int, replica: Replica) -> ReplayedStore:
        ready, origin = self._ready, self.topology.place(rank)
        overlap = ready.config.method.overlap and self._longest is not None and not self._here
        self._stores[rank] = ReplayedStore(
            self._pages[rank], self._shards, self.timelines, self.topology, origin, self._footprint(origin[1]),
            ready.rings, ready.clocks(origin[1]), overlap,
        )  # fmt: skip
        self._stores[rank].headway = Headway(replica, ready.rings.slots + 8)
        return self._stores[rank]

    # --- the play -------------------------------------------------------------------------------------------------------------

    @property
    def _here(self) -> bool:
        """Whether it was recorded in one process, where nothing moves on a thread."""
        return any(part.about["here"] for part in self.parts.values())

    def _footprint(self, partition: int) -> Footprint:
        return footprint(self._ready.model, self._ready.cut.boxes[partition], leads=partition == 0)

    def _due(self, shard: int) -> list[np.ndarray]:
        """Return for each piece of a shard the versions in which it was read, in order."""
        first = sum(len(pieces) for pieces in self._pieces[:shard])
        total = 8 * sum(len(pieces) for pieces in self._pieces)
        due: list[list[np.ndarray]] = [[] for _ in self._pieces[shard]]
        for rank in self._working:
            reads_of = [entry for entry in self.parts[rank].entries if entry.kind in (FETCH, SNAPSHOT)]
            if any(len(entry.content) != total for entry in reads_of):
                raise UserError(f"'{self.parts[rank].path}' is damaged: a fetch says nothing of some slices.")
            found = [entry.array("<i8") for entry in reads_of]
            used = self._used(self.topology.place(rank)[1], shard)
            if found and used:
                versions = np.array(found) // 2
                for number in used:
                    due[number].append(versions[:, first + number])
        return [np.sort(np.concatenate(mine)) if mine else np.zeros(0, np.int64) for mine in due]

    def _used(self, partition: int, shard: int) -> list[int]:
        shown = [_Shown(part, pieces) for part, pieces in zip(self._ready.ranges, self._pieces, strict=True)]
        return [number for index, number, _ in reads(self._footprint(partition), shown) if index == shard]

    def play(self) -> None:
        """Play the run; raise Difference where something is not as recorded."""
        ready, world = self._ready, self.topology
        self._replicas = {rank: self._replica(rank) for rank in self._working}
        for shard in range(world.shards):
            receiver = roles.receiver(ready, self, shard)
            parts = (ready, shard, receiver, self.compared, self._longest)
            self.timelines.append(Timeline(self.parts[world.shard_rank(shard)].entries, self._quotas[shard], *parts))
        players = [timeline.run() for timeline in self.timelines]
        players += [self._recorded(both[0], roles.worker(ready, self, *both).run()) for both in self._replicas.items()]
        players.append(self._patience())
        try:
            take_turns(players)
        except Gathered:
            return
        except Lost as stuck:
            # A moment may lie within updates under way: then this is the last state before it that all shards had.
            if self._stops:
                return
            if any(not timeline.over for timeline in self.timelines) and not self._breaks_off:
                raise Difference(f"{self._first_stuck()}\n{stuck}") from None

    def _replica(self, rank: int) -> Replica:
        """Return a replica, which hands out a gradient if that is wanted of it."""
        place, make, wanted = self.topology.place(rank), Replica, self.gradient
        if wanted is not None and wanted.replica == place[0]:

            def found(w: np.ndarray, g: np.ndarray) -> None:
                wanted.add(self._footprint(place[1]), w, g)
                raise Ended if wanted.left else Gathered

            make = partial(WatchedReplica, wanted.step, found)
        return roles.load_replica(self._ready, *place, self.link(rank), make)

    def save(self, until: str, seconds: float) -> Path:
        """Write a checkpoint of where the timelines have stopped; return its path."""
        stores = [self._stores[rank] for rank in self._working if self.topology.place(rank)[1] == 0]
        reached = []
        for replica, store in enumerate(stores[: self.topology.replicas]):
            ranks = [rank for rank in self._working if self.topology.place(rank)[0] == replica]
            reached.append(store.headway.at(min(self._stores[rank].applied() for rank in ranks)))
        return save(self._ready, until, [timeline.receiver for timeline in self.timelines], reached, seconds)

    @property
    def _breaks_off(self) -> bool:
        """Whether a part that ends before the run did has been played to its end: then others may wait for what it lacks."""
        lost = {entry.value for part in self.parts.values() for entry in part.entries if entry.kind == CLOSE}
        short = [rank for rank in self._ended if not self.parts[rank].whole and self.topology.place(rank)[0] not in lost]
        return bool(short) or any(timeline.over and not timeline.ended for timeline in self.timelines)

    def _first_stuck(self) -> str:
        """Return which event cannot happen: a push that is taken next, and whose replica waits for what comes later."""
        world, found = self.topology, []
        for line in self.timelines:
            if line.awaited is not None:
                rank = world.origin_rank(*divmod(line.awaited, world.partitions))
                store, steps = self._stores[rank], self._replicas[rank].steps
                where = f"shard {line.index}, slice 0, push {store.number}, {world.name(rank)}, step {steps}"
                found.append((not self._shards[line.index].keeps(store.reading), where))
        if not found:
            return "what was recorded cannot have happened in any order."
        return f"{min(found)[1]}: it was taken next, but cannot have been pushed by then."

    def _recorded(self, rank: int, role: Turns) -> Turns:
        """Play a role as far as its record goes."""
        try:
            yield from role
        except Ended:
            self._ended.append(rank)
        self._gone += 1

    def _patience(self) -> Turns:
        """Whoever waits may be helped by one whose turn comes later: only when nothing has come of many turns everyone waits."""
        last, since = -1, 0
        while self._gone < len(self._working) or not all(timeline.over for timeline in self.timelines):
            now = sum(pages.turned + pages.looks for pages in self._pages.values()) + sum(line.taken for line in self.timelines)
            last, since = now, 0 if now != last else since + 1
            yield IDLE if since < _VAIN else Wait("the record has no more")

    @property
    def ended(self) -> bool:
        """Whether the record reaches to the end of the run."""
        return all(timeline.ended for timeline in self.timelines)

    def params(self) -> np.ndarray:
        """Return all parameters."""
        return np.concatenate([params for params, *_ in self._memory])


class _Shown:
    """A shard's range and pieces, which is what a plan of reading looks at."""

    def __init__(self, part: Any, pieces: Sequence[SlicePiece]) -> None:
        self.range, self.pieces = part, pieces
