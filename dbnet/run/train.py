"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dbnet.checkpoint.resume import choose
from dbnet.comm import mpi
from dbnet.comm.topology import Topology
from dbnet.core import config as configuration
from dbnet.core.config import Config
from dbnet.core.errors import Stopped
from dbnet.monitor.display import Display
from dbnet.run.outcome import Marker, Outcome
from dbnet.run.process import train_here
from dbnet.run.ranks import train_ranks
from dbnet.run.setup import Setup, setup
from dbnet.run.starting import Guardian, Starting


def execute(
    run_file: str | Path | Config,
    overrides: Iterable[str] = (),
    *,
    resume: str | None = None,
    comm: Any = None,
    quiet: bool = False,
    marker: Marker | None = None,
    guardian: Guardian | None = None,
    conclude: Callable[[Outcome], int] = lambda done: 0,
) -> Outcome | None:
    """Train as the run file says, on the ranks of `comm` or in this process.

    Parameters
    ----------
    run_file
        Path of a TOML file, or a configuration.
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

    display = Display(quiet or (comm is not None and comm.rank > 0))
    say = display.warn if comm is None or comm.rank == 0 else lambda sentence: None
    config = mpi.together(comm, lambda: configuration.load(run_file, overrides, say))
    marker, shared = marker or Marker(None), ()
    if comm is None:
        done = train_here(_prepare(config, choose(config, resume, display), display), display, marker)
    else:
        launch = f"dbnet train {run_file} {' '.join(overrides)}".strip()
        mpi.together(comm, lambda: Topology.of(config.topology).check(comm.size, launch))
        starting = mpi.together(comm, lambda: Starting(comm, Topology.of(config.topology), config.run))
        with starting.after(guardian):
            done, shared = train_ranks(_prepare_ranks(config, comm, resume, display, starting), comm, display, marker, starting)
    code = 0 if done is None else 2 if done.diagnosis else conclude(done)
    mpi.part(shared, config.run.deadline, code)
    if done is not None and done.diagnosis:
        raise Stopped(done.diagnosis, bool(done.losses))
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
        point = mpi.together(comm, lambda: choose(config, resume, display) if comm.rank == 0 else None)
        point = comm.bcast(point)
        return mpi.together(comm, lambda: _prepare(config, point, display, comm.rank))
