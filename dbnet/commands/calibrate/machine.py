"""A machine file from what was measured, and what to say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dbnet.commands.calibrate.kernels import Timed
from dbnet.core.toml import written
from dbnet.network.cost import SWITCHES, ComputeTable, HostTable, LargeTable, Profile, WayTable

# What stands for a way that could not be measured: shared memory of a present host.
_ASSUMED = {"latency": 1e-6, "bandwidth": 5.0}
_SLICE = 1 << 20
_STEPPING = ("gradient", "fetch", "push", "poll")
_OFTENER = 0.5  # times a step


class Costs(NamedTuple):
    """Seconds of a core that ranks take beside kernels: an operation, a byte copied; a slice, a byte applied; a turn, a step."""

    call: float
    copied: float
    slice: float
    applied: float
    turn: float
    step: float


def switching(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float | None:
    """Return the seconds that a replica takes longer each time it comes back to its core after another rank; None: not measured.

    Of each network there are two runs, the second one with all ranks on one core: what its step takes longer there is explained by
    how much oftener it left its core (least squares). Where others compute, too, it leaves its core in both.
    """
    rows = []
    for pair in pairs:
        spent, left = np.array([_step(run) for run in pair]).T
        rows.append((left[1] - left[0], spent[1] - spent[0]))
    oftener, longer = np.array(rows).T
    if oftener.max() < _OFTENER:
        return None
    return max(0.0, float(oftener @ longer / (oftener @ oftener)))


def _switch(told: Mapping[str, Any]) -> tuple[float, str]:
    """Return the seconds that coming back to a core takes, or 0 and why that was not measured."""
    if told["shared"]:
        return 0.0, told["shared"]
    runs = told["runs"]
    # Alike in all but the core: ranks that are more than their cores give way after each piece of work.
    found = switching([(runs.get(f"{name}, crowded", runs[name]), runs[f"{name}, one core"]) for name in ("small", "middle")])
    if found is None:
        return 0.0, "others computed here, too, and took the cores as often"
    if found > HostTable().slice / SWITCHES:
        return 0.0, f"{1e6 * found:.0f} us came out, more than one can take, since others computed here, too"
    return found, ""


def _step(run: dict[str, Any]) -> tuple[float, float]:
    """Return the processor seconds of a replica's step, and how often it left its core meanwhile."""
    replica = run["ranks"][2]
    return sum(replica["spent"][cause] for cause in _STEPPING) / run["steps"], replica["switches"] / run["steps"]


def large(run: dict[str, Any], largest: int, cost: Costs, alone: float, flush: float) -> dict[str, float]:
    """Return what differs for a network that no cache holds.

    Parameters
    ----------
    run
        One of such a network, as `ranks` counts it.
    largest
        Bytes of the largest network of which `cost` is known to hold.
    cost, alone, flush
        As found; seconds of the network's gradient by itself, 0: unknown; seconds of a flush.
    """
    steps, nbytes, (_, shard, replica) = run["steps"], run["bytes"], (one["spent"] for one in run["ranks"])
    slices = -(-nbytes // _SLICE)
    copied = (replica["fetch"] + replica["push"]) / steps - (2 + 3 * slices) * cost.call - 2 * (1 + slices) * flush
    applied = shard["apply"] / steps - slices * cost.slice
    longer = replica["gradient"] / steps - alone if alone else 0.0
    return {
        "above": 1e-6 * (largest * nbytes) ** 0.5,
        # Not faster than what caches hold.
        "bandwidth": 1e-9 / max(copied / 2 / nbytes, cost.copied, 1e-12),
        "apply": 1e-9 / max(applied / nbytes, cost.applied),
        "step": max(0.0, longer) / nbytes * 1e9,
    }


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
    way, beside, beyond = _way(inside) if inside else dict(_ASSUMED), 0.0, None
    if runs:
        flush, huge = 2 * inside["latency"] if inside else 0.0, runs["huge"]
        cost = costs([runs["small"], runs["large"]], found[0].step, flush)
        alone = next((one.step for one in found if 4 * one.model.layout.size == huge["bytes"] and one.batch == huge["batch"]), 0.0)
        beyond = _short(large(huge, runs["large"]["bytes"], cost, alone, flush))
        host_table["switch"] = _switch(told)[0]
        compute |= {"apply": 1e-9 / cost.applied, "slice": cost.slice, "step": max(0.0, rates["step"] + cost.step)}
        beside = cost.step
        host_table |= {"call": cost.call, "turn": max(cost.turn, 1e-7)}
        if cost.copied > 0:
            way["bandwidth"] = 1e-9 / cost.copied
        if inside:
            host_table["look"] = inside["look"]
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
        large=None if beyond is None else LargeTable.model_validate(beyond),
    )


def _way(found: dict[str, float]) -> dict[str, float]:
    return {"latency": found["latency"], "bandwidth": found["bandwidth"] / 1e9}


def _short(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in numbers.items()}


def unmeasured(told: dict[str, Any] | None, why: str) -> list[str]:
    """Return, a sentence each, what was not measured."""
    told, out = told or {}, []
    if not told.get("runs"):
        reason = why or "no host has three ranks"
        out.append(f"apply, slice, step, call, turn and switch: {reason}; 5 GB/s and no overheads are assumed.")
    if not told.get("inside"):
        out.append(f"inside: {why or 'no two ranks are on one host'}; 1 us and 5 GB/s are assumed.")
    if told.get("runs") and (reason := _switch(told)[1]):
        out.append(f"switch: {reason}; it is left out.")
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
        "local": (compute.local, "GB/s of gradients that a replica steps with by itself"),
    })  # fmt: skip
    lines += ["", "[compute.rates]", *_said({kind: (rate, "") for kind, rate in compute.rates.items()})] if compute.rates else []
    lines += (
        ["", "[compute.rules]", *_said({kind: (speed, "of apply") for kind, speed in compute.rules.items()})]
        if compute.rules
        else []
    )
    for one in compute.measured:
        lines += ["", "[[compute.measured]]", *(f"{name} = {written(value)}" for name, value in one.model_dump().items())]
    lines += ["", "[host]", *_said({
        "ranks": (host.ranks, "ranks on a host; 0: all on one"),
        "cores": (host.cores, "cores of a host, shared by its busy ranks"),
        "late": (host.late, "seconds by which each pause is longer than it was meant to be"),
        "turn": (host.turn, "seconds of a turn in which nothing is computed or sent"),
        "call": (host.call, "seconds that starting a one-sided operation takes its rank"),
        "look": (host.look, "seconds of a look for another partition's values"),
        "switch": (host.switch, "seconds that a rank takes longer when it comes back to its core after another"),
    })]  # fmt: skip
    for name, way in (("inside", made.inside), ("between", made.between)):
        ends = {"latency": (way.latency, "seconds, one way"), "bandwidth": (way.bandwidth, "GB/s")}
        lines += ["", f"[{name}]", *_said(ends)]
    if made.large is not None:
        lines += ["", "[large]", *_said({
            "above": (made.large.above, "MB of parameters from which on caches hold too little"),
            "bandwidth": (made.large.bandwidth, "GB/s within a host"),
            "apply": (made.large.apply, "GB/s of gradients that a shard applies"),
            "step": (made.large.step, "seconds that a step takes longer for each GB of parameters"),
        })]  # fmt: skip
    return "\n".join(lines) + "\n"


def _said(values: dict[str, tuple[float, str]]) -> list[str]:
    return [f"{f'{name} = {value}':<37} # {words}" if words else f"{name} = {value}" for name, (value, words) in values.items()]
