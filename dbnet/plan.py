"""What a run will need, computed without MPI: roles, ranges, bytes per fetch and push, memory of every rank."""

from __future__ import annotations

from typing import NamedTuple

from dbnet.errors import UserError
from dbnet.network import Network
from dbnet.run import EVALUATION_BATCH, Setup, window_layouts
from dbnet.topology import Role


class RankPlan(NamedTuple):
    """One rank's part of a plan; bytes."""

    rank: int
    name: str
    owns: str
    per_step: int
    memory: int


def per_fetch(ready: Setup) -> int:
    """Return the bytes of one fetch (and of one push) of one replica."""
    return ready.model.layout.size * ready.model.dtype.itemsize


def ranks(ready: Setup) -> list[RankPlan]:
    """Return the plan of every rank, in order."""
    world, model, method = ready.topology, ready.model, ready.config.method
    windows, out = window_layouts(ready), []
    rule, item = ready.config.members()[2], model.dtype.itemsize
    for rank in range(world.size):
        name = world.name(rank)
        if world.role(rank) is Role.COORDINATE:
            out.append(RankPlan(rank, name, "no parameters", 0, windows[rank].nbytes))
        elif world.role(rank) is Role.SERVE:
            part = ready.ranges[rank - 1]
            state = part.size * item * len(rule.state)
            moved = world.origins * part.size * item
            bytes_per_step = moved // method.n_fetch + moved // method.n_push
            out.append(RankPlan(rank, name, f"parameters {part.lo} .. {part.hi}", bytes_per_step, windows[rank].nbytes + state))
        else:
            replica = world.place(rank)[0]
            examples = ready.data.subset(replica, world.replicas, ready.config.run.seed).size
            moved = per_fetch(ready)
            bytes_per_step = moved // method.n_fetch + moved // method.n_push
            out.append(RankPlan(rank, name, f"{examples} examples", bytes_per_step, replica_memory(ready, examples)))
    return out


def replica_memory(ready: Setup, examples: int) -> int:
    """Return the bytes of one replica: parameters, gradients, activations, data."""
    model, config = ready.model, ready.config
    method = config.method
    vectors = 3 + 2 * method.overlap + (method.n_push > 1 and method.n_fetch > 1)
    activations = Network.nbytes(model, method.minibatch, True) + Network.nbytes(model, EVALUATION_BATCH, False)
    row = 1
    for n in ready.data.shape:
        row *= n
    watched = ready.data.sizes.get("test", 0) + min(config.evaluate.train, ready.data.sizes["train"])
    return vectors * per_fetch(ready) + activations + (examples + watched) * row * ready.data.dtype.itemsize


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


def describe(ready: Setup) -> str:
    """Return the plan as text."""
    model, method = ready.model, ready.config.method
    lines = [f"{model.layout.size:,} parameters ({model.dtype.name}), input {'x'.join(map(str, ready.data.shape))}"]
    for i, layer in enumerate(model.layers):
        shape, n = (
            "x".join(map(str, model.shapes[i + 1])),
            sum(e.range.size for e in model.layout.entries if e.name.startswith(f"{i}.")),
        )
        lines.append(f"  layer {i}: {layer.kind:<8} {shape:>14} units {n:>14,} parameters")
    lines += [
        "",
        f"Per fetch and replica: {size(per_fetch(ready))} each {method.n_fetch} step(s); per push: {size(per_fetch(ready))} each "
        f"{method.n_push} step(s), in slices of at most {size(method.slot)}, {method.slots} per ring",
        "",
        f"{'rank':>4}  {'role':<22} {'owns':<32} {'moved per step':>15} {'memory':>10}",
    ]
    rows = ranks(ready)
    lines += [f"{r.rank:>4}  {r.name:<22} {r.owns:<32} {size(r.per_step):>15} {size(r.memory):>10}" for r in rows]
    lines += [
        "",
        f"Memory in all: {size(sum(r.memory for r in rows))}",
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
