"""The command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbnet import __version__, interrupt, mpi
from dbnet.errors import Stopped, UserError, own_line, reading, refuse_taken
from dbnet.usage import Parser, unread

STOPPED = 85


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code.

    0 success, 2 something the user can mend, 1 a failure, 85 stopped by a signal with a checkpoint to go on from, 130 interrupted.
    """
    try:
        with interrupt.at_once():
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
    except mpi.Refused:
        return 2
    except UserError as error:
        print(f"dbnet: {error}", file=sys.stderr)
        if isinstance(error, Stopped) and error.broken:
            mpi.leave(mpi.exit_code(error))
        return mpi.exit_code(error)
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


def _command(commands: Any, name: str, function: Any, help_text: str, description: str = "") -> argparse.ArgumentParser:
    made = commands.add_parser(
        name, help=help_text, description=description or help_text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.set_defaults(run=function)
    return made


def _run_file(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_file", metavar="RUN.toml", help="the run file; examples are in jobs/")
    made.add_argument(
        "overrides", nargs="*", default=[], metavar="table.key=value",
        help="changes, for example topology.replicas=4; 'table.key=' takes a key out of the run file",
    )  # fmt: skip


# --- train, plan --------------------------------------------------------------------------------------------------------------


def _train(commands: Any) -> None:
    made = _command(
        commands,
        "train",
        train,
        "train as a run file says",
        "Train as a run file says.\n\n  mpirun -n 5 dbnet train jobs/digits.toml      one rank per role\n"
        "  dbnet train jobs/digits.toml                  all roles in this process, taking turns\n\n"
        "Outputs go to run.folder: NAME.h5 (the run file), NAME.checkpoint.h5 (a link into NAME.checkpoints), NAME.png.\n"
        "A name that is taken gets a number.",
    )
    _run_file(made)
    made.add_argument(
        "--resume", nargs="?", const="", metavar="CHECKPOINT",
        help="go on from a checkpoint; without a path from the newest whole one of this name; auto: that, or begin afresh",
    )  # fmt: skip
    made.add_argument("--marker", metavar="FILE", help="where to write 'running PID HOST' and in the end 'ended CODE', for scripts")
    made.add_argument("--quiet", action="store_true", help="print nothing but errors")


@interrupt.at_once()
def train(options: argparse.Namespace) -> int:
    from dbnet import run
    from dbnet.marker import Marker
    from dbnet.starting import guard

    code = 0

    def conclude(done: Any) -> int:
        nonlocal code
        code = _finished(options, done) if done.finished else _stopped(options, done)
        if done.losses:
            print(done.losses, flush=True)
        marker.ended(code)
        return code

    interrupt.leave_group()
    guardian = guard(options.run_file, options.overrides)
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        marker = Marker(options.marker if comm is None or comm.rank == 0 else None)
        ways = {"comm": comm, "quiet": options.quiet, "marker": marker, "guardian": guardian, "conclude": conclude}
        with marker.failing():
            done = run.train(options.run_file, options.overrides, resume=options.resume, **ways)
    if done is not None and done.losses:
        mpi.leave(code)
    if code and comm is not None:
        mpi.finalize()
    return code


def _stopped(options: argparse.Namespace, done: Any) -> int:
    """Say how to go on after a signal, or after the loss of every replica."""
    why = "Stopped by a signal" if done.stopped else "Every replica is lost"
    if done.unsaved:
        print(f"dbnet: {why}, but no checkpoint could be written ({done.unsaved}).", file=sys.stderr, flush=True)
        return 1
    again = f"{mpi.started()} {shlex.join([options.run_file, *options.overrides])}"
    print(f"dbnet: {why}; checkpoint {done.checkpoint}. Go on with: {again} --resume auto", file=sys.stderr, flush=True)
    return STOPPED if done.stopped else 1


def _finished(options: argparse.Namespace, done: Any) -> int:
    """Draw the run's picture and say where the outputs are."""
    lines = [
        "Test accuracy  " + (f"{done.accuracy:.4f}" if done.accuracy == done.accuracy else "none: no labelled test set"),
        f"Run file       {done.run_file}",
        f"Checkpoint     {done.checkpoint if not done.unsaved else 'the last one could not be written'}",
    ]
    if done.picture is not None:
        from dbnet.plot import drawn

        lines.append(f"Picture        {drawn(done.run_file, done.picture)}")
    if not options.quiet:
        print("\n".join(lines), flush=True)
    if done.unsaved:
        newest = f"the newest is '{done.checkpoint}'" if done.checkpoint.exists() else "there is none"
        print(f"dbnet: The run has ended, but its last checkpoint could not be written: {newest}.", file=sys.stderr)
        return 1
    return 0


def _plan(commands: Any) -> None:
    made = _command(commands, "plan", plan, "show roles, ranges, bytes and memory of a run, without MPI")
    _run_file(made)
    made.add_argument("-n", type=int, metavar="N", help="number of ranks that will be started; checked against the run file")
    made.add_argument("--config", action="store_true", help="print the effective configuration as a run file instead")
    made.add_argument("--ranks", action="store_true", help="print just the number of ranks, for scripts")
    made.add_argument("--slurm", action="store_true", help="print a batch script for Slurm instead")
    made.add_argument("--nodes", type=int, metavar="N", help="--slurm: nodes; default: as few as have a core for each rank")
    made.add_argument("--cores", type=int, metavar="C", help="--slurm: cores of a node, shared by its ranks; default: one a rank")
    made.add_argument("--time", default="01:00:00", metavar="HH:MM:SS", help="--slurm: time limit (default: 01:00:00)")


def plan(options: argparse.Namespace) -> None:
    from dbnet import config as configuration
    from dbnet import plan, run, slurm

    # Scripts count the ranks; the run itself says the rest.
    config = configuration.load(options.run_file, options.overrides, *([lambda _: None] if options.ranks else []))
    if options.config:
        print(configuration.to_toml(config))
        return
    if options.ranks:
        print(config.topology.world)
        return
    ready = run.setup(config)
    if options.n is not None:
        plan.check_size(ready, options.n)
    if options.slurm:
        shape = {"nodes": options.nodes, "cores": options.cores, "time": options.time}
        print(slurm.script(ready, options.run_file, options.overrides, **shape), end="")
        return
    configuration.warn(*ready.doubts())
    print(plan.describe(ready).replace("RUN.toml", " ".join([options.run_file, *options.overrides])))


# --- evaluate, predict --------------------------------------------------------------------------------------------------------


def _use(commands: Any) -> None:
    made = _command(
        commands, "evaluate", evaluate, "loss and accuracy of a checkpoint on a data file; mpirun -n P cuts the network"
    )
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    made.add_argument("data", nargs="?", metavar="DATA.h5", help="data file; default: the one the run was trained on")
    made.add_argument("--part", default="test", help="train or test (default: test)")
    made.add_argument("--trust-modules", action="store_true", help="run the Python code of own modules that the checkpoint holds")
    made = _command(commands, "predict", predict, "write a checkpoint's predictions for a data file; mpirun -n P cuts the network")
    made.add_argument("checkpoint", metavar="CHECKPOINT", help="NAME.checkpoint.h5 of a run")
    made.add_argument("data", metavar="DATA.h5", help="HDF5 file with PART/x (labels are not needed)")
    made.add_argument("out", metavar="OUT", help=".csv (example, class), .npy (output units), .npz or .h5 (class and output units)")
    made.add_argument("--probabilities", action="store_true", help="write probabilities instead of the units before the softmax")
    made.add_argument("--part", default="test", help="group whose x is read (default: test)")
    made.add_argument("--trust-modules", action="store_true", help="run the Python code of own modules that the checkpoint holds")
    made.add_argument("--force", action="store_true", help="replace a file that is there")


def evaluate(options: argparse.Namespace) -> None:
    from dbnet import infer

    comm = mpi.world()
    with mpi.abort_on_error(comm):
        score, n = infer.evaluate(options.checkpoint, options.data, options.part, comm, options.trust_modules)
        if comm is None or comm.rank == 0:
            accuracy = "" if score.test_accuracy != score.test_accuracy else f", accuracy {score.test_accuracy:.4f}"
            print(f"{options.part}: {n} examples, loss {score.test_loss:.4f}{accuracy}")


def predict(options: argparse.Namespace) -> None:
    from dbnet import infer

    comm = mpi.world()
    with mpi.abort_on_error(comm):
        where = (options.checkpoint, options.data, options.part, options.out)
        done = infer.predict(*where, comm, options.force, options.trust_modules, probabilities=options.probabilities)
        if done is not None:
            print(done)


# --- data ---------------------------------------------------------------------------------------------------------------------


def _data(commands: Any) -> None:
    from dbnet.data import base
    from dbnet.registry import family

    layout = base.__doc__.split("\n\n", 1)[1].rstrip()
    made = commands.add_parser(
        "data", help="prepare a data file", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepare a data file (HDF5) from a known format.\n\n" + layout,
    )  # fmt: skip
    kinds = made.add_subparsers(dest="kind", required=True, metavar="FORMAT")
    for kind, member in sorted(family("data").items()):
        one = _command(kinds, kind, data, member.__doc__.split("\n")[0])
        for name, field in member.model_fields.items():
            flag = f"--{name.replace('_', '-')}"
            one.add_argument(
                flag, required=field.is_required(), default=field.default, help=field.description, metavar=name.upper()
            )
        one.add_argument("out", metavar="OUT.h5", help="the data file to write")
        one.add_argument("--force", action="store_true", help="replace a file that is there")


def data(options: argparse.Namespace) -> None:
    from dbnet.data.base import write
    from dbnet.inspect import describe
    from dbnet.registry import family, make

    refuse_taken(options.out, options.force)
    fields = family("data")[options.kind].model_fields
    source = make("data", {"kind": options.kind, **{name: getattr(options, name) for name in fields}}, "data")
    write(options.out, source.read(), options.force)
    print(f"{options.out}: {describe(options.out)}")


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
    from dbnet import config as configuration
    from dbnet import inspect

    if options.verify:
        sound, report = inspect.verify(options.file)
        print(report)
        return 0 if sound else 1
    show = inspect.modules if options.modules else inspect.describe
    print(configuration.to_toml(inspect.stored_config(options.file)) if options.config else show(options.file))
    return 0


def plot(options: argparse.Namespace) -> None:
    from dbnet.monitor import Run
    from dbnet.plot import draw

    run = Run(options.run_file)
    picture = options.picture or str(run.path.with_suffix(".png"))
    refuse_taken(picture, options.force)
    with reading(options.run_file, "it is damaged or not dbnet's"):
        draw(run, picture)
    print(picture)


def _bench(commands: Any) -> None:
    made = _command(
        commands, "bench", bench, "measure kernels, fetch, push, apply and whole steps, beside PyTorch where it is installed"
    )
    made.add_argument(
        "parts", nargs="*", metavar="PART", help="any of apply, layers, overhead, partitions, space, step, wire (default: all)"
    )
    made.add_argument("--out", default="bench.h5", metavar="OUT.h5", help="where the figures are stored (default: bench.h5)")
    made.add_argument("--repeat", type=int, default=7, metavar="N", help="repetitions of each measurement (default: 7)")


def bench(options: argparse.Namespace) -> None:
    from dbnet import bench

    bench.run(options.parts, Path(options.out), options.repeat)


if __name__ == "__main__":
    sys.exit(main())
