"""What tests that start whole programs share: the programs of an installation, and the processes that are left of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def programs(folder: Path) -> Path:
    """Make a folder with the programs that an installation has in its bin: dbnet, python, mpirun."""
    folder.mkdir()
    beside = Path(sys.executable).parent
    for name, command in (("dbnet", f"{sys.executable} -m dbnet"), ("python", sys.executable), ("mpirun", beside / "mpirun")):
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def processes(*marks: str, besides: Sequence[str] = ()) -> dict[int, str]:
    """Return the living processes that have all `marks` in their environment, but for some programs: command lines by pid."""
    out = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words, surroundings = ((place / name).read_bytes().decode(errors="replace") for name in ("cmdline", "environ"))
        except OSError:
            continue
        words = words.replace("\0", " ")
        if words and all(mark in surroundings for mark in marks) and not any(name in words for name in besides):
            out[int(place.name)] = words
    return out
