"""The command line, on ranks of which one kills itself at a certain place: dying.py RANK PLACE arguments..."""

import os
import signal
import sys

from dbnet import mpi, run
from dbnet.__main__ import main
from dbnet.window import MpiWindow

PLACES = {
    "before MPI is up": (mpi, "world"),
    "compiling": (run, "use"),
    "having ended": (MpiWindow, "free"),
}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if sys.argv[3] == "train" and mpi.launched_rank() == int(sys.argv[1]):
    setattr(*PLACES[sys.argv[2]], die)
sys.exit(main(sys.argv[3:]))
