"""Runs whose schedule is recorded, and records of which something is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dbnet.run.train import execute
from dbnet.shards.schedule import log
from dbnet.shards.schedule.log import LogEntry, PartOfSchedule


def recorded(run_file: Path, *changes: str) -> Path:
    """Make a run of one epoch in this process and record it; return its run file."""
    return execute(run_file, ["record.schedule=true", "stop.epochs=1", "evaluate.epochs=1", *changes], quiet=True).run_file


def rewrite(path: Path, change: Callable[[list[LogEntry]], None], threads: int = 0, **machine: str) -> None:
    """Change the entries of a part, and what it says of its machine and threads."""
    part = PartOfSchedule(path)
    change(part.entries)
    about = {**part.about, "threads": threads or part.about["threads"], "machine": {**part.about["machine"], **machine}}
    entries = [LogEntry(log.ABOUT, json.dumps(about).encode()), *part.entries]
    data = b"".join(log._HEAD.pack(entry.kind, len(entry.content)) + entry.content for entry in entries)
    path.write_bytes(log._FORMAT + log.block(data))
