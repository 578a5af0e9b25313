"""What it costs to record a schedule, or a trace, and its program for four ranks, which train the same in turns."""

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

# Name, layers' units with the input first, steps of each replica, options of [method], and the wanted ratios, by what is recorded.
NETWORKS = (
    ("digits network, batch 20", (64, 256, 10), 1500, {"minibatch": 20}, {"trace": 0.98}),
    ("fashion network, batch 50", (784, 256, 10), 600, {"minibatch": 50}, {"schedule": 0.95, "trace": 0.98}),
    ("speech network, batch 100", tuple(SPEECH), 8, {"minibatch": 100, "overlap": True}, {"schedule": 0.97, "trace": 0.98}),
)
REPLICAS, LEAST = 2, 3
WORDS = {"schedule": "recorded", "trace": "traced"}


class Record(Bench):
    """Throughput of two replicas and a shard whose schedule is recorded, or that are traced, against the same without; bytes."""

    kind: ClassVar[str] = "record"

    def rows(self, repeat: int) -> list[Row]:
        return on_ranks("record", 4, "dbnet.commands.bench.ranks.record", repeat)


def main(repeat: int) -> None:
    comm = mpi.world()
    with mpi.abort_on_error(comm):
        folder = Path(comm.bcast(tempfile.mkdtemp(prefix="dbnet-bench-") if comm.rank == 0 else None))
        for name, units, steps, method, bars in NETWORKS:
            data = folder / f"{units[0]}.h5"
            if comm.rank == 0:
                about = {"kind": "random", "shape": str(units[0]), "classes": units[-1], "train": 4000, "test": 10}
                write(data, make("data.formats", about, "data").read())
            measure(comm, name, tables_of(folder, data, units, steps, method), steps * method["minibatch"] * REPLICAS, bars, repeat)
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(folder)


def tables_of(folder: Path, data: Path, units: tuple[int, ...], steps: int, method: dict[str, Any]) -> dict[str, Any]:
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


def measure(comm: Any, name: str, tables: dict[str, Any], examples: int, bars: dict[str, float], repeat: int) -> None:
    """Train in turns and print the rows of one network."""
    seconds: dict[str, list[float]] = {way: [] for way in ("", *bars)}
    sizes: dict[str, list[float]] = {way: [] for way in bars}
    ways = list(seconds)
    for turn in range(max(LEAST, repeat) + 1):
        # Whatever is first of a turn meets what the turn before has left to the disk.
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            comm.Barrier()
            done = execute({**tables, "record": {way: True} if way else {}}, comm=comm, quiet=True)
            if done is not None:
                run = Run(done.run_file)
                # The last evaluation is of the moment at which training ended; the first turn warms up.
                seconds[way] += [float(run.evaluation.seconds.iloc[-1])] if turn else []
                if way:
                    parts = list(done.run_file.with_suffix(f".{way}").iterdir())
                    sizes[way].append(sum(part.stat().st_size for part in parts) / len(run.events))
                shutil.rmtree(done.run_file.with_suffix(".checkpoints"))
    for way, bar in bars.items() if comm.rank == 0 else ():
        mine, other = (" ".join(map(str, seconds[which])) for which in (way, ""))
        print(f"row\t{name}: {WORDS[way]}\texamples/s\t{examples}\twithout\t>= {bar}\t{mine}\t{other}")
        # Each turn beside its own neighbour, which a busy machine slows alike.
        turns = " ".join(str(plain / seen) for plain, seen in zip(seconds[""], seconds[way], strict=True))
        print(f"row\t{name}: {WORDS[way]} / without, worst turn\tof it\t1\t\t\t{turns}\t")
        print(f"row\t{name}: {way}\tbytes/update\t1\t\t\t{' '.join(map(str, sizes[way]))}\t")


if __name__ == "__main__":
    main(int(sys.argv[1]))
