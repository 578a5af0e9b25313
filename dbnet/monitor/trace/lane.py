"""A lane: the spans of one thread of one rank, in a file that is its memory.

The file is a ring of records, mapped: a span that has ended is in the system's hands at once. So nothing is flushed, whoever is
killed leaves every span that had ended, and memory and disk are bounded: the newest `record.spans` are kept. The file has its
blocks before they are touched, since on a full disk a hole would kill whoever writes to it.

Before the records stands a text of `HEAD` bytes, a line of JSON each: what the lane says of itself, then the names of its spans as
they are met: [number, name, category].
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dbnet.comm.turns import Turns
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.files import give_blocks, why

# A span: when it began and ended, ns; a step or the number of a push; its name; of an update: whose, how stale, slices in its ring.
SPAN = np.dtype(
    [
        ("begin", "<i8"),
        ("end", "<i8"),
        ("number", "<i8"),
        ("name", "<u2"),
        ("origin", "<u2"),
        ("staleness", "<i4"),
        ("waiting", "<i4"),
        ("unused", "<i4"),
    ]
)
HEAD = 1 << 16
_FORMAT = "dbnet trace 1"
_PUT = struct.Struct("<qqqHHiii").pack_into
_FIRST = 1 << 16
_REST = 100_000  # ns
_STEP = SPAN.itemsize
_MORE = ["(more names)", "wait"]


class Sampling(NamedTuple):
    """One gradient, one fetch and one push in how many are spans."""

    steps: int = 1
    fetches: int = 1
    pushes: int = 1


WHOLE = Sampling()


def trace_of(config: Config) -> Path:
    """Return the path of the folder of a run's trace."""
    return config.output(".trace")


class Lane:
    """The writer's end; used by one thread.

    Parameters
    ----------
    path
        The file to make.
    about
        What the lane says of itself.
    spans
        How many are kept.
    now
        The time, ns.
    say
        Is told in a sentence why fewer are kept.
    idle
        Whether a rest is a span; where all roles take turns it is not.
    sampling
        What is left out.
    """

    def __init__(
        self, path: Path, about: dict[str, Any], spans: int, now: Callable[[], int], say: Callable[[str], None],
        idle: bool = True, sampling: Sampling = WHOLE,
    ) -> None:  # fmt: skip
        self.path, self.now, self._say, self._idle, self.sampling = path, now, say, idle, sampling
        self._size = HEAD + spans * SPAN.itemsize
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                os.ftruncate(number, self._size)
                give_blocks(number, 0, min(self._size, HEAD + _FIRST))
                self._memory = mmap.mmap(number, self._size)
                # Or the first touch reads megabytes around it that hold nothing: milliseconds for each lane.
                self._memory.madvise(mmap.MADV_RANDOM)
            finally:
                os.close(number)
        except OSError as error:
            raise UserError(f"Cannot write '{path}' ({why(error)}); every rank must reach run.folder to trace.") from None
        # Records from here to `_end`; there the ring grows, or begins again.
        self._at, self._end, self._wrapped = HEAD, HEAD + _whole(min(self._size - HEAD, _FIRST)), False
        self._put, self._text, self._names = _PUT, 0, {}
        self._line({"format": _FORMAT, "sampling": sampling, **about})
        self._line([1, *_MORE])

    def name(self, text: str, category: str) -> int:
        """Return the number of a span's name."""
        number = self._names.get(text)
        if number is None:
            number = len(self._names) + 2
            self._names[text] = number = number if self._line([number, text, category]) else 1
        return number

    def _line(self, content: Any) -> bool:
        line = f"{json.dumps(content)}\n".encode()
        if self._text + len(line) >= HEAD:
            return False
        self._memory[self._text : self._text + len(line)] = line
        self._text += len(line)
        return True

    def add(
        self, name: int, begin: int, end: int, number: int = -1, origin: int = 0, staleness: int = -1, waiting: int = -1
    ) -> None:
        """Add a span that has ended."""
        at = self._at
        self._put(self._memory, at, begin, end, number, name, origin, staleness, waiting, 0)
        at += _STEP
        self._at = at if at < self._end else self._turn(at)

    def _turn(self, at: int) -> int:
        """Return the place of the next record at the end of what is reserved: there, when more can be, or the beginning."""
        if not self._wrapped and at + SPAN.itemsize <= self._size:
            size = min(self._size, HEAD + 2 * (at - HEAD))
            try:
                number = os.open(self.path, os.O_RDWR)
                try:
                    give_blocks(number, at, size)
                finally:
                    os.close(number)
                self._end = HEAD + _whole(size - HEAD)
                return at
            except OSError as error:
                kept = (at - HEAD) // SPAN.itemsize
                self._say(f"'{self.path}' keeps no more than the newest {kept:,} spans: {why(error)}.")
        self._wrapped = True
        return HEAD

    def watch(self, turns: Turns[Any]) -> Turns[Any]:
        """Run what gives way, with a span for each time that it waits or rests."""
        now, reason, begin, end, mark = self.now, None, 0, 0, 0
        try:
            while True:
                try:
                    wait = next(turns)
                except StopIteration as over:
                    return over.value
                words = wait.reason if wait is not None and (wait.reason or self._idle) else None
                # Looks in vain, one after another, are one span.
                if reason is not None and (words != reason or self._at != mark):
                    self._rested(reason, begin, end)
                    reason = None
                if words is not None and reason is None:
                    reason, begin, mark = words, now(), self._at
                yield wait
                if reason is not None:
                    end = now()
        finally:
            if reason is not None:
                self._rested(reason, begin, end)

    def _rested(self, reason: str, begin: int, end: int) -> None:
        # Short rests are gaps as well, and a busy shard has one after each update.
        if reason or end - begin >= _REST:
            self.add(self.name(reason or "idle", "wait" if reason else "idle"), begin, max(begin, end))

    def close(self) -> None:
        """End the file; what is added from here on is not kept."""
        if self._put is _PUT:
            self._put = _nothing
            self._memory.close()
            try:
                os.truncate(self.path, self._end if self._wrapped else self._at)
            except OSError as error:
                self._say(f"'{self.path}' could not be ended ({why(error)}); it can be read as it is.")


def _whole(size: int) -> int:
    """Return how many of so many bytes whole records take."""
    return size // SPAN.itemsize * SPAN.itemsize


def _nothing(*span: Any) -> None:
    """Stands for writing where a lane is closed."""


class Trace:
    """The lanes of the ranks of one process.

    Parameters
    ----------
    config
        The run, under the name that it has found.
    about
        What every lane says: the host; `offset` and `error`, what is added to its clock to get the coordinator's, and by how much
        that may be wrong, ns.
    now, say, idle, sampling
        See `Lane`.

    Attributes
    ----------
    lanes
        Of each rank, by track.
    """

    def __init__(
        self, config: Config, about: dict[str, Any], now: Callable[[], int], say: Callable[[str], None],
        idle: bool = True, sampling: Sampling = WHOLE,
    ) -> None:  # fmt: skip
        self._folder, self._spans, self._about = trace_of(config), config.record.spans, about
        self._ways = (now, say, idle, sampling)
        self.lanes: dict[int, dict[str, Lane]] = {}

    def open(self, rank: int, name: str, track: str, **about: Any) -> None:
        """Make a lane of a rank; `name` is the rank's."""
        path = self._folder / f"{rank:05d}-{track}"
        about = {"rank": rank, "name": name, "track": track, **self._about, **about}
        self.lanes.setdefault(rank, {})[track] = Lane(path, about, self._spans, *self._ways)

    def close(self) -> None:
        """End all lanes."""
        for lanes in self.lanes.values():
            for lane in lanes.values():
                lane.close()


class LaneFile:
    """A lane to read.

    Attributes
    ----------
    about, names
        What it says of itself; (name, category) of spans by their number.
    spans
        All that it holds, in the order in which they ended; times as the coordinator's host would have read them.
    """

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"No lane '{path}' of the trace can be read ({why(error)}).") from None
        text = data[:HEAD].split(b"\0", 1)[0].rpartition(b"\n")[0]
        try:
            self.about, *names = [json.loads(line) for line in text.split(b"\n")]
            if self.about["format"] != _FORMAT:
                raise ValueError
            self.names: dict[int, tuple[str, str]] = {number: (name, category) for number, name, category in names}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"'{path}' is no lane of a trace that this dbnet has made.") from None
        spans = np.frombuffer(data, SPAN, len(data[HEAD:]) // SPAN.itemsize, HEAD) if len(data) > HEAD else np.zeros(0, SPAN)
        # What was never written is nought; a span whose writer was killed has a part that does not fit.
        spans = spans[np.isin(spans["name"], list(self.names)) & (spans["end"] >= spans["begin"])]
        self.spans = spans[np.argsort(spans["end"], kind="stable")].copy()
        for name in ("begin", "end"):
            self.spans[name] += self.about["offset"]

    @property
    def steps(self) -> int:
        """How many steps were made by the end of the last gradient, from the run's first on."""
        gradients = [number for number, (name, _) in self.names.items() if name == "gradient"]
        return int(self.spans["number"][np.isin(self.spans["name"], gradients)].max(initial=-1)) + 1
