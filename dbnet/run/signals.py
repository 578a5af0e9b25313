"""Signals: the first one asks a run to write a checkpoint and stop; a later one stops it at once.

SIGTERM, SIGINT and SIGUSR1 set a flag that is read by polling; the coordinator ends the run (`coordinator.Ending`), other
ranks pass it on with their signs of life. Terminals, launchers and Slurm pass the
same request on by several ways, so what follows within `SAME` seconds is no second request, and SIGUSR1 never is one: job scripts
send it as often as they like. A second SIGTERM or SIGINT raises KeyboardInterrupt.

MPICH's launcher, told to let survivors live (jobs/survive), sends SIGUSR1 to the process groups of all ranks when one has died.
That is no request: such a rank leaves its group, and is killed with the wrapper that it leaves alone there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = 0.5
_PR_SET_PDEATHSIG = 1


class Interrupt:
    """Takes signals from `install` to `remove`; as a context from one end to the other.

    Attributes
    ----------
    by
        Name of the signal that came first; nothing before.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.by = ""
        self._clock, self._since = clock, 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether the run is to stop."""
        return bool(self.by)

    def install(self) -> Interrupt:
        """Take signals from now on; outside the main thread, where Python allows no handlers, there is nothing to take."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def remove(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> Interrupt:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _take(self, number: int, _: FrameType | None) -> None:
        if not self.by:
            self.by, self._since = signal.Signals(number).name, self._clock()
        elif number != signal.SIGUSR1 and self._clock() - self._since > SAME:
            raise KeyboardInterrupt


@contextmanager
def at_once() -> Iterator[None]:
    """While a run starts there is nothing to save: SIGINT and SIGTERM end the process at once, whatever it is in."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            # Whoever takes the signals by now keeps them.
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, handler)


def hand_on(name: str) -> None:
    """Raise a signal that a run has obeyed once more, for whoever takes it by now; nothing without a name.

    SIGUSR1, where nobody takes it, was meant for the run alone: it would end the process.
    """
    if name and not (name == "SIGUSR1" and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL):
        signal.raise_signal(signal.Signals[name])


def leave_group() -> None:
    """Under jobs/survive: make a process group of one's own, out of the launcher's reach, and ask to be killed with the wrapper."""
    if "DBNET_SURVIVE" not in os.environ:
        return
    if os.getpid() != os.getsid(0):
        os.setpgid(0, 0)
    end_with_parent(signal.SIGKILL)


def end_with_parent(number: int) -> None:
    """Ask for a signal when the process that started this one has died."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() == 1:
        # It died before the kernel knew what to do then.
        raise SystemExit(1)
