"""What must hold of every member in a small run: it trains, and does so again to the bit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.commands.see.checks.base import Broken, Checks
from dbnet.core.config import build
from dbnet.core.registry import Member
from dbnet.data.file import write
from dbnet.network.layers.base import Shape
from dbnet.run.setup import setup
from dbnet.run.train import train

_CLASSES, _EXAMPLES = 3, 96
_DENSE = {"kind": "dense", "units": _CLASSES}
# Family -> the part of a configuration that a member, said as a table, takes.
_TABLES = {
    "network.layers": lambda said: {"model": {"layers": [said, _DENSE]}},
    "network.losses": lambda said: {"model": {"layers": [{**_DENSE, "units": 4, "activation": "tanh"}, _DENSE], "loss": said}},
    "shards.rules": lambda said: {"model": {"layers": [_DENSE]}, "rule": said},
    "shards.rules.schedules": lambda said: {"model": {"layers": [_DENSE]}, "rule": {"kind": "sgd", "schedule": said}},
    "network.parameters.initializers": lambda said: {"model": {"layers": [{**_DENSE, "init": said}]}},
    "methods": lambda said: {"model": {"layers": [_DENSE]}, "method": said},
    "methods.descent": lambda said: {"model": {"layers": [_DENSE]}, "method": {"kind": "sandblaster", "descent": said}},
}


def checks(member: Member, path: str, shape: Shape = (7,)) -> Checks:
    """Return what must hold of a run with this member, from the user's file at `path`; nothing for a family that takes no part."""
    return {"trains": partial(trains, member, path, shape)} if member.family in _TABLES else {}


def trains(member: Member, path: str, shape: Shape) -> str:
    """A run in one process moves the parameters, which stay finite; and again, it moves them to the same place."""
    tables: Mapping[str, Any] = _TABLES[member.family](member.options())
    batch = member.family == "methods.descent"
    with tempfile.TemporaryDirectory(prefix="dbnet-check-") as folder:
        rng, data = np.random.default_rng(1), Path(folder) / "data.h5"
        x, y = rng.standard_normal((_EXAMPLES, *shape)).astype(np.float32), rng.integers(0, _CLASSES, _EXAMPLES)
        write(data, {"train/x": x, "train/y": y, "test/x": x[:9], "test/y": y[:9], "classes": _CLASSES})
        tree = {
            "run": {"folder": folder, "picture": False}, "data": {"path": str(data)}, "rule": {"kind": "sgd"}, **tables,
            "topology": {"shards": 2, "replicas": 2}, "stop": {"iterations": 3} if batch else {"steps": 6},
        }  # fmt: skip
        tree = {**tree, "model": {**tree["model"], "modules": [path]} if path else tree["model"]}
        ready = setup(build(tree))
        start = np.empty(ready.model.layout.size, ready.model.dtype)
        ready.model.layout.draw(ready.topology.shard_ranges(start.size)[0]._replace(lo=0, hi=start.size), 1, start)
        ends = [train(tree, quiet=True).params for _ in range(2)]
    if not np.isfinite(ends[0]).all():
        raise Broken("after a few steps parameters are not finite; look at the gradient, or try a lower rate")
    if np.array_equal(ends[0], start):
        raise Broken("after a few steps all parameters are where they were: nothing is trained")
    if not np.array_equal(*ends):
        raise Broken("a run in one process, repeated, ends elsewhere; it may depend on nothing but the seed and the step")
    return "a small run moves the parameters, and again to the same bits"
