"""Say in words what is in a run file, a checkpoint or a data file."""

from __future__ import annotations

from pathlib import Path

from dbnet.checkpoint import Checkpoint
from dbnet.config import Config
from dbnet.data.base import DataFile
from dbnet.errors import UserError, reading
from dbnet.monitor import Run, open_growing


def describe(path: str) -> str:
    """Return the description of any of dbnet's files; UserError where it is none."""
    if not Path(path).exists():
        raise UserError(f"No file '{path}'.")
    with reading(path, "give a run file, a checkpoint or a data file"), open_growing(path) as file:
        names = set(file)
    for name, words in (("progress", _run), ("params", _checkpoint), ("train", _data)):
        if name in names:
            with reading(path, "it is damaged or not dbnet's"):
                return words(path)
    raise UserError(
        f"'{path}' is neither a run file, a checkpoint nor a data file of dbnet; it holds {', '.join(sorted(names)) or 'nothing'}."
    )


def stored_config(path: str) -> Config:
    """Return the configuration that a run file or a checkpoint was made with."""
    words = describe(path)
    if words.startswith("data file"):
        raise UserError(f"'{path}' is a data file; only run files and checkpoints hold a configuration.")
    return Run(path).config if words.startswith("run file") else Checkpoint(path).config


def _run(path: str) -> str:
    run = Run(path)
    world = run.config.topology
    lines = [
        f"run file, {'finished' if run.finished else 'not finished'}, started {run.about['started']}",
        f"  topology     1 coordinator + {world.shards} shards + {world.replicas} replicas x {world.partitions} partitions",
        f"  network      {run.about['parameters']:,} parameters, {', '.join(layer['kind'] for layer in run.config.model.layers)}",
        f"  method       {run.config.method.kind}, {_how(run)}",
        f"  source       revision {run.about['revision']}; {run.about['mpi']}; hosts {', '.join(sorted(set(run.about['hosts'])))}",
        f"  recorded     {len(run.progress)} progress rows, {len(run.evaluation)} evaluations, {len(run.events)} updates",
    ]
    if len(run.iterations):
        last = run.iterations.iloc[-1]
        lines.append(f"  iterations   {last.iteration:.0f}, loss {last.loss:.6g}, gradient norm {last.gradient_norm:.2e}")
    if "resumed_from" in run.about:
        lines.append(f"  resumed from {run.about['resumed_from']}")
    if len(run.evaluation):
        last = run.evaluation.iloc[-1]
        reached = f"test accuracy {last.test_accuracy:.4f}, loss {last.test_loss:.4f}"
        lines.append(f"  last         {reached} after {last.epochs:.1f} epochs, {last.seconds:.1f} s")
    lines += ["  staleness    (updates of each shard by staleness)"]
    lines += ["    " + line for line in run.staleness.to_string().split("\n")]
    return "\n".join(lines)


def _how(run: Run) -> str:
    """Return what moves the parameters."""
    return run.config.batch_method().kind if len(run.iterations) else f"rule {run.config.rule['kind']}"


def _checkpoint(path: str) -> str:
    point = Checkpoint(path)
    lines = [
        f"checkpoint of a run named '{point.config.run.name}', {point.seconds:.1f} s of training",
        f"  registers    {', '.join(point.registers)}; {point.size:,} numbers each ({point.dtype})",
        *(f"    {name:<20} {'x'.join(map(str, shape)):>16} from {offset}" for name, offset, shape in point.layout),
        f"  clocks       {', '.join(str(int(c.max())) for c in point.clock)} (updates of each shard)",
    ]
    for index, row in enumerate(point.replicas):
        lines.append(
            f"  replica {index}    step {row['steps']}, push {row['pushes']}, epoch {row['epoch']} at example {row['position']}"
        )
    return "\n".join(lines)


def _data(path: str) -> str:
    data = DataFile(path)
    targets = f"{data.classes} classes" if data.classes else f"vector targets of {data.targets} units"
    return "\n".join(
        [
            f"data file '{data.name}': examples of {'x'.join(map(str, data.shape))} units, {targets}",
            f"  values {data.dtype}, times {data.scale:g}",
            *(f"  {part:<6} {n} examples" for part, n in data.sizes.items()),
            f"  source {data.source}",
        ]
    )
