"""Which checkpoint a run goes on from: the newest whole one of its name, whatever numbers its outputs got.

A run named NAME writes NAME, NAME-2, ... ; every checkpoint says when it was written and which name was asked for. They are read
through from the newest on, so what is taken is sound; a damaged one is passed over with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from dbnet.checkpoint.format import text
from dbnet.checkpoint.reader import resolved
from dbnet.checkpoint.verify import damage
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.core.files import UNREADABLE
from dbnet.core.untrusted.opening import opened

AUTO = "auto"


def choose(config: Config, wish: str | None, warn: Callable[[str], None]) -> str | None:
    """Return the path of the checkpoint to go on from, or None to begin afresh.

    Parameters
    ----------
    wish
        None: no checkpoint; "": the newest of this name; "auto": the same or none; else a path.
    warn
        Says that a damaged one is left out.

    Raises
    ------
    UserError
        There is none, or none that is whole.
    """
    if wish is None:
        return None
    if wish not in ("", AUTO):
        return _given(wish)
    found = candidates(config)
    for path in found:
        flaws = damage(path)
        if not flaws:
            return str(path)
        warn(f"The checkpoint '{path}' is damaged and left out: {flaws[0]}{_more(flaws)}.")
    if found:
        raise UserError(
            f"All {len(found)} checkpoints of '{config.run.name}' in '{config.run.folder}' are damaged; start without --resume."
        )
    if wish == AUTO:
        return None
    raise UserError(
        f"No checkpoint of a run named '{config.run.name}' in '{config.run.folder}'; give --resume a path, or start without it."
    )


def _given(path: str) -> str:
    flaws = damage(path) if is_checkpoint(path) else []
    if flaws:
        raise UserError(f"The checkpoint '{path}' is damaged: {flaws[0]}{_more(flaws)}; use an earlier one.")
    return str(resolved(path))


def is_checkpoint(path: str | Path) -> bool:
    """Return whether this is a checkpoint, as far as it can be read; what it is otherwise says whoever opens it."""
    try:
        with opened(path, virtual=True) as file:
            return "params" in file and "layout" in file
    except (UserError, *UNREADABLE):
        return False


def _more(flaws: list[str]) -> str:
    return f" (and {len(flaws) - 1} more)" if len(flaws) > 1 else ""


def candidates(config: Config) -> list[Path]:
    """Return the masters of all runs of this name, the last written first; simulated ones are none to go on from."""
    name = re.compile(re.escape(config.run.name) + r"(-\d+)?\.checkpoints")
    folders = [path for path in _list(Path(config.run.folder)) if name.fullmatch(path.name) and not _simulated(path)]
    masters = [path for folder in folders for path in _list(folder) if re.fullmatch(r"\d{6,}\.h5", path.name)]
    dated = [(written, path) for path in masters if (written := _written(path, config.run.name)) is not None]
    return [path for _, path in sorted(dated, reverse=True)]


def _list(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _simulated(folder: Path) -> bool:
    """Return whether the run file beside a folder of checkpoints says that the run was simulated."""
    try:
        with opened(folder.with_suffix(".h5"), growing=True) as file:
            return bool(file.attrs.get("world") == "simulated")
    except (UserError, *UNREADABLE):
        return False


def _written(path: Path, name: str) -> float | None:
    """Return when a checkpoint was written, as it says itself or else its file; None where another name was asked for."""
    try:
        with opened(path, virtual=True) as file:
            about = text(file, "about")
        return float(about["written"]) if about["name"] == name else None
    except (UserError, *UNREADABLE):
        return path.lstat().st_mtime
