"""`dbnet calibrate`: measure this machine, and write the file that `dbnet simulate` and `dbnet plan` take as --machine."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from threadpoolctl import threadpool_limits

from dbnet.comm import mpi
from dbnet.commands.base import add_force
from dbnet.commands.bench.base import launch
from dbnet.commands.calibrate import kernels, machine, ranks
from dbnet.commands.see.doctor.host import quota
from dbnet.core import config as configuration
from dbnet.core import jit
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken, writing
from dbnet.network.cost import Profile
from dbnet.run.setup import setup
from dbnet.shards.shard import Shard

# Seconds that three ranks may take to start and to be measured.
_PATIENCE = 300


class KernelCosts(NamedTuple):
    """[compute] as fitted, the networks that it was fitted to, and the runs' own."""

    rates: dict[str, Any]
    found: list[kernels.Timed]
    own: dict[str, kernels.Timed]


def calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure this machine, in a minute or two, and write what 'dbnet simulate' and 'dbnet plan' take as --machine.\n\n"
        "  dbnet calibrate here.toml                            kernels, a shard, one-sided operations (three ranks are started)\n"
        "  dbnet calibrate here.toml --run jobs/fashion.toml    and the very steps of a run's network\n"
        "  mpirun -n 6 dbnet calibrate cluster.toml             on the hosts of a job: also between hosts\n\n"
        "Do so while nobody else computes here."
    )
    parser.add_argument("out", nargs="?", default="machine.toml", metavar="OUT.toml", help="the file (default: machine.toml)")
    parser.add_argument(
        "--run", action="append", default=[], dest="runs", metavar="RUN.toml", help="a run whose network's own steps count"
    )
    add_force(parser)


def run_calibrate(options: argparse.Namespace) -> None:
    comm, out, began = mpi.world(), Path(options.out), time.monotonic()
    with mpi.abort_on_error(comm):
        mpi.together(comm, lambda: refuse_taken(out, options.force))
        cores = comm.gather((socket.gethostname(), sorted(os.sched_getaffinity(0)))) if comm is not None else None
        made: KernelCosts | None = None
        if comm is None or comm.rank == 0:
            made = _kernels(options.runs)
        if comm is not None:
            # Ranks that wait must not take the cores of the one that measures.
            mpi.meet(comm)
        _say("Real runs and one-sided operations of ranks.", comm)
        told, missing = (ranks.measure(comm), "") if comm is not None else _on_three()
        if made is None:
            return
        profile, text = _written(made, told, missing, cores)
        with writing(out, options.force) as part:
            part.write_text(text)
    print("\n".join(_said(profile)))
    print(f"Machine file   {out} ({time.monotonic() - began:.0f} s)")


def _say(words: str, comm: Any) -> None:
    if comm is None or comm.rank == 0:
        print(words, flush=True)


def _kernels(files: list[str]) -> KernelCosts:
    """Measure steps of networks: [compute], what it was fitted to, and the runs' own."""
    ready = [setup(configuration.load(path, ["topology.partitions=1"])) for path in files]
    for path, one in zip(files, ready, strict=True):
        if one.config.method.receiver is not Shard:
            raise UserError(
                f"'{path}' is of a batch method, whose passes have no steps; add --run with method.kind = 'downpour' in it."
            )
    threadpool_limits(limits=1, user_api="blas")
    jit.set_threads(1)
    for dtype in dict.fromkeys(["float32", *(one.config.model.dtype for one in ready)]):
        jit.warm(dtype)
    _say("Kernels: steps of networks of all kinds of layers, one thread.", None)
    found = list(kernels.trials())
    rates = kernels.fitted(found) | {"local": kernels.local(), "rules": kernels.rules()}
    own = {}
    for path, one in zip(files, ready, strict=True):
        entry = kernels.timed(one, 1.5)
        own[f"{Path(path).stem}, minibatch {entry.batch}"] = entry
    return KernelCosts(rates, found, own)


def _on_three() -> tuple[dict[str, Any] | None, str]:
    """Start three ranks; return what they found, or None and why they did not."""
    command = launch(ranks.RANKS)
    if command is None:
        return None, "there is no mpirun beside this Python or in PATH"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        words = [*command, sys.executable, "-m", ranks.__name__, str(out)]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE, env={**os.environ, **root})
        except subprocess.TimeoutExpired:
            raise UserError(f"Three ranks gave no answer within {_PATIENCE} s; 'dbnet doctor' says what is wrong.") from None
        if done.returncode or not out.exists():
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(f"Three ranks could not be measured ({said}); 'dbnet doctor' says what is wrong.")
        return json.loads(out.read_text()), ""


def _written(made: KernelCosts, told: dict[str, Any] | None, missing: str, cores: Any) -> tuple[Profile, str]:
    """Return the profile and its file."""
    rates, found, own = made
    here = socket.gethostname()
    names = cores or [(here, sorted(os.sched_getaffinity(0)))]
    mine = {core for name, some in names if name == here for core in some}
    together = sum(name == here for name, _ in names) if len({name for name, _ in names}) > 1 else 0
    host = machine.Host(here, max(1, int(min(len(mine), quota()))), together, kernels.lateness())
    profile = machine.profile(host, rates, found, told, own)
    off = kernels.misses(found, Profile.model_validate(profile.model_dump() | {"compute": {**rates, "apply": 1.0}, "large": None}))
    notes = [
        f"Measured by dbnet calibrate on {time.strftime('%Y-%m-%d')}, {mpi.library_version() if told else 'no MPI'}.",
        f"Steps of {len(found)} networks are within {100 * abs(off).max():.0f} % of what these rates say (median "
        f"{100 * sorted(abs(off))[len(off) // 2]:.0f} %); the spread of a measurement was {max(one.spread for one in found):.2f}.",
    ]
    return profile, machine.text(profile, machine.unmeasured(told, missing), notes)


def _said(made: Profile) -> list[str]:
    """Return the most important of a machine, a line each."""
    compute, host = made.compute, made.host
    kinds = ", ".join(f"{kind} {rate:g}" for kind, rate in compute.rates.items())
    lines = [
        f"Cores          {host.cores}",
        f"Kernels        dense {compute.rate:g} GFLOP/s{', ' if kinds else ''}{kinds}; {1e6 * compute.layer:.1f} us a layer",
        f"Step           {1e6 * compute.step:.1f} us beside its arithmetic; a turn {1e6 * host.turn:.1f} us",
        f"Shard          {compute.apply:.2f} GB/s, {1e6 * compute.slice:.1f} us a slice",
    ]
    for name, way in (("Inside", made.inside), ("Between", made.between)):
        words = f"{name + ' a host' if name == 'Inside' else name + ' hosts':<14}"
        lines.append(f"{words} {1e6 * way.latency:.2f} us, {way.bandwidth:.2f} GB/s; a call {1e6 * host.call:.1f} us")
    return lines + [f"Network        {one.about}: {1e3 * one.step:.3f} ms a step" for one in compute.measured]
