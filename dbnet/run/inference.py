"""Use a checkpoint: loss and accuracy on a data file, or predictions written to a file; under mpirun the network is cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm import mpi
from dbnet.comm.communicators import cores_for, crowded, node_of
from dbnet.comm.link import MpiLink
from dbnet.core import jit
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken, writing
from dbnet.core.ranges import flatten, size_of
from dbnet.core.registry import is_running, named, run_module
from dbnet.data.batches import Batches
from dbnet.data.file import DataFile, Examples, read_inputs
from dbnet.network.model import footprint
from dbnet.network.partition import Cut
from dbnet.network.replica import Replica, Score
from dbnet.run.predictions import check, predictions, write
from dbnet.run.roles import use
from dbnet.run.setup import EVALUATION_BATCH, make_model


class Judge:
    """A network with the parameters of a checkpoint, on one rank or cut over all ranks of `comm`.

    Parameters
    ----------
    path
        The checkpoint.
    comm
        MPI's world communicator, every rank of it a partition; None: this process alone.
    threads
        For the kernels.
    trust
        Whether own modules that the checkpoint holds may be run.

    Attributes
    ----------
    columns
        The input units that this rank needs; None: all.
    """

    def __init__(self, path: str, comm: Any, threads: int, trust: bool) -> None:
        self.checkpoint, self.comm = Checkpoint(path), comm
        run_modules(path, self.checkpoint.modules, trust)
        about, config = self.checkpoint.data, self.checkpoint.config
        self.model = make_model(config, tuple(about["shape"]), about["outputs"], about["vectors"])
        self.checkpoint.require(self.model)
        use(config, threads)
        self.cut = Cut(self.model, 1 if comm is None else comm.size, EVALUATION_BATCH, given=False)
        self.boxes = self.cut.boxes[0 if comm is None else comm.rank]
        self.columns = self.model.columns(self.boxes)
        used, _, size = footprint(self.model, self.boxes, leads=True)
        self.w = np.empty(size, self.model.dtype)
        for piece in used:
            self.checkpoint.read("params", piece.range, self.w[piece.at : piece.at + piece.range.size])

    @contextmanager
    def replica(self, batches: Batches) -> Iterator[Replica]:
        """Give a replica that evaluates these examples."""
        if self.comm is None:
            yield Replica(self.model, batches, {"test": batches}, 0)
            return
        link = MpiLink(self.comm, self.checkpoint.config.run.deadline, crowded(node_of(self.comm)))
        yield Replica(self.model, batches, {"test": batches}, 0, (self.cut, link))
        link.close()

    def gather(self, values: np.ndarray) -> np.ndarray | None:
        """Return all output units [n, outputs] from every rank's own [n, units]; None on all ranks but the first."""
        if self.comm is None:
            return values
        parts = self.comm.gather((flatten(self.boxes[-1], self.model.shapes[-1]), values))
        if parts is None:
            return None
        out = np.zeros((len(values), self.checkpoint.data["outputs"]), values.dtype)
        for ranges, part in parts:
            at = 0
            for r in ranges:
                out[:, r.slice] = part[:, at : at + r.size]
                at += r.size
        return out


def run_modules(path: str, entries: list[dict[str, str]], trust: bool) -> None:
    """Run the own modules that a checkpoint holds, as they were when it was written; UserError where that wants `trust`."""
    strange = [entry for entry in entries if not is_running(entry)]
    if strange and not trust:
        raise UserError(
            f"'{path}' holds Python code that would be run: {named(strange)}. 'dbnet inspect {path} --modules' prints it, and "
            "--trust-modules runs it."
        )
    for entry in entries:
        file = jit.cache() / "modules" / entry["sha256"] / "own.py"
        # Numba wants a file, and so does whoever reads a traceback.
        if not file.exists() or file.read_bytes() != entry["text"].encode():
            with writing(file) as part:
                part.write_bytes(entry["text"].encode())
        run_module(entry, file)


def evaluate(path: str, data_path: str | None, part: str, comm: Any = None, trust: bool = False) -> tuple[Score, int]:
    """Return the score (its test fields) and the number of examples of one part of a data file, by default the run's own."""

    def prepare() -> tuple[Judge, Batches]:
        judge = Judge(path, comm, threads, trust)
        data, model = DataFile(data_path or judge.checkpoint.config.data.path), judge.model
        outputs = judge.checkpoint.data["outputs"]
        if part not in data.sizes:
            raise UserError(f"'{data.path}' has no part '{part}'; it has {', '.join(data.sizes)}.")
        if data.shape != model.shapes[0]:
            raise UserError(f"'{data.path}' holds examples of shape {data.shape}, the network takes {model.shapes[0]}.")
        if data.targets and not model.loss.vectors:
            raise UserError(f"'{data.path}' holds vectors, but the {model.loss.kind} loss of the network wants labels.")
        if (data.targets or data.classes) != outputs:
            raise UserError(f"'{data.path}' has {data.targets or data.classes} classes, the network {outputs}.")
        return judge, Batches(data.read(part, None, judge.columns), EVALUATION_BATCH, data.scale, model.dtype, None)

    threads = cores_for(node_of(comm), True)[0]
    judge, batches = mpi.together(comm, prepare)
    with judge.replica(batches) as replica:
        return replica.evaluate(judge.w), len(batches)


def predict(
    path: str,
    data_path: str,
    part: str,
    out: str,
    comm: Any = None,
    force: bool = False,
    trust: bool = False,
    *,
    probabilities: bool = False,
) -> str | None:
    """Write each example's class and output units, or `probabilities` instead of these, to `out`, by its ending.

    A file is replaced with `force` alone.

    Returns
    -------
    How many examples, and in words what was written; None on all ranks but the first.
    """

    def prepare() -> tuple[Judge, Batches]:
        refuse_taken(out, force)
        judge = Judge(path, comm, threads, trust)
        check(out, judge.model.loss.kind, probabilities)
        x, scale = read_inputs(data_path, part, judge.model.shapes[0])
        if judge.columns is not None:
            x = x[:, np.concatenate([np.arange(*r) for r in judge.columns] or [np.arange(0)])]
        about = judge.checkpoint.data
        blank = np.zeros((len(x), about["outputs"]), judge.model.dtype) if about["vectors"] else np.zeros(len(x), np.int64)
        return judge, Batches(Examples(np.ascontiguousarray(x), blank), EVALUATION_BATCH, scale, judge.model.dtype, None)

    threads = cores_for(node_of(comm), True)[0]
    judge, batches = mpi.together(comm, prepare)
    n = len(batches)
    mine = np.zeros((n, size_of(judge.boxes[-1])), judge.model.dtype)
    with judge.replica(batches) as replica:
        network = replica.judge
        for lo in range(0, n, EVALUATION_BATCH):
            count = batches.next(network.x)
            cells = network.forward(judge.w, batches.target)
            mine[lo : lo + count] = cells[-1].y.reshape(-1, EVALUATION_BATCH)[:, :count].T
    values = judge.gather(mine)
    if values is None:
        return None
    config, vectors = judge.checkpoint.config, judge.checkpoint.data["vectors"]
    made = predictions(values, config.model.loss, vectors, probabilities)
    said = write(out, made, {"checkpoint": path, "data": data_path, "part": part}, force)
    return f"{n} predictions written to {out} ({said})"
