"""One rank's part of a recorded schedule: NAME.schedule/shard-0, replica-1.0 (replica and partition), and coordinator.

A part is a line that names the format, and a stream (zlib) of entries: kind, length, content. Each flush ends on a whole entry, in
the system's hands, so whoever is killed leaves a part that can be read up to its last flush. The first entry says whose part it is.

Of a shard, in the order of what it did:
    TAKES     slices taken: (origin, check sum) each; an origin's slices come in order, so nothing else need be said
    CLOSE     nothing more is taken of this replica, which is lost
    SAVE      a checkpoint is begun;  COPY  the next piece of it has been copied;  SAVED  SHA-256 of its registers
    END       the run is over; SHA-256 of what the shard holds
    BEGIN     of a batch method: a pass is begun, its number; what is taken until the next one is of this pass, what comes too late
              is not written down;  SUM  number of a pass all of whose bundles have come, and check sum of the gradient
Of a replica, in the order of its program:
    FETCH, SNAPSHOT   how often each slice had been changed in what was read, as differences from the entry before
    PUSH              number, gradients, newest step; stands before anything of the push can be applied
    ORDER             count of looks at the orders, and the row, when that has changed
    SHARE             number of a share and its row
    EVALUATED         the numbers of an evaluation
    END               the replica has left
A batch method's replicas decide nothing: theirs is empty, and the coordinator has one, in the order of its program:
    PASS              number, and of each bundle in the order in which it was accepted: replica, loss, portions
    ITERATION         number, loss, norm of the gradient, step;  STOP  why the method ends there, where the caller ended it
    EVALUATE          who is asked to evaluate what the shards hold;  EVALUATED  what came of it, which may be much later
    CHECKPOINT        name of one that is begun, number of the pass
    HALT              the run is to stop: number of the pass that is broken off, 0 between passes
    END               the run is over
FULL ends a part that has become too long, or could not be written.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.topology import Role, Topology
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.files import why

(
    ABOUT, TAKES, CLOSE, SAVE, COPY, SAVED, END, FETCH, SNAPSHOT, PUSH, ORDER, SHARE, EVALUATED,
    BEGIN, SUM, PASS, ITERATION, STOP, EVALUATE, CHECKPOINT, HALT, FULL,
) = range(22)  # fmt: skip
NAMES = (
    "its beginning", "slices taken", "the loss of a replica", "a checkpoint's beginning", "a checkpoint's piece",
    "a checkpoint's end", "the end", "a fetch", "a fetch to evaluate", "a push", "an order", "a share", "an evaluation",
    "a pass's beginning", "a pass's sum", "a pass", "an iteration", "a reason to end", "an order to evaluate", "a checkpoint",
    "a halt", "the end of the record",
)  # fmt: skip
TAKE = np.dtype([("origin", "<u2"), ("check", "<u4")])
_FORMAT = b"dbnet schedule 2\n"
_HEAD = struct.Struct("<BI")
_TAKES = 4096


def schedule_of(config: Config) -> Path:
    """Return the path of the folder of a run's recorded schedule."""
    return config.output(".schedule")


def part_of_schedule(config: Config, world: Topology, rank: int) -> Path:
    """Return the path of a rank's part."""
    if world.role(rank) is Role.COORDINATE:
        return schedule_of(config) / "coordinator"
    if world.role(rank) is Role.SERVE:
        return schedule_of(config) / f"shard-{world.shard_of(rank)}"
    replica, partition = world.place(rank)
    return schedule_of(config) / f"replica-{replica}.{partition}"


class LogEntry(NamedTuple):
    """One entry of a part."""

    kind: int
    content: bytes

    @property
    def value(self) -> Any:
        """What was written as JSON."""
        return json.loads(self.content)

    def array(self, dtype: Any) -> np.ndarray:
        return np.frombuffer(self.content, dtype)


class PartLog:
    """The writer's end; used by one thread.

    Parameters
    ----------
    path
        The file to make.
    about
        What the part says of itself.
    limit
        Bytes after which it ends.
    say
        Is told in a sentence why the record ends early.
    """

    def __init__(self, path: Path, about: dict[str, Any], limit: int, say: Callable[[str], None]) -> None:
        self.path, self._limit, self._say = path, limit, say
        self._squeeze = zlib.compressobj(1)
        self._waiting: list[bytes] = []
        self._takes, self._taken = np.zeros(_TAKES, TAKE), 0
        try:
            self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise UserError(f"Cannot write '{path}' ({why(error)}); every rank must reach run.folder to record.") from None
        self._written = 0
        self._write(_FORMAT)
        self.add(ABOUT, about)

    @property
    def open(self) -> bool:
        """Whether the record still goes on."""
        return self._file is not None

    def take(self, origin: int, check: int) -> None:
        """Write down that a slice of `origin` is applied, or refused, next."""
        if self._taken == _TAKES:
            self._put_takes()
        self._takes[self._taken] = origin, check
        self._taken += 1

    def add(self, kind: int, content: Any = b"") -> None:
        """Add an entry: bytes, an array, or what JSON can hold."""
        self._put_takes()
        if isinstance(content, np.ndarray):
            content = content.tobytes()
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self._waiting.append(_HEAD.pack(kind, len(content)) + content)

    def _put_takes(self) -> None:
        if self._taken:
            content = self._takes[: self._taken].tobytes()
            self._waiting.append(_HEAD.pack(TAKES, len(content)) + content)
            self._taken = 0

    def flush(self) -> None:
        """Hand to the system what has been added: it survives the end of this process, however that comes."""
        self._put_takes()
        waiting, self._waiting = b"".join(self._waiting), []
        if not waiting or self._file is None:
            return
        self._write(self._squeeze.compress(waiting) + self._squeeze.flush(zlib.Z_SYNC_FLUSH))
        if self._written > self._limit:
            self._write(self._squeeze.compress(_HEAD.pack(FULL, 0)) + self._squeeze.flush(zlib.Z_SYNC_FLUSH))
            self._stop(f"'{self.path}' has {self._written:,} bytes, the part of record.limit that it may have")

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._written += len(data)
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._stop(f"'{self.path}' cannot be written: {why(error)}")

    def _stop(self, reason: str) -> None:
        self._say(f"The schedule is recorded no further ({reason}); the run goes on.")
        os.close(self._file)
        self._file = None

    def close(self, content: Any = b"") -> None:
        """End the part as that of a rank that has come to its end; again does nothing."""
        if self._file is not None:
            self.add(END, content)
            self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None


class PartOfSchedule:
    """A part to read.

    Attributes
    ----------
    about
        What it says of itself.
    entries
        All that can be read, without the first.
    whole, full
        Whether its rank came to its end; whether it ended before that, being full.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"No part '{path}' of the recorded schedule can be read ({why(error)}).") from None
        if not data.startswith(_FORMAT):
            raise UserError(f"'{path}' is no part of a schedule that this dbnet has recorded.")
        self.path, self.entries = path, _entries(data[len(_FORMAT) :])
        if not self.entries or self.entries[0].kind != ABOUT:
            raise UserError(f"'{path}' is damaged: it does not say whose part it is.")
        self.about: dict[str, Any] = self.entries.pop(0).value
        last = self.entries[-1].kind if self.entries else None
        self.whole, self.full = last == END, last == FULL


def _entries(squeezed: bytes) -> list[LogEntry]:
    """Return all whole entries of a stream that may break off."""
    stream, out, at = zlib.decompressobj(), [], 0
    data = b"".join(_pieces(stream, squeezed))
    while at + _HEAD.size <= len(data):
        kind, length = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if end > len(data) or kind > FULL:
            break
        out.append(LogEntry(kind, data[at + _HEAD.size : end]))
        at = end
    return out


def _pieces(stream: Any, squeezed: bytes) -> Any:
    """Yield what can be read of a stream up to where it breaks off or is damaged."""
    for lo in range(0, len(squeezed), 1 << 16):
        try:
            yield stream.decompress(squeezed[lo : lo + (1 << 16)])
        except zlib.error:
            return
