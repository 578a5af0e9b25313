"""Say in words what is in a run file, a checkpoint or a data file."""

from __future__ import annotations

import datetime
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.checkpoint.format import part_of
from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.verify import damage
from dbnet.comm.topology import Topology
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.files import UNREADABLE, reading
from dbnet.core.registry import named, own_modules
from dbnet.core.untrusted.opening import opened, require_file
from dbnet.data.file import DataFile
from dbnet.monitor.many.frames import summary
from dbnet.monitor.results import Run, bar, bulk, lateness, reached

# More shards than these are not listed one by one.
_EACH = 8


def describe(path: str) -> str:
    """Return the description of any of dbnet's files; UserError where it is none."""
    if not Path(path).exists():
        raise UserError(f"No file '{path}'.")
    with reading(path, "give a run file, a checkpoint or a data file"), opened(path, growing=True, virtual=True) as file:
        names = set(file)
    for name, words in (("progress", _run), ("params", _checkpoint), ("train", _data)):
        if name in names:
            with reading(path, "it is damaged or not dbnet's"):
                return words(path)
    raise UserError(
        f"'{path}' is neither a run file, a checkpoint nor a data file of dbnet; it holds {', '.join(sorted(names)) or 'nothing'}."
    )


def facts(path: str) -> dict[str, Any]:
    """Return what `describe` says, for scripts: plain values that JSON can hold; UserError where the file is none of dbnet's."""
    kind = describe(path).partition(",")[0].partition(" of")[0].partition(" '")[0]
    with reading(path, "it is damaged or not dbnet's"):
        made = {"run file": _run_facts, "checkpoint": _checkpoint_facts, "data file": _data_facts}[kind](path)
    return json.loads(json.dumps({"file": path, "kind": kind, **made}, default=str), parse_constant=lambda _: None)


def _run_facts(path: str) -> dict[str, Any]:
    run = Run(path)
    late = [lateness(row)._asdict() for row in run.staleness.to_numpy().T]
    return {
        **summary(run),
        "evaluated": run.part,
        "about": run.about,
        "config": json.loads(run.config.text()),
        "rows": {name: len(getattr(run, name)) for name in ("progress", "evaluation", "iterations", "events", "refused")},
        "lost": run.lost.to_dict("records"),
        "staleness_by_shard": late,
        "occupancy_by_shard": run.occupancy.tolist(),
    }


def _checkpoint_facts(path: str) -> dict[str, Any]:
    point = Checkpoint(path)
    return {
        "path": str(point.path),
        "seconds": float(point.seconds),
        "steps": int(point.steps),
        "written": _when(point.written),
        "registers": list(point.registers),
        "parameters": int(point.size),
        "dtype": str(point.dtype),
        "layout": [{"name": name, "offset": int(offset), "shape": list(map(int, shape))} for name, offset, shape in point.layout],
        "clocks": [int(clock.max()) for clock in point.clock],
        "replicas": [{name: int(row[name]) for name in ("steps", "pushes", "epoch", "position")} for row in point.replicas],
        "config": json.loads(point.config.text()),
        "came_from": [tree["run"]["name"] for tree in point.chain],
    }


def _data_facts(path: str) -> dict[str, Any]:
    data = DataFile(path)
    return {
        "name": data.name,
        "shape": list(map(int, data.shape)),
        "classes": int(data.classes),
        "targets": int(data.targets),
        "dtype": str(data.dtype),
        "scale": float(data.scale),
        "class_names": data.class_names,
        "normalization": None if data.normalization is None else data.normalization.plain(),
        "sizes": {part: int(n) for part, n in data.sizes.items()},
        "source": data.source,
        "doubts": list(data.doubts),
    }


def stored_config(path: str) -> Config:
    """Return the configuration that a run file or a checkpoint was made with."""
    words = describe(path)
    if words.startswith("data file"):
        raise UserError(f"'{path}' is a data file; only run files and checkpoints hold a configuration.")
    return Run(path).config if words.startswith("run file") else Checkpoint(path).config


def modules(path: str) -> str:
    """Return the text of the own modules that an output holds, as text that does nothing to a terminal."""
    config, run = stored_config(path), describe(path).startswith("run file")
    with reading(path, "it is damaged or not dbnet's"):
        entries = own_modules(Run(path).about["modules"], config.model.modules) if run else Checkpoint(path).modules
    found = "".join(f"# {entry['path']}, SHA-256 {entry['sha256']}\n{entry['text']}" for entry in entries)
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in found.removesuffix("\n"))


def _modules(entries: list[dict[str, str]]) -> list[str]:
    """Return the line that names own modules, if there are any."""
    return [f"  own modules  {named(entries)}"] if entries else []


def verify(path: str) -> tuple[bool, str]:
    """Read every byte of a checkpoint; return whether it is whole, and what is to be said of it."""
    if not Path(path).exists():
        raise UserError(f"No file '{path}'.")
    require_file(path)
    other = None
    with suppress(UserError, *UNREADABLE), opened(path, growing=True, virtual=True) as file:
        other = next((word for name, word in (("progress", "run file"), ("train", "data file")) if name in file), None)
    if other is not None:
        raise UserError(f"'{path}' is a {other}; only checkpoints have checksums.")
    flaws = damage(path)
    if flaws:
        return False, "\n".join(f"damaged: {flaw}" for flaw in flaws)
    point = Checkpoint(path)
    files = [point.path, *(part_of(point.path, shard) for shard in range(len(point.ranges)))]
    return True, f"'{path}' is whole: {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes read."


def _run(path: str) -> str:
    run = Run(path)
    state = "finished" if run.finished else "stopped by a signal" if run.stopped else "not finished"
    lines = [
        f"run file, {state}, started {run.about['started']}",
        f"  topology     {Topology.of(run.config.topology).words()}",
        f"  network      {run.about['parameters']:,} parameters, {', '.join(layer.kind for layer in run.config.model.layers)}",
        f"  method       {run.config.method.kind}, {_how(run)}",
        f"  source       revision {run.about['revision']}; {run.about['mpi']}; hosts {', '.join(sorted(set(run.about['hosts'])))}",
        f"  recorded     {len(run.progress)} progress rows, {len(run.evaluation)} evaluations, {len(run.events)} updates",
    ]
    if len(run.refused):
        pushes = run.refused.drop_duplicates(["replica", "push"]).groupby("replica").size()
        by = ", ".join(f"replica {r}: {n}" for r, n in pushes.items())
        lines.append(f"  refused      {pushes.sum()} pushes whose gradient is not finite ({by})")
    if len(run.iterations):
        last = run.iterations.iloc[-1]
        lines.append(f"  iterations   {last.iteration:.0f}, loss {last.loss:.6g}, gradient norm {last.gradient_norm:.2e}")
    for row in run.lost.itertuples():
        lines.append(
            f"  lost         replica {row.replica} at {row.seconds:.1f} s, {row.applied} of its {row.steps} gradients applied"
        )
    lines += _modules(run.about["modules"])
    if "idle" in run.about:
        lines.append(f"  idle         servers {run.about['idle']}")
    if "resumed_from" in run.about:
        lines.append(f"  resumed from {run.about['resumed_from']}")
    if len(run.evaluation):
        last = run.evaluation.iloc[-1]
        words = ", ".join(reached(run, last)) or f"no {run.part} set"
        lines.append(f"  last         {words} after {last.epochs:.1f} epochs, {last.seconds:.1f} s")
    if words := busy_words(run):
        lines.append(f"  shards       {words}")
    return "\n".join([*lines, *stale_lines(run.staleness.to_numpy().T)])


def busy_words(run: Run) -> str:
    """Return how busy the shards were, in words; nothing where nobody knows."""
    least, most = 100 * run.occupancy.min(), 100 * run.occupancy.max()
    if not most >= 0:
        return ""
    low = f"{least:.0f} to " if round(least) < round(most) else ""
    return f"busy {low}{most:.0f} % of the time"


def stale_lines(counts: np.ndarray) -> list[str]:
    """Return what is to be said of staleness [shards, bins]: a line per shard, or of many their sum and the two extremes."""
    found = [lateness(row) for row in counts]
    total, bins = lateness(counts.sum(axis=0)), bulk(counts.sum(axis=0))
    if not total.updates:
        return ["  staleness    no updates yet"]
    if not total.largest:
        return [f"  staleness    0: none of {total.updates:,} updates came in between a fetch and its push"]
    rows = [(f"shard {shard}", late, counts[shard]) for shard, late in enumerate(found)]
    if len(rows) > _EACH:
        known = [row for row in rows if row[1].updates]
        rows = [min(known, key=lambda row: row[1].mean), max(known, key=lambda row: row[1].mean)]
    if len(found) > 1:
        rows = [(f"{len(found)} shards", total, counts.sum(axis=0)), *rows]
    lines = [f"  staleness    {'updates':>11}     mean  median  95 %  most  from 0 to {bins - 1}"]
    for name, late, own in rows:
        numbers = f"{late.updates:>11,} {late.mean:>8.2f} {late.median:>7} {late.q95:>5} {late.most:>5}"
        lines.append(f"    {name:<10} {numbers}  {bar(own[:bins], 32)}".rstrip())
    return lines


def _how(run: Run) -> str:
    """Return what moves the parameters."""
    return run.config.method.descent.kind if len(run.iterations) else f"rule {run.config.rule.kind}"


def _checkpoint(path: str) -> str:
    point = Checkpoint(path)
    lines = [
        f"checkpoint of a run named '{point.config.run.name}', {point.seconds:.1f} s of training, written {_when(point.written)}",
        f"  files        {point.path} and {len(point.ranges)} parts",
        f"  registers    {', '.join(point.registers)}; {point.size:,} numbers each ({point.dtype})",
        *(f"    {name:<20} {'x'.join(map(str, shape)):>16} from {offset}" for name, offset, shape in point.layout),
        f"  clocks       {_spread([int(clock.max()) for clock in point.clock])} (updates of each shard)",
    ]
    if len(point.replicas) > _EACH:
        words = (f"{word} {_spread(point.replicas[name].tolist())}" for word, name in (("steps", "steps"), ("epochs", "epoch")))
        lines.append(f"  replicas     {len(point.replicas)}: {', '.join(words)}")
    for index, row in enumerate(point.replicas[: _EACH if len(point.replicas) <= _EACH else 0]):
        lines.append(
            f"  replica {index}    step {row['steps']}, push {row['pushes']}, epoch {row['epoch']} at example {row['position']}"
        )
    lines += _modules(point.modules)
    if point.chain:
        lines.append(f"  came from    {', '.join(tree['run']['name'] for tree in point.chain)}")
    for name, rows in point.tables.items():
        lines.append(f"  table        {name}: {len(rows)} rows of {', '.join(rows.dtype.names or ())}")
    return "\n".join(lines)


def _spread(numbers: list[int]) -> str:
    """Return a few numbers, or of many the least and the largest."""
    if len(numbers) <= _EACH:
        return ", ".join(map(str, numbers))
    low, high = min(numbers), max(numbers)
    return f"{low} in each of {len(numbers)}" if low == high else f"{low} to {high} in {len(numbers)}"


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def _normalized(data: DataFile) -> str:
    if data.normalization is None:
        return ""
    each = "map" if data.normalization.mean.shape != data.shape else "unit"
    return f"; normalized: mean 0 and spread 1 of each {each} on the training set"


def _few(names: list[str]) -> str:
    """Return the first names."""
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:_EACH])
    return shown if len(names) <= _EACH else f"{shown}, ... ({len(names)})"


def _data(path: str) -> str:
    data = DataFile(path)
    targets = f"{data.classes} classes" if data.classes else f"vector targets of {data.targets} units"
    return "\n".join(
        [
            f"data file '{data.name}': examples of {'x'.join(map(str, data.shape))} units, {targets}",
            f"  values {data.dtype}, times {data.scale:g}{_normalized(data)}",
            *(f"  {part:<6} {n} examples" for part, n in data.sizes.items()),
            *([f"  classes {_few(data.class_names)}"] if data.class_names else []),
            f"  source {data.source}",
            *(f"  beware {doubt}" for doubt in data.doubts),
        ]
    )
