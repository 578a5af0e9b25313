"""The one decorator of kernels, with one cache policy.

A kernel is declared with its signature, in which ``T`` stands for the run's floating-point type. Importing compiles nothing, and
imports no compiler; `warm` loads the machine code of dbnet's kernels declared so far for one type, and makes what is missing. Those
that are declared outside of dbnet are Numba's own functions, compiled by it. The first rank of a node warms while the others wait,
then these load: nothing is compiled twice (`kernels.folder` says where).

`exp` and `expm1` inside a kernel are a polynomial for float32 that the compiler vectorises (PyPI's Numba has no vector mathematics
library); their relative error is below 2e-7 for -87 < x < 88.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from types import FunctionType, ModuleType
from typing import Any

from dbnet.core.kernels import folder, objects
from dbnet.core.kernels.folder import CHECKED

# Each with a signature; those that were declared outside of dbnet are Numba's.
KERNELS: list[tuple[str, Any]] = []
# Not empty where kernels that are declared outside of dbnet check their bounds.
_GUARDED: list[bool] = []


class Kernel:
    """One of dbnet's own kernels: a function that is called as machine code.

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
        return _compiler().own(self)

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


def _is_own(function: Callable) -> bool:
    """Return whether a function is dbnet's: only these are called as machine code, whose files do not change while it runs."""
    return function.__module__.startswith("dbnet.")


def _refuse(*arguments: Any) -> Any:
    return NotImplemented


def kernel(*signatures: str, parallel: bool = False, fast: bool = False) -> Callable[[Callable], Any]:
    """Declare a kernel: compiled, cached, without the interpreter lock; outside of dbnet it is what ``numba.njit`` makes of it.

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

    def declare(function: Callable) -> Any:
        # An error inside a parallel loop is lost: where bounds are checked it runs as a plain one.
        threads = parallel and not CHECKED and not _GUARDED
        made = Kernel(function, threads, fast) if _is_own(function) else _compiler().made(function, threads, fast, bool(_GUARDED))
        KERNELS.extend((signature, made) for signature in signatures)
        return made

    return declare


@contextmanager
def guarded() -> Iterator[None]:
    """Have the kernels that are declared outside of dbnet meanwhile check the bounds of their arrays: they may be wrong."""
    _GUARDED.append(True)
    try:
        yield
    finally:
        _GUARDED.pop()


def inline(function: Callable) -> Any:
    """Declare a function that kernels take into them; outside of dbnet it is what ``numba.njit`` makes of it."""
    return Inline(function) if _is_own(function) else _compiler().made_inline(function)


class Taken:
    """A function of which the compiler knows what stands for it in a kernel (``overload``), imported when that is asked for."""

    def __init__(self, function: Callable) -> None:
        self.py_func = function
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__

    def __call__(self, *arguments: Any) -> Any:
        return self.py_func(*arguments)

    @property
    def _numba_type_(self) -> Any:
        return _compiler().type_of(self)


class Inline(Taken):
    """One of dbnet's own functions that kernels take into them; called by itself it is compiled."""

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)

    @cached_property
    def compiled(self) -> Any:
        """The function as Numba knows it."""
        return _compiler().made_inline(self.py_func)

    @property
    def _numba_type_(self) -> Any:
        return self.compiled._numba_type_


def __getattr__(name: str) -> Any:
    """Return `prange`, the range whose turns threads share in a parallel kernel: Numba's, which only such a kernel imports."""
    if name != "prange":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return importlib.import_module("numba").prange


def warm(dtype: str, only: Callable[[str], bool] = lambda module: True, first: bool = True) -> int:
    """Load or compile all declared kernels for ``float32`` or ``float64``; return how many had to be compiled.

    `first` is whether they may have to be compiled; whoever comes after such a one loads them at the same time as others do.
    """
    short = {"float32": "f4", "float64": "f8"}[dtype]
    modules: dict[str, dict[tuple[str, str], Kernel]] = {}
    others: list[tuple[str, Any]] = []
    for signature, made in KERNELS:
        module, words = made.py_func.__module__, signature.replace("T", short)
        if only(module):
            if isinstance(made, Kernel):
                modules.setdefault(module, {})[made.py_func.__qualname__, words] = made
            else:
                others.append((words, made))
    with folder.lock(fcntl.LOCK_EX if first else fcntl.LOCK_SH):
        if first:
            objects.sweep(folder.cache())
        compiled = sum(_ready(module, dtype, kernels) for module, kernels in modules.items())
        compiled += sum(_compiler().compile_one(words, made) for words, made in others)
    _tell_threads()
    return compiled


def _ready(module: str, dtype: str, named: dict[tuple[str, str], Kernel]) -> int:
    """Have the kernels of a module ready; return how many had to be compiled."""
    if all(words in made.signatures for (_, words), made in named.items()):
        return 0
    if CHECKED:
        return sum(_compile(words, made) for (_, words), made in named.items())
    path, compiled = folder.cache() / f"{module}-{dtype}-{_stamp(module, named)}.kernels", 0
    found = objects.load(path)
    if found is None:
        compiled, found = _compiler().write(path, named)
    about, entries = found
    for symbol, entry in entries.items():
        name, words = about["entries"][symbol]
        named[name, words].enter(words, entry)
    for name, words in about["rest"]:
        _compile(words, named[name, words])
    return compiled


def _compile(words: str, made: Kernel) -> int:
    """Have Numba call a kernel; return whether it had to be compiled, 0 or 1."""
    compiled = _compiler().compile_one(words, made.compiled)
    made.enter(words, made.compiled)
    return compiled


def _stamp(module: str, named: dict[tuple[str, str], Kernel]) -> str:
    """Return what changes with the code of a module's kernels, of what they take elsewhere, or with what it is made for."""
    functions = [made.py_func for made in named.values()]
    taken = [function.__globals__.get(name) for function in functions for name in function.__code__.co_names]
    modules = {module, *(value.__module__ for value in taken if isinstance(value, FunctionType | Kernel | Taken))}
    files = folder.digest([Path(sys.modules[name].__file__ or "") for name in sorted(modules) if name.startswith("dbnet.")])
    names = [f"{name}({words}) {made.parallel} {made.fast}" for (name, words), made in named.items()]
    return hashlib.sha256("\n".join([folder.digest_of_entries(), files, *names, objects.machine()]).encode()).hexdigest()[:16]


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


@Taken
def barrier() -> None:
    """Let no load and no store of a kernel pass from before this call to after it, or back."""


@kernel("")
def fence() -> None:
    """Let no load and no store of this thread pass from before this call to after it, or back."""
    barrier()


def _pass_locks() -> None:
    with _LOCK:
        pass
    # Of one lock alone what stands before could pass its acquiring, and what follows its release. On x86 and AArch64 no acquiring
    # passes a release that stands before it, so that nothing passes both.
    with _LOCK:
        pass


_LOCK = Lock()
# A thread that looks for signs of life while others start must not load the compiler.
fence._first = _pass_locks


@Taken
def exp(x: float) -> float:
    """Return e to the x; in a kernel on float32 as a polynomial."""
    return math.exp(x)


@Taken
def expm1(x: float) -> float:
    """Return e to the x less 1, also where x is small; in a kernel on float32 as a polynomial."""
    return math.expm1(x)
