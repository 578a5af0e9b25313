"""How ranks come together: bounded before MPI is up, with signs of life from then on until training begins.

While MPI starts nobody can ask anybody, and Python itself cannot run in the call that waits: a child process, the `Guardian`, ends
its rank where that takes longer than the deadline. Then a thread of each rank gives signs of life over a small window
(`heartbeat`), while the rank itself reads, compiles, or waits in a collective call, which would wait for ever for one that died.
The coordinator's thread ends the start when a rank gives none for the deadline, or when nobody has read or compiled anything for as
long; those of the others end it when the coordinator gives none.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NoReturn

from dbnet.comm import mpi
from dbnet.comm.patience import Limit, Patience
from dbnet.comm.topology import Topology
from dbnet.comm.window import MpiWindow, WindowLayout
from dbnet.coordinator.heartbeat import PERIOD, Heartbeat, HeartbeatWatch, heartbeat_fields
from dbnet.coordinator.orders import coordinator_fields
from dbnet.core import config as configuration
from dbnet.core import errors
from dbnet.core.config import RunTable
from dbnet.core.errors import Lost, UserError
from dbnet.run.signals import SIGNALS

_LONGEST = 10  # deadlines that starting may take, whatever signs of life there are
# However short a run's deadline is, programs need that long to be loaded, and threads may be kept from running meanwhile.
_LOADING = 20.0
_WAITS = "waits for the others to start"
_AGAIN = "start it again with --resume auto"


class Guardian:
    """A child process that kills this one unless it is dismissed in time; it ends with this one.

    Parameters
    ----------
    seconds
        The time.
    words
        What it says then; may be nothing.
    """

    def __init__(self, seconds: float, words: str = "") -> None:
        parent = os.getpid()
        out, self._end = os.pipe()
        self._child = os.fork()
        if self._child:
            os.close(out)
            return
        os.close(self._end)
        self._watch(parent, out, seconds, words)

    def _watch(self, parent: int, dismissed: int, seconds: float, words: str) -> NoReturn:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        patience = Patience(seconds)
        while not patience.over():
            # Something to read is the end of the pipe: the parent has closed it, or is dead.
            if select.select([dismissed], [], [], seconds / 16)[0]:
                os._exit(0)
        if words:
            os.write(sys.__stderr__.fileno(), f"dbnet: {words}\n".encode())
        os.kill(parent, signal.SIGKILL)
        os._exit(0)

    def dismiss(self) -> None:
        """End the child; once more does nothing."""
        if self._end >= 0:
            os.close(self._end)
            os.waitpid(self._child, 0)
            self._end = -1


def guard(source: str | Path, overrides: Iterable[str]) -> Guardian | None:
    """Bound the start of MPI by the run's deadline; nothing where no launcher started this process."""
    if mpi.launched_size() == 1:
        return None
    try:
        deadline = configuration.load(source, overrides, lambda sentence: None).run.deadline
    except UserError:
        # All ranks say it together, later.
        deadline = RunTable().deadline
    deadline = max(deadline, _LOADING)
    if mpi.launched_rank():
        # The first one speaks for all.
        return Guardian(deadline + 1)
    words = f"the ranks did not come together within {deadline:g} s: one of them died or hangs, or MPI does not start; {_AGAIN}."
    return Guardian(deadline, words)


class Starting:
    """Signs of life of one rank while a run starts; making it is collective over `comm`.

    Parameters
    ----------
    comm, world
        All ranks, and who is where.
    run
        Its deadline.
    """

    def __init__(self, comm: Any, world: Topology, run: RunTable) -> None:
        self._comm, self._world, self._me = comm, world, world.name(comm.rank)
        # Where MPI tells all ranks at once of one that died, the first of them speaks, and ends the others.
        self._delay = float(comm.rank and 4 + min(comm.rank, 20))
        self._blame = mpi.blaming_others(self._me, self._delay)
        self._bound = max(run.deadline, _LOADING)
        words = f"{self._me} waited in vain for others to start: a rank hangs; {_AGAIN}."
        self._limit = Limit(_LONGEST * self._bound, partial(mpi.stop_all, comm, words))
        fields = [*coordinator_fields(world), *heartbeat_fields(world)]
        self._window = MpiWindow(comm, [WindowLayout(fields), *(WindowLayout(()) for _ in range(1, world.size))])
        self._reason, self._lifted = _WAITS, Event()
        self._signs: Heartbeat | None = None
        self._thread = Thread(target=self._run_thread, name="starting", daemon=True)
        self._thread.start()

    def after(self, guardian: Guardian | None) -> Starting:
        """Dismiss the guardian of the time before; return this."""
        if guardian is not None:
            guardian.dismiss()
        return self

    def __enter__(self) -> Starting:
        self._blame.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is errors.Refused:
            # All ranks stop in step, and end MPI together.
            self.lift()
            self._window.free()
        elif kind is not None:
            self._blame.__exit__(kind, error, trace)

    @contextmanager
    def works(self) -> Iterator[None]:
        """Let this rank work, as long as that takes, while others may wait for it."""
        self._reason = ""
        try:
            yield
        finally:
            self._reason = _WAITS

    def lift(self, signs: Heartbeat | None = None) -> None:
        """The run has begun, and has its own signs of life: those of this rank, if it is not the coordinator."""
        self._signs = signs
        self._lifted.set()
        self._thread.join()
        self._limit.lift()

    def beat(self, reason: str) -> None:
        """Give the run's sign of life, when it has begun; until then a thread gives those of the start."""
        if self._signs is not None:
            self._signs.beat(reason)

    def graph(self) -> str:
        """Return who waits for whom in the run, when it has begun."""
        return "" if self._signs is None else self._signs.graph()

    def free(self) -> None:
        """Give the window back, together with all ranks."""
        self._window.free()

    def _run_thread(self) -> None:
        try:
            with mpi.blaming_others(self._me, self._delay):
                if self._comm.rank:
                    self._beat()
                else:
                    watch = HeartbeatWatch(self._window, self._world, self._bound)
                    look_after(watch, self._world, self._bound, self._turn)
        except Lost as error:
            mpi.stop_all(self._comm, str(error))

    def _turn(self, watch: HeartbeatWatch) -> bool:
        """Wait a moment; return whether to go on."""
        if self._lifted.wait(PERIOD):
            return False
        # Lets MPI progress while the rank itself computes.
        self._comm.Iprobe()
        watch.say(self._reason)
        return True

    def _beat(self) -> None:
        heart = Heartbeat(self._window, self._world, self._comm.rank, self._bound, lambda: False)
        while not self._lifted.wait(PERIOD):
            heart.beat(self._reason)


def look_after(
    watch: HeartbeatWatch,
    world: Topology,
    deadline: float,
    turn: Callable[[HeartbeatWatch], bool],
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """The coordinator's thread: look, turn by turn, who is lost, and whether anybody still works.

    Raises
    ------
    Lost
        One sentence that names who is lost; or who waits for whom.
    """
    patience = Patience(deadline, clock)
    while turn(watch):
        if lost := watch.look():
            names = " and ".join(map(world.name, lost))
            raise Lost(f"{names} gave no sign of life for {watch.bound:g} s while the run was starting; {_AGAIN}.")
        if watch.anybody_works or watch.anybody_silent:
            # Who is silent may be lost: that is known when it has been so for as long as anybody may be.
            patience.begin()
        elif patience.over():
            raise Lost(f"All ranks waited {deadline:g} s for others to start; {_AGAIN}.\n{watch.graph()}")
