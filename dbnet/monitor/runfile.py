"""The run file: one HDF5 file per run, written by the coordinator, readable while it grows (HDF5's single writer, many readers).

/progress     a row per replica and report: seconds, replica, steps, examples, loss, accuracy, examples/s, bytes, waiting
/evaluation   a row per evaluation: seconds, replica, steps, epochs, loss and accuracy of `evaluate.part` and of a part of the
              training set (train_), and of vectors what the loss says besides (squared: mean_squared_error, R2)
/iterations   a row per iteration of a batch method: loss, gradient norm, step; passes, rounds, backups, discarded portions in it
/events       a row per update at a shard, in the order of that shard's updates: who, push, clocks at fetch and apply, gradients;
              of a shard's first million, then of one in a hundred (`record.events`, `record.whole`, `record.every`)
/lost         a row per lost replica: when, its steps of this run, how many of their gradients were applied
/refused      a row per push that a shard refused: who, push, step, gradients in it, its first value that is not finite and where
/staleness    [shards, bins] how many updates, of all, had which staleness; the last bin counts all beyond
/busy         [shards] seconds in which each had something to do; 0 in one process, where replicas apply what they push
/state        0 running, 1 finished, 2 stopped by a signal with a checkpoint to go on from
attributes    config and own modules (JSON), topology, versions, revision, MPI library, hosts by rank, start time

Rows are written in blocks: a reader sees a run as it was a second ago, after two minutes 1 % of its time ago, 20 seconds at most. A
block that is not full is written once more when it is, at another place, so a row a time would fill the disk. While the disk has
no room, rows wait in memory.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from threadpoolctl import threadpool_info

from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.files import require_room, reserve, why
from dbnet.core.registry import SOURCES
from dbnet.core.version import __version__
from dbnet.monitor.tables import EVENTS, ITERATIONS, LOST, REFUSED, TABLES, evaluations

if TYPE_CHECKING:
    from dbnet.monitor.tensorboard import EventFiles
    from dbnet.shards.push import Refusal

BINS = 256
RUNNING, FINISHED, STOPPED = range(3)
ENDED = {FINISHED: "finished", STOPPED: "stopped by a signal"}
# What a run in one process, whose roles take turns, says of its MPI.
HERE = "none, one process"
_CHUNK = 4096
# Seconds that rows wait: at least, at most, and as a part of the time that the run has taken.
_SOON, _LATEST, _PART = 1.0, 20.0, 0.01
_AHEAD = 1 << 20


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a result."""
    return {
        "dbnet": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **{name: importlib.metadata.version(name) for name in ("numba", "scipy")},
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
    }


def machine() -> dict[str, Any]:
    """Return what else of a machine can change the last bit of a result: its processor, and how its BLAS computes."""
    found = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    blas = [
        f"{b['internal_api']} {b['version']} {b.get('architecture', '')}".strip()
        for b in threadpool_info()
        if b["user_api"] == "blas"
    ]
    return {"processor": found[0] if found else platform.machine(), "blas": sorted(set(blas)), **versions()}


def revision() -> str:
    """Return the git revision of the source, with '+' where it was changed; 'unknown' outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def make_folder(config: Config) -> None:
    """Make the folder of the outputs; UserError where that cannot be, or where nothing can be written into it."""
    folder = Path(config.run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the output folder '{folder}': {error.strerror}; set run.folder to another.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"The output folder '{folder}' is not writable; set run.folder to another.")


def begin(config: Config, about: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Config, RunFile]:
    """Create the run file under the first name that is free; return the configuration with that name, and the file.

    A name is free where none of a run's outputs is there. Whoever creates the run file has the name, and one alone can: of runs
    that begin at the same time each gets another.
    """
    name, number = config.run.name, 1
    while True:
        named = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
        if not any(
            os.path.lexists(named.output(ending))
            for ending in (".h5", ".checkpoint.h5", ".checkpoints", ".schedule", ".tensorboard", ".trace", ".png")
        ):
            with suppress(FileExistsError):
                return named, RunFile(named.output(".h5"), named, about, clock)
        number += 1
        name = f"{config.run.name}-{number}"


class RunFile:
    """The writer's end.

    Parameters
    ----------
    path
        The file to create; FileExistsError where there is one.
    config
        The effective configuration.
    about
        More attributes: MPI library, hosts, what was resumed, `errors` that the loss tells.
    clock
        Seconds, by which rows wait.

    Attributes
    ----------
    trouble
        Why rows wait in memory; nothing where none do.
    beside
        What is told the same for TensorBoard, if the run wants it.
    """

    beside: EventFiles | None = None

    def __init__(self, path: Path, config: Config, about: dict[str, Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        try:
            require_room(path.parent, 2 * _AHEAD)
            # HDF5 itself would take over a file that is there.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            try:
                self._file = h5py.File(path, "w", libver="latest")
            except OSError:
                path.unlink()
                raise
        except FileExistsError:
            raise
        except OSError as error:
            raise UserError(f"Cannot write the run file '{path}': {why(error)}; set run.folder to another.") from None
        self.path, self.trouble = path, ""
        self._waiting: dict[str, list[np.ndarray]] = {name: [] for name in TABLES}
        self._reserved = 0
        self._file.attrs.update(
            {
                "config": config.text(),
                "modules": json.dumps([SOURCES[path] for path in config.model.modules]),
                "versions": json.dumps(versions()),
                "revision": revision(),
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **{key: value if isinstance(value, str | int | float) else json.dumps(value) for key, value in about.items()},
            }
        )
        self._tables = {**TABLES, "evaluation": evaluations(about.get("errors", ()))}
        # Held open, and with their lengths: to open one and to ask it costs as much as to write a block.
        self._data, self._rows = {}, dict.fromkeys(self._tables, 0)
        for name, dtype in self._tables.items():
            chunks = (_CHUNK if name == "events" else _CHUNK // 4,)
            self._data[name] = self._file.create_dataset(
                name, (0,), dtype, maxshape=(None,), chunks=chunks, compression="gzip", compression_opts=1, shuffle=True
            )
        shards = config.topology.shards
        self._staleness, self._late = np.zeros((shards, BINS), np.int64), 0
        self._busy = np.zeros(shards)
        totals = {"staleness": self._staleness, "busy": self._busy}
        self._totals = [(self._file.create_dataset(name, data=total), total) for name, total in totals.items()]
        self._counted = False
        self._file.create_dataset("state", data=np.int8(RUNNING))
        # From here on others may read along; nothing but rows can be added any more.
        self._file.swmr_mode = True
        self._begun, self._next = clock(), -np.inf

    def _append(self, name: str, rows: np.ndarray) -> None:
        self._waiting[name].append(rows)
        if self._clock() >= self._next:
            self.flush()
        elif name == "events":
            self._write_blocks()

    def flush(self) -> None:
        """Write the rows that wait, if the disk has room for them."""
        now = self._clock()
        self._next = now + min(_LATEST, max(_SOON, _PART * (now - self._begun)))
        if not self._room():
            return
        for table, waiting in self._waiting.items():
            if waiting:
                self._write(table, np.concatenate(waiting))
                waiting.clear()
        for data, total in self._totals if self._counted else ():
            data[...] = total
            data.flush()
        self._counted = False

    def _write_blocks(self) -> None:
        """Write the updates that fill blocks, so that memory holds a block of them."""
        rows, stored = self._waiting["events"], self._rows["events"]
        full = (stored + sum(map(len, rows))) // _CHUNK * _CHUNK - stored
        if full > 0 and self._room():
            more = np.concatenate(rows)
            self._write("events", more[:full])
            self._waiting["events"] = [more[full:]]

    def _write(self, table: str, rows: np.ndarray) -> None:
        data, before = self._data[table], self._rows[table]
        after = before + len(rows)
        data.resize(after, axis=0)
        data[before:after] = rows
        data.flush()
        self._rows[table] = after

    def _room(self) -> bool:
        """Return whether the disk has room for the rows that wait; HDF5 must not meet a full one."""
        # A chunk that is added to is written once more, at the end of the file.
        needed = sum(
            2 * sum(rows.nbytes for rows in waiting) + _CHUNK * self._tables[name].itemsize
            for name, waiting in self._waiting.items()
            if waiting
        )
        size = self._file.id.get_filesize() + needed + _AHEAD // 4
        if size > self._reserved:
            try:
                reserve(self._file.id.get_vfd_handle(), self.path.parent, size + _AHEAD)
            except OSError as error:
                self.trouble = why(error)
                return False
            self._reserved = size + _AHEAD
        self.trouble = ""
        return True

    @property
    def waiting(self) -> int:
        """Rows that wait in memory."""
        return sum(len(rows) for waiting in self._waiting.values() for rows in waiting)

    def progress(self, rows: np.ndarray) -> None:
        self._append("progress", rows)
        if self.beside is not None:
            self.beside.progress(rows, self.mean_staleness)

    def evaluation(self, *values: float) -> None:
        self._append("evaluation", np.array([values], self._tables["evaluation"]))
        if self.beside is not None:
            self.beside.evaluation(dict(zip(self._tables["evaluation"].names, values, strict=True)))

    def iteration(self, *values: float) -> None:
        self._append("iterations", np.array([values], ITERATIONS))
        if self.beside is not None:
            self.beside.iteration(*values)

    def lost(self, *values: float) -> None:
        self._append("lost", np.array([values], LOST))

    def events(self, shard: int, events: np.ndarray, late: tuple[np.ndarray, np.ndarray], busy: float = 0.0) -> None:
        """Append updates of one shard, and count all that it has made since the last time.

        Parameters
        ----------
        events
            Those that are recorded [rows].
        late
            The stalenesses that occurred, and how many updates had each.
        busy
            Seconds of the run in which the shard has had something to do.
        """
        self._busy[shard], self._counted = busy, True
        values, counts = late
        self._late += int(values @ counts)
        np.add.at(self._staleness[shard], np.minimum(values, BINS - 1), counts)
        rows = np.zeros(len(events), EVENTS)
        rows["shard"] = shard
        for name in events.dtype.names:
            rows[name] = events[name]
        self._append("events", rows)

    def refused(self, seconds: float, shard: int, refusals: Sequence[Refusal]) -> None:
        """Append the pushes that one shard has refused."""
        rows = [(seconds, shard, *refusal.push, refusal.index, refusal.value) for refusal in refusals]
        self._append("refused", np.array(rows, REFUSED))

    @property
    def staleness(self) -> np.ndarray:
        """How many updates had which staleness so far [shards, bins]; not to be written to."""
        return self._staleness

    @property
    def mean_staleness(self) -> float:
        """Mean over all updates of all shards so far; NaN before the first."""
        updates = self._staleness.sum()
        return self._late / int(updates) if updates else float("nan")

    def close(self, state: int) -> int:
        """Mark the run's end; return how many rows are lost for want of room. Closing again does nothing."""
        if not self._file:
            return 0
        self.flush()
        self._file["state"][...] = state
        self._file.close()
        if self.beside is not None:
            self.beside.close(self._staleness)
        return self.waiting
