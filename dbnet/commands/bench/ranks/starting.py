"""One rank of `dbnet train` for the benchmark `start`, which says what its processor seconds went to, and when its first step was.

What is counted stands around functions of a run from outside, in this program alone; all threads of the process count.
"""

from __future__ import annotations

import atexit
import importlib
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CAUSES = ("interpreter", "imports", "configuration", "MPI_Init", "windows", "data", "kernels", "run file", "run", "end", "other")
# What a command imports, here where that can be counted.
_TAKEN = (
    "dbnet.comm.mpi", "dbnet.core.config", "dbnet.run.ranks", "dbnet.run.roles", "dbnet.run.train", "dbnet.network.replica",
    "dbnet.commands.training.train",
)  # fmt: skip
_SPENT = dict.fromkeys(CAUSES, 0.0)


def count(cause: str) -> None:
    """Put what was spent since the last time down to a cause."""
    _SPENT[cause] += time.process_time() - sum(_SPENT.values())


def around(owner: Any, name: str, cause: str, before: str = "other", after: Callable[[], None] = lambda: None) -> None:
    """Count a function."""
    plain = getattr(owner, name)

    def counted(*args: Any, **words: Any) -> Any:
        count(before)
        try:
            return plain(*args, **words)
        finally:
            count(cause)
            after()

    setattr(owner, name, counted)


def main(told: Path, words: list[str]) -> None:
    """Run a command of dbnet's and write what it took."""
    count("interpreter")
    for name in ("dbnet.commands.usage", *_TAKEN):
        importlib.import_module(name)
        if name == "dbnet.commands.usage":
            sys.modules[name].collect_seldom()
    mpi, config, ranks, roles, train, replica, _ = (sys.modules[name] for name in _TAKEN)
    count("imports")
    first: list[float] = []
    around(config, "load", "configuration")
    around(mpi, "world", "MPI_Init")
    for owner, name in ((train, "Starting"), (ranks.communicators, "connect"), (ranks, "MpiWindow")):
        around(owner, name, "windows")
    around(train, "setup", "data")
    around(roles, "load_replica", "data")
    around(roles, "use", "kernels")
    around(roles, "open_record", "run file")
    around(ranks, "drive", "run")
    around(replica.Replica, "accrue", "run", "run", lambda: first.append(time.time()) if not first else None)
    around(mpi, "part", "end", "end")

    def close() -> None:
        count("end")
        rank = mpi.launched_rank()
        told.joinpath(f"spent-{rank}.json").write_text(json.dumps({"rank": rank, "spent": _SPENT, "first": first}))

    # What was registered first is called last.
    atexit.register(close)
    sys.argv[1:] = words
    runpy.run_module("dbnet", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
