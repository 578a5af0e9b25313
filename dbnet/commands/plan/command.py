"""`dbnet plan`: what a run will need, computed without MPI: roles, ranges, bytes per fetch and push, memory of every rank."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dbnet.comm.topology import Role
from dbnet.commands.base import add_configuration
from dbnet.commands.plan import predict
from dbnet.commands.plan.ranks import RankPlan, ranks
from dbnet.commands.plan.slurm import script
from dbnet.commands.plan.words import describe, gradient_seconds, layers
from dbnet.core import config as configuration
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.monitor.results import Run
from dbnet.network.cost import Profile, load_profile
from dbnet.network.partition import Cut
from dbnet.run.setup import Setup, setup


def check_size(ready: Setup, n: int) -> None:
    """Raise UserError, with a topology that would fit, where the configuration does not make a world of `n` ranks."""
    world = ready.topology
    if n == world.size:
        return
    shards = max(1, min(world.shards, n // 4))
    hint = (
        f"For {n} ranks set for example topology.shards={shards} topology.replicas={n - 1 - shards}."
        if n >= 3
        else "A world needs at least 3 ranks."
    )
    raise UserError(f"{world.wanted()}, not {n}. {hint}")


@dataclass(frozen=True)
class Plan:
    """What a run will need. `str` gives what `dbnet plan` prints.

    Attributes
    ----------
    ranks
        Every rank in order: its number, name, what it owns, bytes that it moves per step, bytes of memory at its worst.
    memory
        Bytes of memory of all ranks together.
    bytes_per_step
        Bytes that fetches and pushes move through all shards together while each replica makes one step.
    doubts
        What is allowed but seldom meant, in sentences.
    """

    ranks: list[RankPlan]
    memory: int
    bytes_per_step: int
    doubts: list[str]
    _text: str = field(repr=False)

    def __str__(self) -> str:
        return self._text


def plan(source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = ()) -> Plan:
    """Return what a run will need, computed without MPI and without starting anything.

    Parameters
    ----------
    source
        Path of a configuration file (TOML), nested tables like those in it, or a configuration.
    overrides
        Changes like "topology.replicas=4".

    Returns
    -------
    Roles, ranges, memory (bytes, per rank and in all) and bytes per step; print it to read it.

    Raises
    ------
    UserError
        The configuration, the data or the network do not fit each other; one sentence says what to mend.
    """
    overrides = overrides if isinstance(overrides, str) else list(overrides)
    ready = setup(configuration.load(source, overrides))
    return planned(ready, [str(source) if isinstance(source, str | Path) else "RUN.toml", *overrides])


def planned(ready: Setup, words: Sequence[str], profile: Profile | None = None) -> Plan:
    """Return the plan of a run that `words` start, its configuration and the changes, on a machine or on any."""
    rows, world = ranks(ready), ready.topology
    moved = sum(row.per_step for row in rows if world.role(row.rank) is Role.SERVE)
    text = describe(ready, rows, profile).replace("RUN.toml", " ".join(words))
    return Plan(rows, sum(row.memory for row in rows), moved, ready.doubts(), text)


def facts(ready: Setup, made: Plan, profile: Profile | None = None) -> dict[str, Any]:
    """Return the plan for scripts: plain values; bytes and seconds."""
    batch, cut = ready.config.method.minibatch, ready.cut
    return {
        "parameters": ready.model.layout.size,
        "dtype": ready.model.dtype.name,
        "wire": "bfloat16" if ready.rings.narrow else ready.model.dtype.name,
        "input": list(map(int, ready.data.shape)),
        "layers": layers(ready),
        "topology": json.loads(ready.config.text())["topology"],
        "ranks": [rank._asdict() for rank in made.ranks],
        "memory": made.memory,
        "bytes_per_step": made.bytes_per_step,
        "values_crossing": [cut.crossing(i) for i in range(len(ready.model.layers))] if cut.partitions > 1 else [],
        "seconds_per_gradient": gradient_seconds(Cut(ready.model, cut.partitions, batch), profile),
        "doubts": made.doubts,
    }


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_configuration(parser, optional=True)
    parser.add_argument("--machine", metavar="MACHINE.toml", help="predict times, waiting and staleness there (dbnet calibrate)")
    parser.add_argument("--check", metavar="RUN.h5", help="print what --machine predicts of a run beside what it was")
    parser.add_argument("-n", type=int, metavar="N", help="number of ranks that will be started; checked against the configuration")
    parser.add_argument("--config", action="store_true", help="print the effective configuration as TOML instead")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, for scripts")
    parser.add_argument("--ranks", action="store_true", help="print just the number of ranks, for scripts")
    parser.add_argument("--slurm", action="store_true", help="print a batch script for Slurm instead")
    parser.add_argument("--nodes", type=int, metavar="N", help="--slurm: nodes; default: as few as have a core for each rank")
    parser.add_argument("--cores", type=int, metavar="C", help="--slurm: cores of a node, shared by its ranks; default: one a rank")
    parser.add_argument("--time", default="01:00:00", metavar="HH:MM:SS", help="--slurm: time limit (default: 01:00:00)")


def run_plan(options: argparse.Namespace) -> None:
    others = [f"--{name}" for name in ("slurm", "ranks", "config") if getattr(options, name)]
    others += ["-n"] if options.n is not None else []
    if options.check and others:
        raise UserError(f"--check is of a run that was made; leave {' and '.join(others)} out.")
    if options.machine and (without := [word for word in others if word != "-n"]):
        raise UserError(f"{' and '.join(without)} prints no prediction; leave --machine out.")
    if options.check:
        print("\n".join(check(options)))
        return
    if options.configuration is None:
        raise UserError("'dbnet plan' needs RUN.toml; 'dbnet plan --help' explains it.")
    # Scripts count the ranks; the run itself says the rest.
    config = configuration.load(options.configuration, options.overrides, *([lambda _: None] if options.ranks else []))
    if options.config:
        print(configuration.to_toml(config))
        return
    if options.ranks:
        print(config.topology.world)
        return
    ready, words = setup(config), [options.configuration, *options.overrides]
    if options.n is not None:
        check_size(ready, options.n)
    if options.slurm:
        needs = [rank.memory for rank in ranks(ready)]
        print(script(config, needs, words, nodes=options.nodes, cores=options.cores, time=options.time), end="")
        return
    profile = None if options.machine is None else load_profile(options.machine)
    made = planned(ready, words, profile)
    configuration.warn(*made.doubts)
    found = None if profile is None else predict.predicted(ready, profile)
    if options.json:
        predictions = {} if found is None else {"predicted": found[0]._asdict()}
        print(json.dumps(facts(ready, made, profile) | predictions, indent=1))
        return
    print("\n".join([str(made), *([] if found is None else predict.told(*found, profile))]))


def check(options: argparse.Namespace) -> list[str]:
    """Return what a machine file predicts of a run beside what the run was, as lines."""
    if options.machine is None or options.configuration is not None:
        raise UserError("--check goes by what the run was made with: dbnet plan --check RUN.h5 --machine MACHINE.toml.")
    run, profile = Run(options.check), load_profile(options.machine)
    unlike, measured = predict.comparable(run), predict.figures(run)
    if run.config.model.modules:
        raise UserError(f"'{options.check}' has members of its own; take its configuration: dbnet plan RUN.toml --machine FILE.")
    found, steps = predict.predicted(setup(configuration.restored(run.config)), profile, whole=True)
    if options.json:
        return [json.dumps({"predicted": found._asdict(), "measured": measured._asdict()}, indent=1)]
    head = f"{options.check} beside {steps} dry steps of every replica on: {profile.about or options.machine}"
    return [head, *predict.checked(found, measured), *(f"Mind that {sentence}" for sentence in unlike)]
