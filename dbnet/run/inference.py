"""Use a checkpoint: loss and accuracy on a data file, or predictions written to a file; under mpirun the network is cut.

In Python `load` gives the trained network as a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm import mpi
from dbnet.comm.communicators import cores_for, crowded, node_of
from dbnet.comm.link import MpiLink
from dbnet.core.config import Config, restored
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken, writing
from dbnet.core.kernels.folder import cache
from dbnet.core.ranges import flatten, size_of
from dbnet.core.registry import is_running, named, run_module
from dbnet.data.batches import Batches
from dbnet.data.file import DataFile, Examples, read_inputs
from dbnet.data.predictions import check, predictions, write
from dbnet.data.preparation import Normalization, suited, variance
from dbnet.network.model import footprint
from dbnet.network.partition import Cut
from dbnet.network.replica import Replica, Score
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
    option
        How a user says so.

    Attributes
    ----------
    columns
        The input units that this rank needs; None: all.
    """

    def __init__(self, path: str, comm: Any, threads: int, trust: bool, option: str = "--trust-modules") -> None:
        self.checkpoint, self.comm = Checkpoint(path), comm
        run_modules(path, self.checkpoint.modules, trust, option)
        about, config = self.checkpoint.data, restored(self.checkpoint.config)
        self.model = make_model(config, tuple(about["shape"]), about["outputs"], about["vectors"])
        self.checkpoint.require(self.model)
        use(config, threads)
        self.cut = Cut(self.model, 1 if comm is None else comm.size, EVALUATION_BATCH, given=False)
        self.boxes = self.cut.boxes[0 if comm is None else comm.rank]
        self.columns = self.model.columns(self.boxes)
        self.normalization = Normalization.of(about.get("normalization"), self.model.shapes[0])
        used, _, size = footprint(self.model, self.boxes, leads=True)
        self.w = np.empty(size, self.model.dtype)
        for piece in used:
            self.checkpoint.read("params", piece.range, self.w[piece.at : piece.at + piece.range.size])

    @contextmanager
    def replica(self, batches: Batches) -> Iterator[Replica]:
        """Give a replica that evaluates these examples."""
        if self.comm is None:
            yield Replica(self.model, batches, {"judged": batches}, 0)
            return
        link = MpiLink(self.comm, self.checkpoint.config.run.deadline, crowded(node_of(self.comm)))
        yield Replica(self.model, batches, {"judged": batches}, 0, (self.cut, link))
        link.close()

    def batches(self, examples: Examples, scale: float) -> Batches:
        """Return examples in their order as minibatches of an evaluation; `scale` is what x is multiplied with."""
        return Batches(examples, EVALUATION_BATCH, scale, self.model.dtype, None)

    def own(self, x: np.ndarray) -> np.ndarray:
        """Return of whole inputs [n, units] the columns that this rank needs."""
        return np.ascontiguousarray(x if self.units is None else x[:, self.units])

    @property
    def units(self) -> np.ndarray | None:
        """The input units that this rank needs, one by one; None: all."""
        return None if self.columns is None else np.concatenate([np.arange(*r) for r in self.columns] or [np.arange(0)])

    def unlabelled(self, x: np.ndarray, scale: float) -> Batches:
        """Return inputs [n, own units] as minibatches without targets."""
        about = self.checkpoint.data
        blank = np.zeros((len(x), about["outputs"]), self.model.dtype) if about["vectors"] else np.zeros(len(x), np.int64)
        return self.batches(Examples(x, blank), scale)

    def labelled(self, path: str | Path, part: str) -> Batches:
        """Return one part of a data file as minibatches; UserError where the network does not fit it."""
        data, shape, outputs = DataFile(path), self.model.shapes[0], self.checkpoint.data["outputs"]
        if part not in data.sizes:
            raise UserError(f"'{data.path}' has no part '{part}'; it has {', '.join(data.sizes)}.")
        if data.shape != shape:
            raise UserError(f"'{data.path}' holds examples of shape {data.shape}, the network takes {shape}.")
        if data.targets and not self.model.loss.vectors:
            raise UserError(f"'{data.path}' holds vectors, but the {self.model.loss.kind} loss of the network wants labels.")
        if (data.targets or data.classes) != outputs:
            raise UserError(f"'{data.path}' has {data.targets or data.classes} classes, the network {outputs}.")
        examples, mine = data.read(part, None, self.columns), self.normalization
        x, scale = suited(examples.x, data.scale, data.normalization, mine, data.path, shape, self.units)
        return self.batches(replace(examples, x=x), scale)

    def errors(self, score: Score, batches: Batches) -> str:
        """Return in words what the loss says besides of vectors; nothing for labels."""
        if batches.target.ndim == 1 or not len(batches):
            return ""
        return self.model.loss.words(score.loss, self.checkpoint.data["outputs"], variance(batches.part.y))

    def outputs(self, batches: Batches) -> np.ndarray:
        """Return this rank's own output units [n, units] for each example."""
        out = np.zeros((len(batches), size_of(self.boxes[-1])), self.model.dtype)
        with self.replica(batches) as replica:
            network = replica.judge
            for lo in range(0, len(batches), EVALUATION_BATCH):
                count = batches.next(network.x)
                cells = network.forward(self.w, batches.target)
                out[lo : lo + count] = cells[-1].y.reshape(-1, EVALUATION_BATCH)[:, :count].T
        return out

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


def run_modules(path: str, entries: list[dict[str, str]], trust: bool, option: str) -> None:
    """Run the own modules that a checkpoint holds, as they were then; UserError where that wants `trust`, given by `option`."""
    strange = [entry for entry in entries if not is_running(entry)]
    if strange and not trust:
        raise UserError(
            f"'{path}' holds Python code that would be run: {named(strange)}. 'dbnet inspect {path} --modules' prints it, and "
            f"{option} runs it."
        )
    for entry in entries:
        file = cache() / "modules" / entry["sha256"] / "own.py"
        # Numba wants a file, and so does whoever reads a traceback.
        if not file.exists() or file.read_bytes() != entry["text"].encode():
            with writing(file) as part:
                part.write_bytes(entry["text"].encode())
        run_module(entry, file)


def evaluate(path: str, data_path: str | None, part: str, comm: Any = None, trust: bool = False) -> tuple[Score, int, str]:
    """Return the score (loss and accuracy) of one part of a data file, by default the run's own, its examples, errors in words."""

    def prepare() -> tuple[Judge, Batches]:
        judge = Judge(path, comm, threads, trust)
        return judge, judge.labelled(data_path or judge.checkpoint.config.data.path, part)

    threads = cores_for(node_of(comm), True)[0]
    judge, batches = mpi.together(comm, prepare)
    with judge.replica(batches) as replica:
        score = replica.evaluate(judge.w)
    return score, len(batches), judge.errors(score, batches)


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
        shape = judge.model.shapes[0]
        x, scale = suited(*read_inputs(data_path, part, shape), judge.normalization, data_path, shape)
        return judge, judge.unlabelled(judge.own(x), scale)

    threads = cores_for(node_of(comm), True)[0]
    judge, batches = mpi.together(comm, prepare)
    values = judge.gather(judge.outputs(batches))
    if values is None:
        return None
    config, vectors = judge.checkpoint.config, judge.checkpoint.data["vectors"]
    made = predictions(values, config.model.loss.kind, vectors, probabilities)
    made = made._replace(names=judge.checkpoint.data.get("class_names", []))
    said = write(out, made, {"checkpoint": path, "data": data_path, "part": part}, force)
    return f"{len(values)} predictions written to {out} ({said})"


class Trained:
    """A trained network in this process; `dbnet.load` makes it.

    Attributes
    ----------
    config
        The configuration of the run that trained it.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self.config: Config = judge.checkpoint.config

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters by name (LAYER.KIND.NAME, such as "0.dense.W"), each in its own shape; they can be read alone."""
        views = self._judge.model.layout.views(self._judge.w)
        for view in views.values():
            view.flags.writeable = False
        return views

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Return the output units of each example: before the softmax or the logistic function, values for the squared loss.

        Parameters
        ----------
        x
            Inputs [examples, *shape] as in the data file before 'dbnet data --normalize': uint8, float32 or float64, not scaled
            yet. They are multiplied with the scale of the training data, and normalized as these were. Of images with one map the
            last axis may be missing.

        Returns
        -------
        [examples, outputs], of the network's type.

        Raises
        ------
        UserError
            Another shape or type, or a value that is not finite.
        """
        return self._judge.outputs(self._judge.unlabelled(*self._inputs(x)))

    def evaluate(self, data: str | Path | tuple[np.ndarray, np.ndarray] | None = None, part: str = "test") -> Score:
        """Return the mean loss and the accuracy on labelled examples.

        Parameters
        ----------
        data
            Path of a data file; or x [examples, *shape] as `predict` takes it, and y: labels [examples] or vectors
            [examples, outputs]; None: the data file that the network was trained on.
        part
            Which part of a data file: "test" or "train".

        Returns
        -------
        `loss`, and `accuracy` from 0 to 1 (NaN for vectors); the other two fields are NaN.

        Raises
        ------
        UserError
            No such file or part, or the network does not fit the examples.
        """
        judge = self._judge
        if isinstance(data, tuple | list):
            if len(data) != 2:
                raise UserError(f"data holds {len(data)} arrays; give inputs and labels: (x, y).")
            x, scale = self._inputs(data[0])
            batches = judge.batches(Examples(x, self._targets(data[1], len(x))), scale)
        else:
            batches = judge.labelled(data or self.config.data.path, part)
        with judge.replica(batches) as replica:
            return replica.evaluate(judge.w)

    def _inputs(self, x: np.ndarray) -> tuple[np.ndarray, float]:
        """Return of inputs that the network can take what it needs, [examples, units], and their scale."""
        judge = self._judge
        x, shape = np.asarray(x), self._judge.model.shapes[0]
        if x.dtype not in (np.uint8, np.float32, np.float64):
            raise UserError(f"x is {x.dtype}; use float32, float64 or uint8.")
        if x.ndim < 1 or x.shape[1:] not in (shape, shape[:2] if shape[2:] == (1,) else shape):
            raise UserError(f"x has shape {x.shape}; the network takes (examples, {', '.join(map(str, shape))}).")
        bad = np.argwhere(~np.isfinite(x)) if x.dtype.kind == "f" else ()
        if len(bad):
            raise UserError(f"x of example {bad[0][0]} is {x[tuple(bad[0])]}; remove it.")
        done = judge.normalization
        x, scale = suited(x.reshape(len(x), prod(shape)), done.scale if done else judge.checkpoint.scale, None, done, "x", shape)
        return judge.own(x), scale

    def _targets(self, y: np.ndarray, n: int) -> np.ndarray:
        """Return labels or target vectors of n examples that fit the network."""
        y, about = np.asarray(y), self._judge.checkpoint.data
        outputs, kinds = about["outputs"], "iuf" if about["vectors"] else "iu"
        if y.shape != ((n, outputs) if about["vectors"] else (n,)) or y.dtype.kind not in kinds:
            wanted = f"vectors ({n}, {outputs})" if about["vectors"] else f"{n} integers"
            raise UserError(f"y is {y.dtype} {y.shape}; for these x it must be {wanted}.")
        if about["vectors"]:
            bad = np.argwhere(~np.isfinite(y))
        else:
            bad, y = np.argwhere((y < 0) | (y >= outputs)), y.astype(np.int64)
        if len(bad):
            rule = "vectors must be finite" if about["vectors"] else f"labels are 0 .. {outputs - 1}"
            raise UserError(f"y of example {bad[0][0]} is {y[tuple(bad[0])]}; {rule}.")
        return y


def load(checkpoint: str | Path, *, trust_modules: bool = False) -> Trained:
    """Load the network of a checkpoint, whole, into this process.

    Parameters
    ----------
    checkpoint
        NAME.checkpoint.h5 of a run, or a master in NAME.checkpoints.
    trust_modules
        Whether the Python code of own modules that the checkpoint holds may be run.

    Returns
    -------
    A model: `.predict(x)` gives [examples, outputs], `.evaluate(data)` loss and accuracy, `.parameters` the arrays by name,
    `.config` the run's configuration.

    Raises
    ------
    UserError
        There is no such checkpoint, it is damaged, or it holds code that is not trusted.
    """
    return Trained(Judge(str(checkpoint), None, cores_for(None, True)[0], trust_modules, "trust_modules=True"))
