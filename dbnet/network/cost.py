"""What a rank, its host and its links can do: the model by which cuts are chosen and time is simulated.

A step's predicted time is flops / rate, and for each message its latency + bytes / bandwidth (and bytes / memory for what is
copied in and out of buffers). For choosing a cut only the order of two cuts matters, so round numbers of a present core and network
do (`Machine`). A `Profile` says more of a machine, for simulated time: rates by kind of layer, what a shard takes, hosts, noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import Field

from dbnet.core.config import Table
from dbnet.core.errors import UserError
from dbnet.core.ranges import Region
from dbnet.core.registry import valid
from dbnet.core.toml import tables

if TYPE_CHECKING:
    from dbnet.network.model import Model


class Machine(NamedTuple):
    """What the cost model assumes of a rank and its links: flop/s, bytes/s sent, seconds per message, bytes/s copied."""

    rate: float = 60e9
    bandwidth: float = 4e9
    latency: float = 3e-6
    memory: float = 8e9


# --- profiles -----------------------------------------------------------------------------------------------------------------


class MeasuredStep(Table):
    """Steps of one network that were measured on this machine; cut networks keep to it by what the rates say of their parts."""

    about: str = Field(default="", description="which one it is, for readers")
    network: str = Field(description="its identity: the layers, the shape of an example, the loss, the type")
    minibatch: int = Field(gt=0, description="examples of a step")
    step: float = Field(gt=0, description="seconds of a step, uncut")
    forward: float = Field(gt=0, description="seconds of an evaluation's pass through one of its minibatches")


class ComputeTable(Table):
    """What one rank computes."""

    rate: float = Field(gt=0, description="GFLOP/s of a working rank in forward and backward passes")
    rates: dict[str, float] = Field(default={}, description="GFLOP/s by kind of layer, where they differ from rate")
    evaluation: float = Field(default=1.0, gt=0, description="speed of an evaluation's forward pass as a multiple of these rates")
    step: float = Field(default=0.0, ge=0, description="seconds that a step takes beside its arithmetic")
    layer: float = Field(default=0.0, ge=0, description="seconds that a layer takes in a step beside its arithmetic")
    measured: tuple[MeasuredStep, ...] = Field(default=(), description="networks whose own steps were measured, which then count")
    apply: float = Field(gt=0, description="GB/s of gradients that a shard applies")
    slice: float = Field(default=0.0, ge=0, description="seconds that a shard takes for a slice of a push beside its arithmetic")


class HostTable(Table):
    """How ranks share hosts."""

    ranks: int = Field(default=1, ge=0, description="ranks on a host, in the order of their numbers; 0: all on one")
    cores: int = Field(default=0, ge=0, description="cores of a host, shared by its busy ranks; 0: one for each rank")
    pause: float = Field(default=1e-3, ge=0, description="longest pause of an idle rank, seconds")
    turn: float = Field(default=2e-6, gt=0, description="seconds of a turn in which nothing is computed or sent")
    call: float = Field(default=1e-6, ge=0, description="seconds that starting a one-sided operation takes its rank")


class WayTable(Table):
    """A way from rank to rank."""

    latency: float = Field(ge=0, description="seconds of a message of no bytes, one way")
    bandwidth: float = Field(gt=0, description="GB/s")


class NoiseTable(Table):
    """How the times of steps vary: each is multiplied with a number drawn for (partition of a replica, step).

    Its mean is 1; with a tail that of the steps which are not late.
    """

    kind: Literal["none", "gamma", "exponential", "tail"] = Field(default="none", description="none, gamma, exponential or tail")
    variation: float = Field(default=0.1, gt=0, description="gamma: standard deviation over mean")
    share: float = Field(default=0.02, ge=0, lt=1, description="tail: share of steps that are late")
    late: float = Field(default=1.25, gt=1, description="tail: the shortest late step, in mean ones")
    index: float = Field(default=1.1, gt=0, description="tail: index of the Pareto distribution of late steps")
    longest: float = Field(default=200.0, gt=1, description="tail: the longest late step, in mean ones")


class SpeedTable(Table):
    """How machines differ: a replica's times are multiplied with a number of its own."""

    slow: float = Field(default=0.0, ge=0, le=1, description="share of replicas that are slow, drawn for each")
    factor: float = Field(default=1.0, gt=0, description="their times, as a multiple of the others'")
    cycle: tuple[float, ...] = Field(default=(), description="multiples of replicas 0, 1, 2, ..., again and again; default: 1")


class Profile(Table):
    """A machine for simulated time."""

    about: str = Field(default="", description="what it is, and where its numbers are from")
    compute: ComputeTable
    host: HostTable = HostTable()
    inside: WayTable = Field(description="within a host")
    between: WayTable = Field(description="from host to host")
    noise: NoiseTable = NoiseTable()
    speed: SpeedTable = SpeedTable()

    def layer_seconds(self, model: Model, layer: int, box: Region, batch: int, passes: int) -> float:
        """Return the seconds of so many passes through the units `box` of a layer with `batch` examples."""
        kind = model.layers[layer]
        rate = self.compute.rates.get(kind.kind, self.compute.rate) * 1e9
        return passes * kind.flops(model.shapes[layer], box) * batch / rate

    def step_seconds(self, model: Model, boxes: list[Region], batch: int) -> float:
        """Return the seconds that the owner of these boxes computes in a step; without what it exchanges."""
        known = self._measured(model, batch)
        seconds = self._by_rates(model, boxes, batch)
        return seconds if known is None else seconds * known.step / self._by_rates(model, model.boxes(), batch)

    def _by_rates(self, model: Model, boxes: list[Region], batch: int) -> float:
        layers, compute = range(len(model.layers)), self.compute
        arithmetic = (self.layer_seconds(model, i, boxes[i + 1], batch, 3 if i else 2) for i in layers)
        return compute.step + compute.layer * len(layers) + sum(arithmetic)

    def _measured(self, model: Model, batch: int | None = None) -> MeasuredStep | None:
        """Return what was measured of a network; None where that is nothing."""
        if not self.compute.measured:
            return None
        found = (one for one in self.compute.measured if one.network == model.identity and batch in (None, one.minibatch))
        return next(found, None)

    def forward_seconds(self, model: Model, boxes: list[Region], batch: int) -> float:
        """Return the seconds of an evaluation's pass through `batch` examples."""
        known = self._measured(model)

        def rates(boxes: list[Region]) -> float:
            layers = range(len(model.layers))
            return sum(self.layer_seconds(model, i, boxes[i + 1], batch, 1) for i in layers) / self.compute.evaluation

        return rates(boxes) if known is None else rates(boxes) * known.forward / rates(model.boxes())

    def apply_seconds(self, nbytes: int) -> float:
        """Return the seconds that a shard takes for a slice of so many bytes."""
        return self.compute.slice + nbytes / (self.compute.apply * 1e9)


def load_profile(path: str | Path) -> Profile:
    """Read a machine file; UserError where it is none."""
    try:
        return valid(Profile, tables(path))
    except UserError as error:
        said = str(error).replace("the run file", f"the machine file '{path}'").replace("No run file", "No machine file")
        raise UserError(said.replace("are in jobs/", "are in jobs/machines/")) from None


class Noise:
    """Numbers that vary a machine's times: a function of (seed, entity, event), so nobody's depend on who else there is.

    Parameters
    ----------
    profile, seed
        The machine; the run's seed.
    """

    _BLOCK = 64
    _STEPS, _MACHINES = range(2)

    def __init__(self, profile: Profile, seed: int) -> None:
        self._profile, self._seed = profile, seed
        self._drawn: dict[int, tuple[int, list[float]]] = {}

    def _generator(self, entity: int, block: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self._seed, entity], counter=[0, 0, block, stream]))

    def step(self, entity: int, event: int) -> float:
        """Return what the time of an entity's step is multiplied with."""
        if self._profile.noise.kind == "none":
            return 1.0
        block, place = divmod(event, self._BLOCK)
        drawn = self._drawn.get(entity)
        if drawn is None or drawn[0] != block:
            self._drawn[entity] = drawn = block, self._draw(self._generator(entity, block, self._STEPS)).tolist()
        return drawn[1][place]

    def _draw(self, generator: np.random.Generator) -> np.ndarray:
        noise, n = self._profile.noise, self._BLOCK
        if noise.kind == "gamma":
            shape = noise.variation**-2
            return generator.gamma(shape, 1 / shape, n)
        if noise.kind == "exponential":
            return generator.exponential(1.0, n)
        usual, late = generator.gamma(100.0, 0.01, n), noise.late * (1 + generator.pareto(noise.index, n))
        return np.where(generator.random(n) < noise.share, np.minimum(late, noise.longest), usual)

    def speed(self, replica: int) -> float:
        """Return what all times of a replica are multiplied with."""
        speed = self._profile.speed
        own = speed.cycle[replica % len(speed.cycle)] if speed.cycle else 1.0
        if speed.slow and self._generator(replica, 0, self._MACHINES).random() < speed.slow:
            own *= speed.factor
        return own
