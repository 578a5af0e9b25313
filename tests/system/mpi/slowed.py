"""Train as a command says, with replicas that take their time: slowed.py SECONDS FACTOR SILENCE -- train RUN.toml ...

Every minibatch of a portion takes SECONDS, those of replica 0 FACTOR times as long; after its third portion replica 0 does nothing
for SILENCE seconds. The coordinator prints its peak memory in KiB at the end.
"""

import resource
import sys
import time

from dbnet.__main__ import main
from dbnet.comm import mpi
from dbnet.methods.sandblaster.worker import SandblasterWorker
from dbnet.network.replica import Replica

seconds, factor, silence = map(float, sys.argv[1:4])
compute, accrue = SandblasterWorker._compute, Replica.accrue_share
slow: set[int] = set()


def accrue_slowly(self: Replica, w: object, g: object, fresh: bool) -> tuple[int, float, int]:
    done = accrue(self, w, g, fresh)
    if done[0]:
        time.sleep(seconds * (factor if id(self) in slow else 1))
    return done


def compute_slowly(self: SandblasterWorker, task: object) -> object:
    if self.orders.replica == 0:
        slow.add(id(self.replica))
        if self.computed == 3:
            time.sleep(silence)
    yield from compute(self, task)


Replica.accrue_share, SandblasterWorker._compute = accrue_slowly, compute_slowly
code = main(sys.argv[sys.argv.index("--") + 1 :])
if mpi.launched_rank() == 0:
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}")
sys.exit(code)
