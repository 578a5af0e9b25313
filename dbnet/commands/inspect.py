"""TODO."""

from __future__ import annotations

import argparse
from typing import Any

from dbnet.commands.base import _command
from dbnet.core.files import reading, refuse_taken

# --- inspect, plot, bench -----------------------------------------------------------------------------------------------------


def _look(commands: Any) -> None:
    made = _command(commands, "inspect", inspect, "say what is in a run file, a checkpoint or a data file")
    made.add_argument("file", metavar="FILE.h5", help="the file to describe")
    made.add_argument("--config", action="store_true", help="print the stored configuration as a run file that 'train' accepts")
    made.add_argument("--modules", action="store_true", help="print the own modules that are stored; nothing of them is run")
    made.add_argument("--verify", action="store_true", help="read all of a checkpoint and name what is damaged")
    made = _command(commands, "plot", plot, "draw loss, accuracy and staleness of a run file")
    made.add_argument("run_file", metavar="RUN.h5", help="a run file, also one that still grows")
    made.add_argument("picture", nargs="?", metavar="OUT.png", help="default: the run file's name with .png")
    made.add_argument("--force", action="store_true", help="replace a file that is there")


def inspect(options: argparse.Namespace) -> int:
    from dbnet.core import config as configuration
    from dbnet.monitor import inspect

    if options.verify:
        sound, report = inspect.verify(options.file)
        print(report)
        return 0 if sound else 1
    show = inspect.modules if options.modules else inspect.describe
    print(configuration.to_toml(inspect.stored_config(options.file)) if options.config else show(options.file))
    return 0


def plot(options: argparse.Namespace) -> None:
    from dbnet.monitor.plot import draw
    from dbnet.monitor.results import Run

    run = Run(options.run_file)
    picture = options.picture or str(run.path.with_suffix(".png"))
    refuse_taken(picture, options.force)
    with reading(options.run_file, "it is damaged or not dbnet's"):
        draw(run, picture)
    print(picture)
