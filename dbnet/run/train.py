"""train(): load a configuration, choose the checkpoint to go on from, prepare, play the roles, say what came of it.

Under MPI every stage is done together: either all ranks have come through it, or all leave with the sentence of the one that
failed. From the first collective call on, ranks give signs of life (`starting`), so that one that dies meanwhile hangs nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dbnet.checkpoint.resume import choose
from dbnet.comm import mpi
from dbnet.comm.topology import Topology
from dbnet.core import config as configuration
from dbnet.core.config import Config
from dbnet.core.errors import Stopped
from dbnet.monitor.display import Display
from dbnet.monitor.live import display_for
from dbnet.run.outcome import Marker, Outcome
from dbnet.run.process import train_here
from dbnet.run.ranks import train_ranks
from dbnet.run.setup import Setup, setup
from dbnet.run.signals import hand_on
from dbnet.run.starting import Guardian, Starting


def train(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Iterable[str] = (),
    *,
    resume: str | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train in this process, all roles taking turns: for notebooks and debuggers; repeatable to the bit.

    A signal stops the run with a checkpoint, and is then handed on to whoever had it before: SIGINT raises KeyboardInterrupt,
    SIGTERM ends the process, unless somebody takes it. Where this returns nevertheless the outcome is `stopped`.

    Parameters
    ----------
    source
        Path of a configuration file (TOML); tables like those in it, {"data": {"path": ...}, "model": {"layers": [...]}, ...};
        or a configuration, such as `dbnet.open_run(...).config`.
    overrides
        Changes like "topology.replicas=4", in a list.
    resume
        Path of a checkpoint to go on from; "" for the newest of this name, "auto" for that or none.
    quiet
        Print nothing but warnings.

    Returns
    -------
    Paths of the run file and the checkpoint, the last accuracy on `evaluate.part` (0 .. 1; NaN without one), the parameters
    [parameters].

    Raises
    ------
    UserError
        Something in the configuration or the data is to be mended: one sentence that says what. Nothing has been written.
    Stopped
        Too many gradients were not finite; the message is the diagnosis.
    """
    done = execute(source, overrides, resume=resume, quiet=quiet)
    if done.stopped and not quiet:
        print(f"Stopped by {done.signal}; checkpoint {done.checkpoint}. Go on with resume='auto'.", flush=True)
    hand_on(done.signal)
    return done


def execute(
    source: str | Path | Mapping[str, Any] | Config,
    overrides: Iterable[str] = (),
    *,
    resume: str | None = None,
    comm: Any = None,
    quiet: bool = False,
    marker: Marker | None = None,
    guardian: Guardian | None = None,
    conclude: Callable[[Outcome], int] = lambda done: 0,
) -> Outcome | None:
    """Train as the configuration says, on the ranks of `comm` or in this process.

    Parameters
    ----------
    source
        Path of a TOML file, nested tables, or a configuration.
    overrides
        Changes like "topology.replicas=4".
    resume
        Path of a checkpoint to go on from; "" for the newest of this name, "auto" for that or none.
    comm
        MPI's world communicator; None trains in this process.
    marker
        Where the coordinator says that training begins.
    guardian
        Is dismissed when ranks give signs of life.
    conclude
        Told on the coordinator when everything is done and saved; returns its exit code, whoever may be lost by then.

    Returns
    -------
    The outcome, on the coordinator; None on other ranks.

    Raises
    ------
    Stopped
        On the coordinator, when all ranks have ended: too many gradients were not finite. The message is the diagnosis.
    """

    display = display_for(quiet or (comm is not None and comm.rank > 0))
    say = display.warn if comm is None or comm.rank == 0 else lambda sentence: None
    config = mpi.together(comm, lambda: configuration.load(source, overrides, say))
    marker, shared = marker or Marker(None), ()
    if comm is None:
        done = train_here(_prepare(config, choose(config, resume, display.warn), display), display, marker)
    else:
        words = source if isinstance(source, str | Path) else "RUN.toml"
        launch = f"dbnet train {words} {' '.join(overrides)}".strip()
        mpi.together(comm, lambda: Topology.of(config.topology).check(comm.size, launch))
        starting = mpi.together(comm, lambda: Starting(comm, Topology.of(config.topology), config.run))
        with starting.after(guardian):
            done, shared = train_ranks(_prepare_ranks(config, comm, resume, display, starting), comm, display, marker, starting)
    code = 0 if done is None else 2 if done.diagnosis else conclude(done)
    mpi.part(shared, config.run.deadline, code)
    if done is not None and done.diagnosis:
        raise Stopped(done.diagnosis, bool(done.lost))
    return done


def _prepare(config: Config, point: str | None, display: Display, rank: int | None = None) -> Setup:
    """Return the run that goes on from `point`; all labels are looked at by one rank."""
    ready = setup(config, point, not rank)
    ready.check(rank)
    if ready.checkpoint is not None:
        display.say(f"Goes on from '{point}': {ready.checkpoint.seconds:.1f} s and {ready.checkpoint.steps} steps of training.")
    return ready


# --- MPI ----------------------------------------------------------------------------------------------------------------------


def _prepare_ranks(config: Config, comm: Any, resume: str | None, display: Display, starting: Starting) -> Setup:
    """Return the run; one rank reads the checkpoints through, and all take the same."""
    with starting.works():
        point = mpi.together(comm, lambda: choose(config, resume, display.warn) if comm.rank == 0 else None)
        point = comm.bcast(point)
        return mpi.together(comm, lambda: _prepare(config, point, display, comm.rank))
