"""The command line, on ranks of which one kills itself at a certain place: dying.py RANK PLACE arguments..."""

import os
import signal
import sys

from dbnet.__main__ import main
from dbnet.comm import mpi
from dbnet.comm.window import MpiWindow
from dbnet.run import roles, starting

PLACES = {
    "before MPI is up": (mpi, "world"),
    "compiling": (roles, "use"),
    "having ended": (MpiWindow, "free"),
}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if sys.argv[2] == "before MPI is up":
    # Ranks that wait in MPI's start burn a core each until the deadline; they end the same way however short it is.
    starting._LOADING = 5.0
if sys.argv[3] == "train" and mpi.launched_rank() == int(sys.argv[1]):
    setattr(*PLACES[sys.argv[2]], die)
sys.exit(main(sys.argv[3:]))
