"""`dbnet simulate`: play a run in virtual seconds on a machine that a file describes; say how long it took there and here."""

from __future__ import annotations

import argparse
import sys

from dbnet.commands.base import add_configuration
from dbnet.monitor.pictures.figure import drawn
from dbnet.run import signals
from dbnet.run.simulated.simulate import Simulated, execute

# Of a run that a signal has stopped: with a checkpoint, as of `dbnet train`; a dry one leaves none.
STOPPED, INTERRUPTED = 85, 130


def simulate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Play a run in simulated time, in one process: the code of an MPI run, on a machine that a file describes.\n\n"
        "  dbnet simulate jobs/digits.toml --machine jobs/machines/present.toml topology.replicas=16\n\n"
        "Outputs are those of 'dbnet train'; their seconds are virtual ones. The same seed gives the same run file."
    )
    add_configuration(parser)
    parser.add_argument("--machine", required=True, metavar="MACHINE.toml", help="the machine; examples are in jobs/machines/")
    parser.add_argument("--dry", action="store_true", help="compute no gradients: times, bytes and staleness alone")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


@signals.at_once()
def run_simulate(options: argparse.Namespace) -> int:
    done = execute(options.configuration, options.machine, options.overrides, dry=options.dry, quiet=options.quiet)
    out = done.outcome
    if not options.quiet:
        print("\n".join(_said(done, options.dry)), flush=True)
    if out.unsaved:
        print(f"dbnet: The run has ended, but its last checkpoint could not be written ({out.unsaved}).", file=sys.stderr)
        return 1
    if out.finished:
        return 0
    why = "Stopped by a signal" if out.stopped else "Every replica is lost"
    again = "" if options.dry else f"; begin from the checkpoint with run.start={out.checkpoint}"
    print(f"dbnet: {why}{again}.", file=sys.stderr)
    return 1 if not out.stopped else INTERRUPTED if options.dry else STOPPED


def _said(done: Simulated, dry: bool) -> list[str]:
    """Return what came of it, a line each."""
    rate = done.operations / max(done.spent, 1e-9)
    out, lines = done.outcome, []
    if not dry:
        lines += [out.result]
    lines += [
        f"Time           {done.seconds:,.3f} virtual s in {done.spent:,.1f} s of this processor",
        f"Moved          {done.operations:,} one-sided operations, {rate:,.0f} a second; {done.sent / 1e9:,.3f} GB between hosts",
        f"Run file       {out.run_file}",
    ]
    if not dry:
        lines += [f"Checkpoint     {out.checkpoint}"]
    if out.picture is not None and not dry:
        lines += [f"Picture        {drawn(out.run_file, out.picture)}"]
    if done.died:
        lines += [f"Died           {done.died}", *out.lost.splitlines()]
    return lines
