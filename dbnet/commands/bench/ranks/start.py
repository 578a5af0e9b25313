"""How ranks start and end: processor seconds by cause and role, the first step beside PyTorch's DDP, many ranks on one machine."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from dbnet.comm.topology import Topology
from dbnet.commands.bench.base import Bench, Row, launch
from dbnet.commands.bench.run import Training, theirs
from dbnet.core.config import load, to_toml
from dbnet.core.errors import UserError
from dbnet.data import file
from dbnet.data.formats.random import Random

_FIRST, _MANY, _SECONDS = 3.0, 48, 25.0
_NETWORK = Training("small", (64, 32, 10), 2000, 0, 20, {"kind": "adagrad", "rate": 0.1}, {})


class Started(NamedTuple):
    """One start and end of ranks.

    Attributes
    ----------
    seconds, processor
        From mpirun to the end of all; of processors, of all processes together.
    first
        Seconds from mpirun to the end of the last replica's first step.
    ranks
        Each rank's name and processor seconds by cause; what the process itself cannot see, its own exit, is not in it.
    """

    seconds: float
    processor: float
    first: float
    ranks: list[tuple[str, dict[str, float]]]


class Start(Bench):
    """Ranks that start, make ten steps and end: what each spends on what; the first step beside DDP; `--ranks` of them at once."""

    kind: ClassVar[str] = "start"
    ranks: int = Field(8, ge=4, description="ranks of the largest start")

    def rows(self, repeat: int) -> list[Row]:
        if launch(1) is None:
            print("start: left out, there is no mpirun on this machine")
            return []
        repeat = min(repeat, 5)
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data.h5")
            file.write(data, Random(shape="64", classes=10, train=_NETWORK.examples, test=100).read(), False)
            # The first one compiles what is missing.
            start_and_end(4, data, Path(folder))
            few = [start_and_end(4, data, Path(folder)) for _ in range(repeat)]
            many = [start_and_end(self.ranks, data, Path(folder)) for _ in range(min(repeat, 3))]
            ddp = [_ddp(data) for _ in range(repeat)] if find_spec("torch") is not None else []
        if not ddp:
            print("    PyTorch is not installed: nothing stands beside these rows (jobs/install --extra torch).")
        best = min(few, key=lambda one: one.processor)
        for name, spent in best.ranks:
            said = "  ".join(f"{cause} {seconds:.2f}" for cause, seconds in spent.items() if seconds >= 0.005)
            print(f"    {name:<12} {sum(spent.values()):.2f} s of processor: {said}")
        left = best.processor - sum(sum(spent.values()) for _, spent in best.ranks)
        print(f"    {'all':<12} {best.processor:.2f} s {left:.2f} for the interpreters' exits and the launcher", flush=True)
        return list(self._rows(few, many, ddp))

    def _rows(self, few: list[Started], many: list[Started], ddp: list[float]) -> Iterator[Row]:
        firsts = [one.first for one in few]
        yield _row("4 ranks, mpirun to the first step", firsts, "s", "bound", _FIRST, "<= 1.0")
        if ddp:
            yield _row("4 ranks, mpirun to the first step", firsts, "s", "import torch, DDP", min(ddp), "")
        bound = _SECONDS if self.ranks == _MANY else np.nan
        name = f"{self.ranks} ranks, mpirun to the end"
        yield _row(name, [one.seconds for one in many], "s", "bound", bound, "<= 1.0" if self.ranks == _MANY else "")
        yield _row(f"{self.ranks} ranks, processor a rank", [one.processor / self.ranks for one in many], "s", "", np.nan, "")


def _row(name: str, values: list[float], unit: str, against: str, other: float, bar: str) -> Row:
    best = min(values)
    return Row("start", name, best, unit, against if other == other else "", other, best / other, bar, max(values) / best)


def start_and_end(ranks: int, data: Path, folder: Path) -> Started:
    """Start so many ranks for ten steps of each replica, and look at them."""
    replicas = ranks - 2
    run = {
        "run": {"name": "start", "folder": str(folder / "runs"), "picture": False},
        "data": {"path": str(data)},
        "model": {"layers": [{"kind": "dense", "units": units} for units in _NETWORK.sizes[1:]]},
        "method": {"kind": "downpour", "minibatch": _NETWORK.batch},
        "rule": _NETWORK.rule,
        "topology": {"shards": 1, "replicas": replicas},
        "stop": {"steps": 10},
        "evaluate": {"epochs": 1e9, "train": 0},
    }
    with tempfile.TemporaryDirectory(dir=folder) as told:
        configuration = Path(told, "run.toml")
        configuration.write_text(to_toml(load(run)))
        words = ["-m", "dbnet.commands.bench.ranks.starting", told, "train", str(configuration), "--quiet"]
        before, began, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time(), time.perf_counter()
        done = subprocess.run([*launch(ranks), sys.executable, *words], capture_output=True, text=True, timeout=600, env=_env())
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise UserError(f"A start of {ranks} ranks failed: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
        found = sorted((json.loads(path.read_text()) for path in Path(told).glob("spent-*.json")), key=lambda one: one["rank"])
    names, firsts = Topology(1, replicas), [one["first"][0] for one in found if one["first"]]
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    spent = [(names.name(one["rank"]).removeprefix("the "), one["spent"]) for one in found]
    return Started(seconds, processor, max(firsts) - began, spent)


def _env() -> dict[str, str]:
    """Return the environment, with one thread of BLAS in each process."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _ddp(data: Path) -> float:
    """Return the seconds in which four processes have imported PyTorch and have come together in DDP."""
    began = time.time()
    return max(one.ready for one in theirs(_NETWORK, data, 4, 1)) - began
