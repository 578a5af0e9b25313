"""A private Slurm on this machine: munged, slurmctld, a slurmd per virtual node; as any user, in its own folder, on free ports."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from started import processes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> list[str]:
    """Return the programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """Virtual nodes n1 ... nN that all are this machine; `start` it, and `stop` it whatever happens."""

    def __init__(self, folder: Path, nodes: int, cores: int) -> None:
        self.folder, self.nodes = folder, nodes
        self.env = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        for part in ("state", "log", "munge", *(f"spool/n{n}" for n in range(1, nodes + 1))):
            (folder / part).mkdir(parents=True)
        (folder / "munge").chmod(0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = _free_ports(nodes + 1)
        name, user = socket.gethostname().split(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
        conf = _CONF.format(dir=folder, host=name, user=user, port=ports[0], nodes=nodes)
        for n in range(1, nodes + 1):
            conf += f"NodeName=n{n} NodeHostname={name} NodeAddr=127.0.0.1 Port={ports[n]} CPUs={cores} RealMemory=8000\n"
        (folder / "slurm.conf").write_text(conf)

    def start(self) -> None:
        munge, pid = self.folder / "munge", self.folder / "munged.pid"
        files = [f"--key-file={munge / 'key'}", f"--socket={munge / 'socket'}", f"--pid-file={pid}", f"--log-file={munge / 'log'}"]
        self._daemon("munged", "--force", *files, f"--seed-file={munge / 'seed'}", "--num-threads=2")
        # Clients must reach the socket, and munged wants its folder to be open then.
        munge.chmod(0o755)
        self._daemon("slurmctld", "-c")
        for n in range(1, self.nodes + 1):
            self._daemon("slurmd", "-N", f"n{n}")
        self.wait(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * self.nodes, "all nodes are idle", 30)

    def _daemon(self, *words: str) -> None:
        subprocess.run(words, env=self.env, check=True, timeout=30, stdout=subprocess.DEVNULL)

    def ask(self, *words: object) -> str:
        """Run one of Slurm's commands; return what it prints."""
        done = subprocess.run([*map(str, words)], env=self.env, capture_output=True, text=True, timeout=30, cwd=self.folder)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """Return a field of `scontrol show job`, like JobState."""
        words = self.ask("scontrol", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def wait(self, done: Callable[[], bool], what: str, seconds: float = 60, said: Callable[[], str] = str) -> None:
        """Ask again and again; fail, with what has been `said`, when it takes longer."""
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, f"not within {seconds} s: {what}\n{said()}"
            time.sleep(0.1)

    def left(self) -> dict[int, str]:
        """Return the processes of jobs that still run: those that have the folder in their environment and are no daemon."""
        return processes(str(self.folder), besides=("slurmd", "slurmctld", "slurmscriptd", "munged"))

    def stop(self) -> None:
        """End all jobs and daemons."""
        subprocess.run(
            ["scancel", "--signal=KILL", "--full", "--user", str(os.getuid())], env=self.env, capture_output=True, timeout=30
        )
        files = [*self.folder.glob("slurmd.*.pid"), *self.folder.glob("slurmctld.pid"), *self.folder.glob("munged.pid")]
        pids = [int(text) for path in files if (text := path.read_text().strip())]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        until = time.monotonic() + 10
        while any(Path(f"/proc/{pid}/exe").exists() for pid in pids) and time.monotonic() < until:
            time.sleep(0.05)
        for pid in pids:
            _kill(pid, signal.SIGKILL)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


_CONF = """ClusterName=dbnet
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job begins again when its old credential has expired: by default after two minutes.
AuthInfo=socket={dir}/munge/socket,cred_expire=5
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/log/slurmctld
SlurmdLogFile={dir}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
MpiDefault=none
KillWait=30
MinJobAge=3600
SlurmdTimeout=300
MailProg=/bin/true
RebootProgram=/bin/true
PartitionName=main Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""
