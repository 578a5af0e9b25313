"""The one decorator of kernels, with one cache policy.

A kernel is declared with its signature, in which ``T`` stands for the run's floating-point type. Importing compiles nothing, and
imports no compiler; `warm` loads the machine code of the kernels declared so far for one type, and makes what is missing. The first
rank of a node warms while the others wait, then these load: nothing is compiled twice. The cache lies in ``$DBNET_CACHE``, or else
in ``~/.cache/dbnet``, one folder per host, so that ranks of different hosts never write the same file; where that cannot be
written, in a temporary one.

`exp` and `expm1` inside a kernel are a polynomial for float32 that the compiler vectorises (PyPI's Numba has no vector mathematics
library); their relative error is below 2e-7 for -87 < x < 88.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import importlib
import math
import os
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import FunctionType, ModuleType
from typing import Any

from dbnet.core.errors import UserError
from dbnet.core.kernels import objects


def cache_folder() -> Path:
    """Return the folder that holds this host's compiled kernels; a temporary one where the home is not writable."""
    root = os.environ.get("DBNET_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbnet"
    # Numba notices a change of a kernel's own file, not of what it inlines from here.
    digest = _digest([Path(__file__), *sorted(Path(__file__).with_name("kernels").glob("*.py"))])[:8]
    folder = base / f"kernels-{socket.gethostname()}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if root:
            raise UserError(f"Cannot write to DBNET_CACHE '{root}': {error.strerror}; set it to another folder.") from None
    folder = _own_folder() / folder.name
    folder.mkdir(exist_ok=True)
    return folder


def _own_folder() -> Path:
    """Return a folder for temporary files that nobody else can write: Numba unpickles what it finds."""
    path = Path(tempfile.gettempdir()) / f"dbnet-{os.geteuid()}"
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    state = path.lstat()
    if stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid() and not state.st_mode & 0o077:
        return path
    fresh = tempfile.mkdtemp(prefix="dbnet-")
    atexit.register(shutil.rmtree, fresh, ignore_errors=True)
    return Path(fresh)


# Whether kernels check the bounds of their arrays (NUMBA_BOUNDSCHECK=1).
CHECKED = os.environ.get("NUMBA_BOUNDSCHECK", "0") not in ("", "0")


@functools.cache
def cache() -> Path:
    """Return the folder that the kernels of this process come from: those that check bounds have one of their own."""
    folder = os.environ.get("NUMBA_CACHE_DIR") or str(cache_folder())
    return Path(folder + "-checked" if CHECKED and not folder.endswith("-checked") else folder)


_PATIENCE = 300
KERNELS: list[tuple[str, Kernel]] = []


class Kernel:
    """A function that is called as machine code.

    Attributes
    ----------
    py_func
        The function that was declared.
    parallel, fast
        As they were declared.
    """

    def __init__(self, function: Callable, parallel: bool, fast: bool) -> None:
        self.py_func, self.parallel, self.fast = function, parallel, fast
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__
        self._entries: dict[str, Callable] = {}
        self._first: Callable = _refuse

    def __call__(self, *arguments: Any) -> Any:
        out = self._first(*arguments)
        return out if out is not NotImplemented else self._call_other(arguments)

    def _call_other(self, arguments: tuple[Any, ...]) -> Any:
        for entry in self._entries.values():
            if (out := entry(*arguments)) is not NotImplemented:
                return out
        return self.compiled(*arguments)

    def enter(self, words: str, entry: Callable) -> None:
        """Take an entry for a signature."""
        self._entries[words] = self._first = entry

    @cached_property
    def compiled(self) -> Any:
        """The kernel as Numba knows it, which compiles it for whatever it is called with."""
        return _compiler().made(self)

    @property
    def _numba_type_(self) -> Any:
        """Numba asks for it where a function that it compiles calls this one."""
        return self.compiled._numba_type_

    @property
    def signatures(self) -> set[str]:
        """For what it has been compiled or loaded."""
        if "compiled" not in vars(self):
            return set(self._entries)
        return {*self._entries, *map(_compiler().words_of, self.compiled.signatures)}


def _compiler() -> Any:
    """Import the compiler, which takes its declarations from here, when there is something to compile."""
    return importlib.import_module("dbnet.core.kernels.compiler")


def _refuse(*arguments: Any) -> Any:
    return NotImplemented


def kernel(*signatures: str, parallel: bool = False, fast: bool = False) -> Callable[[Callable], Kernel]:
    """Declare a kernel: compiled, cached, without the interpreter lock.

    Parameters
    ----------
    signatures
        Argument types, separated by ``;``: ``T``, ``f8``, ``i8``, ``u2``, ``u1``, ``b1`` for scalars; ``T[:]``, ``T[:,:]`` ... for
        contiguous arrays. Of several each is one more kernel.
    parallel
        Use `prange` over the threads that the rank was given; the result must not depend on their number.
    fast
        Let the compiler reorder sums (fastmath without NaN assumptions).
    """

    def declare(function: Callable) -> Kernel:
        # An error inside a parallel loop is lost: where bounds are checked it runs as a plain one.
        made = Kernel(function, parallel and not CHECKED, fast)
        KERNELS.extend((signature, made) for signature in signatures)
        return made

    return declare


class Inline:
    """A function that kernels take into them; called by itself it is compiled."""

    def __init__(self, function: Callable) -> None:
        self.py_func = function
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)

    @cached_property
    def compiled(self) -> Any:
        """The function as Numba knows it."""
        return _compiler().made_inline(self.py_func)


inline = Inline


class prange:
    """A range whose turns threads share in a parallel kernel."""

    def __new__(cls, *bounds: int) -> range:  # type: ignore[misc]
        return range(*bounds)


def warm(dtype: str, only: Callable[[str], bool] = lambda module: True, first: bool = True) -> int:
    """Load or compile all declared kernels for ``float32`` or ``float64``; return how many had to be compiled.

    `first` is whether they may have to be compiled; whoever comes after such a one loads them at the same time as others do.
    """
    short = {"float32": "f4", "float64": "f8"}[dtype]
    modules: dict[str, dict[tuple[str, str], Kernel]] = {}
    for signature, made in KERNELS:
        if only(made.__module__):
            # A module that is defined again has other ones of the same names.
            modules.setdefault(made.__module__, {})[made.py_func.__qualname__, signature.replace("T", short)] = made
    with _lock(fcntl.LOCK_EX if first else fcntl.LOCK_SH):
        compiled = sum(_ready(module, dtype, kernels) for module, kernels in modules.items())
    _tell_threads()
    return compiled


def _ready(module: str, dtype: str, named: dict[tuple[str, str], Kernel]) -> int:
    """Have the kernels of a module ready; return how many had to be compiled."""
    if all(words in made.signatures for (_, words), made in named.items()):
        return 0
    if CHECKED:
        return sum(_compile(words, made) for (_, words), made in named.items())
    path, stamp, compiled = cache() / f"{module}-{dtype}.kernels", _stamp(module, named), 0
    found = objects.load(path, stamp)
    if found is None:
        compiled = _compiler().write(path, stamp, named)
        found = objects.load(path, stamp)
    about, entries = found
    for symbol, entry in entries.items():
        name, words = about["entries"][symbol]
        named[name, words].enter(words, entry)
    for name, words in about["rest"]:
        _compile(words, named[name, words])
    return compiled


def _compile(words: str, made: Kernel) -> int:
    """Have Numba call a kernel; return whether it had to be compiled, 0 or 1."""
    compiled = _compiler().compile_one(words, made)
    made.enter(words, made.compiled)
    return compiled


def _stamp(module: str, named: dict[tuple[str, str], Kernel]) -> str:
    """Return what changes with the code of a module's kernels, of what they take elsewhere, or with what it is made for."""
    functions = [made.py_func for made in named.values()]
    taken = [function.__globals__.get(name) for function in functions for name in function.__code__.co_names]
    modules = {module, *(value.__module__ for value in taken if isinstance(value, FunctionType | Kernel | Inline))}
    # A notebook has no file.
    found = [getattr(sys.modules[name], "__file__", None) for name in sorted(modules) if name.startswith(("dbnet.", module))]
    names = [f"{name}({words}) {made.parallel} {made.fast}" for (name, words), made in named.items()]
    code = [f"{function.__code__.co_code.hex()} {function.__code__.co_consts}" for function in functions]
    files = _digest([Path(file) for file in found if file])
    return hashlib.sha256("\n".join([files, *names, *code, objects.machine()]).encode()).hexdigest()


def _digest(files: list[Path]) -> str:
    """Return the SHA-256 of files."""
    return hashlib.sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def _lock(kind: int) -> Iterator[None]:
    """Let one process of this host at a time write the cache, or many read it."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        patience = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise UserError(
                        f"Another process has been compiling into '{folder}' for {_PATIENCE} s; wait for it, or set DBNET_CACHE to "
                        "another folder."
                    ) from None
                time.sleep(0.02)
        yield


_THREADS: list[int] = []


def set_threads(n: int) -> None:
    """Give parallel kernels `n` threads, at most as many as Numba was started with."""
    _THREADS[:] = [n]
    _tell_threads()


def _tell_threads() -> None:
    """Tell Numba, if it is there, how many threads kernels have."""
    if "numba" in sys.modules and _THREADS:
        import numba

        numba.set_num_threads(min(_THREADS[0], numba.config.NUMBA_NUM_THREADS))


def reached(modules: set[str]) -> set[str]:
    """Return these loaded modules and all of dbnet's that they take something from, directly or not."""
    found: set[str] = set()
    left = list(modules)
    while left:
        name = left.pop()
        if name in found or name not in sys.modules:
            continue
        found.add(name)
        # What stands in a table is taken, too.
        own = list(vars(sys.modules[name]).values())
        for value in [*own, *(inner for table in own if isinstance(table, dict) for inner in table.values())]:
            origin = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(origin, str) and origin.startswith("dbnet."):
                left.append(origin)
    return found


# --- what kernels call: for the compiler see `kernels.compiler` -----------------------------------------------------------------


def barrier() -> None:
    """Let no load and no store of a kernel pass from before this call to after it, or back."""


@kernel("")
def fence() -> None:
    """Let no load and no store of this thread pass from before this call to after it, or back."""
    barrier()


def _pass_lock() -> None:
    with _LOCK:
        pass


_LOCK = Lock()
# A thread that looks for signs of life while others start must not load the compiler: till then a lock, which is a barrier, too.
fence._first = _pass_lock


def exp(x: float) -> float:
    """Return e to the x; in a kernel on float32 as a polynomial."""
    return math.exp(x)


def expm1(x: float) -> float:
    """Return e to the x less 1, also where x is small; in a kernel on float32 as a polynomial."""
    return math.expm1(x)
