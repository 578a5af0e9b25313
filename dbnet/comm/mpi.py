"""Start MPI once, late, and end all ranks together.

Importing dbnet starts no MPI; `world` does. A rank that raises prints one readable message and ends the job: with one rank gone
the others would wait for ever. Of those on one host that notice at the same time that another is lost, one speaks.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
import termios
import threading
import time
import traceback
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dbnet.comm.patience import Limit, Patience
from dbnet.core.errors import Lost, Refused, Stopped, UserError, exit_code, own_line

T = TypeVar("T")
_LAST = 60
_SHORTEST, _LONGEST = 5e-4, 2e-2
# Seconds in which a rank whose words another one says is ended by that one; in which a launcher reads words and passes them on.
_ENDED, _TAKEN, _PASSED_ON = 5.0, 3.0, 0.3
SHARED = "/dev/shm"
_RESERVE = 1 << 20  # bytes of shared memory that MPI itself may still take for each rank
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "PMIX_SIZE", "SLURM_STEP_NUM_TASKS")


def require_threads(level: int, mpi: Any) -> None:
    """Raise UserError unless any thread may call MPI: one moves data, one ends the job when a call hangs."""
    if level < mpi.THREAD_MULTIPLE:
        names = {mpi.THREAD_SINGLE: "single", mpi.THREAD_FUNNELED: "funneled", mpi.THREAD_SERIALIZED: "serialized"}
        raise UserError(
            f"MPI was started with thread level '{names.get(level, level)}', but dbnet calls it from several threads: unset "
            "MPI4PY_RC_THREAD_LEVEL and MPI4PY_RC_THREADS, or use an MPI that is built with thread support."
        )


def require_model(model: int, mpi: Any) -> None:
    """Raise UserError unless a window has one copy of its memory."""
    if model != mpi.WIN_UNIFIED:
        raise UserError(
            "This MPI keeps a second copy of window memory on this machine (MPI_WIN_SEPARATE), but dbnet needs the unified memory "
            "model: use MPICH or Open MPI on hosts whose network is cache-coherent."
        )


def shared_memory() -> int | None:
    """Return the bytes that are free where MPI lays the windows of one host's ranks; None where there is no such place."""
    try:
        place = os.statvfs(SHARED)
    except OSError:
        return None
    return place.f_bavail * place.f_frsize


def require_room(comm: Any, sizes: Sequence[int], kind: int) -> None:
    """Raise UserError, on all ranks, where a host's shared memory cannot hold its windows: touching them would be a bus error.

    `sizes`: of each rank's window, in bytes.
    """
    node = comm.Split_type(kind, comm.rank)
    ranks, lack = node.allgather(comm.rank), ""
    free = shared_memory() if node.rank == 0 and node.size > 1 else None
    needed = sum(sizes[rank] for rank in ranks)
    if free is not None and needed + node.size * _RESERVE > free:
        lack = (
            f"The windows of the {node.size} ranks on {socket.gethostname()} take {needed / 2**20:.1f} MiB of shared memory, but "
            f"{SHARED} has {free / 2**20:.1f} MiB left: enlarge it (docker run --shm-size=..., or mount -o remount,size=... "
            f"{SHARED}), lower method.slot or method.slots, or start fewer replicas on a host."
        )
    node.Free()
    for message in comm.allgather(lack):
        if message:
            raise UserError(message)


def launched_size() -> int:
    """Return the number of ranks that a launcher says it started; 1 without a launcher."""
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" not in os.environ:
        return 1
    sizes = [int(os.environ[name]) for name in _SIZE_VARIABLES if os.environ.get(name, "").isdigit()]
    return max(sizes, default=1)


def launched_rank() -> int:
    """Return this process's number in the launcher's count; 0 without a launcher."""
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def started() -> str:
    """Return how a run was started, up to the configuration: by a script (jobs/launch says which), a launcher, or alone."""
    ranks = launched_size()
    return os.environ.get("DBNET_STARTED", "dbnet train" if ranks == 1 else f"mpirun -n {ranks} dbnet train")


def world() -> Any:
    """Start MPI and return its world communicator, or None where no launcher started this process.

    Raises
    ------
    UserError
        The launcher belongs to another MPI than mpi4py: every rank sees a world of size 1.
    """
    started = launched_size()
    if started == 1:
        return None
    from mpi4py import MPI

    atexit.register(bounded)
    comm = MPI.COMM_WORLD
    if comm.size == 1:
        library = library_version()
        if launched_rank() > 0:
            raise SystemExit(2)
        raise UserError(
            f"The launcher started {started} ranks, but each sees a world of size 1: mpirun belongs to another MPI than mpi4py's "
            f"({library}). Use the mpirun beside this Python ({os.path.join(os.path.dirname(sys.executable), 'mpirun')}), "
            "or with Slurm and MPICH: srun --mpi=pmi2."
        )
    LAST_WORDS.share(comm)
    return comm


def library_version() -> str:
    """Return the MPI library's own name and version, on one line."""
    from mpi4py import MPI

    first = MPI.Get_library_version().strip("\x00 \n").split("\n")[0].split(",")[0]
    return " ".join(first.replace("Version:", " ").split())


def hand_over(number: int = 2) -> None:
    """Let the launcher take what this rank has just printed into an open file: where it kills the job at once it may drop that."""
    unread, patience = array("i", [0]), Patience(_TAKEN)
    # Not a synchronisation: what it has read it must still pass on.
    time.sleep(_PASSED_ON)
    with suppress(OSError):
        # Only a pipe says how much of it nobody has read.
        while stat.S_ISFIFO(os.fstat(number).st_mode) and not fcntl.ioctl(number, termios.FIONREAD, unread) and unread[0]:
            if patience.over():
                return
            time.sleep(_PASSED_ON)


class LastWords:
    """Which rank of a host says that another one is lost: the first that notices, so that a user reads it once.

    That is noted in a file that all ranks of the host have open and that has no name any more: it outlives whoever spoke, and no
    job leaves one behind. Where there is no such file every rank speaks.
    """

    def __init__(self) -> None:
        self._file = -1

    def share(self, comm: Any) -> None:
        """Open the file together with all ranks of `comm`."""
        name, path = f"dbnet-{comm.bcast(secrets.token_hex(8))}", None
        try:
            path = Path(tempfile.gettempdir()) / name
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            path = None
        try:
            meet(comm)
        finally:
            if path is not None:
                with suppress(OSError):
                    path.unlink()

    def mine(self) -> bool:
        """Return whether this is the first rank of its host that asks."""
        if self._file < 0:
            return True
        try:
            # Whoever holds the lock asks at this moment: another one is the first, and nobody must wait for one that hangs.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            first = os.fstat(self._file).st_size == 0
            if first:
                # Unlike a byte a length needs no room on a disk.
                os.ftruncate(self._file, 1)
            fcntl.flock(self._file, fcntl.LOCK_UN)
        except BlockingIOError:
            return False
        except OSError:
            # A disk without locks, or of another host that has taken the file away: said twice is better than never.
            return True
        return first

    def say(self, message: str) -> None:
        """Print this, or wait for being ended by the one that has spoken."""
        if self.mine():
            print(f"dbnet: {message}", file=sys.stderr, flush=True)
        else:
            # Not a synchronisation: whoever lives after it ends itself.
            time.sleep(_ENDED)


LAST_WORDS = LastWords()


@contextmanager
def abort_on_error(comm: Any) -> Iterator[None]:
    """End all ranks with this rank's message when the body raises; without MPI let the exception pass."""
    try:
        yield
    except BaseException as error:
        if comm is None or isinstance(error, Refused | Stopped):
            raise
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return
        if isinstance(error, Lost):
            LAST_WORDS.say(str(error))
        elif isinstance(error, UserError):
            print(f"dbnet: {error}", file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt):
            print(f"dbnet: interrupted (rank {comm.rank})", file=sys.stderr, flush=True)
        elif not isinstance(error, SystemExit):
            lines = "".join(traceback.format_exception(error))
            print(f"{own_line(error)}dbnet: rank {comm.rank} of {comm.size} failed\n{lines}", file=sys.stderr, flush=True)
        hand_over()
        comm.Abort(exit_code(error))
        # Where the launcher lets others live it may return.
        os._exit(exit_code(error))


@contextmanager
def blaming_others(me: str, delay: float = 0.0) -> Iterator[None]:
    """MPI raises, if it notices at all, where a call needs a rank that is dead: this rank is well, but its run is over."""
    from mpi4py import MPI

    try:
        yield
    except MPI.Exception as error:
        # Not a synchronisation: where all ranks notice at once the first one that speaks ends the others.
        time.sleep(delay)
        why = " ".join(error.Get_error_string().split())[:200]
        advice = "go on from the newest checkpoint with --resume auto"
        raise Lost(f"{me}: another rank is lost, since an MPI call failed ({why}); {advice}.") from None


def finalize() -> None:
    """End MPI now: what follows, and an exit code other than 0, is then this process's own affair and aborts nothing."""
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized():
        bounded()
        MPI.Finalize()
        if threading.current_thread() is threading.main_thread():
            signal.alarm(0)


def bounded() -> None:
    """Let this process end within a minute, come what may: Finalize waits for ranks that are dead, and lets no thread run."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LAST)


def together(comm: Any, function: Callable[[], T]) -> T:
    """Run `function` on all ranks; if it raised UserError anywhere, all ranks stop, with one message from one rank."""
    value, message = None, None
    try:
        value = function()
    except UserError as error:
        if comm is None:
            raise
        message = str(error)
    messages = []
    if comm is not None:
        # In a blocking call that waits MPI keeps other threads of this rank, which give signs of life, from its lock.
        meet(comm)
        messages = comm.allgather(message)
    first = next((m for m in messages if m), None)
    if first is None:
        return value  # type: ignore[return-value]
    if comm.rank == 0:
        print(f"dbnet: {first}", file=sys.stderr, flush=True)
    raise Refused


def meet(comm: Any) -> None:
    """Wait for all ranks of `comm` without burning the cores that some of them still compute on."""
    request, pause = comm.Ibarrier(), _SHORTEST
    while not request.Test():
        time.sleep(pause)
        # Of many ranks that wait long each would take a part of the cores.
        pause = min(1.1 * pause, _LONGEST)


def leave(code: int) -> NoReturn:
    """End this process without MPI_Finalize, which would wait for ranks that are lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop_all(comm: Any, message: str) -> NoReturn:
    """End all ranks with this message, from whatever thread, even where MPI itself hangs."""
    LAST_WORDS.say(message)
    hand_over()
    # Abort may hang like the call that brought us here.
    ending = threading.Timer(3, os._exit, (1,))
    ending.daemon = True
    ending.start()
    comm.Abort(1)
    os._exit(1)


def part(shared: Sequence[Any], seconds: float, code: int) -> None:
    """Free what all ranks share, together, when everything is done and saved.

    A rank that has died by now takes nothing with it: where the others wait for it, or MPI notices, this one leaves with its code.
    """
    if not shared:
        return
    from mpi4py import MPI

    limit = Limit(seconds, lambda: leave(code))
    try:
        for one in shared:
            one.free()
    except MPI.Exception:
        leave(code)
    limit.lift()
