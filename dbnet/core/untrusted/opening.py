"""Open HDF5 files that somebody else may have made, or that are damaged.

Opening refuses, before anything is read, whatever leads out of the file (links to other files, arrays stored in other files,
virtual arrays over other files) and every array that claims more than the file can hold. What is no regular file is not opened at
all, since a pipe makes HDF5 wait for ever; damaged mappings of virtual arrays are not shown to HDF5, since they crash it. Only a
checkpoint's master has virtual arrays, over its own parts in its own folder.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import h5py
from h5py._objects import phil

from dbnet.core.errors import UserError
from dbnet.core.files import UNREADABLE, words
from dbnet.core.untrusted.mappings import Raw, intact

_PART = re.compile(r"[^/]+\.shard-\d+\.h5")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_LINKS, _DEPTH = 100_000, 32
# Deflate makes nothing more than 1032 times smaller.
_EXPANSION, _SMALL = 1100, 1 << 20
# After each attempt to read what somebody may be writing HDF5 waits twice as long, from a nanosecond on; its own 100 take for ever.
_ATTEMPTS = 27


@contextmanager
def opened(path: str | Path, *, growing: bool = False, virtual: bool = False) -> Iterator[h5py.File]:
    """Open an HDF5 file to read.

    Parameters
    ----------
    growing
        Someone may be writing it.
    virtual
        Whether virtual arrays over parts of a checkpoint in the same folder are allowed.

    Raises
    ------
    UserError
        It is no regular file, leads to other files, has damaged mappings, or claims sizes that it cannot have.
    """
    require_file(path)
    with _open(path, growing) as file:
        made = file.id.get_create_plist()
        with open(path, "rb", buffering=0) as content:
            raw = Raw(content.fileno(), made.get_userblock(), *made.get_sizes())
            for name, item in _objects(path, file.id, raw):
                if isinstance(item, h5py.h5d.DatasetID):
                    try:
                        _check(f"'{path}': /{name}", path, item, virtual)
                    except UNREADABLE as error:
                        raise OSError(f"/{name}: {words(error)}") from None
        yield file


def require_file(path: str | Path) -> None:
    """Raise UserError unless it is a regular file, or OSError where there is none."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise UserError(f"'{path}' cannot be read: it is {_KINDS.get(stat.S_IFMT(mode), 'a device')}; give a regular file.")


def _open(path: str | Path, growing: bool) -> h5py.File:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    # h5py has no name for it.
    call = ctypes.CDLL(h5py.h5p.__file__).H5Pset_metadata_read_attempts
    call.argtypes, call.restype = (ctypes.c_int64, ctypes.c_uint), ctypes.c_int
    # Two threads in HDF5 at a time crash it; h5py's own calls hold this lock.
    with phil:
        if call(access.id, _ATTEMPTS) < 0:
            raise RuntimeError("HDF5 does not take a number of attempts to read")
    name = os.fsencode(path)
    try:
        return h5py.File(h5py.h5f.open(name, h5py.h5f.ACC_RDONLY, access))
    except OSError as error:
        # Of a cut-off file HDF5 would wait for the rest.
        if not growing or "truncated" in str(error):
            raise
    return h5py.File(h5py.h5f.open(name, h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ, access))


def _objects(path: str | Path, root: h5py.h5g.GroupID, raw: Raw) -> Iterator[tuple[str, h5py.h5g.GroupID | h5py.h5d.DatasetID]]:
    """Yield every object of a file with its name, once for each link to it; links within the file lead to one of these."""
    waiting, groups, count = [("", 0, root)], set(), 0
    while waiting:
        inside, depth, group = waiting.pop()
        links: list[tuple[bytes, int, int]] = []
        group.links.iterate(lambda name, info, to=links: _note(to, name, info), info=True)
        count += len(links)
        if count > _LINKS or depth > _DEPTH:
            raise UserError(f"'{path}' holds more than {_LINKS} objects, or groups in groups {_DEPTH} deep; give a simpler file.")
        for link, kind, header in links:
            name = f"{inside}{link.decode(errors='replace')}"
            if kind == h5py.h5l.TYPE_SOFT:
                continue
            if kind != h5py.h5l.TYPE_HARD:
                raise UserError(f"'{path}': /{name} is a link to another file; copy what it leads to into the file.")
            if not intact(raw, header):
                raise UserError(
                    f"'{path}': the mappings of /{name} are damaged (a checksum differs); copy the file again, or use another."
                )
            item = h5py.h5o.open(group, link)
            if isinstance(item, h5py.h5g.GroupID):
                address = h5py.h5o.get_info(item).addr
                if address not in groups:
                    groups.add(address)
                    waiting.append((f"{name}/", depth + 1, item))
            else:
                yield name, item


def _note(links: list[tuple[bytes, int, int]], name: bytes, info: h5py.h5l.LinkInfo) -> bool | None:
    """Take down a link, its kind and the address that it leads to; end the listing where there are far too many."""
    links.append((name, info.type, info.u))
    return True if len(links) > _LINKS else None


def _check(what: str, path: str | Path, item: h5py.h5d.DatasetID, virtual: bool) -> None:
    """Raise UserError where an array's values are in other files, or cannot all be in this one."""
    made = item.get_create_plist()
    if made.get_layout() == h5py.h5d.VIRTUAL:
        # Nothing else may be asked of it: its shape alone can open what it leads to.
        sources = {made.get_virtual_filename(i) for i in range(made.get_virtual_count())}
        parts = all(_PART.fullmatch(source) for source in sources)
        if parts and not virtual:
            raise UserError(f"'{path}' is a checkpoint; give a run file or a data file.")
        if not parts:
            raise UserError(f"{what} takes its values from other files; copy them into the file.")
        return
    if made.get_external_count():
        raise UserError(f"{what} is stored in another file; copy its values into this one.")
    claimed = prod(item.get_space().get_simple_extent_dims() or (0,)) * item.get_type().get_size()
    stored = item.get_storage_size()
    if claimed > max(_SMALL, _EXPANSION * stored) or stored > max(_SMALL, os.stat(path).st_size):
        raise UserError(f"{what} claims {claimed:,} bytes, of which the file holds {stored:,}; it is damaged or was never written.")
