"""Two ranks for the benchmark `wire`: rank 0 is a shard that drains its rings, rank 1 a replica that pushes and fetches.

Rank 1 prints one line per figure: name, bytes, what it is compared with, the bar, and both lists of seconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np

from dbnet.comm import mpi
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns
from dbnet.comm.window import Field, MpiWindow, WindowLayout
from dbnet.commands.bench.base import alternate
from dbnet.core import jit
from dbnet.core.ranges import Range
from dbnet.network.model import Footprint, Piece
from dbnet.shards.push import Intake
from dbnet.shards.routes import Rings, routes
from dbnet.shards.rules.adagrad import Adagrad
from dbnet.shards.rules.base import Rule
from dbnet.shards.rules.sgd import Sgd
from dbnet.shards.shard import Shard
from dbnet.shards.store import Inbox, WindowStore

PARAMETERS = 41_777_152
SLOT, SLOTS = 1 << 20, 8


class Discard(Rule):
    """Takes a slice and does nothing with it: what is left is the transport."""

    def apply(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray], t: int) -> None:
        """Leave the parameters as they are."""


def finish(turns: Turns) -> None:
    """Run a transfer to its end without giving way."""
    for _ in turns:
        time.sleep(0)


def main(repeat: int) -> None:
    """Measure on two ranks."""
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        world = Topology(1, 1)
        part, piece = Range(0, PARAMETERS), Piece(Range(0, PARAMETERS), 0)
        rings = Rings([part], [[0]], np.dtype("f4"), SLOT, SLOTS)
        fields = [*rings.fields(0, world), Field("bare", "float32", (PARAMETERS,))]
        # The window's ranks are the world's of a run, 1 + S + R; here the coordinator is left out, so the shard is rank 0.
        layouts = [WindowLayout(fields), WindowLayout(())]
        window = Shifted(comm, layouts)
        if comm.rank == 0:
            serve(comm, window, world, part, routes([piece], [part])[0])
        else:
            measure(comm, window, world, Footprint([piece], [piece], PARAMETERS), rings, repeat)
        window.free()


class Shifted(MpiWindow):
    """A window whose rank 1 + s is rank s of its communicator: a world without a coordinator."""

    def get(self, rank: int, field: str, out: np.ndarray, start: int = 0) -> None:
        super().get(rank - 1, field, out, start)

    def put(self, rank: int, field: str, data: np.ndarray, start: int = 0) -> None:
        super().put(rank - 1, field, data, start)

    def flush(self, rank: int) -> None:
        super().flush(rank - 1)


def serve(comm: object, window: MpiWindow, world: Topology, part: Range, route: object) -> None:
    """Drain the ring with each rule in turn until rank 1 says that the next is wanted."""
    jit.warm("float32")
    comm.Barrier()
    for rule in (Discard(), Sgd(rate=1e-9), Adagrad(rate=1e-9)):
        shard = Shard(part, rule, window.local["params"], window.local["clock"], time.perf_counter)
        inbox = Inbox(window, [Intake(shard)], world, [0], [route])
        comm.Barrier()
        request = comm.Irecv(np.zeros(1, np.int64), 1)
        while not request.Test():
            if not inbox.drain():
                time.sleep(2e-5)


def measure(comm: object, window: MpiWindow, world: Topology, whole: Footprint, rings: Rings, repeat: int) -> None:
    """Time pushes and fetches in turn with bare transfers of the same size through the same window."""
    store = WindowStore(window, world, (0, 0), whole, rings)
    mine = np.ones(PARAMETERS, np.float32)
    comm.Barrier()

    def bare_put() -> None:
        window.put(1, "bare", mine)
        window.flush(1)

    def bare_get() -> None:
        window.get(1, "bare", mine)
        window.flush(1)

    def push() -> None:
        store.accrued(first=True)
        finish(store.push(1, 0))

    def push_applied() -> None:
        push()
        finish(store.confirm())

    names = ("push, slices taken", "push until applied, sgd", "push until applied, Adagrad")
    for name, action in zip(names, (push_applied, push_applied, push_applied), strict=True):
        comm.Barrier()
        times = alternate(repeat, action, bare_put)
        report(name, "bare Put", ">= 0.8" if name == names[0] else "", times)
        if name == names[0]:
            report("fetch", "bare Get", ">= 0.8", alternate(repeat, lambda: finish(store.fetch()), bare_get))
        comm.Send(np.zeros(1, np.int64), 0)


def report(name: str, against: str, bar: str, times: Sequence[np.ndarray]) -> None:
    """Print one figure for the process that started this."""
    columns = [name, "GB/s", str(4e-9 * PARAMETERS), against, bar, *(" ".join(f"{t:.6g}" for t in one) for one in times)]
    print("row\t" + "\t".join(columns), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
