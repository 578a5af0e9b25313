"""`dbnet doctor`: whether this machine, or the hosts of a job, can run dbnet well; each line ok, slow or broken with the fix."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dbnet.comm import communicators, mpi
from dbnet.commands.bench.base import launch
from dbnet.commands.see.doctor import host, onesided, software
from dbnet.commands.see.doctor.base import BROKEN, OK, SLOW, Finding, shown, summary, together
from dbnet.core.errors import UserError

# Seconds that two ranks may take to start and to be tried.
_PATIENCE = 30


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look whether this machine can run dbnet well: Python, MPI and one-sided operations, cores, memory, BLAS, disk, Slurm.\n\n"
        "  dbnet doctor                          here; two ranks are started to try MPI\n"
        "  mpirun -n 8 dbnet doctor              on the hosts and ranks of a job; rank 0 prints\n"
        "  dbnet doctor --report > report.txt    the text for a bug report\n\n"
        "Exit code 1 where something is broken."
    )
    parser.add_argument("--folder", default=".", metavar="FOLDER", help="where files are tried (run.folder; default: here)")
    parser.add_argument("--report", action="store_true", help="print all that a bug report needs, as text to paste")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON, for scripts")


def run_doctor(options: argparse.Namespace) -> int:
    start, folder = time.monotonic(), Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"--folder: there is no folder '{folder}'.")
    comm = mpi.world()
    if comm is None:
        found = together([(socket.gethostname(), [*software.findings(folder), *host.findings(folder), *two_ranks()])])
        hosts = [socket.gethostname()]
    else:
        with mpi.abort_on_error(comm):
            lists = gathered(comm, folder)
        if comm.rank:
            return 0
        hosts = [name for name, _ in lists]
        found = together(lists)
    code = 1 if any(one.finding.state == BROKEN for one in found) else 0
    if options.json:
        print(json.dumps([{**one.finding._asdict(), "where": one.where} for one in found], indent=1))
        return code
    ranks = "" if comm is None else f" {comm.size} ranks on"
    head = f"dbnet doctor:{ranks} {', '.join(hosts) if len(hosts) < 5 else f'{len(hosts)} hosts'}"
    text = f"{head}\n{shown(found, len(hosts))}\n{summary(found)} ({time.monotonic() - start:.1f} s)"
    print(report(text) if options.report else text)
    return code


def gathered(comm: Any, folder: Path) -> list[tuple[str, list[Finding]]]:
    """Return, on rank 0, what the first rank of each host finds of it, and last, under no name, what is found of MPI."""
    node = communicators.node_of(comm)
    own = [*software.findings(folder), *host.findings(folder)] if node.rank == 0 else []
    node.Free()
    # Ranks that wait must not take the cores of those that measure.
    mpi.meet(comm)
    lists = comm.gather((socket.gethostname(), own))
    world = list(onesided.findings(comm))
    if comm.rank:
        return []
    out = [(name, found) for name, found in lists if found]
    # What concerns all is everybody's.
    return [(name, [*found, *world]) for name, found in out]


def two_ranks() -> Iterator[Finding]:
    """Start two ranks and yield what they find of MPI."""
    command = launch(2)
    if command is None:
        yield Finding("launcher", SLOW, "there is no mpirun beside this Python or in PATH",
                      "'jobs/install mpich' brings one; without one, runs in one process (dbnet train) work")  # fmt: skip
        return
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    process = subprocess.Popen(
        [*command, sys.executable, "-m", onesided.__name__], env={**os.environ, **allowed}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    start = time.monotonic()
    try:
        out, err = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        yield Finding("launcher", BROKEN, f"two ranks that {command[0]} started gave no answer within {_PATIENCE} s",
                      f"try: {' '.join(command)} hostname")  # fmt: skip
        return
    found = onesided.read(out)
    if process.returncode or not found:
        said = next((line for line in reversed(err.strip().splitlines()) if line.strip()), "no word of why")
        said = next((line.removeprefix("dbnet: ") for line in err.splitlines() if line.startswith("dbnet: ")), said)
        fix = "see that this mpirun belongs to the MPI of mpi4py, or make the environment anew: jobs/install mpich"
        yield Finding("launcher", BROKEN, f"two ranks could not be started by {command[0]}: {said[:300]}", fix)
        return
    yield Finding("launcher", OK, f"{command[0]} started two ranks, in {time.monotonic() - start:.1f} s all was tried")
    yield from found


def report(text: str) -> str:
    """Return the text of a bug report."""
    facts = software.facts()
    lines = [text, "", f"platform     {facts['platform']}, {facts['libc']}", "environment"]
    lines += [f"  {name}={value}" for name, value in facts["environment"].items()] or [
        "  nothing of MPI, BLAS, Slurm or dbnet is set"
    ]
    return "\n".join(["```", *lines, "```"])
