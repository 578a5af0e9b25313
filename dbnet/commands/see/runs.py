"""`dbnet inspect`, `dbnet plot` and `dbnet runs`: look at what is in a file, draw runs, list them."""

from __future__ import annotations

import argparse
import json

from dbnet.commands.base import add_force
from dbnet.core import config as configuration
from dbnet.core.errors import UserError
from dbnet.core.files import reading, refuse_taken
from dbnet.monitor import inspect
from dbnet.monitor.live import watch
from dbnet.monitor.many.frames import Runs, find, listing
from dbnet.monitor.pictures.against import AXES
from dbnet.monitor.pictures.figure import chosen, draw, form
from dbnet.monitor.pictures.panels import PANELS
from dbnet.monitor.pictures.report import report
from dbnet.monitor.results import Run
from dbnet.monitor.tables import TABLES


def inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.h5", help="the file to describe")
    parser.add_argument("--config", action="store_true", help="print the stored configuration as TOML that 'train' accepts")
    parser.add_argument("--modules", action="store_true", help="print the own modules that are stored; nothing of them is run")
    parser.add_argument("--verify", action="store_true", help="read all of a checkpoint and name what is damaged")
    parser.add_argument("--json", action="store_true", help="print what is in the file as JSON, for scripts")


def plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw runs.\n\n  dbnet plot runs/digits.h5                                  everything of one run: runs/digits.png\n"
        "  dbnet plot runs/*.h5 --against epochs --out compare.svg    several, in one picture\n\n"
        "Runs that differ in nothing but the seed are one curve: their mean, in a band from the least to the largest, which\n"
        "ends where the shortest of them ends. Checkpoints among the files are passed over."
    )
    parser.add_argument("run_files", nargs="+", metavar="RUN.h5", help="run files, also ones that still grow")
    parser.add_argument(
        "--what",
        metavar="WHAT,...",
        default="",
        help=f"default: loss,accuracy,staleness; of {', '.join(PANELS)}, "
        "and of vectors what the loss says besides: mean_squared_error, R2",
    )
    parser.add_argument("--against", metavar="AXIS", default="seconds", help=f"one of {', '.join(AXES)} (default: seconds)")
    parser.add_argument("--out", metavar="FILE", help="ends in .png, .svg or .pdf; default for one run: its name with .png")
    parser.add_argument("--each", action="store_true", help="a curve for each run, no bands")
    add_force(parser)


def runs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "List the runs of a folder: a line per run, in the end what differs.\n\n"
        "accuracy: the last and the best on the test set, or on the validation set where that is evaluated; of vectors the loss\n"
        "and what it says besides. staleness: its mean over all updates; ended: finished, stopped by a signal, running, or broken\n"
        "off (it was killed or gave up: it wrote nothing for run.deadline + 30 s)."
    )
    parser.add_argument("folder", nargs="*", default=["runs"], metavar="FOLDER", help="folders or run files (default: runs)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON, for scripts")


def report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a report of runs: one page of HTML with pictures, results, settings, and what to look at; it needs no network."
    )
    parser.add_argument("run_files", nargs="+", metavar="RUN.h5", help="run files, also ones that still grow")
    parser.add_argument("--out", metavar="FILE.html", help="default for one run: its name with .html")
    parser.add_argument(
        "--against",
        metavar="AXIS",
        help=f"of the curves: one of {', '.join(AXES)} (default: seconds, of runs in one process epochs)",
    )
    add_force(parser)


def run_report(options: argparse.Namespace) -> None:
    paths = find(options.run_files)
    if options.out is None and len(paths) > 1:
        raise UserError("Where shall the report of several runs go? Give --out FILE.html.")
    out = options.out or str(paths[0].with_name(paths[0].name.removesuffix(".h5") + ".html"))
    refuse_taken(out, options.force)
    with reading(", ".join(map(str, paths)), "it is damaged or not dbnet's"):
        report(paths, out, options.against)
    print(out)


def watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show a run while it goes on, from another terminal; Ctrl-C ends the look and not the run."
    parser.add_argument("run_file", metavar="RUN.h5", help="the run file of a run that goes on, or has ended however")
    parser.add_argument("--once", action="store_true", help="show where it stands and end; so it is where no terminal is")


def run_watch(options: argparse.Namespace) -> int:
    try:
        with reading(options.run_file, "it is damaged or not dbnet's"):
            watch(options.run_file, options.once)
    except KeyboardInterrupt:
        return 0
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    if options.verify:
        sound, report = inspect.verify(options.file)
        print(report)
        return 0 if sound else 1
    if options.json:
        print(json.dumps(inspect.facts(options.file), indent=1))
        return 0
    show = inspect.modules if options.modules else inspect.describe
    print(configuration.to_toml(inspect.stored_config(options.file)) if options.config else show(options.file))
    return 0


def run_plot(options: argparse.Namespace) -> None:
    paths = find(options.run_files)
    if options.out is None and len(paths) > 1:
        raise UserError("Where shall the picture of several runs go? Give --out FILE.png (or .svg, .pdf).")
    words = [word.strip() for word in options.what.split(",") if word.strip()]
    unread = set() if "lateness" in words or options.against == "gradients" else {"events"}
    runs = [Run(path, set(TABLES) - unread) for path in paths]
    what = chosen(words, runs)
    picture = options.out or str(paths[0].with_suffix(".png"))
    form(picture)
    refuse_taken(picture, options.force)
    with reading(paths[0] if len(paths) == 1 else ", ".join(map(str, paths)), "it is damaged or not dbnet's"):
        draw(runs, picture, what, options.against, options.each)
    print(picture)


def run_runs(options: argparse.Namespace) -> None:
    # Of many a shell has given the checkpoints, too.
    words = options.folder if len(options.folder) == 1 else [w for w in options.folder if not w.endswith(".checkpoint.h5")]
    runs = Runs([path for word in words for path in find(word)])
    print(runs.table.to_json(orient="records", indent=1) if options.json else listing(runs))
