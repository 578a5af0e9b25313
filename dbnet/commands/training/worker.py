"""Processes that train the runs of a grid: one that does several, one after another, and one that starts ranks for each.

`WorkerProcess` starts this module as a process of its own, so that a run that dies takes nothing else along, and that the next
ones find all imported and every kernel loaded. It writes tasks to its input, a line of JSON each, and reads answers in the same
way; what a run prints comes on its standard error. `Launch` starts jobs/launch for every run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from dbnet.commands.training.grid import GridPoint
from dbnet.core.errors import UserError, own_line
from dbnet.run.signals import end_with_parent
from dbnet.run.train import execute

LAUNCH = Path(__file__).resolve().parents[3] / "jobs" / "launch"
STOPPED = 85


class Answer(NamedTuple):
    """How a run ended: as it was meant to, stopped by a signal, or failed for a reason."""

    failed: str = ""
    stopped: bool = False


class WorkerProcess:
    """A process that trains runs, each of them in it alone.

    Parameters
    ----------
    cores
        Those that it may use; nothing: all.
    said
        Told what a run prints: its name and a line.
    """

    def __init__(self, source: str, cores: Sequence[int], said: Callable[[str, str], None]) -> None:
        self._source, self._cores, self._said = source, list(cores), said
        self._process: subprocess.Popen[str] | None = None
        self._name, self._asked = "", False

    def play(self, point: GridPoint, checkpoint: Path | None) -> Answer:
        """Train one run."""
        self._name = point.name
        if self._asked:
            return Answer(stopped=True)
        if self._process is None:
            command = [sys.executable, "-m", "dbnet.commands.training.worker", json.dumps(self._cores)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            # Ctrl-C at the terminal reaches the sweep alone, which hands it on.
            self._process = subprocess.Popen(command, **pipes, text=True, start_new_session=True, close_fds=False)
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        task = [self._source, list(point.words), None if checkpoint is None else str(checkpoint)]
        # It may have died before the task, which the answer that does not come says, too.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            return Answer(*json.loads(line))
        code, self._process = self._process.wait(), None
        return Answer(stopped=True) if self._asked else Answer(died(code))

    def _listen(self, process: subprocess.Popen[str]) -> None:
        for line in process.stderr:
            self._said(self._name, line.rstrip())

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the run that is under way to write a checkpoint and stop; no other begins."""
        self._asked = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        """Have the process end when it is idle."""
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()


class Launch:
    """Starts jobs/launch for every run, one rank per role."""

    def __init__(self, source: str, said: Callable[[str, str], None]) -> None:
        self._source, self._said = source, said
        self._process: subprocess.Popen[str] | None = None
        self._asked = False

    def play(self, point: GridPoint, checkpoint: Path | None) -> Answer:
        """Train one run."""
        if self._asked:
            return Answer(stopped=True)
        words = [str(LAUNCH), self._source, *point.words, "--quiet", *(["--resume", str(checkpoint)] if checkpoint else [])]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(words, **pipes, text=True, start_new_session=True, close_fds=False)
        lines = [line.rstrip() for line in self._process.stdout]
        code = self._process.wait()
        if code == STOPPED:
            return Answer(stopped=True)
        reasons = [line.removeprefix("dbnet: ") for line in lines if line.startswith("dbnet: ")] if code else []
        for line in lines:
            if not reasons or line != f"dbnet: {reasons[0]}":
                self._said(point.name, line)
        return Answer(stopped=True) if self._asked and code else Answer((reasons or [died(code)])[0] if code else "")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask the run that is under way to write a checkpoint and stop; no other begins."""
        self._asked = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def close(self) -> None:
        """Nothing is left between two runs."""


def died(code: int) -> str:
    """Return in words how a process ended that gave no answer."""
    if code >= 0:
        return f"its process ended with exit code {code}."
    more = ": the system kills what takes too much memory" if -code == signal.SIGKILL else ""
    return f"its process died of signal {-code} ({signal.strsignal(-code)}){more}."


def train(source: str, words: Sequence[str], checkpoint: str | None) -> Answer:
    """Train one run in this process; what goes wrong is its answer."""
    try:
        done = execute(source, words, resume=checkpoint, quiet=True)
    except UserError as error:
        return Answer(str(error).partition("\n")[0])
    except MemoryError as error:
        return Answer(f"Not enough memory ({error}); 'dbnet plan' shows what each rank needs.")
    except Exception as error:
        own = own_line(error).removeprefix("dbnet: ").strip()
        if not own:
            traceback.print_exc()
        return Answer(own or f"{type(error).__name__}: {error}")
    if done.unsaved:
        return Answer(f"its last checkpoint could not be written ({done.unsaved}).")
    return Answer(stopped=done.stopped)


def main() -> None:
    """Train what comes on standard input until it ends."""
    end_with_parent(signal.SIGTERM)
    cores = json.loads(sys.argv[1])
    if cores:
        os.sched_setaffinity(0, cores)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(train(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
