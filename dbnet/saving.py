"""Writing a checkpoint, both halves: each shard its part, the coordinator the master; see `checkpoint` for the files.

    coordinator -> shard    "checkpoint" (master's path, id)
    shard -> coordinator    "saving" bytes         now and then, while its part is under way
                            "saved" Saved          its part is durable and has its name, or why not
    coordinator             when all have answered: the master, the link to it, then what is older goes

Parts come before the master, the master before the link: whatever ends a run in between, the link leads to a whole checkpoint.
Disks may block; so the files are written by a thread, and nobody waits for it. A shard hands it one slice at a time between
serving: a checkpoint holds each slice as it was then.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from dbnet import __version__
from dbnet.channel import Channel
from dbnet.checkpoint import CHUNK, LIBVER, create, part_of, store, text
from dbnet.disk import Shelter, hdf5, point, publish, require_room, why
from dbnet.ranges import Range
from dbnet.untrusted import opened

_MARGIN = 4 << 20
_MOMENT = 1e-4
_NUMBERED = re.compile(r"(\d{6,})(\.shard-\d+)?\.h5(\.part)?")
FAILURES = (OSError, RuntimeError)
_BEYOND = 1e15


class Unsound(RuntimeError):
    """A register holds values that nobody could go on from."""


class Saved(NamedTuple):
    """A shard's answer: whose checkpoint, what failed if anything did, whether its numbers are sound; what the master must know.

    The registers' types and the SHA-256 of their values go by name.
    """

    id: str
    failure: str
    sound: bool
    range: Range
    clock: np.ndarray
    registers: dict[str, str]
    digests: dict[str, str]


class Background:
    """A thread that does one job after another for someone who must not wait; `inline` without one, a job at each call."""

    def __init__(self, inline: bool = False) -> None:
        self._thread = None if inline else ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._jobs: Iterator[Callable[[], None]] = iter(())
        self._job: Future[None] | None = None

    def start(self, jobs: Iterator[Callable[[], None]]) -> None:
        """Take jobs; each is made when the one before is done."""
        self._jobs = jobs
        self._job = self._submit(_nothing)

    def _submit(self, job: Callable[[], None]) -> Future[None]:
        if self._thread is not None:
            return self._thread.submit(job)
        done: Future[None] = Future()
        try:
            done.set_result(job())
        except Exception as error:  # as the thread does: whoever looks at the job hears of it
            done.set_exception(error)
        return done

    @property
    def busy(self) -> bool:
        return self._job is not None

    def advance(self) -> bool:
        """Begin the next job if the last has ended, and raise what that raised; return whether there was something to do."""
        if self._job is None:
            return False
        # A moment, in which the thread has the interpreter for itself.
        wait((self._job,), _MOMENT)
        if not self._job.done():
            return False
        done, self._job = self._job, None
        done.result()
        job = next(self._jobs, None)
        if job is not None:
            self._job = self._submit(job)
        return True

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)


def _nothing() -> None:
    """Stands for the job before the first."""


# --- the shard's half ---------------------------------------------------------------------------------------------------------


class Part:
    """The part of one shard while it is written; its thread alone touches the file.

    Parameters
    ----------
    path
        Its final path.
    about
        Id of the checkpoint, number of the part.
    size, registers
        Elements and types of the registers.
    """

    def __init__(self, path: Path, about: dict[str, Any], size: int, registers: dict[str, np.dtype]) -> None:
        self.path, self._temporary = path, path.with_name(path.name + ".part")
        require_room(path.parent, _MARGIN + size * sum(dtype.itemsize for dtype in registers.values()))
        self._shelter = Shelter(self._temporary)
        self._file = h5py.File(self._shelter, "w", libver=LIBVER)
        # HDF5 has no chunks without elements.
        self._registers = {name: create(self._file, name, (size,), dtype) for name, dtype in registers.items() if size}
        self._hashes = {name: hashlib.sha256() for name in self._registers}
        store(self._file, "about", about)

    def write(self, name: str, lo: int, values: np.ndarray) -> None:
        """Write the next slice of a register, `lo` counted within the shard."""
        self._registers[name][lo : lo + values.size] = values
        self._hashes[name].update(values)
        if self._shelter.error is not None:
            raise self._shelter.error

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each register that was written."""
        return {name: digest.hexdigest() for name, digest in self._hashes.items()}

    def commit(self, part: Range, clock: np.ndarray) -> None:
        """Add the clock; make the file durable and give it its name."""
        store(self._file, "clock", clock)
        store(self._file, "range", np.array(part))
        self._file.close()
        self._shelter.close()
        publish(self._temporary, self.path)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        with suppress(OSError):
            self._shelter.close()
        with suppress(OSError):
            self._temporary.unlink()


class Saver:
    """A shard's side: writes its part when the coordinator asks for it.

    Parameters
    ----------
    shard
        Its range, registers and clock.
    channel
        To the coordinator.
    clock
        Seconds of the run.
    inline
        Whether it writes itself, a slice at each turn, and not a thread.
    """

    def __init__(self, shard: Any, channel: Channel, clock: Callable[[], float], inline: bool = False) -> None:
        self._shard, self._channel, self._clock, self._inline = shard, channel, clock, inline
        self._background: Background | None = None
        self._part: Part | None = None
        self._id, self._said, self._bytes = "", 0.0, 0

    @property
    def busy(self) -> bool:
        return self._background is not None and self._background.busy

    def begin(self, master: Path, number: int, identity: str) -> None:
        """Start a part; the coordinator asks for one at a time."""
        if self._background is None:
            self._background = Background(self._inline)
        self._id, self._bytes, self._said = identity, 0, self._clock()
        self._background.start(self._jobs(part_of(master, number), number))

    def _jobs(self, path: Path, number: int) -> Iterator[Callable[[], None]]:
        shard, registers = self._shard, self._shard.registers()

        def begin() -> None:
            about = {"id": self._id, "part": number, "dbnet": __version__}
            self._part = Part(path, about, shard.range.size, {name: x.dtype for name, x in registers.items()})

        yield begin
        for name, register in registers.items():
            step = max(1, CHUNK // register.itemsize)
            for lo in range(0, shard.range.size, step):
                values = register[lo : lo + step].copy()
                # Parameters beyond this are beyond all learning; a comparison with NaN is false.
                if not np.abs(values).max() <= (_BEYOND if name == "params" else np.finfo(values.dtype).max):
                    raise Unsound(f"{name} holds values that are not finite, or beyond all learning")
                yield partial(self._part.write, name, lo, values)
                self._bytes += values.nbytes
        clock = shard.clock.copy()
        yield partial(self._part.commit, shard.range, clock)
        self._answer("", clock)

    def _answer(self, failure: str, clock: np.ndarray, sound: bool = True) -> None:
        digests = self._part.digests if self._part is not None else {}
        self._part = None
        types = {name: x.dtype.name for name, x in self._shard.registers().items()}
        self._channel.send(0, "saved", Saved(self._id, failure, sound, self._shard.range, clock, types, digests))

    def advance(self) -> bool:
        """Hand the next slice to the thread if it is free; return whether there was something to do."""
        if self._background is None:
            return False
        if self._background.busy and self._bytes and self._clock() - self._said > 1:
            self._channel.send(0, "saving", self._bytes)
            self._said, self._bytes = self._clock(), 0
        try:
            return self._background.advance()
        except FAILURES as error:
            self._discard()
            self._answer(why(error), self._shard.clock.copy(), not isinstance(error, Unsound))
            return True

    def _discard(self) -> None:
        if self._part is not None:
            self._part.discard()
            self._part = None

    def close(self) -> None:
        """End the thread; a part that is not complete leaves nothing."""
        if self._background is not None:
            self._background.close()
            self._discard()


# --- the coordinator's half ---------------------------------------------------------------------------------------------------


def master_of(folder: Path, number: int) -> Path:
    """Return the path of a generation's master."""
    return folder / f"{number:06d}.h5"


def write_master(path: Path, texts: dict[str, Any], tables: dict[str, np.ndarray], parts: list[Saved]) -> None:
    """Write the master over the parts that the shards have written."""
    about = {**texts["about"], "dbnet": __version__, "written": time.time(), "registers": parts[0].registers}
    require_room(path.parent, _MARGIN)
    about_parts = [{"part": shard, "digests": part.digests} for shard, part in enumerate(parts)]
    temporary = path.with_name(path.name + ".part")
    for shard in range(len(parts)):
        _see(part_of(path, shard), about["id"], shard)
    with hdf5(temporary, LIBVER) as file:
        for name, value in {**texts, "about": about, "parts": about_parts, **tables}.items():
            store(file, name, value)
        store(file, "clock", np.array([part.clock for part in parts]))
        store(file, "ranges", np.array([part.range for part in parts], np.int64))
        for name, dtype in about["registers"].items():
            layout = h5py.VirtualLayout((about["size"],), np.dtype(dtype))
            for shard, part in enumerate(parts):
                if part.range.size:
                    layout[part.range.slice] = h5py.VirtualSource(part_of(path, shard).name, name, (part.range.size,))
            file.create_virtual_dataset(name, layout, fillvalue=np.nan)
    publish(temporary, path)


def _see(path: Path, identity: str, shard: int) -> None:
    """Raise OSError where a part is not to be seen from here."""
    if not path.exists():
        raise OSError(f"the part of shard {shard} is not in the coordinator's '{path.parent}'; all hosts must share run.folder")
    with opened(path) as file:
        if text(file, "about")["id"] != identity:
            raise OSError(f"'{path}' was written by another run")


def prune(folder: Path, keep: int, upto: int) -> None:
    """Remove what is older than the last `keep` whole generations, and what is half-made up to number `upto`."""
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name))]
    whole = sorted(number for number, path in found if path == master_of(folder, number))
    kept = set(whole[-keep:])
    # Masters first: a master without its parts is never there.
    for number, path in sorted(found, key=lambda entry: entry[1] != master_of(folder, entry[0])):
        if number not in kept and number <= upto:
            path.unlink(missing_ok=True)


def seal(
    path: Path, link: Path, keep: int, texts: dict[str, Any], tables: dict[str, np.ndarray], parts: list[Saved]
) -> Iterator[Callable[[], None]]:
    """Yield the jobs that make a checkpoint of parts."""
    yield partial(write_master, path, texts, tables, parts)
    yield partial(point, link, f"{path.parent.name}/{path.name}")
    yield partial(prune, path.parent, keep, int(path.stem))
