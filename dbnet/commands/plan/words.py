"""A plan in words: layers, cut, predicted times, ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dbnet.comm.topology import Role
from dbnet.commands.plan.ranks import RankPlan, process
from dbnet.commands.plan.step import replica_step
from dbnet.coordinator.heartbeat import polling
from dbnet.coordinator.progress import INTERVAL, REPLICAS
from dbnet.core.errors import UserError
from dbnet.core.toml import written
from dbnet.network.cost import Profile
from dbnet.network.partition import Cut
from dbnet.run.setup import Setup
from dbnet.shards.rules.schedules import base as schedules

# Measured: bytes of a row in the run file, and of blocks that were written before they were full, in a day.
EVENT_BYTES, PROGRESS_BYTES, REWRITTEN = 10, 60, 110e6
UPDATES = 2000
# More ranks than these of one role share a line.
EACH = 16


def gradient_seconds(cut: Cut, profile: Profile | None) -> float:
    """Return the seconds of a replica's gradient: on a machine, its ranks with a core each, or on what is assumed of any."""
    if profile is None:
        return cut.seconds
    return replica_step(profile.suited(cut.model.layout.size * cut.model.dtype.itemsize), cut).total


def cut_lines(ready: Setup, profile: Profile | None = None) -> list[str]:
    """Return what the plan says of a cut: grids, crossing values, predicted times."""
    model, cut, batch = ready.model, ready.cut, ready.config.method.minibatch
    item, lines = model.dtype.itemsize, []
    if cut.partitions > 1:
        lines += ["", f"Each replica is cut over {cut.partitions} partitions:"]
        for i, layer in enumerate(model.layers):
            crossing = cut.crossing(i)
            grid = " x ".join(map(str, cut.chosen[i]))
            lines.append(
                f"  layer {i}: {layer.kind:<8} {grid:>7} parts   {crossing:>9,} values cross below it, "
                f"{size(2 * crossing * item * batch)} per step up and down"
            )
        total = sum(cut.crossing(i) for i in range(len(model.layers)))
        lines.append(f"  in all {total:,} values per example, {size(2 * total * item * batch)} per step of {batch}")
        lines.append(f"  the loss: {cut.statistics:,} statistics per example, {size(cut.statistics * item * batch)} per step")
        if cut.shared:
            lines.append(
                f"  the gradients of {cut.shared:,} shared parameters are summed, {size(cut.shared * item)} of each partition"
            )
    where = f"{cut.machine.rate / 1e9:.0f} GFLOP/s a rank assumed" if profile is None else "each rank with a core of this machine"
    lines += ["", f"Predicted time of a step (gradient of {batch} examples; {where}):"]
    alone = gradient_seconds(Cut(model, 1, batch), profile)
    for partitions in sorted({1, 2, 4, 8, 16, cut.partitions}):
        try:
            seconds = gradient_seconds(Cut(model, partitions, batch), profile)
        except UserError:
            continue
        lines.append(f"  P = {partitions:>2}: {1e3 * seconds:9.2f} ms   {alone / seconds:5.2f} times as fast as one")
    return lines


def describe(ready: Setup, rows: Sequence[RankPlan], profile: Profile | None = None) -> str:
    """Return the plan as text."""
    model, item = ready.model, ready.model.dtype.itemsize
    n_fetch, n_push = ready.config.method.worker.intervals(ready.config, ready.data.sizes["train"])
    moved = size(model.layout.size * ready.rings.wire.itemsize) + " (bfloat16)" * ready.rings.narrow
    lines = [f"{model.layout.size:,} parameters ({model.dtype.name}), input {'x'.join(map(str, ready.data.shape))}"]
    for i, layer in enumerate(layers(ready)):
        shape, options = "x".join(map(str, layer["shape"])), ", ".join(f"{k} {_plain(v)}" for k, v in layer["options"].items())
        lines.append(
            f"  layer {i}: {layer['kind']:<8} {shape:>14} units {layer['parameters']:>14,} parameters   {options}".rstrip()
        )
    lines += [
        *cut_lines(ready, profile),
        "",
        f"Per replica a fetch moves {moved} each {n_fetch} step(s), a push as much each {n_push} step(s), "
        f"in slices of at most {size(ready.rings.slot)}, {ready.rings.slots} per ring; "
        f"all rings of a shard take {size(max(map(len, ready.users)) * ready.rings.slots * ready.rings.slot)}",
        *([] if ready.rule[0] is ready.config.rule else [schedules.words(ready.config.rule, ready.horizon)]),
        "",
    ]
    vectors = 1 + ready.config.method.receiver.vectors(ready.config)
    python = sum(process(ready, ready.topology.role(row.rank)) for row in rows)
    lines += [
        *table(ready, rows),
        "",
        f"Memory in all: {size(sum(r.memory for r in rows))}, of which {size(python)} are Python and its libraries",
        f"A checkpoint takes at most {size(vectors * model.layout.size * item)} of disk, in one part per shard; "
        f"{ready.config.checkpoint.keep} are kept, and one more while it is written",
        f"Each replica reports to the coordinator every {1e3 * polling(ready.topology):.0f} ms: "
        f"{ready.topology.copies / polling(ready.topology):,.0f} reports a second",
        f"The run file grows by at most {size(recorded(ready))} in a day of {UPDATES:,} updates a second "
        f"(record.events = '{ready.config.record.events}')",
        f"Start it with: mpirun -n {ready.topology.size} dbnet train RUN.toml",
    ]
    return "\n".join(lines)


def recorded(ready: Setup) -> float:
    """Return the bytes that a run file grows by in its first day, when every shard makes `UPDATES` a second."""
    record, day = ready.config.record, 86400
    updates, rows = UPDATES * day, min(ready.topology.replicas, REPLICAS) / INTERVAL * day
    sampled = min(updates, record.whole) + max(0, updates - record.whole) / record.every
    kept = {"all": updates, "sampled": sampled, "counts": 0}[record.events]
    return ready.topology.shards * kept * EVENT_BYTES + rows * PROGRESS_BYTES + REWRITTEN


def layers(ready: Setup) -> list[dict[str, Any]]:
    """Return each layer's kind, shape, number of parameters, and those of its options that do not stand in its shape."""
    model, out = ready.model, []
    for i, layer in enumerate(model.layers):
        count = sum(e.range.size for e in model.layout.entries if e.name.startswith(f"{i}."))
        options = {
            key: value
            for key, value in layer.model_dump().items()
            if key not in ("units", "maps") and value not in (None, "by_activation")
        }
        out.append({"kind": layer.kind, "shape": list(model.shapes[i + 1]), "parameters": count, "options": options})
    return out


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(map(str, value))
    if isinstance(value, dict):
        return written(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(ready: Setup, rows: Sequence[RankPlan]) -> list[str]:
    """Return the lines of all ranks; where there are many of a role they share one, with the least and the most of each figure."""
    world = ready.topology
    alike: dict[tuple[Role, bool], list[RankPlan]] = {}
    for row in rows:
        alike.setdefault((world.role(row.rank), row.owns.endswith(", spare")), []).append(row)
    form = "{:>9}  {:<26} {:<50} {:>22} {:>22}".format
    lines = [form("rank", "role", "owns", "moved per step", "memory")]
    for (role, spare), own in alike.items():
        if len(own) <= EACH:
            lines += [form(r.rank, r.name, r.owns, size(r.per_step), size(r.memory)) for r in own]
            continue
        name = f"{len(own)} shards" if role is Role.SERVE else f"{len(own)} ranks of {'spare ' if spare else ''}replicas"
        owned = [int(row.owns.split()[0]) for row in own] if role is Role.WORK else [part.size for part in ready.ranges]
        words = f"{_least_to_most(owned, '{:,}'.format)} parameters each"
        moved, memory = (_least_to_most([getattr(r, key) for r in own], size) for key in ("per_step", "memory"))
        lines.append(form(f"{own[0].rank}-{own[-1].rank}", name, words, moved, memory))
    return lines


def _least_to_most(values: Sequence[int], words: Callable[[float], str]) -> str:
    low, high = words(min(values)), words(max(values))
    return low if low == high else f"{low} - {high}"


def size(nbytes: float) -> str:
    """Return bytes in words, like 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
