"""A whole world in one process over window memory, advanced turn by turn as a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import numpy as np

from dbnet.comm.topology import Topology
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.orders import GO, Orders, coordinator_fields
from dbnet.core import config
from dbnet.core.ranges import Range
from dbnet.methods.downpour import DownpourWorker
from dbnet.network.model import Footprint, Piece
from dbnet.shards.push import Intake
from dbnet.shards.routes import Rings, routes
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox, WindowStore


class Gradients:
    """Stands for a replica: its gradient at step k is `make(replica, k)`; everything that it computed is kept."""

    def __init__(self, index: int, size: int, steps: int, source: Callable[[int, int, np.ndarray], np.ndarray]) -> None:
        self.index, self._source, self._limit = index, source, steps
        self.steps = self.examples = self.right = 0
        self.loss, self.trouble = 0.0, None
        self.computed: list[np.ndarray] = []
        self.seen: list[np.ndarray] = []
        self.train = _Endless()
        self.snapshot = np.zeros(size)

    def accrue(self, w: np.ndarray, g: np.ndarray, accrued: int, rate: float) -> float:
        gradient = self._source(self.index, self.steps, w)
        self.seen.append(w.copy())
        self.computed.append(gradient.copy())
        g[:] = g + gradient if accrued else gradient
        if rate:
            w -= rate * gradient
        self.steps += 1
        return 0.0


class _Endless:
    """Examples without end; `finished` looks at the steps alone."""

    cursor = SimpleNamespace(epoch=0, position=0)
    taken = 0
    cursors = ()

    def __len__(self) -> int:
        return 1


class Late(LocalWindow):
    """A rank's end of a window in which nothing moves before the flush, and then the newest transfer first, as MPI may.

    Parameters
    ----------
    memory
        All ranks' window memory.
    meanwhile
        What others do after each transfer; it is given the rank that was the target.
    """

    def __init__(self, memory: LocalWindow, meanwhile: Callable[[int], object] = lambda rank: None) -> None:
        super().__init__((), 0, memory._all)
        self.meanwhile, self._under_way = meanwhile, []

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        self._under_way.append((super().get, rank, field, out, start))

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        self._under_way.append((super().put, rank, field, data, start))

    def flush(self, rank: int) -> None:
        due = [entry for entry in self._under_way if entry[1] == rank]
        self._under_way = [entry for entry in self._under_way if entry[1] != rank]
        for move, *transfer in reversed(due):
            move(*transfer)
            self.meanwhile(rank)


def over(store: WindowStore, window: LocalWindow) -> LocalWindow:
    """Have a store that has moved nothing yet use this end of the window; return it."""
    store._window = window
    store._prepare()
    return window


class World:
    """S shards and R scripted replicas over a `Memory` window, with no coordinator: all have GO from the start.

    Parameters
    ----------
    size
        Parameters.
    shards, replicas, steps
        The topology, and the steps of each replica.
    source
        (replica, step, w) -> gradient.
    method
        Overrides of the [method] table.
    rule
        Table of the rule.
    guard
        Whether pushes that are not finite are refused.
    tables
        Overrides of other tables.
    """

    def __init__(
        self,
        size: int,
        shards: int,
        replicas: int,
        steps: int,
        source: Callable[[int, int, np.ndarray], np.ndarray],
        method: Sequence[str] = (),
        rule: dict | None = None,
        guard: bool = True,
        tables: Sequence[str] = (),
    ) -> None:
        tree = {
            "data": {"path": "none"},
            "model": {"layers": [{"kind": "dense", "units": 1}]},
            "rule": rule or {"kind": "sgd", "rate": 1.0},
            "stop": {"steps": steps},
            "guard": {"finite": guard},
        }
        for text in (*(f"method.{option}" for option in method), *tables):
            config.override(tree, text)
        self.config = config.build(tree)
        self.world, self.dtype = Topology(shards, replicas), np.dtype("f8")
        self.ranges = self.world.shard_ranges(size)
        footprint = [Piece(Range(0, size), 0)]
        ways = {route.shard: route for route in routes(footprint, self.ranges)}
        self.users = [[o for o in range(replicas) if s in ways] for s in range(shards)]
        table = self.config.method
        rings = Rings(self.ranges, self.users, self.dtype, table.slot or 1 << 20, table.slots or 8)
        fields = [rings.fields(s, self.world) for s in range(shards)]
        layouts = [
            WindowLayout(coordinator_fields(self.world)),
            *(WindowLayout(f) for f in fields),
            *(WindowLayout(()) for _ in range(replicas)),
        ]
        self.memory = LocalWindow(layouts)
        self.memory.local["order"][:, GO] = 1
        self.shards, self.inboxes = [], []
        for s, part in enumerate(self.ranges):
            end = self.memory.at(1 + s)
            shard = Shard(part, self.config.rule, end.local["params"], end.local["clock"], lambda: 0.0)
            self.shards.append(shard)
            users, mine = self.users[s], [ways[s]] * len(self.users[s]) if s in ways else []
            intakes = [Intake(shard, self.config.guard.finite) for _ in users]
            self.inboxes.append(Inbox(end, intakes, self.world, users, mine))
        self.replicas = [Gradients(r, size, steps, source) for r in range(replicas)]
        self.stores = [
            WindowStore(self.memory, self.world, (r, 0), Footprint(footprint, footprint, size), rings, table.overlap)
            for r in range(replicas)
        ]
        self.turns = [
            DownpourWorker(replica, store, Orders(self.memory, self.world, r, lambda: 0.0), self.config).run()
            for r, (replica, store) in enumerate(zip(self.replicas, self.stores, strict=True))
        ]

    @property
    def w(self) -> np.ndarray:
        return np.concatenate([shard.params for shard in self.shards])

    @property
    def done(self) -> bool:
        return bool(self.memory.local["status"][:, 1].all())

    def work(self, replica: int) -> None:
        """Let one replica go on until it gives way."""
        next(self.turns[replica])

    def serve(self, shard: int) -> bool:
        """Let one shard take one slice of each ring."""
        return self.inboxes[shard].drain()

    def serve_all(self) -> None:
        """Let every shard drain all of its rings."""
        while any([self.serve(s) for s in range(len(self.shards))]):
            pass

    def script(self, moves: Iterable[tuple[str, int]]) -> None:
        for kind, index in moves:
            self.work(index) if kind == "work" else self.serve(index)

    def run(self) -> None:
        """Everyone in turn until all replicas are done and all rings are empty."""
        while not self.done:
            for replica in range(len(self.replicas)):
                self.work(replica)
            for shard in range(len(self.shards)):
                self.serve(shard)
        self.serve_all()

    def in_flight(self) -> np.ndarray:
        """Sum of all gradients that lie in the rings."""
        out = np.zeros(sum(part.size for part in self.ranges))
        for s, part in enumerate(self.ranges):
            local = self.memory.at(1 + s).local
            for row, origin in enumerate(self.users[s]):
                for number in range(int(local["tail"][origin]), int(local["head"][origin])):
                    slot = number % (self.config.method.slots or 8)
                    _, first, n, *_ = local["header"][row, slot]
                    out[part.lo + first : part.lo + first + n] += local["ring"][row, slot, :n]
        return out
