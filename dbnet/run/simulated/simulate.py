"""simulate(): load a configuration and a machine, prepare, play all roles in virtual seconds, say what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dbnet.checkpoint.format import link_of
from dbnet.comm.simulated.rest import next_look
from dbnet.core import config as configuration
from dbnet.core import jit
from dbnet.core.config import Config
from dbnet.core.errors import Lost, Stopped, UserError
from dbnet.monitor import runfile
from dbnet.monitor.display import Display
from dbnet.network.cost import Profile, load_profile
from dbnet.run import roles
from dbnet.run.outcome import Outcome, outcome
from dbnet.run.setup import Setup, setup
from dbnet.run.signals import Interrupt, hand_on
from dbnet.run.simulated.faults import gone_on_with
from dbnet.run.simulated.world import Simulation
from dbnet.shards.shard import Shard

_COORDINATOR_LOOKS = 0.25  # virtual seconds: as often as a row of progress falls due


class Simulated(NamedTuple):
    """What a simulated run has produced, and what it took.

    Attributes
    ----------
    outcome
        As of any run.
    seconds, spent
        Virtual seconds; processor seconds of this process.
    operations, events, sent
        One-sided operations; turns and arrivals; bytes from host to host.
    died
        How many replicas died, in words; nothing where none did.
    """

    outcome: Outcome
    seconds: float
    spent: float
    operations: int
    events: int
    sent: int
    died: str = ""


def simulate(
    source: str | Path | Mapping[str, Any] | Config,
    machine: str | Path | Profile,
    overrides: Iterable[str] = (),
    *,
    dry: bool = False,
    quiet: bool = False,
) -> Simulated:
    """Play a run in simulated time, in this process; the same seed gives the same run file, to the byte.

    A signal stops the run with a checkpoint, and is then handed on as by `dbnet.train`.

    Parameters
    ----------
    source
        Path of a configuration file (TOML), nested tables like those of one, or a configuration.
    machine
        Path of a machine file (TOML), or a profile.
    overrides
        Changes like "topology.replicas=4".
    dry
        Compute no gradients: times, bytes and staleness alone.
    quiet
        Print nothing but warnings.

    Raises
    ------
    UserError
        Something in the configuration, the machine file or the data is to be mended, or is not simulated; nothing has been written.
    Stopped
        Too many gradients were not finite, or the parameters have grown out of all bounds; the message is the diagnosis.
    Lost
        A rank waited in vain for longer than the run's deadline, or a machine died without which there is no run.
    """
    done = execute(source, machine, overrides, dry=dry, quiet=quiet)
    hand_on(done.outcome.signal)
    return done


def execute(
    source: str | Path | Mapping[str, Any] | Config,
    machine: str | Path | Profile,
    overrides: Iterable[str],
    *,
    dry: bool,
    quiet: bool,
) -> Simulated:
    """Do what `simulate` does, and hand no signal on: the outcome says which it was."""
    display = Display(quiet)
    ready = setup(configuration.load(source, overrides, display.warn))
    # Afterwards, since it may name layers and rules of the run's own modules.
    profile = machine if isinstance(machine, Profile) else load_profile(machine)
    refuse(ready, dry)
    if not dry:
        ready.check(None)
    if ready.topology.spares and profile.faults is None:
        display.warn("Nobody dies on this machine, since its file has no table 'faults': topology.spares is left out.")
        ready = replace(ready, topology=replace(ready.topology, spares=0))
    done = play(ready, profile, display, dry)
    if done.outcome.diagnosis:
        raise Stopped(done.outcome.diagnosis)
    return done


def refuse(ready: Setup, dry: bool) -> None:
    """Raise UserError where a run asks for what is not simulated."""
    method = ready.config.method
    if ready.config.record.schedule:
        raise UserError("Simulated time is the same again by itself; add record.schedule=false to the command.")
    if ready.config.run.threads not in (None, 1):
        raise UserError("Simulated time computes on one thread, to be the same on any machine; add run.threads=1 to the command.")
    if dry and method.receiver is not Shard:
        raise UserError(
            f"A dry run computes nothing, and method.kind = '{method.kind}' goes by what it computes; leave --dry out, or use "
            "method.kind = 'downpour'."
        )
    if dry and (ready.config.stop.accuracy is not None or ready.config.warmstart.accuracy is not None):
        raise UserError("A dry run has no accuracy to go by; take stop.accuracy and warmstart.accuracy out.")


def play(ready: Setup, profile: Profile, display: Display, dry: bool) -> Simulated:
    """Play all roles."""
    interrupt, topology = Interrupt(), ready.topology
    world = Simulation(ready, profile, dry, interrupt)
    working = range(topology.origin_rank(0, 0), topology.size)
    replicas = {rank: world.replica(rank) for rank in working}
    runfile.make_folder(ready.config)
    # What rests counts its looks out (`comm.simulated.rest`).
    jit.warm(ready.config.model.dtype, {next_look.__module__}.__contains__)
    if not dry:
        # With more threads BLAS would sum in another order on another number of cores.
        roles.use(ready.config, 1)
    # A date would make two files differ that are the same.
    about = {"mpi": "none, simulated time", "hosts": ["simulated"], "world": "simulated", "dry": dry, "started": "in no time"}
    unused = {"faults"} if profile.faults is None else None
    # By the machine's time rows would lie in other blocks each time.
    ready, record = roles.open_record(ready, {**about, "machine": profile.model_dump(exclude=unused)}, lambda: world.time.now)
    display.say(f"Simulated time{', nothing is computed' if dry else ''}: {topology.words()}. {profile.about}".rstrip())
    now = {"host": "simulated", "offset": 0, "error": 0}, lambda: round(1e9 * world.time.now)
    trace = roles.open_trace(ready, range(topology.size), *now, display.warn, threads=True, free=True)
    coordinator = roles.coordinator(ready, world, record, display)
    players, servers = {0: roles.traced(trace, 0, coordinator)}, {0: _COORDINATOR_LOOKS}
    for shard in range(topology.shards):
        rank = topology.shard_rank(shard)
        server = roles.server(ready, world, shard, world.receiver(shard))
        players[rank] = roles.traced(trace, rank, server)
        if trace is None and ready.config.method.receiver is Shard:
            world.time.settled[rank] = server.settled
        servers[rank] = ready.config.run.deadline / 4
    # Layers take no virtual time.
    workers = {rank: roles.worker(ready, world, rank, replica) for rank, replica in replicas.items()}
    players |= {rank: roles.traced(trace, rank, worker, by_layer=False) for rank, worker in workers.items()}
    if world.faults is not None:
        players = world.faults.begin(coordinator, players)
        if doubt := world.faults.doubt(world.longest):
            display.warn(doubt)
    began = time.process_time()
    try:
        with interrupt:
            world.time.play(players, servers, topology.name)
        if world.faults is not None:
            world.faults.conclude()
    except Lost as error:
        if world.faults is None:
            raise
        raise gone_on_with(error, link_of(ready.config)) from None
    finally:
        coordinator.close()
        if trace is not None:
            trace.close()
    spent = time.process_time() - began
    done = outcome(ready, coordinator, interrupt.by, None if dry else world.params())
    died = "" if world.faults is None else world.faults.words()
    return Simulated(done, coordinator.time.seconds, spent, world.wire.operations, world.time.events, world.wire.sent, died)
