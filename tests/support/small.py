"""A run of eight examples, for simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def small_run(data: Path) -> dict[str, Any]:
    """Return its tables: ten parameters of the first layer and twelve of the second."""
    return {
        "run": {"folder": "out", "picture": False},
        "data": {"path": str(data)},
        "model": {
            "layers": [{"kind": "dense", "units": 5, "activation": "tanh"}, {"kind": "dense", "units": 2}],
            "dtype": "float64",
        },
        "method": {"kind": "downpour", "minibatch": 2, "slot": 64, "slots": 2},
        "rule": {"kind": "adagrad", "rate": 0.1},
        "topology": {"shards": 2, "replicas": 2},
        "stop": {"epochs": 6},
        "evaluate": {"epochs": 2},
    }
