"""Train on several ranks, of which one raises in the middle: failing.py RANK EXCEPTION run-file overrides..."""

import os
import sys

from dbnet.__main__ import main
from dbnet.comm import mpi
from dbnet.core.errors import UserError
from dbnet.network.replica import Replica
from dbnet.shards.shard import Shard

rank, kind = int(sys.argv[1]), sys.argv[2]
left = [20]


def spoil(method):
    """Return the method, raising at its twentieth call."""

    def spoiled(*arguments):
        left[0] -= 1
        if left[0] == 0:
            if kind == "exit":
                sys.exit(7)
            if kind == "kill":
                os.kill(os.getpid(), 9)
            raise UserError("The twentieth call was refused.") if kind == "user" else RuntimeError("the twentieth call failed")
        return method(*arguments)

    return spoiled


if mpi.launched_rank() == rank:
    Replica.accrue = spoil(Replica.accrue)
    Shard.finish = spoil(Shard.finish)
sys.exit(main(["train", *sys.argv[3:]]))
