"""A thread that moves data while the main thread computes, and the jobs it is given."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator

from dbnet.waiting import Turns, Wait


class Job:
    """A transfer on the mover's thread."""

    def __init__(self, work: Generator, behind: Job | None = None) -> None:
        self.work, self.done, self.error = work, threading.Event(), None
        self.moved, self.behind = 0, behind

    @property
    def _progress(self) -> int:
        """How often it has moved on, or the transfers before it, which it waits for."""
        job, moved = self, 0
        while job is not None:
            job, moved = job.behind, moved + job.moved
        return moved

    def wait(self, what: str) -> Turns:
        """Give way until the transfer has ended; raise what it raised.

        A transfer that goes on, however long it takes, is not waited for in vain.
        """
        moved = self._progress
        while not self.done.wait(1e-4):
            before, moved = moved, self._progress
            yield Wait(f"a replica waits for {what}") if moved == before else None
        if self.error is not None:
            raise self.error


class Mover:
    """A thread that moves a replica's data while its main thread computes; transfers run in the order they were started."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._last: Job | None = None
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
        self._thread.start()

    def start(self, work: Generator) -> Job:
        before = self._last if self._last is not None and not self._last.done.is_set() else None
        self._last = job = Job(work, before)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            # Those before it are over, and nobody needs to keep them.
            job.behind = None
            try:
                for wait in job.work:
                    job.moved += wait is None
                    time.sleep(2e-5)
            except BaseException as error:  # handed to the main thread, which raises it
                job.error = error
            job.done.set()
