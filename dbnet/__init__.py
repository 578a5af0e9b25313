"""dbnet: the DistBelief system (Dean et al., NIPS 2012) over one-sided MPI.

Importing the package imports nothing else: the public names below are loaded when they are first used. It starts no MPI and
compiles nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> the module it is defined in.
_PUBLIC = {
    "Arrival": "shards.rules.base",
    "Layer": "network.layers.base",
    "Loss": "network.losses.base",
    "Method": "methods.base",
    "Parameter": "network.layers.base",
    "Rule": "shards.rules.base",
    "UserError": "core.errors",
    "__version__": "core.version",
    "kernel": "core.jit",
    "load": "run.inference",
    "open_run": "monitor.results",
    "open_runs": "monitor.many.frames",
    "plan": "commands.plan.command",
    "simulate": "run.simulated.simulate",
    "train": "run.train",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dbnet' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dbnet.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
