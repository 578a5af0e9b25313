"""A machine file from what was measured, and what to say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dbnet.commands.calibrate.kernels import Timed
from dbnet.core.toml import written
from dbnet.network.cost import ComputeTable, HostTable, Profile, WayTable

# What stands for a way that could not be measured: shared memory of a present host.
_ASSUMED = {"latency": 1e-6, "bandwidth": 5.0}
_SLICE = 1 << 20


class Costs(NamedTuple):
    """Seconds of a core that ranks take beside kernels: an operation, a byte copied; a slice, a byte applied; a turn, a step."""

    call: float
    copied: float
    slice: float
    applied: float
    turn: float
    step: float


def costs(runs: Sequence[dict[str, Any]], alone: float, flush: float) -> Costs:
    """Return what explains the processor seconds of two runs of one replica and one shard, of a small and of a large network.

    Parameters
    ----------
    runs
        As `ranks` counts them, the small one first.
    alone
        Seconds of the small network's gradient, measured by itself.
    flush
        Seconds that a flush of a one-sided operation takes.
    """
    from scipy.optimize import nnls

    rows, seconds, applied = [], [], []
    for run in runs:
        steps, nbytes, replica, shard = run["steps"], run["bytes"], run["ranks"][2]["spent"], run["ranks"][1]["spent"]
        slices = -(-nbytes // _SLICE)
        # A fetch gets clock and parameters; a push puts header, slice and head; each flushes twice.
        rows += [(2.0, nbytes), (3.0 * slices, nbytes)]
        seconds += [replica["fetch"] / steps - 2 * flush, replica["push"] / steps - 2 * flush * slices]
        applied.append((slices, nbytes, shard["apply"] / steps))
    wanted = np.maximum(seconds, 1e-7)
    work = np.array(rows) / wanted[:, None]
    size = work.max(axis=0)
    call, copied = nnls(work / size, np.ones(len(rows)))[0] / size
    (few, short, small), (many, long, large) = applied
    work = np.array([(few, short), (many, long)]) / np.maximum([[small], [large]], 1e-9)
    size = work.max(axis=0)
    a_slice, a_byte = nnls(work / size, np.ones(2))[0] / size
    small_run = runs[0]["ranks"]
    turn = small_run[1]["spent"]["poll"] / max(1, small_run[1]["turns"])
    replica, steps = small_run[2]["spent"], runs[0]["steps"]
    # The simulation has a turn for the fetch and one for the step.
    step = replica["poll"] / steps - 2 * turn + replica["gradient"] / steps - alone
    # Not less than memory can ever take: all of it may have gone to slices where the machine was busy.
    return Costs(call, copied, a_slice, max(a_byte, 1e-12), turn, step)


class Host(NamedTuple):
    """The machine's hosts: its name, cores of one, ranks on one (0: all), seconds by which pauses are too long."""

    name: str
    cores: int
    ranks: int
    late: float


def profile(
    host: Host, rates: dict[str, Any], found: Sequence[Timed], told: dict[str, Any] | None, own: Mapping[str, Timed]
) -> Profile:
    """Return the profile.

    Parameters
    ----------
    host
        The machine.
    rates, found
        [compute] as fitted, and the networks it was fitted to.
    told
        What `ranks.measure` found; None: nothing.
    own
        Networks whose own steps were measured, by what they are.
    """
    told = told or {}
    inside, between, runs = told.get("inside"), told.get("between"), told.get("runs")
    compute, host_table = dict(rates), {"cores": host.cores, "ranks": host.ranks, "late": host.late}
    way, beside = _way(inside) if inside else dict(_ASSUMED), 0.0
    if runs:
        cost = costs(runs, found[0].step, 2 * inside["latency"] if inside else 0.0)
        compute |= {"apply": 1e-9 / cost.applied, "slice": cost.slice, "step": max(0.0, rates["step"] + cost.step)}
        beside = cost.step
        host_table |= {"call": cost.call, "turn": max(cost.turn, 1e-7)}
        if cost.copied > 0:
            way["bandwidth"] = 1e-9 / cost.copied
    else:
        # As fast as memory is written: nothing was applied.
        compute["apply"] = _ASSUMED["bandwidth"]
    measured = [one.entry(about, beside) for about, one in own.items()]
    return Profile(
        about=f"{host.name}, measured by dbnet calibrate.",
        compute=ComputeTable.model_validate(_short(compute) | {"measured": measured}),
        host=HostTable.model_validate(_short(host_table)),
        inside=WayTable.model_validate(_short(way)),
        between=WayTable.model_validate(_short(_way(between) if between else way)),
    )


def _way(found: dict[str, float]) -> dict[str, float]:
    return {"latency": found["latency"], "bandwidth": found["bandwidth"] / 1e9}


def _short(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in numbers.items()}


def unmeasured(told: dict[str, Any] | None, why: str) -> list[str]:
    """Return, a sentence each, what was not measured."""
    told, out = told or {}, []
    if not told.get("runs"):
        out.append(f"apply, slice, step, call and turn: {why or 'no host has three ranks'}; 5 GB/s and no overheads are assumed.")
    if not told.get("inside"):
        out.append(f"inside: {why or 'no two ranks are on one host'}; 1 us and 5 GB/s are assumed.")
    if not told.get("between"):
        out.append("between: all was on one host, so it is a copy of inside; measure it with mpirun on two hosts.")
    return out


def text(made: Profile, missing: Sequence[str], notes: Sequence[str]) -> str:
    """Return the machine file; `notes` say how well it fits."""
    compute, host = made.compute, made.host
    lines = [f"# {note}" for note in [*notes, *(f"Not measured: {sentence}" for sentence in missing)]]
    lines += [f"about = {written(made.about)}", "", "[compute]"]
    lines += _said({
        "rate": (compute.rate, "GFLOP/s of dense layers in forward and backward passes"),
        "evaluation": (compute.evaluation, "speed of an evaluation's forward pass as a multiple of these rates"),
        "step": (compute.step, "seconds that a step takes beside its arithmetic"),
        "layer": (compute.layer, "seconds that a layer takes in a step beside its arithmetic"),
        "apply": (compute.apply, "GB/s of gradients that a shard applies, with Adagrad"),
        "slice": (compute.slice, "seconds that a shard takes for a slice beside its arithmetic"),
    })  # fmt: skip
    lines += ["", "[compute.rates]", *_said({kind: (rate, "") for kind, rate in compute.rates.items()})] if compute.rates else []
    for one in compute.measured:
        lines += ["", "[[compute.measured]]", *(f"{name} = {written(value)}" for name, value in one.model_dump().items())]
    lines += ["", "[host]", *_said({
        "ranks": (host.ranks, "ranks on a host; 0: all on one"),
        "cores": (host.cores, "cores of a host, shared by its busy ranks"),
        "late": (host.late, "seconds by which each pause is longer than it was meant to be"),
        "turn": (host.turn, "seconds of a turn in which nothing is computed or sent"),
        "call": (host.call, "seconds that starting a one-sided operation takes its rank"),
    })]  # fmt: skip
    for name, way in (("inside", made.inside), ("between", made.between)):
        ends = {"latency": (way.latency, "seconds, one way"), "bandwidth": (way.bandwidth, "GB/s")}
        lines += ["", f"[{name}]", *_said(ends)]
    return "\n".join(lines) + "\n"


def _said(values: dict[str, tuple[float, str]]) -> list[str]:
    return [f"{f'{name} = {value}':<37} # {words}" if words else f"{name} = {value}" for name, (value, words) in values.items()]
