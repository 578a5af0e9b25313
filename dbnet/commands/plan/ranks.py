"""What every rank of a run owns, moves and needs, computed without MPI.

Memory is all that a rank holds at its worst: the process with its libraries, its window, the vectors, the networks' arrays, and
the data. What a shard holds beside its parameters the method's receiver says (`vectors`). A rank that compiles kernels takes
more for a while; that is the batch script's matter (`slurm`).
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from dbnet.comm.topology import Role
from dbnet.core.ranges import Range, overlap, size_of
from dbnet.network.exchange import Exchange
from dbnet.network.model import Piece, footprint
from dbnet.network.network import Network
from dbnet.run.roles import compiles, window_layouts
from dbnet.run.setup import EVALUATION_BATCH, Setup, first_shares

# Measured, see tests/system/mpi/test_memory.py: Python, MPI and the libraries that a role uses; what HDF5 holds of each register
# that it saves.
PROCESS = {Role.COORDINATE: 148 << 20, Role.SERVE: 141 << 20, Role.WORK: 153 << 20}
# The compiler, where kernels need it at every start: on whoever computes, and on the first rank of a host, which readies them.
COMPILER = 70 << 20
WRITING = 8 << 20


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
    item, wire, method = model.dtype.itemsize, ready.rings.wire.itemsize, ready.config.method
    n_fetch, n_push = method.worker.intervals(ready.config, ready.data.sizes["train"])
    needs = [partition_memory(ready, p) for p in range(world.partitions)]
    parts = [footprint(model, boxes, leads=p == 0) for p, boxes in enumerate(ready.cut.boxes)]
    for rank in range(world.size):
        name = world.name(rank)
        if world.role(rank) is Role.COORDINATE:
            out.append(RankPlan(rank, name, "no parameters", 0, process(ready, Role.COORDINATE) + windows[rank].nbytes))
        elif world.role(rank) is Role.SERVE:
            part = ready.ranges[rank - 1]
            vectors = method.receiver.vectors(ready.config)
            state = vectors * part.size * item + (1 + vectors) * min(WRITING, part.size * item) + WRITING
            state += method.narrow * ready.rings.elements * item
            fetched = sum(_common(p.used, part) for p in parts) * world.replicas * wire
            pushed = sum(_common(p.pushed, part) for p in parts) * world.replicas * wire
            moved = fetched // n_fetch + pushed // n_push
            owns = f"parameters {part.lo} .. {part.hi}"
            out.append(RankPlan(rank, name, owns, moved, process(ready, Role.SERVE) + windows[rank].nbytes + state))
        else:
            replica, partition = world.place(rank)
            examples = sum(share.size for share in first_shares(ready, replica))
            mine, touched = parts[partition], [s for s, part in enumerate(ready.ranges) if _common(parts[partition].used, part)]
            pushed = sum(piece.range.size for piece in mine.pushed)
            moved = mine.size * wire // n_fetch + pushed * wire // n_push
            data = f"{examples} examples" if replica < world.replicas else "spare"
            owns = f"{mine.size} parameters, shards {_span(touched)}, {data}"
            out.append(RankPlan(rank, name, owns, moved, needs[partition] + data_memory(ready, partition, examples)))
    return out


def process(ready: Setup, role: Role) -> int:
    """Return the bytes of a rank's process by itself: Python, MPI and the libraries."""
    return PROCESS[role] + COMPILER * (role is not Role.SERVE and compiles(ready.config))


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
    watched = ready.data.sizes.get(config.evaluate.part) or config.evaluate.train
    networks = network_memory(ready, partition, batch, True)
    networks += network_memory(ready, partition, EVALUATION_BATCH if watched else batch, False)
    # What travels as bfloat16 is put together apart.
    carried = config.method.narrow * (size + ready.rings.elements) * ready.rings.wire.itemsize
    return process(ready, Role.WORK) + (config.method.worker.copies(config) + 1) * size * model.dtype.itemsize + carried + networks


def data_memory(ready: Setup, partition: int, own: int) -> int:
    """Return the bytes of the examples that one partition of a replica holds, `own` of them its share."""
    data, config, item = ready.data, ready.config, ready.model.dtype.itemsize
    units = size_of(ready.cut.boxes[partition][0]) if ready.cut.partitions > 1 else prod(data.shape)
    trained = ready.config.method.worker.kept(config, data.sizes["train"], own)
    watched = data.sizes.get(ready.config.evaluate.part, 0) + min(config.evaluate.train, data.sizes["train"])
    # Beside x: the target, in its own type as well where it is a vector, the example's number, its place in the order.
    each = units * (1 if data.dtype == "u1" else item) + (2 * 8 * data.targets or 8) + 2 * 8
    return (trained + watched) * each
