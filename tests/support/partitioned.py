"""Run a cut network in one process: a thread per partition, queues instead of MPI."""

from __future__ import annotations

import threading
from collections import defaultdict
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np

from dbnet.core.ranges import relative, whole
from dbnet.network.exchange import Exchange
from dbnet.network.model import footprint
from dbnet.network.network import Network
from dbnet.network.partition import Cut


class Hub:
    """What the links of one replica share."""

    def __init__(self, size: int) -> None:
        self.size, self.queues = size, defaultdict(SimpleQueue)
        self.lock = threading.Lock()

    def queue(self, *key: object) -> SimpleQueue:
        with self.lock:
            return self.queues[key]


class ThreadLink:
    """The end of one thread."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub, self.rank, self.size = hub, rank, hub.size
        self._under_way = set()

    def sender(self, buffer, to, tag):
        assert buffer.flags.c_contiguous
        return ("send", buffer, self._hub.queue(self.rank, to, tag))

    def receiver(self, buffer, source, tag):
        assert buffer.flags.c_contiguous
        return ("receive", buffer, self._hub.queue(source, self.rank, tag))

    def start(self, transfers):
        # As MPI asks of persistent requests: none begins anew before it was waited for.
        assert not self._under_way.intersection(map(id, transfers))
        self._under_way.update(map(id, transfers))
        for kind, buffer, queue in transfers:
            if kind == "send":
                queue.put(buffer.copy())

    def wait(self, transfers):
        self._under_way.difference_update(map(id, transfers))
        for kind, buffer, queue in transfers:
            if kind == "receive":
                buffer[...] = queue.get(timeout=4)

    def _all(self, mine):
        for other in range(self.size):
            self._hub.queue(self.rank, other, "all").put(mine.copy())
        return [self._hub.queue(other, self.rank, "all").get(timeout=4) for other in range(self.size)]

    def gather(self, mine, everyone):
        everyone[...] = self._all(mine)

    def total(self, mine, total):
        total[...] = sum(self._all(mine))

    def meet(self):
        self._all(np.zeros(1))

    def close(self):
        """Queues need no closing."""

    def share(self, values):
        values[...] = self._all(values)[0]


def run(model, partitions, batch, w, x, target, count, accumulate=False, start=0.0):
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
    hub, results, errors = Hub(partitions), [None] * partitions, []

    def part(p: int) -> None:
        try:
            network = Network(model, batch, cut.boxes[p] if partitions > 1 else None)
            link = ThreadLink(hub, p)
            exchange = Exchange(link, cut, network) if partitions > 1 else None
            used, pushed, size = footprint(model, network.boxes, leads=p == 0)
            mine = np.concatenate([w[piece.range.slice] for piece in used] or [np.zeros(0)])
            g = np.full(size, start)
            network.x[:] = x[relative(network.input_box, whole(model.shapes[0]))].reshape(-1, batch)
            score = network.loss_and_gradient(mine, g, target, count, accumulate, 5, 7)
            assert not link._under_way
            results[p] = SimpleNamespace(network=network, exchange=exchange, pushed=pushed, g=g, w=mine, score=score, size=size)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=part, args=(p,)) for p in range(partitions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        # The first one is the cause; the others waited in vain for that partition.
        raise errors[0]
    g, y = np.full(w.size, np.nan), np.full((*model.shapes[-1], batch), np.nan)
    for r in results:
        for piece in r.pushed:
            assert np.isnan(g[piece.range.slice]).all(), "a parameter is pushed twice"
            g[piece.range.slice] = r.g[piece.at : piece.at + piece.range.size]
        out = r.network.above(len(model.layers))
        y[relative(out[1], whole(model.shapes[-1]))] = out[0]
    return SimpleNamespace(g=g, y=y, score=results[0].score, parts=results, cut=cut)
