"""Jobs in a private Slurm, which is started once and leaves nothing behind."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from started import programs

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
NODES, CORES = 4, 8

RUN_FILE = """
[run]
folder = "out"
[data]
path = "{data}"
[model]
layers = [{{kind = "dense", units = 10}}]
dtype = "float64"
[topology]
shards = 2
replicas = 2
[stop]
seconds = 4
[evaluate]
epochs = 1000
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = [*missing(), *(["an mpirun beside this Python"] if not (Path(sys.executable).parent / "mpirun").exists() else [])]
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.mpi)
            if absent:
                install = "apt-get install --no-install-recommends slurm-wlm munge"
                item.add_marker(pytest.mark.skip(reason=f"there is no {', '.join(absent)}; for Slurm: {install}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # A short path: sockets have names of at most a hundred letters.
    folder = Path(tempfile.mkdtemp(prefix="dbnet-slurm-", dir="/tmp"))
    made = Cluster(folder, NODES, CORES)
    made.env.update(
        PYTHONPATH=str(ROOT), DBNET_HOME=str(ROOT), DBNET_BIN=str(programs(folder / "bin")), OMP_NUM_THREADS="1",
        TMPDIR=str(folder),
        # More ranks than cores: MPICH's default transport between nodes takes milliseconds for each operation then.
        MPIR_CVAR_CH4_NETMOD="ofi", FI_PROVIDER="tcp",
        OMPI_MCA_mpi_yield_when_idle="1", OMPI_MCA_pml="ob1", OMPI_MCA_btl="self,sm,tcp",
    )  # fmt: skip
    try:
        made.start()
        yield made
    finally:
        made.stop()
        # What a job script has started besides may need a moment to notice.
        made.wait(lambda: not made.left(), "no process is left", 20, lambda: str(made.left()))
        shutil.rmtree(folder)


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    """Return a folder with a configuration."""
    (tmp_path / "run.toml").write_text(RUN_FILE.format(data=digits))
    return tmp_path
