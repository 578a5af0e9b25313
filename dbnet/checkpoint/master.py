"""The coordinator's side of checkpoints: when one is due, who is asked, what is done where one fails.

A checkpoint that cannot be written costs nothing but itself: what there is of it goes, the run goes on, and the next one is tried
at its time. What failed last is known at the end of the run.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.checkpoint.format import LIBVER, folder_of, link_of, part_of, store, text
from dbnet.checkpoint.parts import _MARGIN, FAILURES, Saved
from dbnet.comm.channel import Channel
from dbnet.comm.threads import Background
from dbnet.core.config import Config
from dbnet.core.files import hdf5, point, publish, require_room, why
from dbnet.core.untrusted.opening import opened
from dbnet.core.version import __version__


class Checkpoints:
    """Has the checkpoints of one run written.

    Parameters
    ----------
    channel, warn
        To the shards; where failures are said.
    config, texts
        The run; what `format.texts` says of it.
    clock
        Seconds since the start.
    inline
        Whether it writes itself, and not a thread.

    Attributes
    ----------
    failure
        Why the last checkpoint could not be written; nothing if it could.
    """

    def __init__(
        self, channel: Channel, warn: Callable[[str], None], config: Config, texts: dict[str, Any], clock: Callable[[], float],
        inline: bool = False, resumed: bool = False,
    ) -> None:  # fmt: skip
        self._channel, self._warn, self._config, self._texts, self._clock = channel, warn, config, texts, clock
        self.folder, self.link = folder_of(config), link_of(config)
        self._background: Background | None = None
        self._inline = inline
        self._number, self._next = 0, config.checkpoint.seconds or 0.0
        # The steps of a resumed run do not count from nought.
        self._marks: int | None = None if resumed else 0
        self._id, self._answers = "", {}
        self._seconds = 0.0
        self.writing, self.failure = False, ""

    def messages(self) -> dict[str, Callable[[int, Any], None]]:
        """A shard that is still at it says so: the message alone is a sign of life."""
        return {"saving": lambda shard, written: None}

    def act(self, status: Any) -> bool:
        return self.advance()

    def due(self, steps: int) -> bool:
        """Return whether it is time, after so many steps of all replicas together."""
        every = self._config.checkpoint
        if self.writing:
            return False
        if every.steps is not None and self._marks is None and steps:
            self._marks = steps // every.steps
        by_steps = every.steps is not None and self._marks is not None and steps // every.steps > self._marks
        return by_steps or (every.seconds is not None and self._clock() >= self._next)

    def begin(self, tables: dict[str, np.ndarray], state: dict[str, Any], seconds: float, steps: int) -> None:
        """Ask every shard for its part of a checkpoint that also holds `tables` and a batch method's `state`."""
        every = self._config.checkpoint
        self._next = self._clock() + (every.seconds or 0)
        self._marks = steps // every.steps if every.steps is not None else 0
        self._number += 1
        self._id, self._answers, self._seconds, self.failure = secrets.token_hex(8), {}, seconds, ""
        about = {"id": self._id, "name": self._texts["name"], "seconds": seconds, "steps": steps}
        about |= {name: self._texts[name] for name in ("size", "scale")}
        texts = {name: self._texts[name] for name in ("config", "layout", "data", "chain", "modules")}
        self._content = ({**texts, "about": about, "method": state}, tables)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._fail(f"the coordinator: {why(error)}")
            return
        self.writing = True
        for shard in range(self._config.topology.shards):
            self._channel.send(1 + shard, "checkpoint", (self.master, shard, self._id))

    @property
    def master(self) -> Path:
        """The path of the newest generation's master."""
        return master_of(self.folder, self._number)

    def take(self, shard: int, saved: Saved) -> None:
        """Take a shard's answer; when all have come, write the master on a thread."""
        if saved.id != self._id:
            return
        self._answers[shard] = saved
        if len(self._answers) < self._config.topology.shards:
            return
        if self._background is None:
            self._background = Background(self._inline)
        self._background.start(self._jobs())

    def _jobs(self) -> Iterator[Callable[[], None]]:
        parts = [self._answers[shard] for shard in range(self._config.topology.shards)]
        failed = [(shard, part.failure) for shard, part in enumerate(parts) if part.failure]
        if failed:
            shard, reason = failed[0]
            self._fail(f"shard {shard}{f' and {len(failed) - 1} more' if len(failed) > 1 else ''}: {reason}")
            yield partial(prune, self.folder, self._config.checkpoint.keep, self._number)
        else:
            yield from seal(self.master, self.link, self._config.checkpoint.keep, *self._content, parts)

    def advance(self) -> bool:
        """See how far the thread is; return whether there was something to do."""
        if self._background is None:
            return False
        try:
            busy = self._background.advance()
        except FAILURES as error:
            busy = True
            if self.link.is_symlink() and self.link.readlink().name == self.master.name:
                self._warn(f"Old checkpoints could not be removed (the coordinator: {why(error)}). The run goes on.")
            elif not self.failure:
                # What there is of it goes; where even that fails, the reason has been said.
                self._fail(f"the coordinator: {why(error)}")
                self._background.start(iter([partial(prune, self.folder, self._config.checkpoint.keep, self._number)]))
        if busy and not self._background.busy:
            self.writing = False
        return busy

    def _fail(self, reason: str) -> None:
        self.failure = reason
        self._warn(f"The checkpoint at {self._seconds:.1f} s could not be written ({reason}). The run goes on.")

    def close(self) -> None:
        """End the thread; a checkpoint that is not complete leaves nothing."""
        if self._background is not None:
            self._background.close()
        if self.writing:
            self.writing = False
            with suppress(OSError):
                prune(self.folder, self._config.checkpoint.keep, self._number)


class Unsaved(Checkpoints):
    """Of a run that computes nothing: there is nothing to save."""

    def due(self, steps: int) -> bool:
        return False

    def begin(self, tables: dict[str, np.ndarray], state: dict[str, Any], seconds: float, steps: int) -> None:
        """Write nothing."""


_NUMBERED = re.compile(r"(\d{6,})(\.shard-\d+)?\.h5(\.part)?")


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
