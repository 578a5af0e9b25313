"""Checkpoints: the whole restartable state in one HDF5 file, written whole or not at all.

    /params, /state.<name>   [parameters] the flat vector and the rule's registers
    /vector.<name>, /state   [parameters] the registers of a batch method, and what its coordinator knows (JSON)
    /clock                   [shards, partitions] count of updates, with /ranges [shards, 2]
    /replicas                one row per replica: steps, examples, pushes, epoch, position (the cursor of its subset)
    attributes               config (JSON), layout (names, offsets, shapes), model input shape, run seconds

The order of examples is a function of (seed, subset, epoch), so a cursor is the state of the generators too. The shards send
their registers slice by slice while they go on serving; the coordinator writes them to a temporary name, makes them durable and
renames. A checkpoint that is taken during training therefore holds each slice as it was when it was sent.
"""

from __future__ import annotations

import json
import os
from math import isfinite
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet import __version__
from dbnet.config import Config, stored
from dbnet.errors import UserError, reading
from dbnet.model import Model
from dbnet.ranges import Range, overlap

REPLICA = np.dtype([("steps", "i8"), ("examples", "i8"), ("pushes", "i8"), ("epoch", "i8"), ("position", "i8")])
# Counts travel as float64, too.
_MOST = 1 << 53


class Writer:
    """Collects one checkpoint; `commit` makes it appear.

    Parameters
    ----------
    path
        The final path.
    config, model, input_shape
        What the checkpoint is of.
    """

    def __init__(self, path: Path, config: Config, model: Model, data: dict[str, Any]) -> None:
        self.path, self._part = path, path.with_name(path.name + ".part")
        self._size = model.layout.size
        self._file = h5py.File(self._part, "w")
        layout = [(e.name, e.offset, e.shape) for e in model.layout.entries]
        self._file.attrs.update(
            {"dbnet": __version__, "config": config.text(), "layout": json.dumps(layout), "data": json.dumps(data)}
        )

    def write(self, name: str, lo: int, values: np.ndarray) -> None:
        """Write a slice of a register, `lo` counted in the flat vector."""
        if name not in self._file:
            self._file.create_dataset(name, (self._size,), values.dtype)
        self._file[name][lo : lo + values.size] = values

    def commit(
        self, clocks: np.ndarray, ranges: list[Range], replicas: np.ndarray, seconds: float, state: dict[str, Any] | None = None
    ) -> None:
        """Add what belongs to no register, make the file durable and give it its name."""
        self._file["clock"], self._file["ranges"], self._file["replicas"] = clocks, np.array(ranges), replicas
        self._file.attrs["seconds"] = seconds
        if state:
            # Not an attribute: a long history's Gram matrix may be too large for one.
            self._file["state"] = json.dumps(state)
        self._file.close()
        with open(self._part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._part, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def discard(self) -> None:
        """Leave nothing behind."""
        self._file.close()
        self._part.unlink(missing_ok=True)


class Checkpoint:
    """A checkpoint to read; every reader takes only its own ranges."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"No checkpoint '{path}'; a run writes its own beside its run file (NAME.checkpoint.h5).")
        with reading(path, "use an earlier checkpoint"), h5py.File(self.path, "r") as file:
            if "params" not in file or "config" not in file.attrs:
                raise UserError(f"'{path}' is not a dbnet checkpoint; give the NAME.checkpoint.h5 of a run.")
            self.config: Config = stored(file.attrs["config"])
            self.layout = json.loads(file.attrs["layout"])
            self.data: dict[str, Any] = json.loads(file.attrs["data"])
            self.seconds = float(file.attrs["seconds"])
            self.size, self.dtype = file["params"].shape[0], file["params"].dtype
            self.clock, self.ranges = file["clock"][:], file["ranges"][:]
            rows = file["replicas"][:]
            if rows.dtype.names != REPLICA.names or rows.ndim != 1:
                raise ValueError("/replicas is damaged")
            self.replicas: np.ndarray = rows.astype(REPLICA)
            self.registers = [name for name in file if name == "params" or name.startswith(("state.", "vector."))]
            if any(file[name].shape != (self.size,) or file[name].dtype.kind != "f" for name in self.registers):
                raise ValueError(f"the registers must all have {self.size} floating-point numbers")
            self.state: dict[str, Any] = json.loads(file["state"][()]) if "state" in file else {}
            self._check()

    def _check(self) -> None:
        """Raise ValueError where what a checkpoint says of itself cannot be used."""
        for name, offset, shape in self.layout:
            if not isinstance(name, str) or any(type(n) is not int or n < 0 for n in (offset, *shape)):
                raise ValueError(f"the layout of {name!r} is damaged")
        shape, outputs = self.data["shape"], self.data["outputs"]
        if not shape or any(type(n) is not int or n < 1 for n in (*shape, outputs)) or type(self.data["vectors"]) is not bool:
            raise ValueError("what it says of its data is damaged")
        shards = len(self.ranges)
        if self.clock.ndim != 2 or not self.clock.size or len(self.clock) != shards or self.ranges.shape != (shards, 2):
            raise ValueError(f"/clock {self.clock.shape} and /ranges {self.ranges.shape} do not fit each other")
        for values in (self.clock, self.ranges, *(self.replicas[name] for name in REPLICA.names)):
            if values.dtype.kind not in "iu" or values.min(initial=0) < 0 or values.max(initial=0) > _MOST:
                raise ValueError("/clock, /ranges and /replicas must hold counts")
        if not isfinite(self.seconds) or not isinstance(self.state, dict):
            raise ValueError("/state or the attribute seconds is damaged")

    def read(self, name: str, part: Range, out: np.ndarray) -> None:
        """Read a range of a register into `out` [part.size]."""
        with reading(self.path, "use an earlier checkpoint"), h5py.File(self.path, "r") as file:
            if name in file:
                out[:] = file[name][part.slice]

    def clock_of(self, part: Range, partitions: int) -> np.ndarray:
        """Return the clocks for a shard with this range: those of the old shards it overlaps, the largest of them."""
        touching = [bool(overlap(part, Range(*old)).size) for old in self.ranges.tolist()]
        clocks = self.clock[touching] if any(touching) else self.clock
        newest = clocks.max(axis=0)
        # Another cut has no clocks of its own yet; Adam must not take its old moments for new ones.
        return np.where(newest, newest, newest.max()) if len(newest) == partitions else np.full(partitions, newest.max())

    def require(self, model: Model, state: tuple[str, ...] = ()) -> None:
        """Raise UserError where the checkpoint is of another network, or lacks registers that the rule keeps."""
        lacking = [name for name in state if f"state.{name}" not in self.registers]
        if lacking:
            raise UserError(
                f"'{self.path}' was made with rule.kind = '{self.config.rule['kind']}' and has no register '{lacking[0]}'; resume "
                "with that rule."
            )
        mine = [[e.name, e.offset, list(e.shape)] for e in model.layout.entries]
        if mine != self.layout:
            raise UserError(f"'{self.path}' holds another network than the run file describes; use the run file it came from.")
