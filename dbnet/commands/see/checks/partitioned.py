"""Run a cut network in one process: a thread per partition, queues instead of MPI."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from dbnet.core.ranges import relative, whole
from dbnet.network.exchange import Exchange
from dbnet.network.model import Model, footprint
from dbnet.network.network import Network
from dbnet.network.partition import Cut

# Seconds after which a partition has waited in vain: another one sends what it was not asked for.
_PATIENCE = 60.0


class Hub:
    """What the links of one replica share."""

    def __init__(self, size: int) -> None:
        self.size, self.failed = size, False
        self._queues: dict[Any, SimpleQueue[np.ndarray]] = defaultdict(SimpleQueue)
        self._lock = threading.Lock()

    def queue(self, *key: object) -> SimpleQueue[np.ndarray]:
        with self._lock:
            return self._queues[key]

    def take(self, queue: SimpleQueue[np.ndarray]) -> np.ndarray:
        """Return what comes next, unless another partition has failed meanwhile."""
        end = time.monotonic() + _PATIENCE
        while not self.failed and time.monotonic() < end:
            with suppress(Empty):
                return queue.get(timeout=0.1)
        raise TimeoutError("a partition waited in vain for another one")


class ThreadLink:
    """The end of one thread."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub, self.rank, self.size = hub, rank, hub.size
        self.under_way: set[int] = set()

    def sender(self, buffer: np.ndarray, to: int, tag: int) -> Any:
        assert buffer.flags.c_contiguous
        return ("send", buffer, self._hub.queue(self.rank, to, tag))

    def receiver(self, buffer: np.ndarray, source: int, tag: int) -> Any:
        assert buffer.flags.c_contiguous
        return ("receive", buffer, self._hub.queue(source, self.rank, tag))

    def start(self, transfers: Sequence[Any]) -> None:
        # As MPI asks of persistent requests: none begins anew before it was waited for.
        assert not self.under_way.intersection(map(id, transfers))
        self.under_way.update(map(id, transfers))
        for kind, buffer, queue in transfers:
            if kind == "send":
                queue.put(buffer.copy())

    def wait(self, transfers: Sequence[Any]) -> None:
        self.under_way.difference_update(map(id, transfers))
        for kind, buffer, queue in transfers:
            if kind == "receive":
                buffer[...] = self._hub.take(queue)

    def _all(self, mine: np.ndarray) -> list[np.ndarray]:
        for other in range(self.size):
            self._hub.queue(self.rank, other, "all").put(mine.copy())
        return [self._hub.take(self._hub.queue(other, self.rank, "all")) for other in range(self.size)]

    def gather(self, mine: np.ndarray, everyone: np.ndarray) -> None:
        everyone[...] = self._all(mine)

    def total(self, mine: np.ndarray, total: np.ndarray) -> None:
        total[...] = sum(self._all(mine))

    def meet(self) -> None:
        self._all(np.zeros(1))

    def close(self) -> None:
        """Queues need no closing."""

    def share(self, values: np.ndarray) -> None:
        values[...] = self._all(values)[0]


@dataclass
class PartRun:
    """One partition after a run: its network and exchange, what it pushes from where, gradient, parameters, score."""

    network: Network
    exchange: Exchange | None
    pushed: Any
    g: np.ndarray
    w: np.ndarray
    score: tuple[float, int]
    size: int


@dataclass
class CutRun:
    """What all partitions have computed, put together: gradient [parameters], outputs [units..., batch], score."""

    g: np.ndarray
    y: np.ndarray
    score: tuple[float, int]
    parts: list[PartRun]
    cut: Cut


def run(
    model: Model, partitions: int, batch: int, w: np.ndarray, x: np.ndarray, target: np.ndarray, count: int,
    accumulate: bool = False, start: float = 0.0,
) -> CutRun:  # fmt: skip
    """Compute loss, outputs and gradient on P threads; return them put together, and the networks and exchanges.

    Parameters
    ----------
    w
        The global parameter vector.
    x
        Input [input shape..., batch].
    start
        What the gradient holds before, when it is added to.
    """
    cut = Cut(model, partitions, batch)
    hub = Hub(partitions)
    results: dict[int, PartRun] = {}
    errors: list[BaseException] = []

    def part(p: int) -> None:
        try:
            network = Network(model, batch, cut.boxes[p] if partitions > 1 else None)
            link = ThreadLink(hub, p)
            exchange = Exchange(link, cut, network) if partitions > 1 else None
            used, pushed, size = footprint(model, network.boxes, leads=p == 0)
            mine = np.concatenate([w[piece.range.slice] for piece in used] or [np.zeros(0)]).astype(model.dtype)
            g = np.full(size, start, model.dtype)
            network.x[:] = x[relative(network.input_box, whole(model.shapes[0]))].reshape(-1, batch)
            score = network.loss_and_gradient(mine, g, target, count, accumulate, 5, 7)
            assert not link.under_way
            results[p] = PartRun(network, exchange, pushed, g, mine, score, size)
        except BaseException as error:
            errors.append(error)
            hub.failed = True

    threads = [threading.Thread(target=part, args=(p,)) for p in range(partitions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # The first one is the cause; the others waited in vain for that partition.
        raise errors[0]
    parts = [results[p] for p in range(partitions)]
    g, y = np.full(w.size, np.nan), np.full((*model.shapes[-1], batch), np.nan)
    for r in parts:
        for piece in r.pushed:
            assert np.isnan(g[piece.range.slice]).all(), "a parameter is pushed twice"
            g[piece.range.slice] = r.g[piece.at : piece.at + piece.range.size]
        out = r.network.above(len(model.layers))
        y[relative(out[1], whole(model.shapes[-1]))] = out[0]
    return CutRun(g, y, parts[0].score, parts, cut)
