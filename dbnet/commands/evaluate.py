"""`dbnet evaluate`, `dbnet predict`: use a checkpoint, on one rank or, under mpirun, cut over all. `dbnet export`: for others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dbnet.checkpoint import onnx, weights
from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm import mpi
from dbnet.comm.communicators import cores_for, node_of
from dbnet.commands.base import add_force
from dbnet.core.config import restored
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken
from dbnet.data.batches import Batches
from dbnet.data.confusion import confusion, table
from dbnet.run import inference
from dbnet.run.setup import make_model


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    parser.add_argument("data", nargs="?", metavar="DATA.h5", help="data file; default: the one the run was trained on")
    parser.add_argument("--part", default="test", help="train, test or validation (default: test)")
    parser.add_argument("--by-class", action="store_true", help="print the accuracy of each class, and what it is mistaken for")
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust-modules."""
    parser.add_argument("--trust-modules", action="store_true", help="run the Python code of own modules that the checkpoint holds")


def predict_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    parser.add_argument("data", metavar="DATA.h5", help="HDF5 file with PART/x (labels are not needed)")
    parser.add_argument(
        "out", metavar="OUT", help=".csv (example, class), .npy (output units), .npz or .h5 (class and output units)"
    )
    parser.add_argument("--probabilities", action="store_true", help="write probabilities instead of the units before the softmax")
    parser.add_argument("--part", default="test", help="group whose x is read (default: test)")
    add_trust(parser)
    add_force(parser)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write what was trained for other programs, by the ending of OUT.\n\n"
        "  .onnx           the network as it is evaluated: x [examples, *shape] as in the data file -> y [examples, outputs],\n"
        "                  as dbnet.load(CHECKPOINT).predict gives; beyond 2 GB the parameters lie in OUT.onnx.data\n"
        "  .safetensors    the parameters by name (LAYER.KIND.NAME), which run.start takes, too\n"
        "  .npz            the same, for numpy.load\n\n"
        "It is written by ranges: memory does not grow with the network."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    parser.add_argument("out", metavar="OUT", help="ends in .onnx, .safetensors or .npz")
    add_trust(parser)
    add_force(parser)


def run_export(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.suffix not in (".onnx", *weights.ENDINGS):
        raise UserError(f"'{out}' must end in .onnx, .safetensors or .npz.")
    refuse_taken(out, options.force)
    point = Checkpoint(options.checkpoint)
    files = [out]
    if out.suffix == ".onnx":
        onnx.library()
        inference.run_modules(options.checkpoint, point.modules, options.trust_modules, "--trust-modules")
        about = point.data
        model = make_model(restored(point.config), tuple(about["shape"]), about["outputs"], about["vectors"])
        point.require(model)
        files = onnx.write(point, model, out, options.force)
    else:
        weights.write(point, out, options.force)
    size = sum(file.stat().st_size for file in files) / 1e6
    print(f"{point.size:,} parameters written to {' and '.join(map(str, files))} ({size:,.3f} MB)")


def run_evaluate(options: argparse.Namespace) -> None:
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        if options.by_class:
            # Before anything is printed.
            mpi.together(comm, lambda: _classes(options.checkpoint))
        score, n, errors = inference.evaluate(options.checkpoint, options.data, options.part, comm, options.trust_modules)
        if comm is None or comm.rank == 0:
            accuracy = "" if score.accuracy != score.accuracy else f", accuracy {score.accuracy:.4f}"
            errors = f", {errors}" if errors else ""
            print(f"{options.part}: {n} examples, loss {score.loss:.4f}{accuracy}{errors}")
        if options.by_class:
            _by_class(options, comm)


def _classes(checkpoint: str) -> None:
    """Raise UserError where a checkpoint's network tells no classes."""
    if Checkpoint(checkpoint).data["vectors"]:
        raise UserError(f"'{checkpoint}' was trained on vectors, which are no classes; leave --by-class out.")


def _by_class(options: argparse.Namespace, comm: Any) -> None:
    """Print how the network does class by class."""
    ways = (options.checkpoint, comm, cores_for(node_of(comm), True)[0], options.trust_modules)

    def prepare() -> tuple[inference.Judge, Batches]:
        judge = inference.Judge(*ways)
        return judge, judge.labelled(options.data or judge.checkpoint.config.data.path, options.part)

    judge, batches = mpi.together(comm, prepare)
    values, about = judge.gather(judge.outputs(batches)), judge.checkpoint.data
    if values is not None:
        counts = confusion(batches.part.y, values.argmax(axis=1), about["outputs"])
        print("\n".join(table(counts, about.get("class_names", []))))


def run_predict(options: argparse.Namespace) -> None:
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        where = (options.checkpoint, options.data, options.part, options.out)
        done = inference.predict(*where, comm, options.force, options.trust_modules, probabilities=options.probabilities)
        if done is not None:
            print(done)
