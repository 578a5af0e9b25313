"""Run a cut: bring crossing values to the partitions that need them, and their deltas back, while kernels compute.

Everything is set up once: persistent sends and receives from and into the network's own arrays, or through a staging buffer where
a box is not contiguous. Before layer i each partition starts its messages; the layer computes its interior; when the borders are
there it computes the rest. Downwards the share of another partition's delta is sent as soon as it is known, while the gradient of
the parameters is computed, and added in the order of the partitions.

`values` counts every value that is sent, per example.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dbnet.comm.link import Link
from dbnet.core.ranges import Region, relative
from dbnet.network.network import Network, held
from dbnet.network.partition import Crossing, Cut


class Exchange:
    """One partition's end of all exchanges of one network.

    Parameters
    ----------
    link
        The other partitions.
    cut
        The plan.
    network
        Whose arrays are sent and filled; it is told of this exchange.
    tags
        First of the message tags; every network of a replica has its own.
    """

    def __init__(self, link: Link, cut: Cut, network: Network, tags: int = 0) -> None:
        self._link, self._cut, self._network = link, cut, network
        layers = range(len(cut.model.layers))
        self._up = [self._side(cut.messages(i), i, tags + 2 * i, network.above, network.below) for i in layers]
        self._down = [
            self._side(
                [Crossing(m.target, m.source, m.boxes) for m in cut.messages(i)], i, tags + 2 * i + 1, network.below_delta, None
            )
            if network.training
            else _Side([], [], [], [])
            for i in layers
        ]
        self._stats = np.zeros((link.size, *network.stats.shape), network.stats.dtype)
        self._total = np.zeros_like(network.share)
        self.values, self.waited = 0, 0.0
        network.exchange = self

    @property
    def nbytes(self) -> int:
        """Return the bytes of the staging buffers and of what is summed."""
        sides = [pair for side in (*self._up, *self._down) for pair in (*side.pack, *side.unpack)]
        return held((sides, self._stats, self._total))

    def _side(
        self, messages: Sequence[Crossing], layer: int, tag: int, source: Callable[..., Any], target: Callable[..., Any] | None
    ) -> _Side:
        """Set up the messages of one direction: views or staging buffers, and persistent transfers."""
        me, side = self._link.rank, _Side([], [], [], [])
        for message in messages:
            if message.source == me:
                buffer, pieces = _place(message, *source(layer))
                side.sends.append(self._link.sender(buffer, message.target, tag))
                side.values += message.size
                side.pack += pieces
            if message.target == me:
                # Deltas are added to what is there, so they land beside it.
                buffer, pieces = _place(message, *(target or self._network.above_delta)(layer), beside=target is None)
                side.receives.append(self._link.receiver(buffer, message.source, tag))
                side.unpack += [(view, piece) for piece, view in pieces]
        return side

    def crosses(self, layer: int) -> bool:
        """Return whether this partition receives anything before `layer`."""
        return bool(self._up[layer].receives)

    def start_up(self, layer: int) -> None:
        """Send what others need of the layer below, and be ready to receive."""
        self._start(self._up[layer])

    def finish_up(self, layer: int) -> None:
        """Wait for what this partition needs."""
        side = self._up[layer]
        self._finish(side)
        for view, buffer in side.unpack:
            view[...] = buffer

    def start_down(self, layer: int) -> None:
        """Send the deltas of what others own."""
        self._start(self._down[layer])

    def finish_down(self, layer: int) -> None:
        """Wait for the deltas of what this partition owns, and add them in the order of the partitions."""
        side = self._down[layer]
        self._finish(side)
        for view, buffer in side.unpack:
            view += buffer

    def combine(self, stats: np.ndarray) -> np.ndarray:
        """Return all partitions' statistics of the output units, [partitions, width, batch]."""
        started = time.perf_counter()
        self._link.gather(stats, self._stats)
        self.waited += time.perf_counter() - started
        return self._stats

    def total(self, share: np.ndarray) -> np.ndarray:
        """Return the sum over the partitions of the gradient of shared parameters."""
        if share.size:
            started = time.perf_counter()
            self._link.total(share, self._total)
            self.waited += time.perf_counter() - started
        return self._total

    def _start(self, side: _Side) -> None:
        for buffer, view in side.pack:
            buffer[...] = view
        self.values += side.values
        if side.all:
            self._link.start(side.all)

    def _finish(self, side: _Side) -> None:
        if side.all:
            started = time.perf_counter()
            self._link.wait(side.all)
            self.waited += time.perf_counter() - started


def _place(
    message: Crossing, array: np.ndarray, origin: Region, beside: bool = False
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return where a message lies: in the array itself if it can, or in a buffer, with (piece of it, view of the array) pairs."""
    views = [array[relative(box, origin)] for box in message.boxes]
    if len(views) == 1:
        view = views[0]
        buffer = view if view.flags.c_contiguous and not beside else np.empty_like(view, order="C")
        return buffer, [] if buffer is view else [(buffer, view)]
    buffer, at, pieces = np.empty(sum(view.size for view in views), array.dtype), 0, []
    for view in views:
        pieces.append((buffer[at : at + view.size].reshape(view.shape), view))
        at += view.size
    return buffer, pieces


class _Side:
    """One direction of one layer: transfers, what is copied before and after them, values sent per example."""

    def __init__(self, sends: list[Any], receives: list[Any], pack: list[Any], unpack: list[Any]) -> None:
        self.sends, self.receives, self.pack, self.unpack = sends, receives, pack, unpack
        self.values = 0

    @property
    def all(self) -> list[Any]:
        return [*self.receives, *self.sends]
