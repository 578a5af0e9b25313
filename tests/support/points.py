"""Checkpoints written by hand: what the shards and the coordinator of a run would write, one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.checkpoint.format import REPLICA, part_of, texts
from dbnet.checkpoint.master import master_of, seal
from dbnet.checkpoint.parts import PartFile, Saved
from dbnet.core.config import build
from dbnet.core.ranges import split
from dbnet.network.layers.dense import Dense
from dbnet.network.losses.softmax import Softmax
from dbnet.network.model import Model

MODEL = Model([Dense(units=4), Dense(units=2)], Softmax(), (3,), 2, "float32")
TREE: dict[str, Any] = {
    "data": {"path": "d.h5"}, "model": {"layers": [{"kind": "dense", "units": 4}, {"kind": "dense", "units": 2}]},
    "stop": {"steps": 1},
}  # fmt: skip
SIZE = MODEL.layout.size
VALUES = np.random.default_rng(7).normal(size=SIZE).astype(np.float32)
REGISTERS = {"params": VALUES, "state.sum": VALUES**2}
REPLICAS = np.array([(1, 2, 3, 4, 5), (6, 7, 8, 9, 10)], REPLICA)
ROWS = np.array([(3, 0.5), (4, 0.25)], [("piece", "i4"), ("share", "f8")])


def tree(shards: int = 3) -> dict[str, Any]:
    """Return the configuration, as nested tables, of what is written here."""
    return {**TREE, "topology": {"shards": shards, "replicas": len(REPLICAS), "partitions": 2}}


def jobs(folder: Path, number: int = 1, shards: int = 3, keep: int = 2, name: str = "run") -> Iterator[Callable[[], None]]:
    """Yield the steps in which checkpoint `number` of a run whose outputs are at `folder`/`name` is written."""
    config = build({**tree(shards), "run": {"folder": str(folder), "name": name}})
    path, identity = master_of(folder / f"{name}.checkpoints", number), f"id-{number}"
    saved = []
    path.parent.mkdir(exist_ok=True)
    for shard, part in enumerate(split(SIZE, shards)):
        writer = PartFile(
            part_of(path, shard), {"id": identity, "part": shard}, part.size, {n: x.dtype for n, x in REGISTERS.items()}
        )
        clock = np.array([5 + shard, shard])
        for register, values in REGISTERS.items():
            for lo in range(0, part.size, 3):
                yield partial(writer.write, register, lo, number * values[part.slice][lo : lo + 3])
        yield partial(writer.commit, part, clock)
        digests = {n: hashlib.sha256((number * x[part.slice]).tobytes()).hexdigest() for n, x in REGISTERS.items() if part.size}
        saved.append(Saved(identity, "", True, part, clock, {n: x.dtype.name for n, x in REGISTERS.items()}, digests))
    said = texts(config, name, MODEL.layout, {"shape": [3], "outputs": 2, "vectors": False, "examples": 8, "labels": ""}, [])
    about = {"id": identity, "name": name, "seconds": 12.5, "size": said.pop("size"), "scale": said.pop("scale"), "steps": 7}
    said.pop("name")
    content = {**said, "about": about, "method": {"k": number}}
    yield from seal(path, folder / f"{name}.checkpoint.h5", keep, content, {"replicas": REPLICAS, "table.cursors": ROWS}, saved)


def write(folder: Path, number: int = 1, **options: Any) -> Path:
    """Write a checkpoint; return the link to it. The parameters are `number` times `VALUES`."""
    for job in jobs(folder, number, **options):
        job()
    return folder / f"{options.get('name', 'run')}.checkpoint.h5"
