"""dbnet: the DistBelief system (Dean et al., NIPS 2012) over one-sided MPI.

Importing the package starts no MPI and compiles nothing.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["open_run", "train"]


def open_run(path: str) -> Any:
    """Open a run file for analysis, also while it grows; see `dbnet.monitor.Run`."""
    from dbnet.monitor import Run

    return Run(path)


def train(run_file: str, *overrides: str) -> Any:
    """Train in this process, for notebooks and debuggers; see `dbnet.run.train`."""
    from dbnet.run import train

    return train(run_file, overrides)
