"""Ranks that write down the signals they get until a file tells them to end: signaled.py FOLDER."""

import os
import signal
import sys
import time
from pathlib import Path

from dbnet.comm import mpi
from dbnet.run import signals

folder = Path(sys.argv[1])
signals.leave_group()
rank = mpi.launched_rank()
for number in signals.SIGNALS:
    signal.signal(number, lambda number, frame: (folder / f"{rank}.{signal.Signals(number).name}").touch())
comm = mpi.world()
(folder / f"{rank}.pid").write_text(str(os.getpid()))
until = time.monotonic() + 60
while not (folder / "end").exists() and time.monotonic() < until:
    time.sleep(0.02)
# One rank was killed: MPI cannot be ended with all.
os._exit(0)
