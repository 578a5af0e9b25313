"""TODO."""

from __future__ import annotations

import argparse
from typing import Any

from dbnet.comm import mpi
from dbnet.commands.base import _command

# --- evaluate, predict --------------------------------------------------------------------------------------------------------


def _use(commands: Any) -> None:
    made = _command(
        commands, "evaluate", evaluate, "loss and accuracy of a checkpoint on a data file; mpirun -n P cuts the network"
    )
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    made.add_argument("data", nargs="?", metavar="DATA.h5", help="data file; default: the one the run was trained on")
    made.add_argument("--part", default="test", help="train or test (default: test)")
    made.add_argument("--trust-modules", action="store_true", help="run the Python code of own modules that the checkpoint holds")
    made = _command(commands, "predict", predict, "write a checkpoint's predictions for a data file; mpirun -n P cuts the network")
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    made.add_argument("data", metavar="DATA.h5", help="HDF5 file with PART/x (labels are not needed)")
    made.add_argument("out", metavar="OUT", help=".csv (example, class), .npy (output units), .npz or .h5 (class and output units)")
    made.add_argument("--probabilities", action="store_true", help="write probabilities instead of the units before the softmax")
    made.add_argument("--part", default="test", help="group whose x is read (default: test)")
    made.add_argument("--trust-modules", action="store_true", help="run the Python code of own modules that the checkpoint holds")
    made.add_argument("--force", action="store_true", help="replace a file that is there")


def evaluate(options: argparse.Namespace) -> None:
    from dbnet.run import inference

    comm = mpi.world()
    with mpi.abort_on_error(comm):
        score, n = inference.evaluate(options.checkpoint, options.data, options.part, comm, options.trust_modules)
        if comm is None or comm.rank == 0:
            accuracy = "" if score.test_accuracy != score.test_accuracy else f", accuracy {score.test_accuracy:.4f}"
            print(f"{options.part}: {n} examples, loss {score.test_loss:.4f}{accuracy}")


def predict(options: argparse.Namespace) -> None:
    from dbnet.run import inference

    comm = mpi.world()
    with mpi.abort_on_error(comm):
        where = (options.checkpoint, options.data, options.part, options.out)
        done = inference.predict(*where, comm, options.force, options.trust_modules, probabilities=options.probabilities)
        if done is not None:
            print(done)
