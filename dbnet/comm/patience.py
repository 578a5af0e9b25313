"""How long something has been waited for, and what ends a wait that has no turns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Patience:
    """Bounds one wait after another of a loop, in which `over` is called again and again.

    Time in which the loop itself did not run for more than a quarter of the bound does not count: a job that was stopped and
    continued as a whole has waited for nobody meanwhile.

    Parameters
    ----------
    bound
        Seconds that one wait may last.
    """

    def __init__(self, bound: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.bound, self._clock = bound, clock
        self.begin()

    def begin(self) -> None:
        """A wait begins."""
        self._since = self._before = self._clock()

    def over(self) -> bool:
        """Return whether the wait has lasted too long."""
        now = self._clock()
        if now - self._before > self.bound / 4:
            self._since += now - self._before
        self._before = now
        return now - self._since > self.bound


class Limit:
    """Calls `end` unless it is lifted in time: collective calls wait for ever for a rank that is dead."""

    def __init__(self, seconds: float, end: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._lifted = threading.Event()
        threading.Thread(target=self._run, args=(Patience(seconds, clock), end), daemon=True).start()

    def lift(self) -> None:
        self._lifted.set()

    def _run(self, patience: Patience, end: Callable[[], None]) -> None:
        while not self._lifted.wait(patience.bound / 16):
            if patience.over():
                self._lifted.set()
                end()
