"""A small file that says how far a run is, for job scripts: launchers may return nonsense when a rank was killed.

The coordinator writes one line, `running PID HOST` when training begins, and `ended CODE` in its place when the run has come to its
own end, good or bad. A marker that does not say `ended` belongs to a run that did not.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dbnet import mpi
from dbnet.errors import writing


class Marker:
    """One rank's marker; without a path there is none. What an earlier run has left at the path is taken away."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            with writing(self.path) as part:
                part.touch()

    def running(self) -> None:
        """Say that training begins, in this process."""
        self._write(f"running {os.getpid()} {socket.gethostname()}")

    def ended(self, code: int) -> None:
        """Say that the run has ended with this exit code."""
        self._write(f"ended {code}")

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Write down the exit code of what the body raises."""
        try:
            yield
        except BaseException as error:
            self.ended(mpi.exit_code(error))
            raise

    def _write(self, line: str) -> None:
        if self.path is None:
            return
        with writing(self.path) as part:
            part.write_text(f"{line}\n")
