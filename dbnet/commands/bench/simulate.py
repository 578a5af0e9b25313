"""What simulated time costs this processor: beside the gradients themselves, and without any."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dbnet.commands.bench.base import Bench, Row
from dbnet.commands.bench.step import dense_replica
from dbnet.core.registry import make
from dbnet.data.file import write
from dbnet.network.cost import Profile
from dbnet.run.simulated.simulate import Simulated, simulate

_REPLICAS, _SHARDS, _STEPS, _MINIBATCH = 200, 16, 10, 50
# Shards that keep up: rings that fill would be a figure of their own.
_MACHINE = {
    "compute": {"rate": 1.0, "apply": 50.0},
    "inside": {"latency": 1e-6, "bandwidth": 10.0},
    "between": {"latency": 3e-6, "bandwidth": 100.0},
    "noise": {"kind": "gamma"},
}


class Simulate(Bench):
    """Simulated time, 200 replicas of the fashion network on 16 shards: one-sided operations a second, cost beside gradients."""

    kind: ClassVar[str] = "simulate"

    def rows(self, repeat: int) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.h5"
            options = {"kind": "random", "shape": "784", "classes": 10, "train": 20000, "test": 0}
            write(data, make("data.formats", options, "data").read())
            dry = [self._play(folder, data, dry=True) for _ in range(repeat)]
            wet, bare = [], []
            for _ in range(repeat):
                wet.append(self._play(folder, data, dry=False).spent)
                bare.append(self._gradients())
        rates = np.array([done.operations / done.spent for done in dry])
        beside = np.array([(one - other) / other for one, other in zip(wet, bare, strict=True)])
        return [
            Row(
                "simulate", "one-sided operations, dry", rates.max(), "1/s", "bound", 200e3, rates.max() / 200e3, ">= 1.0",
                rates.max() / rates.min(),
            ),
            Row(
                "simulate", "processor time beside the gradients", beside.min(), "of them", "bound", 0.3, beside.min() / 0.3,
                "<= 1.0", max(wet) / min(wet),
            ),
        ]  # fmt: skip

    @staticmethod
    def _play(folder: str, data: Path, dry: bool) -> Simulated:
        tables: dict[str, Any] = {
            "run": {"folder": folder, "picture": False, "deadline": 1e4},
            "data": {"path": str(data)},
            "model": {"layers": [{"kind": "dense", "units": 256, "activation": "sigmoid"}, {"kind": "dense", "units": 10}]},
            "method": {"minibatch": _MINIBATCH},
            "rule": {"rate": 0.001},
            "topology": {"replicas": _REPLICAS, "shards": _SHARDS},
            "stop": {"steps": _STEPS},
            "evaluate": {"train": 0},
        }
        return simulate(tables, Profile.model_validate(_MACHINE), dry=dry, quiet=True)

    @staticmethod
    def _gradients() -> float:
        """Return the processor seconds of as many gradients of one replica after the other, each with parameters of its own."""
        replica = dense_replica((784, 256, 10), _MINIBATCH, 20000)
        vectors = [np.zeros((2, replica.size), np.float32) for _ in range(_REPLICAS)]
        began = time.process_time()
        for _ in range(_STEPS):
            for w, g in vectors:
                replica.accrue(w, g, 0, 0.0)
        return time.process_time() - began
