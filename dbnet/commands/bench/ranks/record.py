"""What it costs to record a schedule, and its program for four ranks: they train the same in turns, unrecorded and recorded."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from dbnet.comm import mpi
from dbnet.commands.bench.base import Bench, Row, on_ranks
from dbnet.commands.bench.step import SPEECH
from dbnet.core.registry import make
from dbnet.data.file import write
from dbnet.monitor.results import Run
from dbnet.run.train import execute

# Name, layers' units with the input first, steps of each replica, options of [method], and the wanted ratio.
NETWORKS = (
    ("fashion network, batch 50", (784, 256, 10), 600, {"minibatch": 50}, 0.95),
    ("speech network, batch 100", tuple(SPEECH), 8, {"minibatch": 100, "overlap": True}, 0.97),
)
REPLICAS = 2


class Record(Bench):
    """Throughput of two replicas and a shard whose schedule is recorded, against the same unrecorded; bytes of each update."""

    kind: ClassVar[str] = "record"

    def rows(self, repeat: int) -> list[Row]:
        return on_ranks("record", 4, "dbnet.commands.bench.ranks.record", repeat)


def main(repeat: int) -> None:
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        folder = Path(comm.bcast(tempfile.mkdtemp(prefix="dbnet-bench-") if comm.rank == 0 else None))
        for name, units, steps, method, bar in NETWORKS:
            data = folder / f"{units[0]}.h5"
            if comm.rank == 0:
                about = {"kind": "random", "shape": str(units[0]), "classes": units[-1], "train": 4000, "test": 10}
                write(data, make("data.formats", about, "data").read())
            measure(comm, name, run_file(folder, data, units, steps, method), steps * method["minibatch"] * REPLICAS, bar, repeat)
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(folder)


def run_file(folder: Path, data: Path, units: tuple[int, ...], steps: int, method: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of a run that trains a dense network and does little else."""
    layers: list[dict[str, Any]] = [{"kind": "dense", "units": n, "activation": "sigmoid"} for n in units[1:-1]]
    return {
        "run": {"folder": str(folder), "picture": False},
        "data": {"path": str(data)},
        "model": {"layers": [*layers, {"kind": "dense", "units": units[-1]}]},
        "method": method,
        "rule": {"kind": "adagrad", "rate": 0.01, "initial_sum": 1e-4},
        "topology": {"shards": 1, "replicas": REPLICAS},
        "stop": {"steps": steps},
        "evaluate": {"epochs": 1e6, "train": 0},
    }


def measure(comm: Any, name: str, tables: dict[str, Any], examples: int, bar: float, repeat: int) -> None:
    """Train in turns and print the rows of one network."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    sizes = []
    for turn in range(repeat + 1):
        for recorded in (False, True):
            comm.Barrier()
            done = execute({**tables, "record": {"schedule": recorded}}, comm=comm, quiet=True)
            if done is not None:
                run = Run(done.run_file)
                # The last evaluation is of the moment at which training ended; the first turn warms up.
                seconds[recorded] += [float(run.evaluation.seconds.iloc[-1])] if turn else []
                parts = done.run_file.with_suffix(".schedule")
                sizes += [sum(part.stat().st_size for part in parts.iterdir()) / len(run.events)] if recorded else []
                shutil.rmtree(done.run_file.with_suffix(".checkpoints"))
    if comm.rank == 0:
        mine, other = (" ".join(map(str, seconds[recorded])) for recorded in (True, False))
        print(f"row\t{name}: recorded\texamples/s\t{examples}\tunrecorded\t>= {bar}\t{mine}\t{other}")
        print(f"row\t{name}: record\tbytes/update\t1\t\t\t{' '.join(map(str, sizes))}\t")


if __name__ == "__main__":
    main(int(sys.argv[1]))
