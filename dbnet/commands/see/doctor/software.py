"""Python and what dbnet stands on: packages, BLAS, the cache of compiled kernels, HDF5."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from dbnet.commands.see.doctor.base import BROKEN, OK, SLOW, Finding, looked
from dbnet.core.files import hdf5
from dbnet.core.kernels.folder import cache
from dbnet.core.untrusted.opening import opened
from dbnet.core.version import __version__
from dbnet.monitor.runfile import revision

_NEEDED = ("numpy", "scipy", "numba", "llvmlite", "h5py", "mpi4py", "pydantic", "pandas")
# GFLOP/s of one core in single precision below which its BLAS is none for it.
_FLOPS = 15.0


def findings(folder: Path) -> Iterator[Finding]:
    """Yield what is found of the software; files are tried in `folder`."""
    looks = {"dbnet": _dbnet, "Python": _python, "packages": _packages, "BLAS": _blas, "kernels": _kernels,
             "HDF5": lambda: _hdf5(folder.resolve())}  # fmt: skip
    for subject, look in looks.items():
        yield from looked(subject, look)


def _dbnet() -> Finding:
    return Finding("dbnet", OK, f"{__version__}, revision {revision()}, in {Path(__file__).resolve().parents[4]}")


def _python() -> Finding:
    said = f"{platform.python_version()} ({sys.executable})"
    old = sys.version_info < (3, 11)
    return Finding("Python", BROKEN if old else OK, said, "dbnet needs 3.11 or newer: DBNET_PYTHON=python3.11 jobs/install")


def _packages() -> Finding:
    have, lack = [], []
    for name in _NEEDED:
        try:
            have.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lack.append(name)
    state = BROKEN if lack else OK
    return Finding("packages", state, ", ".join([*have, *(f"{name} is missing" for name in lack)]), "install them: jobs/install")


def _blas() -> Finding:
    found = [one for one in threadpool_info() if one["user_api"] == "blas"]
    if not found:
        return Finding(
            "BLAS",
            SLOW,
            "none that is known: NumPy has another one",
            "install NumPy from PyPI or conda-forge, with OpenBLAS or MKL",
        )
    a = np.random.default_rng(1).random((768, 768), np.float32)
    times = []
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(4):
            start = time.perf_counter()
            _ = a @ a
            times.append(time.perf_counter() - start)
    rate = 2 * a.shape[0] ** 3 / min(times) / 1e9
    one = found[0]
    core, by = one.get("architecture", "an unknown processor"), one.get("threading_layer", "nothing")
    said = (
        f"{one['internal_api']} {one['version']} for {core}, {one['num_threads']} threads by {by}; a core makes {rate:.0f} GFLOP/s"
    )
    fix = "other work may run here; else install NumPy from PyPI or conda-forge, whose BLAS knows this processor"
    return Finding("BLAS", OK if rate >= _FLOPS else SLOW, said, fix)


def _kernels() -> Finding:
    """Where compiled kernels are kept: they must outlive this process, and be found again."""
    folder = cache()
    files = list(folder.rglob("*.nbc")) if folder.exists() else []
    size = sum(path.stat().st_size for path in files) / 2**20
    said = f"{len(files)} compiled ones ({size:.0f} MiB) in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("kernels", BROKEN, f"{folder} cannot be written", "set DBNET_CACHE to a folder that you can write")
    if str(folder).startswith(tempfile.gettempdir() + os.sep):
        return Finding(
            "kernels", SLOW, f"{said}, which does not last", "set DBNET_CACHE to a folder that lasts: all kernels are compiled anew"
        )
    if not files:
        said = f"none compiled yet in {folder}: the first run takes about a minute longer"
    return Finding("kernels", OK, said)


def _hdf5(folder: Path) -> Finding:
    """Write a little file, and read it as it grows."""
    import h5py

    said = f"{h5py.version.hdf5_version}, h5py {h5py.__version__}"
    try:
        made = tempfile.TemporaryDirectory(prefix=".dbnet-doctor-", dir=folder)
    except OSError:
        # The line "disk" says what to do.
        return Finding("HDF5", OK, f"{said}; not tried, as nothing can be written in {folder}")
    with made as place:
        path, values = Path(place) / "small.h5", np.arange(1000.0)
        with hdf5(path, "latest") as file:
            file["values"] = values
        with opened(path, growing=True) as file:
            back = file["values"][:]
    if not np.array_equal(back, values):
        return Finding("HDF5", BROKEN, f"{said}: a file that was written reads otherwise", "try another disk: run.folder")
    return Finding("HDF5", OK, f"{said}; a file written in {folder} reads back while others may write it")


def environment() -> dict[str, str]:
    """Return the variables that change how dbnet and its libraries run; no others."""
    known = re.compile(
        r"(DBNET|OMP|OPENBLAS|MKL|NUMBA|MPICH|MPIR|OMPI|PMIX?|PRTE|FI|UCX|HYDRA|MPI4PY|HDF5|SLURM_(JOB|NTASKS|CPUS|NNODES|MPI))_?\w*"
    )
    hidden = re.compile(r"TOKEN|KEY|SECRET|PASS|COOKIE|NAMESPACE|URI|ADDR|PORT", re.IGNORECASE)
    return {name: value for name, value in sorted(os.environ.items()) if known.fullmatch(name) and not hidden.search(name)}


def facts() -> dict[str, Any]:
    """Return what else a bug report wants."""
    return {"platform": platform.platform(), "libc": " ".join(platform.libc_ver()), "environment": environment()}
