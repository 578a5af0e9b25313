"""Run a command of the command line on every rank and write the most memory that each had of its own: measured.py OUT WORD ...

Pages of a file and of a shard's window count where they lie; what others have mapped of a window is not their own.
"""

import sys
import threading
from pathlib import Path

from dbnet.__main__ import main
from dbnet.comm.mpi import launched_rank

out, stop, most = Path(sys.argv[1]), threading.Event(), {}


def sample() -> None:
    while not stop.wait(0.005):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Rss"):
                name, kilobytes, _ = line.split()
                most[name[:-1]] = max(most.get(name[:-1], 0), int(kilobytes) << 10)


thread = threading.Thread(target=sample, daemon=True)
thread.start()
code = main(sys.argv[2:])
stop.set()
thread.join()
(out / f"{launched_rank()}").write_text(f"{most['RssAnon']} {most['RssFile']} {most['RssShmem']}")
sys.exit(code)
