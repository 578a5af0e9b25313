"""The door: parse, call one command, turn an exception into an exit code.

A command's file is imported when the command is called: help and wrong words cost nothing, and a command just what it needs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from dbnet.comm import mpi
from dbnet.commands.usage import Parser, collect_seldom, unread
from dbnet.core import errors
from dbnet.core.errors import Stopped, UserError, own_line
from dbnet.core.version import __version__
from dbnet.run import signals

# Command -> what it does, in a line; its file in dbnet/commands, which holds COMMAND_arguments(parser) and run_COMMAND(options).
COMMANDS = {
    "train": ("train as a configuration says", "training.train"),
    "sweep": ("train every combination of values that is not there yet, and compare what came out", "training.sweep"),
    "replay": ("play a recorded run again in one process, and compare it to the bit", "replay.command"),
    "simulate": ("train in simulated time, on a machine that a file describes", "training.simulate"),
    "calibrate": ("measure this machine, for simulated time and predictions", "calibrate.command"),
    "plan": ("show roles, ranges, bytes and memory of a run, without MPI", "plan.command"),
    "evaluate": ("loss and accuracy of a checkpoint on a data file; mpirun -n P cuts the network", "evaluate"),
    "predict": ("write a checkpoint's predictions for a data file; mpirun -n P cuts the network", "evaluate"),
    "export": ("write a checkpoint's network or parameters for other programs: .onnx, .safetensors, .npz", "evaluate"),
    "data": ("prepare a data file", "data"),
    "inspect": ("say what is in a run file, a checkpoint or a data file", "see.runs"),
    "plot": ("draw runs, one or several: accuracy, loss, staleness, throughput, waiting", "see.runs"),
    "runs": ("list the runs of a folder: what differs, accuracy, seconds, staleness, how they ended", "see.runs"),
    "report": ("write a page about runs: results, pictures, settings, what to look at", "see.runs"),
    "trace": ("write a traced run as a timeline for Perfetto's viewer", "see.timeline"),
    "watch": ("show a run while it goes on, from another terminal", "see.runs"),
    "help": ("explain tables, layers, losses, methods, rules and formats with all of their options", "see.reference"),
    "check": ("check layers, losses, rules and methods of your own: gradients, cut = uncut, in place", "see.checks.command"),
    "doctor": (
        "look whether this machine or the hosts of a job can run dbnet well; what is slow or broken, and the fix",
        "see.doctor.command",
    ),
    "bench": ("measure kernels, fetch, push, apply and whole steps, beside PyTorch where it is installed", "bench.command"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    0 success, 2 something the user can mend, 1 a failure, 85 stopped by a signal with a checkpoint to go on from, 130 interrupted.
    """
    collect_seldom()
    try:
        with signals.at_once():
            options = parser().read(arguments)
    except SystemExit as end:
        if end.code and mpi.launched_size() > 1:
            # A launcher drops what the first rank has complained about if another one has left with an error before.
            mpi.meet(mpi.world())
        raise
    try:
        code = int(options.run(options) or 0)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return unread()
    except errors.Refused:
        return 2
    except UserError as error:
        print(f"dbnet: {error}", file=sys.stderr)
        if isinstance(error, Stopped) and error.broken:
            mpi.leave(errors.exit_code(error))
        return errors.exit_code(error)
    except MemoryError as error:
        print(f"dbnet: Not enough memory ({error}); 'dbnet plan' shows what each rank needs.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dbnet: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        print(own_line(error), end="", file=sys.stderr, flush=True)
        raise


def parser() -> Parser:
    """Return the parser of all commands; each takes in its own arguments when it is called."""
    top = Parser(
        prog="dbnet", description="DistBelief over MPI: Downpour SGD with model-parallel replicas and parameter shards.",
        epilog="Run 'dbnet COMMAND --help' for a command's options.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"dbnet {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (line, _) in COMMANDS.items():
        commands.add_parser(
            name, help=line, description=line, formatter_class=argparse.RawDescriptionHelpFormatter,
            arguments=lambda made, name=name: take_in(made, name),
        )  # fmt: skip
    return top


def take_in(made: Parser, name: str) -> None:
    """Import the file of a command and let it say what its arguments are."""
    file = importlib.import_module(f"dbnet.commands.{COMMANDS[name][1]}")
    getattr(file, f"{name}_arguments")(made)
    made.set_defaults(run=getattr(file, f"run_{name}"))


if __name__ == "__main__":
    sys.exit(main())
