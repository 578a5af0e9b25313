"""A checkpoint to read, for any topology: a register is one vector over all parts, of which every reader takes its own range.

The master names the parts and maps each register over them (a virtual dataset), so that a run goes on with other shards, replicas
or partitions than it was written with: ranges are cut anew, per-replica counters are taken where the number of replicas is the
same, and become means where it is not. Clocks of a range are those of the parts that it overlaps.
"""

from __future__ import annotations

from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.checkpoint.format import REPLICA, part_of, text
from dbnet.core.config import Config, stored
from dbnet.core.errors import UserError
from dbnet.core.files import reading
from dbnet.core.ranges import Range, overlap, split
from dbnet.core.registry import own_modules
from dbnet.core.untrusted.opening import opened
from dbnet.data.file import DataFile
from dbnet.data.preparation import Normalization
from dbnet.data.subsets import SHARE, Share
from dbnet.network.model import Model

# Counts travel as float64, too.
_MOST = 1 << 53


class Checkpoint:
    """A checkpoint to read; every reader takes only its own ranges.

    Parameters
    ----------
    path
        The master, or a link to it; it is followed once, so that what is read is of one generation.
    parts
        Whether to look that all of its parts are there.

    Attributes
    ----------
    config, chain
        The configuration of the run, and (as nested tables) those of the runs that it came from, oldest first.
    modules
        The own modules of the run: path, sha256 and text of each. Reading a checkpoint does not run them.
    scale
        What the data were multiplied with on their way into the network.
    replicas, tables
        Where each replica stood; the tables that a method has added, by name.
    state
        What a batch method knows.
    """

    def __init__(self, path: str | Path, parts: bool = True) -> None:
        if not Path(path).exists():
            raise UserError(f"No checkpoint '{path}'; a run writes its own beside its run file (NAME.checkpoint.h5).")
        self.path = resolved(path)
        with reading(self.path, "use an earlier checkpoint"), opened(self.path, virtual=True) as file:
            if "params" not in file or "about" not in file:
                raise UserError(f"'{path}' is not a dbnet checkpoint; give the NAME.checkpoint.h5 of a run.")
            about = text(file, "about")
            if "part" in about:
                raise UserError(f"'{path}' is one shard's part of a checkpoint; give {self.path.name.split('.')[0]}.h5.")
            self.id, self.name, self.seconds, self.written = (about[key] for key in ("id", "name", "seconds", "written"))
            self.steps: int = about["steps"]
            self.scale: float = about["scale"]
            self.config: Config = stored(text(file, "config"))
            self.modules: list[dict[str, str]] = own_modules(text(file, "modules"), self.config.model.modules)
            self.chain: list[dict[str, Any]] = text(file, "chain")
            self.layout, self.data, self.state = (text(file, name) for name in ("layout", "data", "method"))
            self.size, self.dtype = int(about["size"]), np.dtype(about["registers"]["params"])
            self.registers: dict[str, str] = about["registers"]
            self.digests: list[dict[str, str]] = [part["digests"] for part in text(file, "parts")]
            self.clock, ranges, rows = file["clock"][:], file["ranges"][:], file["replicas"][:]
            if rows.dtype.names != REPLICA.names or rows.ndim != 1:
                raise ValueError("/replicas is damaged")
            self.replicas: np.ndarray = rows.astype(REPLICA)
            self.tables = {name.removeprefix("table."): file[name][:] for name in file if name.startswith("table.")}
            self._check(ranges)
            self.ranges = [Range(*map(int, row)) for row in ranges]
        for shard in range(len(self.ranges) if parts else 0):
            self.look_for_part(shard)

    def _check(self, ranges: np.ndarray) -> None:
        """Raise ValueError where what a checkpoint says of itself cannot be used."""
        for name, offset, shape in self.layout:
            if not isinstance(name, str) or any(type(n) is not int or n < 0 for n in (offset, *shape)):
                raise ValueError(f"the layout of {name!r} is damaged")
        shape, outputs = self.data["shape"], self.data["outputs"]
        if not shape or any(type(n) is not int or n < 1 for n in (*shape, outputs)) or type(self.data["vectors"]) is not bool:
            raise ValueError("what it says of its data is damaged")
        names = self.data.get("class_names", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) not in (0, outputs):
            raise ValueError("what it says of its classes is damaged")
        Normalization.of(self.data.get("normalization"), shape)
        if type(self.data["examples"]) is not int or not isinstance(self.data["labels"], str):
            raise ValueError("what it says of its data is damaged")
        if not isinstance(self.chain, list) or not all(isinstance(tree["run"]["name"], str) for tree in self.chain):
            raise ValueError("/chain is damaged")
        world, shards = self.config.topology, len(ranges)
        if self.clock.ndim != 2 or not self.clock.size or len(self.clock) != shards or ranges.shape != (shards, 2):
            raise ValueError(f"/clock {self.clock.shape} and /ranges {ranges.shape} do not fit each other")
        if shards != world.shards or self.clock.shape[1] not in (1, world.partitions) or len(self.replicas) != world.replicas:
            found = f"/clock {self.clock.shape} and /replicas {self.replicas.shape}"
            raise ValueError(
                f"{found} do not fit {world.shards} shards and {world.replicas} replicas x {world.partitions} partitions"
            )
        shares = self.tables.get("shares", np.zeros(0, SHARE))
        if shares.dtype != SHARE or shares.ndim != 1 or (shares["lo"] > shares["hi"]).any():
            raise ValueError("/table.shares is damaged")
        if (shares["subset"] >= world.replicas).any() or (shares["position"] > shares["hi"] - shares["lo"]).any():
            raise ValueError("/table.shares is damaged")
        counts = (self.clock, ranges, *(self.replicas[name] for name in REPLICA.names), *(shares[name] for name in Share._fields))
        for values in counts:
            if values.dtype.kind not in "iu" or values.min(initial=0) < 0 or values.max(initial=0) > _MOST:
                raise ValueError("/clock, /ranges, /replicas and /table.shares must hold counts")
        bounds = [0, *ranges.ravel().tolist(), self.size]
        if bounds[::2] != bounds[1::2] or self.size != max((offset + prod(shape) for _, offset, shape in self.layout), default=0):
            raise ValueError("/ranges and /layout do not fit the number of parameters")
        if type(self.scale) is not float or not isfinite(self.scale) or not self.scale:
            raise ValueError("/about is damaged")
        if not isfinite(self.seconds) or type(self.steps) is not int or not isinstance(self.state, dict):
            raise ValueError("/about or /method is damaged")
        if not all(np.dtype(kind).kind == "f" for kind in self.registers.values()) or len(self.digests) != shards:
            raise ValueError("/about or /parts is damaged")

    def look_for_part(self, shard: int) -> None:
        """Raise UserError unless a part is there, of this checkpoint, and the one that it should be."""
        path = part_of(self.path, shard)
        if not path.exists():
            raise UserError(f"'{self.path}' lacks its part '{path.name}'; copy a checkpoint with all its parts into one folder.")
        with reading(path, "use an earlier checkpoint"), opened(path) as file:
            about = text(file, "about")
            if about["id"] != self.id:
                raise UserError(f"'{path}' belongs to another checkpoint than '{self.path}'; use an earlier checkpoint.")
            if about["part"] != shard:
                raise UserError(f"'{path}' is part {about['part']} of this checkpoint, not {shard}; use an earlier checkpoint.")
            if file["range"][:].tolist() != list(self.ranges[shard]) or file["clock"][:].tolist() != self.clock[shard].tolist():
                raise UserError(f"'{path}' has another /range or /clock than '{self.path}' says; use an earlier checkpoint.")

    def read(self, name: str, part: Range, out: np.ndarray) -> None:
        """Read a range of a register into `out` [part.size]; a register that was not stored leaves it as it is."""
        for shard, owned in enumerate(self.ranges):
            both, path = overlap(part, owned), part_of(self.path, shard)
            if both.size and name in self.registers:
                with reading(f"{path}: /{name}", "use an earlier checkpoint"), opened(path) as file:
                    mine = out[both.shift(-part.lo).slice]
                    mine[:] = file[name][both.shift(-owned.lo).slice]
                    if not (np.isfinite(mine.min()) and np.isfinite(mine.max())):
                        raise ValueError("it holds values that are not finite")

    def clock_of(self, part: Range, partitions: int) -> np.ndarray:
        """Return the clocks for a shard with this range: those of the old shards it overlaps, the largest of them."""
        touching = [bool(overlap(part, old).size) for old in self.ranges]
        clocks = self.clock[touching] if any(touching) else self.clock
        newest = clocks.max(axis=0)
        # Another cut has no clocks of its own yet; Adam must not take its old moments for new ones.
        return np.where(newest, newest, newest.max()) if len(newest) == partitions else np.full(partitions, newest.max())

    @property
    def subsets(self) -> int:
        """Into how many subsets the training set was cut: one for each replica that was not spare."""
        return self.config.topology.replicas

    @property
    def progress(self) -> float:
        """Passes over the training set, on average over its examples."""
        rows = self.tables["shares"] if "shares" in self.tables else np.zeros(0, [("lo", "i8")])
        if not len(rows):
            return 0.0
        sizes = rows["hi"] - rows["lo"]
        return float((rows["epoch"] * sizes + rows["position"]).sum() / max(1, sizes.sum()))

    def replica(self, index: int, replicas: int) -> np.void:
        """Return the counters that one of `replicas` goes on from; those of another number share what the old ones had."""
        old, row = self.replicas, np.zeros(1, REPLICA)[0]
        if self.subsets == replicas:
            return old[index]
        working = old[old["steps"] > 0]
        if len(working):
            row["steps"], row["pushes"] = round(working["steps"].mean()), working["pushes"].max()
        # All together have seen as many as before.
        row["examples"] = split(int(old["examples"].sum()), replicas)[index].size
        return row

    def require(self, model: Model, state: tuple[str, ...] = ()) -> None:
        """Raise UserError where the checkpoint is of another network, or lacks registers that the rule keeps."""
        lacking = [name for name in state if f"state.{name}" not in self.registers]
        if lacking:
            raise UserError(
                f"'{self.path}' was made with rule.kind = '{self.config.rule.kind}' and has no register '{lacking[0]}'; resume "
                "with that rule."
            )
        mine = [[e.name, e.offset, list(e.shape)] for e in model.layout.entries]
        if mine != self.layout:
            raise UserError(f"'{self.path}' holds another network than the configuration describes; use the one it came from.")


def require_data(point: Checkpoint, data: DataFile) -> None:
    """Raise UserError where a run would go on with other data than it began with."""
    advice = f"resume with '{point.config.data.path}' as it was, or begin a new run from its parameters with run.start"
    if point.data["examples"] != data.sizes["train"]:
        found = f"{point.data['examples']} training examples, '{data.path}' has {data.sizes['train']}"
        raise UserError(f"'{point.path}' was made with {found}; {advice}.")
    if point.data["labels"] != data.labels:
        raise UserError(f"'{point.path}' was made with other training labels than those of '{data.path}'; {advice}.")
    if not alike(point, data):
        raise UserError(f"'{point.path}' was made with data that were normalized in another way than '{data.path}'; {advice}.")


def alike(point: Checkpoint, data: DataFile) -> bool:
    """Return whether a checkpoint's data were normalized by the same numbers as these, or neither were."""
    then, now = Normalization.of(point.data.get("normalization"), data.shape), data.normalization
    return now is None if then is None else then.same(now)


def resolved(path: str | Path) -> Path:
    """Follow a link, so that what is read later is the same."""
    path = Path(path)
    return path.parent / path.readlink() if path.is_symlink() else path
