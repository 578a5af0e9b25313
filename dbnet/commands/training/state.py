"""Which runs of a grid are there already, and which of the others have a checkpoint to go on from.

A run is told by its whole configuration (all but names and what only concerns its output), by the text of its own modules, and by
whether it ran on ranks or in one process; never by its name alone: what another one has left under that name is not taken.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dbnet.checkpoint.resume import candidates
from dbnet.checkpoint.verify import damage
from dbnet.commands.training.grid import GridPoint
from dbnet.core.config import Config, warn
from dbnet.core.errors import UserError
from dbnet.core.registry import SOURCES
from dbnet.monitor.results import Run
from dbnet.monitor.runfile import HERE


class Identity(NamedTuple):
    """What two runs have in common that are the same one: configuration, digests of own modules, ranks or one process."""

    config: str
    modules: tuple[str, ...]
    mpi: bool


class PointState(NamedTuple):
    """What there is of a point: the file of its finished run; or the checkpoint that an unfinished one has left."""

    run_file: Path | None = None
    checkpoint: Path | None = None

    @property
    def words(self) -> str:
        return "done" if self.run_file else f"goes on from {self.checkpoint}" if self.checkpoint else "to do"


def states(points: Sequence[GridPoint], mpi: bool, say: Callable[[str], None] = warn, start: str | None = None) -> list[PointState]:
    """Return what there is of every point; a damaged checkpoint is passed over with a sentence.

    Looked at are the run files in the outputs' folder whose names begin with `start`; default: with the configuration's name.
    """
    base, folder = points[0].base if start is None else start, Path(points[0].config.run.folder)
    paths = [path for path in folder.glob("*.h5") if path.name.startswith(base) and not path.name.endswith(".checkpoint.h5")]
    finished: dict[Identity, Path] = {}
    begun: dict[Identity, list[str]] = {}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        # Files that are damaged or none of a run are nobody's result.
        with suppress(UserError):
            run = Run(path, [])
            if run.about.get("world") == "simulated":
                continue
            me = _identity(run.config, run.about.get("modules", []), run.about.get("mpi") != HERE)
            if run.finished:
                finished[me] = path
            else:
                begun.setdefault(me, []).append(path.name.removesuffix(".h5"))
    out = []
    for point in points:
        me = _identity(point.config, [SOURCES[path] for path in point.config.model.modules], mpi)
        path = finished.get(me)
        out.append(PointState(path, None if path else _newest(point.config, begun.get(me, []), say)))
    return out


def _newest(config: Config, names: Sequence[str], say: Callable[[str], None]) -> Path | None:
    """Return the last sound checkpoint of the runs with these outputs."""
    folders = {f"{name}.checkpoints" for name in names}
    for path in candidates(config) if names else ():
        if path.parent.name in folders:
            flaws = damage(path)
            if not flaws:
                return path
            say(f"The checkpoint '{path}' is damaged and left out: {flaws[0]}.")
    return None


def _identity(config: Config, modules: Sequence[dict[str, str]], mpi: bool) -> Identity:
    run = config.run.model_copy(update={"name": "", "folder": "", "picture": False, "deadline": 60.0, "heartbeat": 20.0})
    return Identity(config.model_copy(update={"run": run}).text(), tuple(entry["sha256"] for entry in modules), mpi)


@contextmanager
def alone(folder: Path, name: str, say: Callable[[str], None], stopped: Callable[[], bool]) -> Iterator[None]:
    """Be the only sweep of this name in a folder; first wait until another one, or what is left of it, has ended.

    The lock is an open file, which the processes that a sweep starts hold, too: what outlives a killed one ends in peace.
    """
    path, waits = folder / f".{name}.sweep", False
    while True:
        number = _opened(path)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, number):
                break
        except BlockingIOError:
            if not waits:
                # The name may be gone by now; what is open stays.
                whose = os.pread(number, 200, 0).decode(errors="replace").strip() or "it has just begun"
                say(f"Another sweep of '{name}' in '{folder}' has not ended ({whose}); this one begins then.")
            waits = True
            time.sleep(0.1)
        except OSError as error:
            os.close(number)
            raise UserError(f"'{path}' cannot be locked ({error.strerror}); set run.folder to a disk that has locks.") from None
        os.close(number)
        if stopped():
            raise KeyboardInterrupt
    try:
        os.ftruncate(number, 0)
        os.write(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(number)


def _opened(path: Path) -> int:
    """Return the open file of a sweep's lock, which processes that are started inherit."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"'{path}', the lock of a sweep, cannot be opened ({error.strerror}); it may be another user's: change run.name or "
            "run.folder."
        ) from None
    os.set_inheritable(number, True)
    return number


def _is(path: Path, number: int) -> bool:
    """Return whether an open file still has its name: whoever had the lock may have taken it away since."""
    try:
        return os.path.samestat(os.fstat(number), os.stat(path))
    except FileNotFoundError:
        return False
