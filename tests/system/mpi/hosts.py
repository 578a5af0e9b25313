"""Several hosts on one machine: namespaces with their own network, /dev/shm, host name and processes, joined by a bridge.

The bridge lies in a namespace of its own, the front end, where launchers run. So nothing here has a name in the machine's own
network, sessions cannot meet, and all of it vanishes with the first process of each namespace, which ends with this one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")
# A host that never gets ready must not hold up the tests.
_PATIENCE = 20
_RSH = """#!/bin/sh
# What launchers take for ssh: [options] HOST WORDS...
while case $1 in -*) true ;; *) false ;; esac; do
    case $1 in -o | -p | -l | -i | -F) shift ;; esac
    shift
done
host=$1
shift
exec nsenter -t "$(cat "{folder}/$host.pid")" -n -u -i -m -p --wd="$PWD" -- /bin/sh -c "$*"
"""
_FIRST = """set -e
hostname {name}
ip link set lo up
mount -t tmpfs shm /dev/shm
mount -t tmpfs local "{folder}/local"
mount --bind "{folder}/hosts" /etc/hosts
echo ready
read -r _ || true
"""


class NoHosts(Exception):
    """This machine or this user cannot make hosts; the message says what failed."""


class Hosts:
    """Hosts h1 .. hN at 10.77.0.1 .. N; `close` ends every process on them.

    Attributes
    ----------
    names
        h1 .. hN.
    local
        A folder that is another one on every host; all other files are common.
    """

    def __init__(self, n: int) -> None:
        if os.getuid() != 0:
            raise NoHosts("virtual hosts need root")
        missing = [tool for tool in TOOLS if not shutil.which(tool)]
        if missing:
            raise NoHosts(f"virtual hosts need {', '.join(missing)}")
        self.names = [f"h{i}" for i in range(1, n + 1)]
        self.folder = Path(tempfile.mkdtemp(prefix="dbnet-hosts-"))
        self.local = self.folder / "local"
        self._holders: list[subprocess.Popen[bytes]] = []
        self._pids: dict[str, int] = {}
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        self.local.mkdir()
        known = [f"10.77.0.{i} {name}" for i, name in enumerate(self.names, 1)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, "10.77.0.254 front", ""]))
        rsh = self.folder / "rsh"
        rsh.write_text(_RSH.format(folder=self.folder))
        rsh.chmod(0o755)
        # Launchers look for the hosts' first processes from the front end, which therefore sees all of the machine's.
        self._hold("front")
        bridge = ("ip link add name joint type bridge", "ip addr add 10.77.0.254/24 dev joint", "ip link set joint up")
        for command in bridge:
            self._on("front", command)
        for i, name in enumerate(self.names, 1):
            self._hold(name, "--pid", "--fork", "--kill-child", "--mount-proc")
            self._on("front", f"ip link add name to-{name} type veth peer name eth0 netns {self._pids[name]}")
            self._on("front", f"ip link set to-{name} master joint up")
            self._on(name, f"ip addr add 10.77.0.{i}/24 dev eth0")
            self._on(name, "ip link set eth0 up")

    def _hold(self, name: str, *more: str) -> None:
        """Start the process that keeps a host's namespaces alive, until this process lets go of its input."""
        words = ["unshare", "--net", "--uts", "--ipc", "--mount", "--propagation", "private", *more]
        holder = subprocess.Popen(
            [*words, "bash", "-c", _FIRST.format(name=name, folder=self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._holders.append(holder)
        if holder.stdout.readline() != b"ready\n":
            holder.wait(_PATIENCE)
            raise NoHosts(f"virtual hosts: {holder.stderr.read().decode().strip()}")
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        self._pids[name] = int(children[0]) if more else holder.pid
        (self.folder / f"{name}.pid").write_text(str(self._pids[name]))

    def _on(self, name: str, command: str) -> None:
        """Run a command in the network of one host."""
        words = ["nsenter", "-t", str(self._pids[name]), "-n", *command.split()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE)
        if done.returncode:
            raise NoHosts(f"virtual hosts: {command}: {done.stderr.strip()}")

    def cut(self, name: str) -> None:
        """Cut a host's link: what is sent to it or from it is lost."""
        self._on("front", f"ip link set to-{name} down")

    def join(self, name: str) -> None:
        """Mend a host's link; afterwards it carries, both ways."""
        self._on("front", f"ip link set to-{name} up")
        # Who was looked for while the link was down is not found for some seconds more.
        for host in ("front", *self.names):
            self._on(host, "ip neigh flush all")
        until(lambda: self._reaches_front(name), _PATIENCE, f"the link of {name} carries")

    def _reaches_front(self, name: str) -> bool:
        """Return whether the front end answers a host: it refuses, since nobody listens there."""
        words = ["nsenter", "-t", str(self._pids[name]), "-n", "bash", "-c", "exec 3<>/dev/tcp/10.77.0.254/9"]
        tried = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE, env={**os.environ, "LC_ALL": "C"})
        return "refused" in tried.stderr

    def processes(self, name: str, words: str = "") -> list[int]:
        """Return the living processes on a host but its first one, by their numbers on the machine.

        Parameters
        ----------
        words
            Only those whose command line has these words.
        """
        mine, found = os.readlink(f"/proc/{self._pids[name]}/ns/pid"), []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                there = os.readlink(folder / "ns" / "pid") == mine and int(folder.name) != self._pids[name]
                # Without a command line it has ended and nobody has asked for its exit code yet.
                called = (folder / "cmdline").read_text().replace("\0", " ") if there else ""
            except OSError:
                # It has ended meanwhile.
                continue
            if called and words in called:
                found.append(int(folder.name))
        return found

    def sweep(self) -> None:
        """Kill every process on the hosts, remove their shared memory and mend all links."""
        for name in self.names:
            for pid in self.processes(name):
                with _gone_is_fine():
                    os.kill(pid, signal.SIGKILL)
            self.join(name)
            words = ["nsenter", "-t", str(self._pids[name]), "-m", "find", "/dev/shm", str(self.local), "-mindepth", "1", "-delete"]
            subprocess.run(words, check=True, timeout=_PATIENCE)

    def launcher(self, vendor: str, mpirun: Path, ranks: int | Sequence[int], options: Sequence[str] = ()) -> list[str]:
        """Return the words that start `ranks[i]` ranks on the i-th host, or, where `ranks` is a number, that many in turns."""
        turns = isinstance(ranks, int)
        n, shares = (ranks, [1] * len(self.names)) if turns else (sum(ranks), ranks)
        front = ["nsenter", "-t", str(self._pids["front"]), "-n", "-u", "-i", "-m", "--wd=.", "--", str(mpirun)]
        where = ",".join(f"{name}:{share}" for name, share in zip(self.names, shares, strict=True))
        if vendor == "openmpi":
            agent = ["--prtemca", "plm", "ssh", "--prtemca", "plm_ssh_agent", str(self.folder / "rsh")]
            how = ["--bind-to", "none", "--map-by", "node:OVERSUBSCRIBE" if turns else "slot", "--mca", "osc", "rdma", *agent]
            return [*front, *how, "--host", where, *options, "-n", str(n)]
        agent = ["-launcher", "ssh", "-launcher-exec", str(self.folder / "rsh")]
        return [*front, *agent, "-hosts", where, *options, "-n", str(n)]

    def surroundings(self, vendor: str) -> dict[str, str]:
        """Return the environment variables of ranks on the hosts."""
        tcp = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"} if vendor == "mpich" else {}
        return {**tcp, "TMPDIR": str(self.local)}

    def close(self) -> None:
        """End everything on the hosts, and the hosts."""
        for holder in self._holders:
            holder.stdin.close()
        for holder in self._holders:
            try:
                holder.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                holder.kill()
                holder.wait()
            holder.stdout.close()
            holder.stderr.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


def until(true: Callable[[], object], seconds: float, what: str) -> None:
    """Look every 50 ms whether something has become true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)
