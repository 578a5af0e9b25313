"""`dbnet train`: train on the ranks that a launcher started, or in this process; say where the outputs are, or how to go on."""

from __future__ import annotations

import argparse
import shlex
import sys

from dbnet.comm import mpi
from dbnet.commands.base import add_configuration
from dbnet.monitor.pictures.figure import drawn
from dbnet.run import signals, train
from dbnet.run.outcome import Marker, Outcome
from dbnet.run.starting import guard

STOPPED = 85


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train as a configuration says.\n\n  mpirun -n 5 dbnet train jobs/digits.toml      one rank per role\n"
        "  dbnet train jobs/digits.toml                  all roles in this process, taking turns\n\n"
        "Outputs go to run.folder: NAME.h5 (the run file), NAME.checkpoint.h5 (a link into NAME.checkpoints), NAME.png.\n"
        "A name that is taken gets a number."
    )
    add_configuration(parser)
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="go on from a checkpoint; without a path from the newest whole one of this name; auto: that, or begin afresh",
    )  # fmt: skip
    parser.add_argument(
        "--marker", metavar="FILE", help="where to write 'running PID HOST' and in the end 'ended CODE', for scripts"
    )
    parser.add_argument("--record", action="store_true", help="record the schedule, for 'dbnet replay': record.schedule=true")
    parser.add_argument(
        "--trace", action="store_true", help="trace what every rank does when, for 'dbnet trace': record.trace=true"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


@signals.at_once()
def run_train(options: argparse.Namespace) -> int:
    code = 0

    def conclude(done: Outcome) -> int:
        nonlocal code
        code = _finished(options, done) if done.finished else _stopped(options, done)
        if done.lost:
            print(done.lost, flush=True)
        if done.crashed:
            print("\n".join(f"dbnet: {line}" for line in done.crashed.split("\n")), file=sys.stderr, flush=True)
            # A run that was asked to stop is still to be gone on with.
            code = code or 1
        marker.ended(code)
        return code

    if options.record:
        options.overrides = [*options.overrides, "record.schedule=true"]
    if options.trace:
        options.overrides = [*options.overrides, "record.trace=true"]
    signals.leave_group()
    guardian = guard(options.configuration, options.overrides)
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        marker = Marker(options.marker if comm is None or comm.rank == 0 else None)
        ways = {"comm": comm, "quiet": options.quiet, "marker": marker, "guardian": guardian, "conclude": conclude}
        with marker.failing():
            done = train.execute(options.configuration, options.overrides, resume=options.resume, **ways)
    pictured = done is not None and done.finished and done.picture is not None
    lost = done is not None and bool(done.lost)
    if comm is not None and (code or pictured) and not lost:
        # Nobody waits for the picture: the others are free to go.
        mpi.finalize()
    if pictured:
        words = f"Picture        {drawn(done.run_file, done.picture)}"
        if not options.quiet:
            print(words, flush=True)
    if lost:
        mpi.leave(code)
    return code


def _stopped(options: argparse.Namespace, done: Outcome) -> int:
    """Say how to go on after a signal, after two crashes, or after the loss of every replica."""
    why = "Stopped by a signal" if done.stopped else "Every replica is lost"
    if done.repeated:
        why = f"Stopped, since two processes crashed alike ({done.repeated})"
    if done.unsaved:
        print(f"dbnet: {why}, but no checkpoint could be written ({done.unsaved}).", file=sys.stderr, flush=True)
        return 1
    again = f"{mpi.started()} {shlex.join([options.configuration, *options.overrides])}"
    print(f"dbnet: {why}; checkpoint {done.checkpoint}. Go on with: {again} --resume auto", file=sys.stderr, flush=True)
    return STOPPED if done.stopped and not done.repeated else 1


def _finished(options: argparse.Namespace, done: Outcome) -> int:
    """Say where the outputs are."""
    lines = [
        done.result,
        f"Run file       {done.run_file}",
        f"Checkpoint     {done.checkpoint if not done.unsaved else 'the last one could not be written'}",
    ]
    if not options.quiet:
        print("\n".join(lines), flush=True)
    if done.unsaved:
        newest = f"the newest is '{done.checkpoint}'" if done.checkpoint.exists() else "there is none"
        print(f"dbnet: The run has ended, but its last checkpoint could not be written: {newest}.", file=sys.stderr)
        return 1
    return 0
