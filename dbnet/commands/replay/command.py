"""`dbnet replay`: play a recorded run again, compare it to the bit, say what was compared or what differed first."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm.communicators import cores_for
from dbnet.commands.base import add_force
from dbnet.commands.evaluate import add_trust
from dbnet.commands.replay.moment import Gradient, iteration, place_of, quotas
from dbnet.commands.replay.outcome import Compared, Difference
from dbnet.commands.replay.passes import ReplayedPasses
from dbnet.commands.replay.world import ReplayedWorld
from dbnet.core.config import Config, fitting, override, restored, stored
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken
from dbnet.core.registry import Family, own_modules, take
from dbnet.monitor.results import Run
from dbnet.monitor.runfile import machine
from dbnet.run import roles
from dbnet.run.inference import run_modules
from dbnet.run.setup import Setup, setup
from dbnet.shards.schedule.log import PartOfSchedule
from dbnet.shards.schedule.paths import part_of_schedule, schedule_of

# What evaluations may differ by, relatively, where another machine has recorded.
NEAR = 1e-6


def replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Play a recorded run again in this process, and compare it with the record to the bit: every gradient, every\n"
        "evaluation, every checkpoint, the end; of a batch method every iteration.\n\n"
        "  mpirun -n 6 dbnet train jobs/digits.toml --record      records runs/digits.schedule\n"
        "  dbnet replay runs/digits.h5\n\n"
        "Exit code 0: identical; 1: something differs, and the first such thing is named."
    )
    parser.add_argument("run_file", metavar="RUN.h5", help="the run file of a recorded run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="rule.key=value",
        help="run another rule or rate under the same schedule; only the evaluations are shown then, side by side",
    )  # fmt: skip
    parser.add_argument(
        "--until",
        metavar="UPDATE|SECONDS",
        help="play up to so many updates, of a batch method iterations (5000), or seconds (2.5s), and write a checkpoint of that",
    )
    parser.add_argument(
        "--gradient", nargs=3, metavar=("REPLICA", "STEP", "OUT.h5"),
        help="make one gradient again, and write it with the parameters it was made from",
    )  # fmt: skip
    add_force(parser)
    add_trust(parser)


def run_replay(options: argparse.Namespace) -> int:
    try:
        run, world, compared = _recorded(options)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"'{options.run_file}' or its schedule is damaged ({type(error).__name__}: {error}).") from error
    other = f" with {' '.join(options.overrides)}" if options.overrides else ""
    print(f"Replay of {run.path}{other}: {world.topology.words()}.", flush=True)
    try:
        world.play()
        if options.gradient is not None:
            print(_write_gradient(world, run, options))
            return 0
    except (KeyError, ValueError, IndexError, StopIteration) as error:
        raise UserError(f"The schedule of '{options.run_file}' is damaged ({type(error).__name__}: {error}).") from error
    except Difference as difference:
        if options.overrides:
            print(
                f"another rule under the same schedule: {compared.words()}; then its numbers were out of bounds, and it stood still"
            )
            print(_scores(compared))
            return 1
        print(f"different: {difference}; identical before: {compared.words()}")
        return 1
    if options.until is not None:
        print(f"{'identical' if compared.exact else 'played'}: {compared.words()}; {_save(world, run, options.until)}")
        return 0
    return _verdict(world, compared, options.overrides)


def _save(world: ReplayedWorld | ReplayedPasses, run: Run, until: str) -> Path:
    """Write the moment as a checkpoint; return its path."""
    if isinstance(world, ReplayedPasses):
        return world.save(until, float(run.iterations.seconds[run.iterations.iteration == world.state.iteration].iloc[0]))
    updates, wanted = world.compared.updates, sum(quotas(run, until))
    if updates < wanted:
        # The name must not promise more.
        until = str(updates)
        print(f"The moment lies within updates under way; all shards had the state after {until} of the {wanted} together.")
    return world.save(until, float(run.events.seconds.sort_values().iloc[: max(updates, 1)].max()))


def _write_gradient(world: ReplayedWorld, run: Run, options: argparse.Namespace) -> str:
    """Write the gradient that was asked for; return what is said of it."""
    replica, step, out = options.gradient
    if world.gradient is None or world.gradient.left:
        raise UserError(f"Replica {replica} makes no step {step} in what '{run.path}' has recorded; steps are counted from 0.")
    world.gradient.write(Path(out), str(run.path), options.force)
    return f"{out}: replica {replica}'s gradient of step {step}, and the parameters it was made from"


def _verdict(world: ReplayedWorld, compared: Compared, overrides: list[str]) -> int:
    """Print what came of a replay to the end of its record; return the exit code."""
    near = all(np.allclose(*both, rtol=NEAR, atol=NEAR, equal_nan=True) for _, *both in compared.scores)
    elsewhere = f"evaluations are {'equal' if near else 'not equal'} to {NEAR:g}"
    said = "identical" if compared.exact else "another rule under the same schedule" if overrides else elsewhere
    print(f"{said}: {compared.words()}{'' if world.ended else _short(world.parts)}")
    if not compared.exact:
        print(_scores(compared))
    return int(not (compared.exact or near or overrides))


def _recorded(options: argparse.Namespace) -> tuple[Run, ReplayedWorld | ReplayedPasses, Compared]:
    """Return a recorded run, the world in which it is played again, and what counts what is compared."""
    run = Run(options.run_file)
    recorded = run.about.get("schedule")
    if not isinstance(recorded, dict):
        raise UserError(f"'{options.run_file}' was not recorded; train with --record, or with record.schedule = true.")
    # The folder may have been moved since.
    moved = {"name": run.path.stem, "folder": str(run.path.parent)}
    config = run.config.model_copy(update={"run": run.config.run.model_copy(update=moved)})
    run_modules(options.run_file, own_modules(run.about["modules"], config.model.modules), options.trust_modules, "--trust-modules")
    ready = setup(_changed(config, options.overrides), _point(recorded, run.path.parent))
    parts = _parts(ready, options.run_file, recorded["id"])
    working = [part for rank, part in parts.items() if rank > ready.topology.shards]
    threads = sorted({part.about["threads"] for part in working})
    exact = _alike(parts, threads) and not options.overrides
    roles.use(ready.config, max(threads, default=cores_for(None, True)[0]))
    batch = ready.config.method.recorder is not None
    compared = Compared(exact, ready.topology.shards, "iteration" if batch else "update")
    whole = any(part.about["here"] for part in parts.values()) and ready.topology.partitions == 1
    if options.until is not None:
        place_of(ready, options.until)
    if batch:
        _refuse(options)
        until = None if options.until is None else iteration(run, options.until)
        return run, ReplayedPasses(ready, parts, whole, compared, until), compared
    stops = () if options.until is None else quotas(run, options.until)
    gradient = None if options.gradient is None else Gradient(ready, *_numbers(options))
    return run, ReplayedWorld(ready, parts, whole, compared, stops, gradient), compared


def _refuse(options: argparse.Namespace) -> None:
    """Raise UserError where something is wanted of a batch method's run that it has not."""
    if options.overrides:
        raise UserError(f"'{options.overrides[0]}': a batch method goes by no rule, so nothing can be another one; train anew.")
    if options.gradient is not None:
        raise UserError("--gradient: a batch method's replicas make no steps, a pass has one gradient; leave it out.")


def _numbers(options: argparse.Namespace) -> tuple[int, int]:
    """Return replica and step of the gradient that is wanted; UserError where they are none, or its file cannot be written."""
    replica, step, out = options.gradient
    if options.until is not None or not (replica.isdecimal() and step.isdecimal()):
        raise UserError("--gradient takes a replica, a step (both from 0) and a file, and goes without --until.")
    refuse_taken(out, options.force)
    return int(replica), int(step)


def _scores(compared: Compared) -> str:
    """Return a line for each evaluation: what is evaluated, as recorded and now."""
    lines = [f"{'evaluation by':<24}  {'recorded':>17}  {'now':>17}"]
    for who, *both in compared.scores:
        lines.append("  ".join([f"{who:<24}", *(f"{loss:8.4f} {accuracy:8.4f}" for loss, accuracy, *_ in both)]))
    return "\n".join(lines)


def _changed(config: Config, overrides: list[str]) -> Config:
    """Return the configuration with another rule; UserError where something else is to be another."""
    tree = json.loads(config.text())
    for text in overrides:
        if not text.startswith(("rule.", "rule=")):
            raise UserError(f"'{text}': under a recorded schedule only the rule can be another one; train anew for anything else.")
        override(tree, text)
    for left in fitting(tree, overrides):
        print(f"dbnet: {left}", file=sys.stderr)
    # What a user says may be wrong, or leave the kind out; what a run file says may not.
    mark = Family.of(Config, "rule")
    tree["rule"] = take(mark.name, tree["rule"], "rule", mark.default).options()
    return restored(stored(tree))


def _short(parts: dict[int, PartOfSchedule]) -> str:
    full = [str(part.path) for part in parts.values() if part.full]
    return f"; the record ends before the run did, {f'{full[0]} was full' if full else 'which was killed, or could not write on'}"


def _point(recorded: dict[str, Any], folder: Path) -> str | None:
    """Return the checkpoint that the run went on from, if it did: where it was, or beside the run file, with which it was moved."""
    path, identity = recorded["from"]
    if not identity:
        return path or None
    there = [place for place in (Path(path), folder.joinpath(*Path(path).parts[-2:])) if place.exists()]
    if not there:
        raise UserError(f"The run went on from '{path}', which is not there; put it back, or its folder beside the run file.")
    for place in there:
        if Checkpoint(place).id == identity:
            return str(place)
    raise UserError(f"The run went on from '{path}', which has been written anew since; it cannot be played again.")


def _parts(ready: Setup, run_file: str, identity: str) -> dict[int, PartOfSchedule]:
    """Return the parts of the record by rank; a coordinator that decides nothing has none."""
    config, world, out = ready.config, ready.topology, {}
    if not schedule_of(config).is_dir():
        raise UserError(f"'{run_file}' was recorded, but its folder '{schedule_of(config)}' is not beside it.")
    for rank in range(int(config.method.recorder is None), world.size):
        path = part_of_schedule(config, world, rank)
        out[rank] = PartOfSchedule(path)
        if out[rank].about["run"] != identity:
            raise UserError(f"'{path}' is of another run than '{run_file}'.")
    return out


def _alike(parts: dict[int, PartOfSchedule], threads: list[int]) -> bool:
    """Return whether this machine computes to the bit as those of the record did; warn where it may not."""
    here, there = machine(), [part.about["machine"] for part in parts.values()]
    strange = sorted({name for other in there for name in {*here, *other} if here.get(name) != other.get(name)})
    if len(threads) > 1:
        print(
            f"dbnet: Replicas had {' and '.join(map(str, threads))} threads, here all have as many; bits may differ; evaluations "
            f"are compared to {NEAR:g}.",
            file=sys.stderr,
        )
    if strange:
        names = ", ".join(f"{name} ({there[0].get(name)}, here {here.get(name)})" for name in strange)
        print(
            f"dbnet: The run was recorded elsewhere: {names}; bits may differ; evaluations are compared to {NEAR:g}.",
            file=sys.stderr,
        )
    return not strange and len(threads) < 2
