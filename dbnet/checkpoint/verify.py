"""Read a checkpoint through: bytes have their checksums, parts are those that the master speaks of, numbers are finite."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.checkpoint.format import TEXTS, part_of, text
from dbnet.checkpoint.reader import Checkpoint, resolved
from dbnet.core.errors import UserError
from dbnet.core.files import UNREADABLE, words
from dbnet.core.untrusted.opening import opened


def damage(path: str | Path) -> list[str]:
    """Read every byte of a checkpoint; return what is damaged: file, dataset, elements."""
    master = resolved(path)
    found = list(_damaged(master, dict.fromkeys((*TEXTS, "clock", "ranges", "replicas"), "")))
    if found:
        return found
    try:
        with opened(master, virtual=True) as file:
            if lacking := [name for name in text(file, "about")["registers"] if name not in file]:
                return [f"'{master}': /{name} is missing" for name in lacking]
            point = Checkpoint(master, parts=False)
            wanted = sorted((part_of(master, s).name, part.lo, part.hi) for s, part in enumerate(point.ranges) if part.size)
            strange = [name for name in point.registers if sorted(_sources(file, name)) != wanted]
    except (UserError, *UNREADABLE) as error:
        return [_said(master, error)]
    found += [f"'{master}': /{name} does not map the parts as /ranges says" for name in strange]
    for shard, part in enumerate(point.ranges):
        expected = dict.fromkeys(("clock", "range", "about"), "")
        flaws = list(_damaged(part_of(master, shard), {**expected, **(point.digests[shard] if part.size else {})}, point, shard))
        found += flaws
    return found


def _said(path: Path, error: BaseException) -> str:
    """Return what was wrong with a file."""
    return str(error).rstrip(".") if isinstance(error, UserError) else f"'{path}': {words(error)}"


def _sources(file: h5py.File, name: str) -> Iterator[tuple[str, int, int]]:
    for source in file[name].virtual_sources():
        (lo,), (last,) = source.vspace.get_select_bounds()
        yield source.file_name, lo, last + 1


def _damaged(path: Path, expected: dict[str, str], point: Checkpoint | None = None, shard: int = 0) -> Iterator[str]:
    """Yield what cannot be read of one file, or is not what was written.

    Parameters
    ----------
    expected
        SHA-256 of each dataset's values; nothing where none is known.
    point, shard
        Whose part it is, and which one.
    """
    if not path.exists():
        yield f"'{path}' is missing (copy a checkpoint with all its parts into one folder)"
        return
    sound = True
    try:
        with opened(path, virtual=point is None) as file:
            digests = {name: hashlib.sha256() for name in sorted({*expected, *file})}
            for name, digest in digests.items():
                for where in _damaged_elements(file, name, digest):
                    sound = False
                    yield f"'{path}': /{name}{where}"
        if sound and point is not None:
            point.look_for_part(shard)
        for name, wanted in expected.items() if sound else ():
            if wanted and digests[name].hexdigest() != wanted:
                yield f"'{path}': /{name} holds other values than were written (its SHA-256 differs)"
    except (UserError, *UNREADABLE) as error:
        yield _said(path, error)


def _damaged_elements(file: h5py.File, name: str, digest: Any) -> Iterator[str]:
    try:
        data = file[name]
        if data.is_virtual:
            return
        step = data.chunks[0]
        if data.id.get_num_chunks() != prod(-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True)):
            raise ValueError("some of its chunks were never written")
    except UNREADABLE as error:
        yield f": {words(error)}"
        return
    for lo in range(0, data.shape[0], step):
        hi = min(lo + step, data.shape[0])
        try:
            values = data[lo:hi]
            digest.update(values.tobytes())
        except UNREADABLE as error:
            yield f", elements {lo} .. {hi}: {words(error)}"
            continue
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            yield f", elements {lo} .. {hi}: element {lo + bad} is {values.reshape(-1)[bad]}"
