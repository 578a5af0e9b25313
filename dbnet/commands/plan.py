"""What a run will need, computed without MPI: roles, ranges, bytes per fetch and push, memory of every rank.

Memory is all that a rank holds at its worst: the process with its libraries, its window, the vectors, the networks' arrays, and
the data. What a shard holds beside its parameters the method's receiver says (`vectors`). A rank that compiles kernels takes
more for a while; that is the batch script's matter (`slurm`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from dbnet.comm.topology import Role
from dbnet.commands.base import add_run_file
from dbnet.commands.slurm import script
from dbnet.core import config as configuration
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, overlap, size_of
from dbnet.network.exchange import Exchange
from dbnet.network.model import Piece, footprint
from dbnet.network.network import Network
from dbnet.network.partition import Cut
from dbnet.run.roles import window_layouts
from dbnet.run.setup import EVALUATION_BATCH, Setup, first_shares, setup

# Measured, see tests/system/mpi/test_memory.py: Python, its libraries and MPI; what HDF5 holds of each register that it saves.
PROCESS, WRITING = 233 << 20, 8 << 20


class RankPlan(NamedTuple):
    """One rank's part of a plan; bytes."""

    rank: int
    name: str
    owns: str
    per_step: int
    memory: int


def ranks(ready: Setup) -> list[RankPlan]:
    """Return the plan of every rank, in order."""
    world, model = ready.topology, ready.model
    windows, out = window_layouts(ready), []
    item, (n_fetch, n_push) = model.dtype.itemsize, ready.config.method.worker.intervals(ready.config, ready.data.sizes["train"])
    needs = [partition_memory(ready, p) for p in range(world.partitions)]
    parts = [footprint(model, boxes, leads=p == 0) for p, boxes in enumerate(ready.cut.boxes)]
    for rank in range(world.size):
        name = world.name(rank)
        if world.role(rank) is Role.COORDINATE:
            out.append(RankPlan(rank, name, "no parameters", 0, PROCESS + windows[rank].nbytes))
        elif world.role(rank) is Role.SERVE:
            part = ready.ranges[rank - 1]
            vectors = ready.config.method.receiver.vectors(ready.config)
            state = vectors * part.size * item + (1 + vectors) * min(WRITING, part.size * item) + WRITING
            fetched = sum(_common(p.used, part) for p in parts) * world.replicas * item
            pushed = sum(_common(p.pushed, part) for p in parts) * world.replicas * item
            moved = fetched // n_fetch + pushed // n_push
            owns = f"parameters {part.lo} .. {part.hi}"
            out.append(RankPlan(rank, name, owns, moved, PROCESS + windows[rank].nbytes + state))
        else:
            replica, partition = world.place(rank)
            examples = sum(share.size for share in first_shares(ready, replica))
            mine, touched = parts[partition], [s for s, part in enumerate(ready.ranges) if _common(parts[partition].used, part)]
            pushed = sum(piece.range.size for piece in mine.pushed)
            moved = mine.size * item // n_fetch + pushed * item // n_push
            data = f"{examples} examples" if replica < world.replicas else "spare"
            owns = f"{mine.size} parameters, shards {_span(touched)}, {data}"
            out.append(RankPlan(rank, name, owns, moved, needs[partition] + data_memory(ready, partition, examples)))
    return out


def _common(pieces: list[Piece], part: Range) -> int:
    return sum(overlap(piece.range, part).size for piece in pieces)


def _span(numbers: list[int]) -> str:
    """Write sorted numbers shortly, like 0-3 or 0 2."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return " ".join(map(str, numbers)) or "none"


class _Nobody:
    """Stands for the link to partitions that are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sender(self, *_: Any) -> None:
        """Nothing is sent."""

    receiver = sender


def network_memory(ready: Setup, partition: int, batch: int, training: bool) -> int:
    """Return the bytes of one partition's network with `batch` columns, from those of one column and of two."""
    cut, found = ready.cut, []
    for columns in (1, 2):
        network = Network(ready.model, columns, cut.boxes[partition] if cut.partitions > 1 else None, training)
        nbytes = network.nbytes
        if cut.partitions > 1:
            nbytes += Exchange(_Nobody(partition, cut.partitions), cut, network).nbytes
        found.append(nbytes)
    return found[0] + (batch - 1) * (found[1] - found[0])


def partition_memory(ready: Setup, partition: int) -> int:
    """Return the bytes of one partition of a replica without its data: process, parameters and gradients, networks."""
    model, config = ready.model, ready.config
    size = footprint(model, ready.cut.boxes[partition], leads=partition == 0).size
    batch = ready.config.method.worker.batch(config, ready.data.sizes["train"])
    watched = ready.data.sizes.get("test") or config.evaluate.train
    networks = network_memory(ready, partition, batch, True)
    networks += network_memory(ready, partition, EVALUATION_BATCH if watched else batch, False)
    return PROCESS + (ready.config.method.worker.copies(config) + 1) * size * model.dtype.itemsize + networks


def data_memory(ready: Setup, partition: int, own: int) -> int:
    """Return the bytes of the examples that one partition of a replica holds, `own` of them its share."""
    data, config, item = ready.data, ready.config, ready.model.dtype.itemsize
    units = size_of(ready.cut.boxes[partition][0]) if ready.cut.partitions > 1 else prod(data.shape)
    trained = ready.config.method.worker.kept(config, data.sizes["train"], own)
    watched = data.sizes.get("test", 0) + min(config.evaluate.train, data.sizes["train"])
    # Beside x: the target, in its own type as well where it is a vector, the example's number, its place in the order.
    each = units * (1 if data.dtype == "u1" else item) + (2 * 8 * data.targets or 8) + 2 * 8
    return (trained + watched) * each


def cut_lines(ready: Setup) -> list[str]:
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
    lines += ["", f"Predicted time of a step (gradient of {batch} examples; {cut.machine.rate / 1e9:.0f} GFLOP/s a rank assumed):"]
    alone = Cut(model, 1, batch).seconds
    for partitions in sorted({1, 2, 4, 8, 16, cut.partitions}):
        try:
            seconds = Cut(model, partitions, batch).seconds
        except UserError:
            continue
        lines.append(f"  P = {partitions:>2}: {1e3 * seconds:9.2f} ms   {alone / seconds:5.2f} times as fast as one")
    return lines


def check_size(ready: Setup, n: int) -> None:
    """Raise UserError, with a topology that would fit, where the run file does not make a world of `n` ranks."""
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


def describe(ready: Setup, rows: Sequence[RankPlan]) -> str:
    """Return the plan as text."""
    model, method, item = ready.model, ready.config.method, ready.model.dtype.itemsize
    n_fetch, n_push = ready.config.method.worker.intervals(ready.config, ready.data.sizes["train"])
    lines = [f"{model.layout.size:,} parameters ({model.dtype.name}), input {'x'.join(map(str, ready.data.shape))}"]
    for i, layer in enumerate(model.layers):
        shape, n = (
            "x".join(map(str, model.shapes[i + 1])),
            sum(e.range.size for e in model.layout.entries if e.name.startswith(f"{i}.")),
        )
        lines.append(f"  layer {i}: {layer.kind:<8} {shape:>14} units {n:>14,} parameters")
    lines += [
        *cut_lines(ready),
        "",
        f"Per replica a fetch moves {size(model.layout.size * item)} each {n_fetch} step(s), a push as much each "
        f"{n_push} step(s), in slices of at most {size(ready.rings.slot)}, {method.slots} per ring",
        "",
        f"{'rank':>4}  {'role':<22} {'owns':<50} {'moved per step':>15} {'memory':>10}",
    ]
    vectors = 1 + ready.config.method.receiver.vectors(ready.config)
    lines += [f"{r.rank:>4}  {r.name:<22} {r.owns:<50} {size(r.per_step):>15} {size(r.memory):>10}" for r in rows]
    lines += [
        "",
        f"Memory in all: {size(sum(r.memory for r in rows))}, of which {size(PROCESS)} a rank for Python and its libraries",
        f"A checkpoint takes at most {size(vectors * model.layout.size * item)} of disk, in one part per shard; "
        f"{ready.config.checkpoint.keep} are kept, and one more while it is written",
        f"Start it with: mpirun -n {ready.topology.size} dbnet train RUN.toml",
    ]
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Return bytes in words, like 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


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
        Path of a run file (TOML), nested tables like those of one, or a configuration.
    overrides
        Changes like "topology.replicas=4".

    Returns
    -------
    Roles, ranges, memory (bytes, per rank and in all) and bytes per step; print it to read it.

    Raises
    ------
    UserError
        The run file, the data or the network do not fit each other; one sentence says what to mend.
    """
    overrides = overrides if isinstance(overrides, str) else list(overrides)
    ready = setup(configuration.load(source, overrides))
    return planned(ready, [str(source) if isinstance(source, str | Path) else "RUN.toml", *overrides])


def planned(ready: Setup, words: Sequence[str]) -> Plan:
    """Return the plan of a run that `words` start: its run file and the changes."""
    rows, world = ranks(ready), ready.topology
    moved = sum(row.per_step for row in rows if world.role(row.rank) is Role.SERVE)
    text = describe(ready, rows).replace("RUN.toml", " ".join(words))
    return Plan(rows, sum(row.memory for row in rows), moved, ready.doubts(), text)


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("-n", type=int, metavar="N", help="number of ranks that will be started; checked against the run file")
    parser.add_argument("--config", action="store_true", help="print the effective configuration as a run file instead")
    parser.add_argument("--ranks", action="store_true", help="print just the number of ranks, for scripts")
    parser.add_argument("--slurm", action="store_true", help="print a batch script for Slurm instead")
    parser.add_argument("--nodes", type=int, metavar="N", help="--slurm: nodes; default: as few as have a core for each rank")
    parser.add_argument("--cores", type=int, metavar="C", help="--slurm: cores of a node, shared by its ranks; default: one a rank")
    parser.add_argument("--time", default="01:00:00", metavar="HH:MM:SS", help="--slurm: time limit (default: 01:00:00)")


def run_plan(options: argparse.Namespace) -> None:
    # Scripts count the ranks; the run itself says the rest.
    config = configuration.load(options.run_file, options.overrides, *([lambda _: None] if options.ranks else []))
    if options.config:
        print(configuration.to_toml(config))
        return
    if options.ranks:
        print(config.topology.world)
        return
    ready, words = setup(config), [options.run_file, *options.overrides]
    if options.n is not None:
        check_size(ready, options.n)
    if options.slurm:
        needs = [rank.memory for rank in ranks(ready)]
        print(script(config, needs, words, nodes=options.nodes, cores=options.cores, time=options.time), end="")
        return
    made = planned(ready, words)
    configuration.warn(*made.doubts)
    print(made)
