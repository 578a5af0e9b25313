"""`dbnet inspect` and `dbnet plot`: look at what is in a file."""

from __future__ import annotations

import argparse

from dbnet.commands.base import add_force
from dbnet.core import config as configuration
from dbnet.core.files import reading, refuse_taken
from dbnet.monitor import inspect
from dbnet.monitor.plot import draw
from dbnet.monitor.results import Run


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.h5", help="the file to describe")
    parser.add_argument("--config", action="store_true", help="print the stored configuration as a run file that 'train' accepts")
    parser.add_argument("--modules", action="store_true", help="print the own modules that are stored; nothing of them is run")
    parser.add_argument("--verify", action="store_true", help="read all of a checkpoint and name what is damaged")


def plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", metavar="RUN.h5", help="a run file, also one that still grows")
    parser.add_argument("picture", nargs="?", metavar="OUT.png", help="default: the run file's name with .png")
    add_force(parser)


def run_inspect(options: argparse.Namespace) -> int:
    if options.verify:
        sound, report = inspect.verify(options.file)
        print(report)
        return 0 if sound else 1
    show = inspect.modules if options.modules else inspect.describe
    print(configuration.to_toml(inspect.stored_config(options.file)) if options.config else show(options.file))
    return 0


def run_plot(options: argparse.Namespace) -> None:
    run = Run(options.run_file)
    picture = options.picture or str(run.path.with_suffix(".png"))
    refuse_taken(picture, options.force)
    with reading(options.run_file, "it is damaged or not dbnet's"):
        draw(run, picture)
    print(picture)
