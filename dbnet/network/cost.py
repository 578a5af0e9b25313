"""What a rank, its host and its links can do: the model by which cuts are chosen and time is simulated.

A step's predicted time is flops / rate, and for each message its latency + bytes / bandwidth (and bytes / memory for what is
copied in and out of buffers). For choosing a cut only the order of two cuts matters, so round numbers of a present core and network
do (`Machine`). A `Profile` says more of a machine, for simulated time and for what a cut replica's step takes
(`commands.plan.step`): rates by kind of layer, what a shard takes, hosts, noise, faults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from dbnet.core.config import Table
from dbnet.core.errors import UserError, nearest
from dbnet.core.ranges import Region
from dbnet.core.registry import chosen, family, valid
from dbnet.core.toml import tables
from dbnet.network.model import Model, footprint

# Seconds below which a clock stands still in a long run; a slice is at least so many switches.
SHORTEST, SWITCHES = 1e-9, 10


class Machine(NamedTuple):
    """What the cost model assumes of a rank and its links: flop/s, bytes/s sent, seconds per message, bytes/s copied."""

    rate: float = 60e9
    bandwidth: float = 4e9
    latency: float = 3e-6
    memory: float = 8e9


# --- profiles -----------------------------------------------------------------------------------------------------------------


def _kinds(name: str) -> AfterValidator:
    """Return what refuses keys that are no kinds of a family."""

    def known(speeds: dict[str, float]) -> dict[str, float]:
        for kind in speeds:
            if chosen(name, kind) is None:
                kinds = sorted(family(name))
                raise ValueError(f"there is no kind '{kind}' in {name}{nearest(kind, kinds)}; known here: {', '.join(kinds)}.")
        return speeds

    return AfterValidator(known)


Positive = Annotated[float, Field(gt=0)]


class MachineTable(Table):
    """A table of a machine file, where a number is a number: neither "7" nor true."""

    model_config = ConfigDict(strict=True)


class MeasuredStep(MachineTable):
    """Steps of one network that were measured on this machine; cut networks keep to it by what the rates say of their parts."""

    about: str = Field(default="", description="which one it is, for readers")
    network: str = Field(description="its identity: the layers, the shape of an example, the loss, the type")
    minibatch: int = Field(gt=0, description="examples of a step")
    step: float = Field(gt=0, description="seconds of a step, uncut")
    forward: float = Field(gt=0, description="seconds of an evaluation's pass through one of its minibatches")


class ComputeTable(MachineTable):
    """What one rank computes."""

    rate: float = Field(gt=0, description="GFLOP/s of a working rank in forward and backward passes")
    rates: Annotated[dict[str, Positive], _kinds("network.layers")] = Field(
        default={}, description="GFLOP/s by kind of layer, where they differ from rate"
    )
    evaluation: float = Field(default=1.0, gt=0, description="speed of an evaluation's forward pass as a multiple of these rates")
    step: float = Field(default=0.0, ge=0, description="seconds that a step takes beside its arithmetic")
    layer: float = Field(default=0.0, ge=0, description="seconds that a layer takes in a step beside its arithmetic")
    measured: tuple[MeasuredStep, ...] = Field(
        default=(), strict=False, description="networks whose own steps were measured, which then count"
    )
    apply: float = Field(gt=0, description="GB/s of gradients that a shard applies")
    rules: Annotated[dict[str, Positive], _kinds("shards.rules")] = Field(
        default={}, description="speed of a rule of updates as a multiple of apply, where it differs"
    )
    slice: float = Field(default=0.0, ge=0, description="seconds that a shard takes for a slice of a push beside its arithmetic")
    local: float = Field(default=0.0, ge=0, description="GB/s of gradients that a replica steps with by itself; 0: in no time")


class HostTable(MachineTable):
    """How ranks share hosts."""

    ranks: int = Field(default=1, ge=0, description="ranks on a host, in the order of their numbers; 0: all on one")
    shard_cards: int = Field(default=1, gt=0, description="network cards of a shard's host, for a shard that stands for several")
    cores: int = Field(default=0, ge=0, description="cores of a host, shared by its busy ranks; 0: one for each rank")
    pause: float = Field(default=1e-3, ge=0, description="longest pause of an idle rank, seconds")
    late: float = Field(default=0.0, ge=0, description="seconds by which each pause is longer than it was meant to be")
    turn: float = Field(default=2e-6, ge=SHORTEST, description="seconds of a turn in which nothing is computed or sent")
    call: float = Field(default=1e-6, ge=0, description="seconds that starting a one-sided operation takes its rank")
    look: float = Field(default=1e-6, ge=SHORTEST, description="seconds of a look for another partition's values")
    switch: float = Field(
        default=0.0, ge=0, description="seconds that a rank takes longer when it comes back to its core after another"
    )
    slice: float = Field(default=4e-3, ge=1e-5, description="seconds after which a rank leaves its core to those that wait for it")

    @model_validator(mode="after")
    def _gets_on(self) -> HostTable:
        if self.slice < 0.999 * SWITCHES * self.switch:
            raise ValueError(
                f"slice = {self.slice:g} is too short for switch = {self.switch:g}, since ranks would do little but come back to "
                f"their cores; make host.slice at least {SWITCHES} times host.switch, {SWITCHES * self.switch:g}."
            )
        return self


class WayTable(MachineTable):
    """A way from rank to rank."""

    latency: float = Field(ge=0, description="seconds of a message of no bytes, one way")
    bandwidth: float = Field(gt=0, description="GB/s")


class LargeTable(MachineTable):
    """What differs where a network's parameters are more than caches hold."""

    above: float = Field(ge=0, description="MB of parameters from which on this holds")
    bandwidth: float = Field(gt=0, description="GB/s within a host")
    apply: float = Field(gt=0, description="GB/s of gradients that a shard applies")
    step: float = Field(default=0.0, ge=0, description="seconds that a step takes longer for each GB of its parameters")


class NoiseTable(MachineTable):
    """How the times of steps vary: each is multiplied with a number drawn for (partition of a replica, step).

    Its mean is 1; with a tail that of the steps which are not late.
    """

    kind: Literal["none", "gamma", "exponential", "tail"] = Field(default="none", description="none, gamma, exponential or tail")
    variation: float = Field(default=0.1, gt=0, description="gamma: standard deviation over mean")
    share: float = Field(default=0.02, ge=0, lt=1, description="tail: share of steps that are late")
    late: float = Field(default=1.25, gt=1, description="tail: the shortest late step, in mean ones")
    index: float = Field(default=1.1, gt=0, description="tail: index of the Pareto distribution of late steps")
    longest: float = Field(default=200.0, gt=1, description="tail: the longest late step, in mean ones")


class SpeedTable(MachineTable):
    """How machines differ: a replica's times are multiplied with a number of its own."""

    slow: float = Field(default=0.0, ge=0, le=1, description="share of replicas that are slow, drawn for each")
    factor: float = Field(default=1.0, gt=0, description="their times, as a multiple of the others'")
    cycle: tuple[Positive, ...] = Field(
        default=(), strict=False, description="multiples of replicas 0, 1, 2, ..., again and again; default: 1"
    )


class DeathTable(MachineTable):
    """A machine that dies: that of a replica's partition, of a shard or of the coordinator."""

    at: float = Field(ge=0, description="when, in virtual seconds")
    replica: int | None = Field(default=None, ge=0, description="a replica; spare ones are numbered after the others")
    partition: int = Field(default=0, ge=0, description="which of its partitions")
    shard: int | None = Field(default=None, ge=0, description="a shard")
    coordinator: bool = Field(default=False, description="the coordinator")

    @model_validator(mode="after")
    def _one(self) -> DeathTable:
        if (self.replica is not None) + (self.shard is not None) + self.coordinator != 1:
            raise ValueError(
                "say whose machine dies, and give one of replica, shard and coordinator, like {at = 12.0, replica = 3}."
            )
        if self.partition and self.replica is None:
            raise ValueError("partition belongs to a replica; give replica, too, like {at = 12.0, replica = 3, partition = 1}.")
        return self


class FaultsTable(MachineTable):
    """Machines that die, with all ranks on them; where all ranks are on one host (`host.ranks` = 0), ranks.

    A dead one does not come back, as under MPI: spare replicas take over, or the others.
    """

    mtbf: float | None = Field(
        default=None,
        gt=0,
        description="mean time between failures of a machine, seconds, exponential; by default none fails at random",
    )
    servers: bool = Field(
        default=True, description="whether machines with a shard or the coordinator fail at random, too, which ends the run"
    )
    deaths: tuple[DeathTable, ...] = Field(default=(), strict=False, description="machines that die at a given time")


class Profile(MachineTable):
    """A machine for simulated time."""

    about: str = Field(default="", description="what it is, and where its numbers are from")
    compute: ComputeTable
    host: HostTable = HostTable()
    inside: WayTable = Field(description="within a host")
    between: WayTable = Field(description="from host to host")
    large: LargeTable | None = Field(default=None, description="what differs for networks that no cache holds")
    noise: NoiseTable = NoiseTable()
    speed: SpeedTable = SpeedTable()
    faults: FaultsTable | None = Field(default=None, description="machines that die; by default nobody does")

    def suited(self, nbytes: int, rule: str = "") -> Profile:
        """Return the profile for a network of so many bytes of parameters, which are changed by a rule of this kind."""
        large, compute, inside = self.large, self.compute, self.inside
        if large is not None and nbytes <= 1e6 * large.above:
            large = None
        apply = (compute.apply if large is None else large.apply) * compute.rules.get(rule, 1.0)
        if large is not None:
            inside = inside.model_copy(update={"bandwidth": large.bandwidth})
        return self.model_copy(
            update={"compute": compute.model_copy(update={"apply": apply, "rules": {}}), "inside": inside, "large": large}
        )

    def cold_seconds(self, nbytes: int) -> float:
        """Return what a step with so many bytes of parameters takes longer because no cache holds them (after `suited`)."""
        return 0.0 if self.large is None else 1e-9 * nbytes * self.large.step

    def local_seconds(self, nbytes: int) -> float:
        """Return the seconds of a replica's own step with a gradient of so many bytes."""
        return 1e-9 * nbytes / self.compute.local if self.compute.local else 0.0

    def one_host(self, ranks: int) -> bool:
        """Return whether so many ranks, the first ones, are on one host."""
        return not self.host.ranks or ranks <= self.host.ranks

    def machine(self, partitions: int) -> Machine:
        """Return what choosing the cut of a replica takes of this machine: its slowest way, and copies as fast as within a host."""
        way = self.inside if self.one_host(partitions) else self.between
        latency, memory = way.latency + self.host.call, self.inside.bandwidth * 1e9
        return Machine(self.compute.rate * 1e9, way.bandwidth * 1e9, latency, memory)

    def slowest(self, n: int) -> float:
        """Return what the time of the slowest of `n` partitions is expected to be multiplied with (`NoiseTable`).

        That is the integral over x > 0 of 1 - F(x)^n, with F the distribution of one.
        """
        noise = self.noise
        if noise.kind == "none":
            return 1.0
        if noise.kind == "exponential":
            return sum(1 / i for i in range(1, n + 1))
        from scipy.special import gammainc

        shape = noise.variation**-2 if noise.kind == "gamma" else 100.0
        x = np.concatenate([np.zeros(1), np.geomspace(1e-6, max(noise.longest, 100.0), 20_000)])
        below = gammainc(shape, x * shape)
        if noise.kind == "tail":
            late = np.where(x < noise.longest, 1 - np.maximum(x / noise.late, 1.0) ** -noise.index, 1.0)
            below = (1 - noise.share) * below + noise.share * late
        return float(np.trapezoid(1 - below**n, x))

    def rate(self, kind: str) -> float:
        """Return the flop/s of a kind of layer."""
        return self.compute.rates.get(kind, self.compute.rate) * 1e9

    def layer_seconds(self, model: Model, layer: int, box: Region, batch: int, passes: int) -> float:
        """Return the seconds of so many passes through the units `box` of a layer with `batch` examples."""
        kind = model.layers[layer]
        return passes * kind.flops(model.shapes[layer], box) * batch / self.rate(kind.kind)

    def step_seconds(self, model: Model, boxes: list[Region], batch: int) -> float:
        """Return the seconds that the owner of these boxes computes in a step (after `suited`); without what it exchanges."""
        known, seconds = self._measured(model, batch), self._by_rates(model, boxes, batch)
        if known is not None:
            seconds *= known.step / self._by_rates(model, model.boxes(), batch)
        cold = 0 if self.large is None else footprint(model, boxes, False).size
        return seconds + self.cold_seconds(cold * model.dtype.itemsize)

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

    def pass_seconds(self, model: Model, boxes: list[Region], batch: int) -> list[float]:
        """Return the seconds of a pass of the owner of these boxes through its part of each layer."""
        return [self.layer_seconds(model, i, boxes[i + 1], batch, 1) for i in range(len(model.layers))]

    def apply_seconds(self, nbytes: int) -> float:
        """Return the seconds that a shard takes for a slice of so many bytes."""
        return self.compute.slice + nbytes / (self.compute.apply * 1e9)


def load_profile(path: str | Path) -> Profile:
    """Read a machine file; UserError where it is none."""
    try:
        return valid(Profile, tables(path))
    except UserError as error:
        said = str(error).replace("the configuration", f"the machine file '{path}'")
        said = said.replace("No configuration file", "No machine file")
        raise UserError(said.replace("are in jobs/", "are in jobs/machines/")) from None
