"""Runs that are hurt while they train: started by jobs/local.sh, ranks killed or stopped, and counts of what was done to them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from started import processes, programs

from dbnet.core.errors import UserError
from dbnet.monitor.results import Run

ROOT = Path(__file__).resolve().parents[3]
COUNTS: Counter[str] = Counter()
# Seconds without a sign of life: short, but none that three suites on two cores may keep a rank from its core for.
BOUND = 6.0

RUN_FILE = """
[run]
folder = "out"
picture = false
heartbeat = {bound}
[data]
path = "{data}"
[model]
layers = [{{kind = "dense", units = 16, activation = "sigmoid"}}, {{kind = "dense", units = 10}}]
dtype = "float64"
decay = 1e-3
[method]
minibatch = 20
[rule]
kind = "adagrad"
rate = 0.1
[topology]
shards = 2
replicas = 3
[stop]
epochs = 120
[evaluate]
epochs = 1000
[checkpoint]
seconds = 0.5
"""


def until(done: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Ask again and again; fail when it takes longer."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def trains(folder: Path, seconds: float = 0.0) -> bool:
    """Whether a run in the folder has trained: the marker says so a little before all ranks have met, who may not be lost there;
    `seconds` of training are recorded."""
    for path in (folder / "out").glob("*.h5"):
        if not path.name.endswith(".checkpoint.h5"):
            with suppress(UserError):
                run = Run(path)
                if len(run.progress) and run.progress.seconds.max() >= seconds and not run.finished and not run.stopped:
                    return True
    return False


class Hurt:
    """One run of jobs/local.sh in a folder with a configuration.

    Parameters
    ----------
    folder
        Where it runs.
    overrides
        Changes of the configuration, and options.
    """

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        bin = folder / "bin" if (folder / "bin").exists() else programs(folder / "bin")
        self.mark = f"DBNET_TEST={folder}"
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DBNET_BIN": str(bin), "DBNET_TEST": str(folder)}
        self.job = subprocess.Popen(
            [ROOT / "jobs" / "local.sh", "run.toml", *overrides], cwd=folder, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.code, self.out, self.err, self.seconds = -1, "", "", 0.0

    def training(self) -> Hurt:
        """Wait until the run trains."""

        def begun() -> bool:
            assert self.job.poll() is None, self.job.communicate()
            return trains(self.folder)

        until(begun, "training begins", 120)
        return self

    def pid(self, rank: int) -> int:
        """Return the process of a rank of the world."""
        found: dict[int, str] = {}
        for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK"):
            found.update(processes(self.mark, f"\0{name}={rank}\0", besides=("survive", "mpirun", "hydra", "prte")))
        # A wrapper of a shell hands its place on to the program, or stays as its parent: the youngest is the rank.
        assert found, f"rank {rank} is not there"
        return max(pid for pid, words in found.items() if "dbnet train" in words)

    def hurt(self, rank: int, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a rank; return its process."""
        pid = self.pid(rank)
        os.kill(pid, number)
        return pid

    def end(self, timeout: float = 120) -> Hurt:
        """Wait for the end; whatever happens, nothing stays."""
        start = time.monotonic()
        try:
            self.out, self.err = self.job.communicate(timeout=timeout)
        finally:
            for pid in processes(self.mark):
                with_no_mercy(pid)
        self.code, self.seconds = self.job.returncode, time.monotonic() - start
        return self

    def good(self) -> Hurt:
        assert self.code == 0, f"exit code {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"
        return self


def with_no_mercy(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def prepare(folder: Path, data: Path, bound: float = BOUND) -> Path:
    """Write the configuration; return the folder."""
    (folder / "run.toml").write_text(RUN_FILE.format(data=data, bound=bound))
    return folder
