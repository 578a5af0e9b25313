"""One host: cores and who may use them, processor, memory, its name, its disk, Slurm."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dbnet.comm.mpi import SHARED, shared_memory
from dbnet.commands.see.doctor.base import BROKEN, OK, SLOW, Finding, looked

_CGROUP, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_GIB = 2**30


def findings(folder: Path) -> Iterator[Finding]:
    """Yield what is found of this host; files are tried in `folder`."""
    looks = {
        "cores": _cores,
        "processor": _processor,
        "load": _load,
        "memory": _memory,
        "shared memory": _shared,
        "host name": _name,
        "open files": _files,
        "disk": lambda: _disk(folder.resolve()),
        "Slurm": _slurm,
    }
    for subject, look in looks.items():
        yield from looked(subject, look)


def quota() -> float:
    """Return how many cores' worth of time the control group allows; infinity where it has no limit."""
    out = float("inf")
    for line in _MINE.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            places = [_CGROUP / path.lstrip("/"), _CGROUP]
            limits = [(place / "cpu.max").read_text().split() for place in places if (place / "cpu.max").exists()]
        elif "cpu" in controllers.split(","):
            places = [root / path.lstrip("/") for root in (_CGROUP / controllers, _CGROUP / "cpu")] + [_CGROUP / "cpu"]
            limits = [[(place / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")] for place in places
                      if (place / "cpu.cfs_quota_us").exists()]  # fmt: skip
        else:
            continue
        out = min([out, *(int(most) / int(period) for most, period in limits if most not in ("max", "-1"))])
    return out


def _cores() -> Finding:
    mine, all_, limit = len(os.sched_getaffinity(0)), os.cpu_count() or 1, quota()
    said = f"{mine} of {all_} may be used"
    if limit < mine:
        fix = f"give whole cores (docker run --cpuset-cpus), or use so many: taskset -c 0-{max(0, int(limit) - 1)} dbnet ..."
        return Finding("cores", SLOW, f"{said}, but the container gets the time of {limit:.1f}: threads wait for each other", fix)
    return Finding("cores", OK, said)


def _processor() -> Finding:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines if ":" in line}
    name = fields.get("model name", platform.machine())
    have = set(fields.get("flags", fields.get("Features", "")).split())
    wide = [flag for flag in ("avx512f", "avx2", "fma", "asimd", "sve") if flag in have]
    said = f"{name}: {', '.join(wide) or 'no vector instructions that are known'}"
    if platform.machine() == "x86_64" and "avx2" not in have:
        return Finding(
            "processor", SLOW, said, "a virtual machine may hide AVX2 (choose the host's processor type); else this is an old one"
        )
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists() and governor.read_text().strip() == "powersave" and "intel_pstate" not in _driver():
        return Finding("processor", SLOW, f"{said}; governor powersave", "cpupower frequency-set -g performance")
    return Finding("processor", OK, said)


def _driver() -> str:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_driver")
    return path.read_text().strip() if path.exists() else ""


def _load() -> Finding:
    busy, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    said = f"{busy:.1f} processes wanted to run in the last minute, on {cores} cores"
    return Finding("load", OK if busy <= 1.2 * cores else SLOW, said, "others compute here: what is measured now varies; see 'top'")


def _memory() -> Finding:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    free, total = sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)
    said = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free; a rank takes about 0.2 GiB for Python alone"
    return Finding("memory", OK if free > _GIB else SLOW, said, "close other programs, or take a larger machine")


def _shared() -> Finding:
    free = shared_memory()
    if free is None:
        return Finding(
            "shared memory",
            SLOW,
            f"there is no {SHARED}",
            f"mount it (mount -t tmpfs shm {SHARED}): ranks of one host exchange through it",
        )
    fix = f"docker run --shm-size=1g, or mount -o remount,size=4g {SHARED}: windows of one host's ranks lie there"
    return Finding("shared memory", OK if free >= 256 << 20 else SLOW, f"{free / _GIB:.2f} GiB free in {SHARED}", fix)


def _name() -> Finding:
    name, start = socket.gethostname(), time.perf_counter()
    fix = f"add '127.0.1.1 {name}' to /etc/hosts: launchers look their own host up"
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        return Finding("host name", SLOW, f"{name} has no address ({error})", fix)
    took = time.perf_counter() - start
    said = f"{name} is {address}"
    return (
        Finding("host name", OK, said)
        if took < 1
        else Finding("host name", SLOW, f"{said}; to find that out took {took:.1f} s", fix)
    )


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    return Finding(
        "open files", OK if soft < 0 or soft >= 1024 else SLOW, f"{many} may be open at once", f"ulimit -n {min(hard, 4096)}"
    )


def _disk(folder: Path) -> Finding:
    """Write 16 MiB for good."""
    free, size = shutil.disk_usage(folder).free, 16 << 20
    kind = _file_system(folder)
    try:
        with tempfile.NamedTemporaryFile(prefix=".dbnet-doctor-", dir=folder) as file:
            start = time.perf_counter()
            file.write(os.urandom(1 << 20) * (size >> 20))
            file.flush()
            os.fsync(file.fileno())
            took = time.perf_counter() - start
    except OSError as error:
        return Finding(
            "disk", BROKEN, f"{folder} cannot be written ({error.strerror})", "set run.folder to another folder, or give --folder"
        )
    rate = size / took / 1e6
    said = f"{folder} ({kind}): {free / _GIB:.1f} GiB free, {rate:.0f} MB/s for good"
    if free < _GIB:
        return Finding("disk", SLOW, said, "make room: checkpoints and run files go there")
    return Finding(
        "disk", OK if rate >= 20 else SLOW, said, "checkpoints wait for it: set run.folder to a faster disk that all hosts share"
    )


def _file_system(folder: Path) -> str:
    """Return the type of the file system that a folder lies on."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    here = [(len(words[1]), words[2]) for words in mounts if folder.resolve().is_relative_to(words[1])]
    return max(here, default=(0, "unknown"))[1]


def _slurm() -> Finding:
    job = os.environ.get("SLURM_JOB_ID")
    if shutil.which("srun") is None:
        return Finding("Slurm", OK, "none here" if job is None else f"job {job}; its programs are not in PATH")
    try:
        done = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=4)
        version = subprocess.run(["srun", "--version"], capture_output=True, text=True, timeout=4).stdout.strip()
    except subprocess.TimeoutExpired:
        return Finding("Slurm", SLOW, "srun gives no answer within 4 s", "the controller may be down: scontrol ping")
    ways = (done.stdout + done.stderr).split()
    have = [way for way in ("pmi2", "pmix") if any(word.startswith(way) for word in ways)]
    said = f"{version}, {f'job {job}' if job else 'outside of a job'}; starts ranks by {', '.join(have) or 'neither pmi2 nor pmix'}"
    return Finding(
        "Slurm", OK if have else SLOW, said, "MPICH under srun wants Slurm's plugin pmi2; without it use mpirun within the job"
    )
