"""What a step of a cut replica takes on a machine, from shapes alone: when each partition can go on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dbnet.network.cost import Profile
from dbnet.network.partition import Cut, Load


class StepSeconds(NamedTuple):
    """What a step of a replica takes: in all, and what its busiest partition computes; between the two they wait."""

    total: float
    compute: float

    @property
    def waited(self) -> float:
        return self.total - self.compute


class _Moves:
    """The messages before one layer on a machine; `item` is the bytes of a value of all examples."""

    def __init__(self, load: Load, profile: Profile, item: int) -> None:
        n = len(load.flops)
        self._ends = load.source, load.target
        place = np.arange(n) // profile.host.ranks if profile.host.ranks else np.zeros(n, int)
        host = [place[end] for end in self._ends]
        far, nbytes, way = host[0] != host[1], load.values * item, np.where
        # Between hosts a host's card is shared by its ranks; within, each rank copies by itself.
        near = [np.bincount(end, nbytes * ~far, n)[end] for end in self._ends]
        card = [np.bincount(end, nbytes * far, n)[end] for end in host]
        speed = way(far, profile.between.bandwidth, profile.inside.bandwidth) * 1e9
        self._lasts = [way(far, shared, own) / speed for shared, own in zip(card, near, strict=True)]
        self._latency = way(far, profile.between.latency, profile.inside.latency)
        self._before = profile.host.call * sum(np.bincount(end, minlength=n) for end in self._ends)
        self._before = self._before + load.copied * item / (profile.inside.bandwidth * 1e9)

    def start(self, now: np.ndarray, down: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return when each partition has started its messages and when all that it is sent has come."""
        (source, target), (leaves, enters) = (ends[:: -1 if down else 1] for ends in (self._ends, self._lasts))
        started = now + self._before
        there = started.copy()
        np.maximum.at(there, target, started[source] + self._latency + np.maximum(leaves, enters))
        return started, there


def replica_step(profile: Profile, cut: Cut) -> StepSeconds:
    """Return what a step of a replica takes whose partitions are a machine's first ranks; needs shapes alone.

    Before a layer a partition waits for its messages, while its interior is computed where the layer can do that; downwards it
    waits while the gradient of the layer's parameters is computed (`Network`). Each message takes both its ends `host.call`
    seconds; then all move at once, after their way's latency, and share their hosts' network cards.
    """
    model, partitions, slowest = cut.model, cut.partitions, profile.slowest(cut.partitions)
    moves = [_Moves(load, profile, model.dtype.itemsize * cut.batch) for load in cut.loads]
    own = np.array(
        [load.flops * slowest * cut.batch / profile.rate(kind.kind) for load, kind in zip(cut.loads, model.layers, strict=True)]
    )
    compute = slowest * np.array([profile.step_seconds(model, boxes, cut.batch) for boxes in cut.boxes])
    # What a step takes beside its layers' arithmetic is spread over them; who owns no unit has it first.
    arithmetic = 3 * own.sum(axis=0) - own[0]
    own *= np.divide(compute, arithmetic, out=np.ones(partitions), where=arithmetic > 0)
    now = np.where(arithmetic > 0, 0.0, compute)
    for load, move, mine in zip(cut.loads, moves, own, strict=True):
        inner = np.divide(load.inner, load.flops, out=np.zeros(partitions), where=load.flops > 0) * mine
        started, there = move.start(now)
        now = np.maximum(started + inner, there) + mine - inner
    now[:] = now.max() + cut.together_seconds(profile.machine(partitions))
    for i in reversed(range(len(moves))):
        # A layer without parameters has all its work before its messages.
        inputs = own[i] * (int(i > 0) + (not model.parameters[i]))
        started, there = moves[i].start(now + inputs, down=True)
        now = np.maximum(started + 2 * own[i] - inputs if i else started + own[i] - inputs, there)
    return StepSeconds(float(now.max()), float(compute.max()))
