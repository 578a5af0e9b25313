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


def train(run_file: str, *overrides: str, resume: str | None = None) -> Any:
    """Train in this process, for notebooks and debuggers; see `dbnet.run.train`.

    A signal stops the run with a checkpoint, and is then handed on to whoever had it before: SIGINT raises KeyboardInterrupt,
    SIGTERM ends the process, unless somebody takes it. Where this returns nevertheless the outcome is `stopped`.
    """
    from dbnet.interrupt import hand_on
    from dbnet.run import train

    done = train(run_file, overrides, resume=resume)
    if done.stopped:
        print(f"Stopped by {done.signal}; checkpoint {done.checkpoint}. Go on with resume='auto'.", flush=True)
    hand_on(done.signal)
    return done
