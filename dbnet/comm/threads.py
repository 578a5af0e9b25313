"""A thread that moves data while the main thread computes, and the jobs it is given."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from dbnet.comm.turns import Turns, Wait

# Seconds from one look at a transfer to the next, and of a pause of the mover whenever it gives way.
_LOOK, PAUSE = 1e-4, 2e-5


class Done(Protocol):
    """What of a thread's event a job needs: virtual time has its own."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...
    def wait(self, timeout: float) -> bool: ...


class Job:
    """A transfer on the mover's thread."""

    def __init__(self, work: Generator, behind: Job | None = None, done: Done | None = None) -> None:
        self.work, self.done, self.error = work, done or threading.Event(), None
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
        while not self.done.wait(_LOOK):
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

    @property
    def here(self) -> bool:
        """Whether it is the mover that asks."""
        return threading.current_thread() is self._thread

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
                    time.sleep(PAUSE)
            except BaseException as error:  # handed to the main thread, which raises it
                job.error = error
            job.done.set()


_MOMENT = 1e-4


class Background:
    """A thread that does one job after another for someone who must not wait; `inline` without one, a job at each call."""

    def __init__(self, inline: bool = False) -> None:
        self._thread = None if inline else ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._jobs: Iterator[Callable[[], None]] = iter(())
        self._job: Future[None] | None = None

    def start(self, jobs: Iterator[Callable[[], None]]) -> None:
        """Take jobs; each is made when the one before is done."""
        self._jobs = jobs
        self._job = self._submit(_nothing)

    def _submit(self, job: Callable[[], None]) -> Future[None]:
        if self._thread is not None:
            return self._thread.submit(job)
        done: Future[None] = Future()
        try:
            done.set_result(job())
        except Exception as error:  # as the thread does: whoever looks at the job hears of it
            done.set_exception(error)
        return done

    @property
    def busy(self) -> bool:
        return self._job is not None

    def advance(self) -> bool:
        """Begin the next job if the last has ended, and raise what that raised; return whether there was something to do."""
        if self._job is None:
            return False
        # A moment, in which the thread has the interpreter for itself.
        wait((self._job,), _MOMENT)
        if not self._job.done():
            return False
        done, self._job = self._job, None
        done.result()
        job = next(self._jobs, None)
        if job is not None:
            self._job = self._submit(job)
        return True

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)


def _nothing() -> None:
    """Stands for the job before the first."""
