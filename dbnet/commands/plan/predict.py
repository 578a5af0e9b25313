"""How a run will go on a machine: a dry simulation of some steps, and the same figures of a run that was made beside it.

Figures of a run come from its run file, whichever world wrote it: the time of a step from the moments at which a replica's pushes
were applied, staleness from the counts of the shards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.monitor.display import Display
from dbnet.monitor.results import Run, lateness
from dbnet.network.cost import Profile
from dbnet.run.setup import Setup
from dbnet.run.signals import hand_on
from dbnet.run.simulated.simulate import play
from dbnet.shards.shard import Shard

# One-sided operations that a prediction may simulate: some seconds.
_OPERATIONS, _FEWEST, _MOST = 120_000, 20, 1000


class Figures(NamedTuple):
    """How a run went, or will.

    Attributes
    ----------
    step
        Seconds of a replica's step, from push to push.
    updates, examples
        Per second, of all replicas together.
    waiting
        Share of its time that a replica waits for room in a ring.
    staleness
        Mean, over the updates of all shards.
    busy
        Share of the time in which the busiest shard had something to do.
    moved
        Bytes fetched and pushed per step of a replica's partition.
    """

    step: float
    updates: float
    examples: float
    waiting: float
    staleness: float
    busy: float
    moved: float


def figures(run: Run) -> Figures:
    """Return the figures of a run file; UserError where too little happened to say anything."""
    config, events = run.config, run.events
    rows = events[(events.shard == 0) & (events.partition == 0)]
    steps, updates, examples = [], 0.0, 0.0
    every = getattr(config.method, "n_push", 1)
    last = run.progress.groupby("replica").last() if len(run.progress) else run.progress
    for replica, own in rows.groupby("replica"):
        first, final = own.iloc[0], own.iloc[-1]
        seconds, pushes = final.seconds - first.seconds, final["push"] - first["push"]
        if pushes <= 0 or seconds <= 0:
            continue
        steps.append(seconds / pushes / every)
        updates += pushes / seconds
        made = last.loc[replica] if replica in last.index else None
        examples += 0.0 if made is None else made.examples / made.steps / steps[-1]
    if not steps:
        raise UserError(f"'{run.path}' has no updates to go by: it pushed too little, or recorded no events (record.events).")
    counts = run.staleness.to_numpy().sum(axis=1)
    return Figures(
        float(np.mean(steps)),
        updates,
        examples,
        float((last.waited / last.seconds).mean()),
        lateness(counts).mean,
        float(run.busy.max() / run.progress.seconds.max()),
        float(((last.bytes_fetched + last.bytes_pushed) / last.steps).mean()),
    )


def predicted(ready: Setup, profile: Profile, whole: bool = False) -> tuple[Figures, int]:
    """Simulate a run, dry, for some steps; return its figures and the steps of a replica.

    Parameters
    ----------
    ready, profile
        The run and the machine.
    whole
        Whether evaluations are part of it, and its end, as for a comparison with a run that was made.

    Raises
    ------
    UserError
        The run asks for what is not simulated, or makes too few steps.
    """
    _refuse(ready)
    world, config = ready.topology, ready.config
    each = 5 * world.replicas * world.partitions * world.shards
    steps = max(_FEWEST, 3 * getattr(config.method, "n_push", 1), min(_MOST, _OPERATIONS // each))
    if config.stop.steps is not None:
        steps = min(steps, config.stop.steps)
    if config.stop.epochs is not None and whole:
        batch = config.method.worker.batch(config, ready.data.sizes["train"])
        per_epoch = -(-ready.data.sizes["train"] // (batch * world.replicas))
        steps = min(steps, max(1, int(config.stop.epochs * per_epoch)))
    stop = config.stop.model_copy(update={"steps": steps, "epochs": None, "seconds": None, "accuracy": None})
    record = {"trace": False, "tensorboard": False, "schedule": False, "events": "all"}
    changes = {"stop": stop, "record": config.record.model_copy(update=record)}
    # Alone a replica meets nobody, and that would be a large part of so few steps.
    changes["warmstart"] = config.warmstart.model_copy(update={"steps": 0, "accuracy": None})
    if not whole:
        changes["evaluate"] = config.evaluate.model_copy(update={"epochs": 1e9, "train": 0})
    with tempfile.TemporaryDirectory() as folder:
        changes["run"] = config.run.model_copy(update={"folder": folder, "picture": False, "name": "predicted", "threads": None})
        dry = replace(ready, config=config.model_copy(update=changes), topology=replace(world, spares=0), checkpoint=None)
        # In so few steps a death would be an accident, and no prediction.
        done = play(dry, profile.model_copy(update={"faults": None}), Display(True), True)
        # Of fewer steps than are said nothing is predicted.
        hand_on(done.outcome.signal)
        return figures(Run(done.outcome.run_file)), steps


def _refuse(ready: Setup) -> None:
    """Raise UserError where a dry simulation would not be of this run."""
    config = ready.config
    if config.method.receiver is not Shard:
        raise UserError(
            f"A prediction computes nothing, and method.kind = '{config.method.kind}' goes by what it computes; predict a run of "
            "method.kind = 'downpour'."
        )


# --- words --------------------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A figure: what it is called, its unit, what it is multiplied with for that, digits after the point."""

    name: str
    unit: str
    scale: float
    digits: int


LINES = {
    "step": Line("time of a step", "ms", 1e3, 3),
    "updates": Line("updates", "1/s", 1, 1),
    "examples": Line("examples", "1/s", 1, 0),
    "waiting": Line("replicas wait", "%", 100, 1),
    "staleness": Line("mean staleness", "", 1, 2),
    "busy": Line("busiest shard", "%", 100, 1),
    "moved": Line("moved per step", "MB", 1e-6, 3),
}


def told(made: Figures, steps: int, profile: Profile) -> list[str]:
    """Return what is predicted, a line each."""
    lines = ["", f"Predicted by {steps} dry steps of every replica on: {profile.about or 'a machine without a name'}"]
    lines += [f"  {line.name:<16} {_number(getattr(made, key), line):>12} {line.unit}".rstrip() for key, line in LINES.items()]
    return lines + ["Machines die there (faults), but in no prediction: dbnet simulate has them."] * (profile.faults is not None)


def checked(made: Figures, measured: Figures) -> list[str]:
    """Return predicted beside measured, line by line."""
    lines = [f"  {'':<20} {'predicted':>12} {'measured':>12} {'off by':>8}"]
    for key, line in LINES.items():
        one, other = getattr(made, key), getattr(measured, key)
        name = f"{line.name}{', ' if line.unit else ''}{line.unit}"
        lines.append(f"  {name:<20} {_number(one, line):>12} {_number(other, line):>12} {_off(one, other, line):>8}")
    return lines


def _number(value: float, line: Line) -> str:
    return "none" if value != value else f"{line.scale * value:,.{line.digits}f}"


def _off(made: float, measured: float, line: Line) -> str:
    """Return by how much a prediction is off: of shares the difference in points, else in percent of what was measured."""
    if line.unit == "%":
        return f"{100 * (made - measured):+.1f} pt"
    return "" if not measured or made != made or measured != measured else f"{100 * (made / measured - 1):+.1f} %"


def comparable(run: Run) -> Sequence[str]:
    """Return what makes a comparison unfair, a sentence each; UserError where it would say nothing."""
    if not len(run.busy) or "one process" in str(run.about.get("mpi", "")):
        raise UserError(f"'{run.path}' was trained in one process, which has no ranks; make it with mpirun to check a prediction.")
    out = []
    if len(run.lost):
        out.append(f"{len(run.lost)} replicas were lost; nobody is in the prediction.")
    if not run.finished:
        out.append(f"the run is {run.ended}, its figures are those so far.")
    return out
