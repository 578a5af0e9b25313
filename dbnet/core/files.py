"""Files that appear whole or not at all, and HDF5 files that a full disk does no harm.

HDF5 cannot end a file whose writes fail: it keeps what it could not write and crashes when the process ends. So it writes through a
`Shelter`, which remembers the first failure and pretends from there on that all went well; whoever opened the file gets the failure
when HDF5 is done with it. A file that others read while it grows (HDF5 allows that on real files alone) has its blocks reserved
before they are written.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py

from dbnet.core.errors import UserError

_SYNC = 64 << 20
_KEEP_SIZE = 1
_ALLOCATE = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)


class Shelter:
    """A file to write for HDF5 whose writes never fail.

    Attributes
    ----------
    error
        The first failure; nothing has been written since.
    """

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self.error: OSError | None = None
        self._at = self._size = self._unsynced = 0

    def write(self, data: Any) -> int:
        view, done = memoryview(data).cast("B"), 0
        try:
            while self.error is None and done < len(view):
                done += os.pwrite(self._number, view[done:], self._at + done)
            self._unsynced += done
            if self._unsynced >= _SYNC:
                # Now and then, so that the last one is short and memory is not filled with what waits for the disk.
                self._unsynced = 0
                os.fsync(self._number)
        except OSError as error:
            self.error = error
        self._at += len(view)
        self._size = max(self._size, self._at)
        return len(view)

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")
        had = os.pread(self._number, len(view), self._at)
        view[:] = had + bytes(len(view) - len(had))
        self._at += len(view)
        return len(view)

    def read(self, size: int) -> bytes:
        out = bytearray(size)
        self.readinto(out)
        return bytes(out)

    def truncate(self, size: int) -> int:
        self._size = size
        try:
            os.ftruncate(self._number, size)
        except OSError as error:
            self.error = self.error or error
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Close the file, once; raise what has failed."""
        if self._number >= 0:
            os.close(self._number)
            self._number = -1
        if self.error is not None:
            raise self.error


@contextmanager
def hdf5(path: Path, libver: Any = None) -> Iterator[h5py.File]:
    """Open a new HDF5 file; OSError at the end, and no crash, where it could not be written."""
    shelter = Shelter(path)
    try:
        with h5py.File(shelter, "w", libver=libver) as file:
            yield file
    finally:
        # A failed write explains whatever HDF5 has complained about after it.
        shelter.close()


def publish(part: Path, path: Path) -> None:
    """Make a file durable, then give it its name."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync(path.parent)


def point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target`, in the place of the one that was there."""
    part = link.with_name(link.name + ".part")
    part.unlink(missing_ok=True)
    os.symlink(target, part)
    os.replace(part, link)
    sync(link.parent)


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def require_room(folder: Path, needed: int) -> None:
    """Raise OSError where the disk has no room for so many bytes."""
    state = os.statvfs(folder)
    if state.f_blocks and state.f_bavail * state.f_frsize < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def reserve(number: int, folder: Path, size: int) -> None:
    """Reserve blocks for an open file to grow to `size` bytes, so that writing them cannot fail; OSError where there is no room."""
    if not _allocated(number, size):
        # A disk that cannot reserve is asked what it has left.
        require_room(folder, size - os.fstat(number).st_size)


def give_blocks(number: int, lo: int, hi: int) -> None:
    """Give an open file its blocks from byte `lo` to `hi`, where nothing is written yet; OSError where there is no room.

    On a full disk a hole in a file that is mapped kills whoever writes to it.
    """
    if not _allocated(number, hi):
        while lo < hi:
            lo += os.pwrite(number, bytes(min(hi - lo, 1 << 20)), lo)
        # Some file systems look for room only now.
        os.fsync(number)


def _allocated(number: int, size: int) -> bool:
    """Reserve blocks for the first `size` bytes of an open file; return whether its disk can do that. OSError: it has no room."""
    if _ALLOCATE is None:
        return False
    if _ALLOCATE(number, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    return False


def put(number: int, data: bytes) -> None:
    """Write all of `data` to an open file."""
    while data:
        data = data[os.write(number, data) :]


def mapped(path: Path, size: int, advice: str) -> mmap.mmap:
    """Make a file of `size` zeros and map it; UserError that ends in `advice` where that cannot be.

    They are written, since on a full disk a hole kills whoever writes to it.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        put(number, bytes(size))
        # Some file systems look for room only now.
        os.fsync(number)
        try:
            return mmap.mmap(number, size)
        except OSError as error:
            words = f"{why(error)}; not every network or FUSE file system can do that"
            raise UserError(f"'{path}' cannot be mapped into memory ({words}); {advice}.") from None
    finally:
        os.close(number)


def why(error: Exception) -> str:
    """Return what a failed operation says, on one line."""
    said = getattr(error, "strerror", None) or str(error)
    name = getattr(error, "filename", None)
    return " ".join(f"{said} ('{name}')".split() if name else said.split())


# Whatever a missing part, a cut-off or a damaged file makes a reader raise.
UNREADABLE = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError, MemoryError)


def words(error: BaseException) -> str:
    """Return what a reader's error says, on one line."""
    said = str(error.args[-1] if isinstance(error, KeyError) and error.args else error)
    if "file signature not found" in said:
        return "it is no HDF5 file"
    if found := re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", said):
        return f"it is cut off: it has {int(found[1]):,} of its {int(found[2]):,} bytes"
    return " ".join(said.split()) or type(error).__name__


# How files start that are taken for HDF5 now and then.
_STARTS = {b"PK": "a zip archive, like NumPy's .npz", b"\x93NUMPY": "a NumPy array", b"\x1f\x8b": "compressed with gzip"}


def foreign(path: str | Path) -> str:
    """Return what a file is that is plainly no HDF5 file; otherwise nothing."""
    if Path(path).is_dir():
        return "a folder"
    if not Path(path).is_file():
        return "no ordinary file" if Path(path).exists() else ""
    with open(path, "rb") as file:
        start = file.read(512)
    found = next((words for magic, words in _STARTS.items() if start.startswith(magic)), "")
    return found or ("a text file" if start and all(byte >= 32 or byte in b"\t\n\r\f" for byte in start) else "")


@contextmanager
def reading(path: str | Path, advice: str) -> Iterator[None]:
    """Turn what a reader raises into one sentence that ends in `advice`."""
    try:
        yield
    except UNREADABLE as error:
        with suppress(OSError):
            if isinstance(error, OSError) and (found := foreign(path)):
                advice = "'dbnet data --help' shows how arrays become a data file"
                raise UserError(f"'{path}' cannot be read: it is {found}, and dbnet's files are HDF5; {advice}.") from None
        raise UserError(f"'{path}' cannot be read ({words(error)}); {advice}.") from None


def refuse_taken(path: str | Path, force: bool = False) -> None:
    """Raise UserError where a file has this name already and may not be replaced."""
    if not force and os.path.lexists(path) and not Path(path).is_dir():
        raise UserError(f"Cannot write '{path}': that file exists; choose another name, or give --force to replace it.")


@contextmanager
def writing(path: Path, force: bool = True) -> Iterator[Path]:
    """Give the body a temporary name to write to; it becomes `path` when the body ends, and vanishes when it raises.

    Without `force` a file that has the name, or gets it in the meantime, stays as it is: UserError.
    """
    # Of its own, since two may write the same file at the same time.
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        refuse_taken(path, force)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if not force:
            _reserve(path)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Cannot write '{path}': {getattr(error, 'strerror', None) or error}; choose another place.") from None
    finally:
        with suppress(OSError):
            part.unlink()


def _reserve(path: Path) -> None:
    """Take a name that nobody has."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        refuse_taken(path)
