"""Files that appear whole or not at all, and HDF5 files that a full disk does no harm.

HDF5 cannot end a file whose writes fail: it keeps what it could not write and crashes when the process ends. So it writes through a
`Shelter`, which remembers the first failure and pretends from there on that all went well; whoever opened the file gets the failure
when HDF5 is done with it. A file that others read while it grows (HDF5 allows that on real files alone) has its blocks reserved
before they are written.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

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
    if _ALLOCATE is not None:
        if _ALLOCATE(number, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    # A disk that cannot reserve is asked what it has left.
    require_room(folder, size - os.fstat(number).st_size)


def why(error: Exception) -> str:
    """Return what a failed operation says, on one line."""
    said = getattr(error, "strerror", None) or str(error)
    name = getattr(error, "filename", None)
    return " ".join(f"{said} ('{name}')".split() if name else said.split())
