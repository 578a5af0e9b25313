"""Where compiled kernels lie, and who may write there.

In ``$DBNET_CACHE``, or else in ``~/.cache/dbnet``, one folder per host, so that ranks of different hosts never write the same file;
where that cannot be written, in a temporary one.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import os
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dbnet.core.errors import UserError


def cache_folder() -> Path:
    """Return the folder that holds this host's compiled kernels; a temporary one where the home is not writable."""
    root = os.environ.get("DBNET_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dbnet"
    folder = base / _name()
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


def _name() -> str:
    """Return the name of this host's folder. Numba notices a change of a kernel's own file, not of what it inlines from here."""
    return f"kernels-{socket.gethostname()}-{digest_of_entries()[:8]}"


@functools.cache
def digest_of_entries() -> str:
    """Return the SHA-256 of what makes kernels, and calls them."""
    return digest([Path(__file__).parents[1] / "jit.py", *sorted(Path(__file__).parent.glob("*.py"))])


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
    root = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(root) / _name() if root else cache_folder()
    return folder.with_name(folder.name + "-checked") if CHECKED else folder


_PATIENCE = 300


def digest(files: list[Path]) -> str:
    """Return the SHA-256 of files."""
    return hashlib.sha256(b"\n".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def say_unwritten(why: str) -> None:
    """Say, once, that what was compiled cannot be kept."""
    where = f"Compiled kernels cannot be written to '{cache()}'"
    print(f"dbnet: {where}: {why}; the next start compiles them again.", file=sys.stderr, flush=True)


@contextmanager
def lock(kind: int) -> Iterator[None]:
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
