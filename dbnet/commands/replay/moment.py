"""A moment of a recorded run: what the shards held then, as a checkpoint; or one gradient, with the parameters it was made from.

The updates of all shards stand in the run file with their seconds, so a moment is for each shard a number of its updates. Each
timeline plays so many and stops; where some of them cannot be made without slices of later ones, a few updates before. Ranks have
one clock, from host to host as well as half a round trip tells. A replica goes on from the newest push of which every shard has
applied its part.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.checkpoint.format import CHUNK, REPLICA, folder_of, link_of, part_of, texts
from dbnet.checkpoint.master import master_of, seal
from dbnet.checkpoint.parts import PartFile, Saved
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.files import why, writing
from dbnet.core.ranges import Range
from dbnet.core.version import __version__
from dbnet.data.subsets import SHARE, Share
from dbnet.monitor.results import Run
from dbnet.network.model import Footprint
from dbnet.network.replica import Replica
from dbnet.run.setup import Setup
from dbnet.shards.push import Receiver
from dbnet.shards.routes import routes


class Gathered(Exception):
    """The gradient that was asked for has been made on all partitions."""


class Headway:
    """How far a replica was at its newest pushes: (number, steps, examples, cursors), as many as may be under way."""

    def __init__(self, replica: Replica, most: int) -> None:
        self._replica, self._most = replica, most
        self._marks: list[tuple[int, int, int, list]] = []

    def mark(self, number: int) -> None:
        """Note that push `number` is made."""
        replica = self._replica
        self._marks.append((number, replica.steps, replica.examples, list(replica.train.cursors)))
        del self._marks[: -self._most]

    def at(self, number: int) -> tuple[int, int, int, list] | None:
        """Return what was noted at the last push before push `number`; nothing where there is none."""
        return next((mark for mark in reversed(self._marks) if mark[0] < number), None)


def quotas(run: Run, until: str) -> list[int]:
    """Return how many updates each shard had made at a moment: after so many of all updates ("5000"), or seconds ("2.5s").

    Raises
    ------
    UserError
        `until` is neither; or not every update has a row.
    """
    _require(until, "updates, like 5000")
    rows, shards = run.events.sort_values("seconds", kind="stable"), run.config.topology.shards
    if len(rows) != int(run.staleness.to_numpy().sum()):
        raise UserError(
            f"'{run.path}' holds only some of its updates (record.events, record.whole), so a moment cannot be told from them; "
            "record with record.events = 'all'."
        )
    if len(run.lost):
        raise UserError("Of a run that lost replicas no moment can be made a checkpoint: what was handed on is not known.")
    if until.isdecimal() and int(until) > len(rows):
        raise UserError(f"--until {until}: '{run.path}' has {len(rows):,} updates, those of all shards counted.")
    rows = rows[rows.seconds <= float(until[:-1])] if until.endswith("s") else rows[: int(until)]
    return np.bincount(rows.shard.to_numpy(np.int64), minlength=shards).tolist()


def iteration(run: Run, until: str) -> int:
    """Return the last iteration of a batch method up to a moment: that of this number ("20"), or at so many seconds ("2.5s").

    Raises
    ------
    UserError
        `until` is neither; or there is none.
    """
    _require(until, "iterations, like 20")
    rows = run.iterations
    chosen = rows.seconds <= float(until[:-1]) if until.endswith("s") else rows.iteration == int(until)
    if not chosen.any():
        span = f"{rows.iteration.min()} to {rows.iteration.max()}" if len(rows) else "none"
        raise UserError(f"--until {until}: there is no such iteration; '{run.path}' has {span}.")
    return int(rows.iteration[chosen].iloc[-1])


def _require(until: str, units: str) -> None:
    if not re.fullmatch(r"\d+|\d*\.?\d+s", until):
        raise UserError(f"--until {until}: give a number of {units}, or seconds, like 2.5s.")


def place_of(ready: Setup, until: str) -> Config:
    """Return the configuration by which the outputs of a moment are named; UserError where they are there already."""
    config = ready.config
    at = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{config.run.name}-at-{until}"})})
    if os.path.lexists(link_of(at)) or folder_of(at).exists():
        raise UserError(f"'{link_of(at)}' is there already; remove it and '{folder_of(at)}', or move them.")
    return at


def save(
    ready: Setup, until: str, receivers: Sequence[Receiver], reached: Sequence[Any], seconds: float,
    method: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write what the shards hold as a checkpoint NAME-at-UNTIL; return its path.

    Parameters
    ----------
    receivers
        The shards, or what stands before them.
    reached
        Of each replica what it had noted (`Headway.at`), or nothing.
    seconds
        The run's time at that moment.
    method
        What a checkpoint holds of a batch method.
    """
    at = place_of(ready, until)
    folder, link = folder_of(at), link_of(at)
    try:
        # Whoever makes the folder has the name.
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"Cannot write '{folder}': {why(error)}.") from None
    try:
        _write(ready, receivers, reached, (seconds, method or {}), folder, link)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder)
        raise UserError(f"Cannot write '{link}': {why(error)}.") from None
    return link


def _write(
    ready: Setup, receivers: Sequence[Receiver], reached: Sequence[Any], when: tuple[float, dict], folder: Path, link: Path
) -> None:
    """Write parts, master and link."""
    config, identity = ready.config, secrets.token_hex(8)
    master, parts = master_of(folder, 1), []
    for shard, receiver in enumerate(receivers):
        registers = receiver.registers()
        about = {"id": identity, "part": shard, "dbnet": __version__}
        part = PartFile(part_of(master, shard), about, receiver.range.size, {name: x.dtype for name, x in registers.items()})
        for name, x in registers.items():
            for lo in range(0, x.size, CHUNK // x.itemsize):
                part.write(name, lo, x[lo : lo + CHUNK // x.itemsize])
        part.commit(receiver.range, receiver.clock)
        types = {name: x.dtype.name for name, x in registers.items()}
        parts.append(Saved(identity, "", True, receiver.range, receiver.clock.copy(), types, part.digests))
    rows, shares = _positions(ready, reached)
    said = texts(config, ready.name, ready.model.layout, ready.data.described, ready.chain, ready.data.scale)
    steps = ready.beginning().beside + int(rows["steps"].sum())
    about = {"id": identity, "name": said["name"], "seconds": when[0], "steps": steps, "size": said["size"], "scale": said["scale"]}
    content = {**{name: said[name] for name in ("config", "layout", "data", "chain", "modules")}, "about": about, "method": when[1]}
    for job in seal(master, link, 1, content, {"replicas": rows, "table.shares": shares}, parts):
        job()


def _positions(ready: Setup, reached: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the checkpoint's rows of replicas, and of what they train on."""
    facts, shares = ready.beginning(), []
    rows, before = np.zeros(ready.topology.replicas, REPLICA), ready.checkpoint
    for replica, (row, mark, given) in enumerate(zip(rows, reached, facts.subsets, strict=True)):
        if mark is not None:
            row["steps"], row["examples"], row["pushes"] = mark[1], mark[2], mark[0] + 1
        elif before is not None:
            rows[replica] = before.replica(replica, ready.topology.replicas)
        cursors = [share[3:] for share in given] if mark is None else mark[3]
        row["epoch"], row["position"] = min(cursors, default=(0, 0))
        shares += [tuple(Share(*share[:3], *cursor)) for share, cursor in zip(given, cursors, strict=True)]
    return rows, np.array(shares, SHARE)


class WatchedReplica(Replica):
    """A replica that hands out the gradient of one step.

    Parameters
    ----------
    step, found
        Which step; called with the parameters and the gradient.
    parts, more
        What a replica is made of.
    """

    def __init__(self, step: int, found: Any, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._step, self._found = step, found

    def accrue(self, w: np.ndarray, g: np.ndarray, accrued: int, rate: float) -> float:
        if self.steps != self._step:
            return super().accrue(w, g, accrued, rate)
        loss = super().accrue(w, g, 0, 0.0)
        self._found(w, g)
        return loss


class Gradient:
    """One gradient, gathered from the partitions of a replica.

    Parameters
    ----------
    ready, replica, step
        The run, and which gradient.
    """

    def __init__(self, ready: Setup, replica: int, step: int) -> None:
        if not 0 <= replica < ready.topology.copies:
            raise UserError(f"--gradient {replica} {step}: the run has replicas 0 to {ready.topology.copies - 1}.")
        self.replica, self.step, self._layout = replica, step, ready.model.layout
        self.left = ready.topology.partitions
        self._flat = {name: np.zeros(self._layout.size, ready.model.dtype) for name in ("parameters", "gradient")}

    def add(self, mine: Footprint, w: np.ndarray, g: np.ndarray) -> None:
        """Take one partition's part."""
        for flat, values, pieces in ((self._flat["parameters"], w, mine.used), (self._flat["gradient"], g, mine.pushed)):
            for route in routes(pieces, [Range(0, self._layout.size)]):
                for place, target, n in route.moves(0, route.size):
                    flat[target : target + n] = values[place : place + n]
        self.left -= 1

    def write(self, path: Path, run: str, force: bool) -> None:
        """Write it: groups `parameters` and `gradient`, a dataset per parameter."""
        with writing(path, force) as part, h5py.File(part, "w") as file:
            file.attrs.update(run=run, replica=self.replica, step=self.step)
            for group, flat in self._flat.items():
                for entry in self._layout.entries:
                    values = flat[entry.offset : entry.offset + int(np.prod(entry.shape))]
                    file.create_dataset(f"{group}/{entry.name}", data=values.reshape(entry.shape))
