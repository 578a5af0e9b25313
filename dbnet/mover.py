"""A thread that moves data while the main thread computes, and the jobs it is given."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator

from dbnet.waiting import Turns, Wait


class Job:
    """A transfer on the mover's thread."""

    def __init__(self, work: Generator) -> None:
        self.work, self.done, self.error = work, threading.Event(), None
        self.moved = 0

    def wait(self, what: str) -> Turns:
        """Give way until the transfer has ended; raise what it raised.

        A transfer that goes on, however long it takes, is not waited for in vain.
        """
        moved = self.moved
        while not self.done.wait(1e-4):
            before, moved = moved, self.moved
            yield Wait(f"a replica waits for {what}") if moved == before else None
        if self.error is not None:
            raise self.error


class Mover:
    """A thread that moves a replica's data while its main thread computes; transfers run in the order they were started."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)
        self._thread.start()

    def start(self, work: Generator) -> Job:
        job = Job(work)
        self._jobs.put(job)
        return job

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                for wait in job.work:
                    job.moved += wait is None
                    time.sleep(2e-5)
            except BaseException as error:  # handed to the main thread, which raises it
                job.error = error
            job.done.set()
