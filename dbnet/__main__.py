"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dbnet.comm import mpi
from dbnet.commands.bench.command import _bench
from dbnet.commands.data import _data
from dbnet.commands.evaluate import _use
from dbnet.commands.inspect import _look
from dbnet.commands.plan import _plan
from dbnet.commands.train import _train
from dbnet.commands.usage import Parser, unread
from dbnet.core import errors
from dbnet.core.errors import Stopped, UserError, own_line
from dbnet.core.version import __version__
from dbnet.run import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    0 success, 2 something the user can mend, 1 a failure, 85 stopped by a signal with a checkpoint to go on from, 130 interrupted.
    """
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
    """Return the parser of all commands."""
    top = Parser(
        prog="dbnet", description="DistBelief over MPI: Downpour SGD with model-parallel replicas and parameter shards.",
        epilog="Run 'dbnet COMMAND --help' for a command's options.",
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"dbnet {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train(commands)
    _plan(commands)
    _use(commands)
    _data(commands)
    _look(commands)
    _bench(commands)
    return top


if __name__ == "__main__":
    sys.exit(main())
