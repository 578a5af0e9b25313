"""What `dbnet predict` writes: a table for the eye (.csv), or arrays (.npy, .npz, .h5), by the file's ending."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.files import hdf5, writing

ENDINGS = (".csv", ".npy", ".npz", ".h5", ".hdf5")
# What the units of the last layer are to each loss.
_UNITS = {
    "softmax": "logits, before the softmax",
    "logistic": "logits, before the logistic function",
    "squared": "predicted values",
}


class Predictions(NamedTuple):
    """Output units [examples, units] of a network, what they are, and the class that each example is taken for.

    Attributes
    ----------
    classes
        None where the network was trained on vectors.
    asked
        Whether a table shows the units, too.
    names
        Of the classes; empty where the training data named none.
    """

    outputs: np.ndarray
    meaning: str
    classes: np.ndarray | None
    asked: bool
    names: Sequence[str] = ()


def check(out: str, loss: str, probabilities: bool) -> None:
    """Raise UserError where the ending is none that can be written, or the loss knows no probabilities."""
    ending = Path(out).suffix
    if ending not in ENDINGS:
        raise UserError(f"'{out}': '{ending}' is no ending for predictions; take {', '.join(ENDINGS)}.")
    if probabilities and loss not in ("softmax", "logistic"):
        raise UserError(f"The {loss} loss has no probabilities; leave out --probabilities.")


def predictions(outputs: np.ndarray, loss: str, vectors: bool, probabilities: bool) -> Predictions:
    """Return predictions from output units; `probabilities` turns them into those of the classes."""
    classes = None if vectors else outputs.argmax(axis=1)
    if not probabilities:
        return Predictions(outputs, _UNITS.get(loss, "output units"), classes, vectors)
    if loss == "logistic":
        with np.errstate(over="ignore"):
            return Predictions(1 / (1 + np.exp(-outputs)), "probabilities of each class by itself", classes, True)
    share = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return Predictions(share / share.sum(axis=1, keepdims=True), "probabilities of the classes", classes, True)


def write(out: str, made: Predictions, about: dict[str, str], force: bool) -> str:
    """Write predictions, whole or not at all, over another file with `force` alone; return in words what is in the file."""
    ending, arrays = Path(out).suffix, {"outputs": made.outputs}
    if made.classes is not None:
        arrays = {"class": made.classes, **arrays}
    if made.classes is not None and made.names:
        # Text as NumPy and HDF5 hold it without objects.
        arrays["class_names"] = np.array([name.encode() for name in made.names])
    with writing(Path(out), force) as partial:
        if ending == ".csv":
            return _table(partial, made)
        if ending in (".h5", ".hdf5"):
            with hdf5(partial) as file:
                for name, array in arrays.items():
                    file[name] = array
                file.attrs.update(about)
                file["outputs"].attrs["meaning"] = made.meaning
        else:
            with partial.open("wb") as file:
                np.save(file, made.outputs) if ending == ".npy" else np.savez(file, **arrays, **about)
    return f"outputs are {made.meaning}"


def _table(path: Path, made: Predictions) -> str:
    """Write a row per example: its class, and the units where they are what was asked for."""
    titles, columns = ["example"], [map(str, range(len(made.outputs)))]
    if made.classes is not None:
        titles, columns = [*titles, "class"], [*columns, map(str, made.classes.tolist())]
    if made.classes is not None and made.names:
        titles, columns = [*titles, "name"], [*columns, (made.names[k] for k in made.classes)]
    if made.asked:
        width = made.outputs.shape[1]
        titles += made.names if len(made.names) == width else [f"output_{u}" for u in range(width)]
        columns += [(f"{value:.8g}" for value in made.outputs[:, u]) for u in range(width)]
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(titles)
        table.writerows(zip(*columns, strict=True))
    return (
        f"outputs are {made.meaning}" if made.asked else "classes alone; --probabilities, or .npy, .npz, .h5, for the outputs, too"
    )
