"""The one Numba decorator, with one cache policy.

A kernel is declared with its signature, in which ``T`` stands for the run's floating-point type. Importing compiles nothing;
`warm` compiles (or loads from the node's cache) every kernel declared so far for one type. The first rank of a node warms while
the others wait, then these load: nothing is compiled twice. The cache lies in ``$DBNET_CACHE``, or else in ``~/.cache/dbnet``,
one folder per host, so that ranks of different hosts never write the same file; where that cannot be written, in a temporary one.

`exp` and `expm1` inside a kernel are a polynomial for float32 that the compiler vectorises (PyPI's Numba has no vector mathematics
library); their relative error is below 2e-7 for -87 < x < 88.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import math
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from dbnet.core.errors import UserError


def cache_folder() -> Path:
    """Return the folder that holds this host's compiled kernels; a temporary one where the home is not writable."""
    root = os.environ.get("DBNET_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbnet"
    # Numba notices a change of a kernel's own file, not of what it inlines from here.
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
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
CHECKED = bool(numba.config.BOUNDSCHECK)


def _of_this_kind(folder: str) -> str:
    """Return the folder for kernels compiled as now: Numba's index does not tell those that check bounds from others."""
    return folder + "-checked" if CHECKED and not folder.endswith("-checked") else folder


# Read whenever a kernel is declared, so it holds also where something else imported Numba first.
numba.config.CACHE_DIR = _of_this_kind(numba.config.CACHE_DIR or str(cache_folder()))


def cache() -> Path:
    """Return the folder that the kernels of this process come from."""
    return Path(numba.config.CACHE_DIR)


_PATIENCE = 300
KERNELS: list[tuple[str, Any]] = []
_NAMES = {
    "f4": types.float32, "f8": types.float64, "i8": types.int64, "u8": types.uint64, "u2": types.uint16, "u1": types.uint8,
    "b1": types.boolean,
}  # fmt: skip


def kernel(*signatures: str, parallel: bool = False, fast: bool = False) -> Callable[[Callable], Any]:
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

    def declare(function: Callable) -> Any:
        flags = {"reassoc", "nsz", "contract", "arcp"} if fast else {"contract"}
        # An error inside a parallel loop is lost: where bounds are checked it runs as a plain one.
        threads = parallel and not CHECKED
        jitted = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=flags, parallel=threads)(function)
        KERNELS.extend((signature, jitted) for signature in signatures)
        return jitted

    return declare


inline = numba.njit(inline="always", error_model="numpy")
prange = numba.prange


def _type(name: str, scalar: str) -> Any:
    """Return the Numba type of one word of a signature."""
    match = re.fullmatch(r"(\w+)(\[[:,]*\])?", name.strip())
    base = _NAMES[scalar if match[1] == "T" else match[1]]
    return types.Array(base, match[2].count(":"), "C") if match[2] else base


def warm(dtype: str, only: Callable[[str], bool] = lambda module: True, first: bool = True) -> int:
    """Compile or load all declared kernels for ``float32`` or ``float64``; return how many had to be compiled.

    `first` is whether they may have to be compiled; whoever comes after such a one loads them at the same time as others do.
    """
    compiled = 0
    with _lock(fcntl.LOCK_EX if first else fcntl.LOCK_SH):
        for signature, jitted in KERNELS:
            if only(jitted.py_func.__module__):
                words = signature.split(";") if signature else ()
                arguments = tuple(_type(word, {"float32": "f4", "float64": "f8"}[dtype]) for word in words)
                before = sum(jitted.stats.cache_misses.values())
                jitted.compile(arguments)
                compiled += sum(jitted.stats.cache_misses.values()) - before
    return compiled


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


def set_threads(n: int) -> None:
    """Give parallel kernels `n` threads, at most as many as Numba was started with."""
    numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))


# --- order of memory ----------------------------------------------------------------------------------------------------------


@intrinsic
def _fence(typingctx: Any) -> Any:  # type: ignore[misc]
    """Emit a full memory barrier, for the processor and for the compiler."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@kernel("")
def fence() -> None:
    """Let no load and no store of this thread pass from before this call to after it, or back."""
    _fence()


# --- exp that vectorises ------------------------------------------------------------------------------------------------------


@intrinsic
def _bits_to_float(typingctx: Any, bits: Any) -> Any:  # type: ignore[misc]
    """Reinterpret an int32 as a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def exp(x: float) -> float:
    """Return e to the x; in a kernel on float32 as a polynomial."""
    return math.exp(x)


def expm1(x: float) -> float:
    """Return e to the x less 1, also where x is small; in a kernel on float32 as a polynomial."""
    return math.expm1(x)


def _polynomial(less):  # type: ignore[no-untyped-def]
    """Return the code of e to the x, or with `less` of that less 1, on float32."""
    f, i = np.float32, np.int32
    low, high, log2e = f(-87.0), f(88.0), f(1.44269504)
    # ln 2 in two parts, so that n * ln 2 is subtracted exactly (Cody and Waite); 1.5 * 2^23 rounds to the nearest integer.
    ln2_high, ln2_low, magic = f(0.693359375), f(-2.12194440e-4), f(12582912.0)
    c = tuple(f(1 / math.factorial(k)) for k in range(8))
    c2, c3, c4, c5, c6, c7 = c[2:]
    one, bias, width = f(1.0), i(127), i(23)

    def exp32(x):  # type: ignore[no-untyped-def]
        # In this order a NaN stays one.
        z = low if x < low else x
        z = high if z > high else z
        n = (z * log2e + magic) - magic
        r = (z - n * ln2_high) - n * ln2_low
        p = c2 + r * (c3 + r * (c4 + r * (c5 + r * (c6 + r * c7))))
        power = _bits_to_float(i(i(n) + bias) << width)
        return (r + r * r * p) * power + (power - one) if less else (one + r + r * r * p) * power

    return exp32


@overload(exp, inline="always")
def _exp(x):  # type: ignore[no-untyped-def]
    return _polynomial(False) if x == types.float32 else lambda x: math.exp(x)


@overload(expm1, inline="always")
def _expm1(x):  # type: ignore[no-untyped-def]
    return _polynomial(True) if x == types.float32 else lambda x: math.expm1(x)
