"""Use a checkpoint: loss and accuracy on a data file, or predictions written to a file."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from dbnet.batches import Batches
from dbnet.build import EVALUATION_BATCH, make_model
from dbnet.checkpoint import Checkpoint
from dbnet.data.base import DataFile, Part, read_inputs
from dbnet.errors import UserError, writing
from dbnet.model import Model
from dbnet.orders import Score
from dbnet.ranges import Range
from dbnet.replica import Replica


def load(checkpoint: Checkpoint) -> tuple[Model, np.ndarray]:
    """Return the model of a checkpoint and its parameters [parameters]."""
    about = checkpoint.data
    model = make_model(checkpoint.config, tuple(about["shape"]), about["outputs"], about["vectors"])
    checkpoint.require(model)
    w = np.empty(checkpoint.size, checkpoint.dtype)
    checkpoint.read("params", Range(0, checkpoint.size), w)
    return model, w


def evaluate(path: str, data_path: str | None, part: str) -> tuple[Score, int]:
    """Return the score (its test fields) and the number of examples of one part of a data file, by default the run's own."""
    checkpoint = Checkpoint(path)
    model, w = load(checkpoint)
    data = DataFile(data_path or checkpoint.config.data.path)
    if part not in data.sizes:
        raise UserError(f"'{data.path}' has no part '{part}'; it has {', '.join(data.sizes)}.")
    if data.shape != model.shapes[0]:
        raise UserError(f"'{data.path}' holds examples of shape {data.shape}, the network takes {model.shapes[0]}.")
    if (data.targets or data.classes) != checkpoint.data["outputs"]:
        raise UserError(f"'{data.path}' has {data.targets or data.classes} classes, the network {checkpoint.data['outputs']}.")
    batches = Batches(data.read(part), EVALUATION_BATCH, data.scale, model.dtype, None)
    return Replica(model, batches, {"test": batches}, 0).evaluate(w), len(batches)


def predict(path: str, data_path: str, part: str, out: str) -> int:
    """Write each example's class to `out` (.csv), with the output units in a .h5; return the number of examples."""
    checkpoint = Checkpoint(path)
    model, w = load(checkpoint)
    x, scale = read_inputs(data_path, part, model.shapes[0])
    n, outputs = len(x), checkpoint.data["outputs"]
    blank = np.zeros((n, outputs), model.dtype) if checkpoint.data["vectors"] else np.zeros(n, np.int64)
    batches = Batches(Part(x, blank), EVALUATION_BATCH, scale, model.dtype, None)
    network = Replica(model, batches, {"test": batches}, 0).judge
    answers, values = np.zeros(n, np.int64), np.zeros((n, outputs), model.dtype)
    for lo in range(0, n, EVALUATION_BATCH):
        count = batches.next(network.x)
        cells = network.forward(w, batches.target)
        values[lo : lo + count] = cells[-1].y.reshape(outputs, -1)[:, :count].T
    answers[:] = values.argmax(axis=1)
    target = Path(out)
    with writing(target) as partial:
        if target.suffix in (".h5", ".hdf5"):
            with h5py.File(partial, "w") as file:
                file["class"], file["outputs"] = answers, values
                file.attrs["checkpoint"], file.attrs["data"], file.attrs["part"] = path, data_path, part
        else:
            table = np.column_stack([np.arange(n), answers])
            np.savetxt(partial, table, fmt="%d", delimiter=",", header="example,class", comments="")
    return n
