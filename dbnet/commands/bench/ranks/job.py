"""One rank of a whole run for the benchmark `run`, which says what its processor seconds went to.

What is counted stands around the methods of a run from outside, in this program alone: a run itself counts nothing. A second is
counted where it was spent: the update that a push makes in the same process is `apply` and not `push`. `poll` is all that is left
while the run goes on: orders, reports, signs of life, looking for something to do.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dbnet.comm import mpi
from dbnet.comm.topology import Topology
from dbnet.coordinator.coordinator import Coordinator
from dbnet.monitor.runfile import RunFile
from dbnet.network.replica import Replica
from dbnet.run import process, ranks, train
from dbnet.shards.local_store import LocalStore
from dbnet.shards.push import Intake
from dbnet.shards.store import WindowStore

CAUSES = ("start", "gradient", "fetch", "push", "apply", "poll", "record", "evaluate", "end", "other threads")


class Account:
    """The processor seconds of this process's main thread by cause, and of all its other threads together."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(CAUSES, 0.0)
        self._causes, self._last, self._thread = ["start"], 0.0, threading.get_ident()

    def turn(self, cause: str) -> None:
        """From now on what is counted nowhere else is due to `cause`."""
        self._count()
        if self._causes[0] == "start":
            # Those that read, compile and give signs of life while the run starts.
            self.spent["start"] += self._others()
        self._causes[0] = cause

    def _others(self) -> float:
        """Return the seconds of other threads that are not counted yet."""
        return time.process_time() - sum(self.spent.values())

    def _count(self) -> None:
        now = time.thread_time()
        self.spent[self._causes[-1]] += now - self._last
        self._last = now

    def _within(self, cause: str, call: Callable[[], Any]) -> Any:
        if threading.get_ident() != self._thread:
            return call()
        self._count()
        self._causes.append(cause)
        try:
            return call()
        finally:
            self._count()
            self._causes.pop()

    def around(self, cls: type, cause: str, *names: str) -> None:
        """Count methods of a class."""
        for name in names:
            setattr(cls, name, self._counted(cause, getattr(cls, name)))

    def around_turns(self, cls: type, cause: str, *names: str) -> None:
        """Count methods of a class that give way."""
        for name in names:
            setattr(cls, name, self._counted_turns(cause, getattr(cls, name)))

    def _counted(self, cause: str, plain: Callable) -> Callable:
        return lambda *args, **words: self._within(cause, lambda: plain(*args, **words))

    def _counted_turns(self, cause: str, plain: Callable) -> Callable:
        def counted(*args: Any, **words: Any) -> Any:
            turns, end = plain(*args, **words), object()
            while (wait := self._within(cause, lambda: next(turns, end))) is not end:
                yield wait

        return counted

    def close(self) -> dict[str, float]:
        """Return what was spent."""
        self._count()
        return {**self.spent, "other threads": self._others()}


def count_all(account: Account) -> None:
    """Put the account around everything that a run is made of."""
    account.around(Replica, "gradient", "accrue")
    account.around(Replica, "evaluate", "evaluate")
    account.around(Intake, "apply", "take")
    account.around(RunFile, "record", "events", "progress", "evaluation", "flush", "close")
    for store in (WindowStore, LocalStore):
        account.around_turns(store, "fetch", "fetch", "arrive", "snapshot")
        account.around_turns(store, "push", "push", "settle", "confirm")


def main(order: dict[str, Any]) -> None:
    """Train as ordered, and write what it took."""
    account, told = Account(), {"rank": 0, "name": "all roles", "seconds": 0.0, "examples": 0}
    count_all(account)

    def during(play: Callable) -> Callable:
        def played(*args: Any) -> None:
            account.turn("poll")
            play(*args)
            account.turn("end")

        return played

    ranks.Rank.play, process.take_turns = during(ranks.Rank.play), during(process.take_turns)
    close = Coordinator.close

    def closed(coordinator: Coordinator) -> None:
        told.update(seconds=coordinator.time.seconds, examples=int(coordinator.status["examples"].sum()))
        close(coordinator)

    Coordinator.close = closed
    if order["idle"]:
        # A replica whose gradients take so long that nobody has anything to do meanwhile.
        Replica.accrue = slowly(Replica.accrue)
        order["run"]["stop"] = {"steps": 5}
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        if comm is not None:
            topology = order["run"]["topology"]
            told.update(rank=comm.rank, name=Topology(topology["shards"], topology["replicas"]).name(comm.rank))
            told["name"] = told["name"].removeprefix("the ")
        train.execute(order["run"], comm=comm, quiet=True)
    Path(order["told"], f"spent-{told['rank']}.json").write_text(json.dumps({**told, "spent": account.close()}))


def slowly(accrue: Callable) -> Callable:
    """Return a gradient that takes two seconds and no processor."""

    def slow(*args: Any) -> float:
        time.sleep(2)
        return accrue(*args)

    return slow


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
