"""`dbnet evaluate` and `dbnet predict`: use a checkpoint, on one rank or, under mpirun, cut over all."""

from __future__ import annotations

import argparse

from dbnet.comm import mpi
from dbnet.commands.base import add_force
from dbnet.run import inference


def evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    parser.add_argument("data", nargs="?", metavar="DATA.h5", help="data file; default: the one the run was trained on")
    parser.add_argument("--part", default="test", help="train or test (default: test)")
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


def run_evaluate(options: argparse.Namespace) -> None:
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        score, n = inference.evaluate(options.checkpoint, options.data, options.part, comm, options.trust_modules)
        if comm is None or comm.rank == 0:
            accuracy = "" if score.test_accuracy != score.test_accuracy else f", accuracy {score.test_accuracy:.4f}"
            print(f"{options.part}: {n} examples, loss {score.test_loss:.4f}{accuracy}")


def run_predict(options: argparse.Namespace) -> None:
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        where = (options.checkpoint, options.data, options.part, options.out)
        done = inference.predict(*where, comm, options.force, options.trust_modules, probabilities=options.probabilities)
        if done is not None:
            print(done)
