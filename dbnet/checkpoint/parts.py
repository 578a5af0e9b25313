"""The shard's half of writing a checkpoint: its part; `master` is the coordinator's; the room tells of their messages.

Parts come before the master, the master before the link: whatever ends a run in between, the link leads to a whole checkpoint.
Disks may block; so the files are written by a thread, and nobody waits for it. A shard hands it one slice at a time between
serving: a checkpoint holds each slice as it was then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from dbnet.checkpoint.format import CHUNK, LIBVER, create, part_of, store
from dbnet.comm.channel import Channel
from dbnet.comm.threads import Background
from dbnet.core.files import Shelter, publish, require_room, why
from dbnet.core.ranges import Range
from dbnet.core.version import __version__

_MARGIN = 4 << 20
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


# --- the shard's half ---------------------------------------------------------------------------------------------------------


class PartFile:
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


class PartWriter:
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
        self._part: PartFile | None = None
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
            self._part = PartFile(path, about, shard.range.size, {name: x.dtype for name, x in registers.items()})

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
