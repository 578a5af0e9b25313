"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Finished(NamedTuple):
    """What a command has left: its exit code and what it printed."""

    code: int
    out: str
    err: str
