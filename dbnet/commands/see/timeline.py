"""`dbnet trace`: a traced run as a timeline for Perfetto's viewer, and what each rank spent its time on."""

from __future__ import annotations

import argparse
from pathlib import Path

from dbnet.commands.base import add_force
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken
from dbnet.monitor.trace.timeline import TraceView, table


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a run that was trained with --trace as a timeline: what every rank did when. Open it on https://ui.perfetto.dev\n"
        "(it stays in the browser). Also of a run that goes on, or was killed: every span that had ended is in it."
    )
    parser.add_argument("run_file", metavar="RUN.h5", help="the run file; the trace is the folder RUN.trace beside it")
    parser.add_argument("--out", metavar="FILE", help="default: RUN.pb")
    add_force(parser)


def run_trace(options: argparse.Namespace) -> None:
    run_file = Path(options.run_file)
    if run_file.suffix != ".h5":
        raise UserError(f"'{run_file}' is no run file; give RUN.h5.")
    out = Path(options.out) if options.out else run_file.with_suffix(".pb")
    refuse_taken(out, options.force)
    timeline = TraceView(run_file.with_suffix(".trace"))
    timeline.write(out, options.force)
    print("\n".join(table(timeline)))
    print(f"{timeline.spans:,} spans, {timeline.flows:,} flows from push to apply. {timeline.clocks}")
    print(out)
