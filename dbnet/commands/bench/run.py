"""Whole runs beside PyTorch on the same cores: examples per second, and what each rank's processor seconds went to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dbnet.commands.bench.base import Bench, Row, launch
from dbnet.core.errors import UserError
from dbnet.data import file
from dbnet.data.formats.random import Random

_PLACE = "dbnet.commands.bench.ranks"


class Training(NamedTuple):
    """A network, what it learns from, and how; the bars of its rows by (steps between pushes, what it is compared with)."""

    name: str
    sizes: tuple[int, ...]
    examples: int
    epochs: int
    batch: int
    rule: dict[str, Any]
    bars: Mapping[tuple[int, str], str]


FASHION = Training(
    "fashion", (784, 256, 10), 60000, 5, 50, {"kind": "adagrad", "rate": 0.02},
    {(1, "one process"): ">= 1.35", (1, "PyTorch"): ">= 1.5", (5, "one process"): ">= 1.85"},
)  # fmt: skip
SPEECH = Training(
    "speech", (440, 2560, 2560, 2560, 2560, 8192), 4000, 1, 100, {"kind": "sgd", "rate": 1e-3},
    {(1, "one process"): ">= 1.6", (1, "DDP"): ">= 1.25", (5, "one process"): ">= 1.75"},
)  # fmt: skip


class Spending(NamedTuple):
    """What one process says of itself: its name, processor seconds by cause, and, if it knows, seconds and examples of training.

    `ready` is the time of day at which a process of PyTorch's begins to train.
    """

    name: str
    spent: dict[str, float]
    seconds: float
    examples: int
    ready: float = np.nan


class Measured(NamedTuple):
    """A whole run that is measured: what it is called, and what carries it out."""

    name: str
    run: Callable[[], list[Spending]]


def tables(network: Training, data: Path, folder: Path, replicas: int, every: int, evaluate: bool = False) -> dict[str, Any]:
    """Return the configuration of a network as nested tables."""
    layers = [{"kind": "dense", "units": n, "activation": "sigmoid"} for n in network.sizes[1:-1]]
    return {
        "run": {"name": network.name, "folder": str(folder), "picture": False},
        "data": {"path": str(data)},
        "model": {"layers": [*layers, {"kind": "dense", "units": network.sizes[-1]}]},
        "method": {"kind": "downpour", "minibatch": network.batch, "n_fetch": every, "n_push": every},
        "rule": network.rule,
        "topology": {"shards": 1, "replicas": replicas},
        "stop": {"epochs": network.epochs},
        "evaluate": {"epochs": 1.0 if evaluate else 1e9, "train": 0},
    }


def told(folder: str) -> list[Spending]:
    """Return what the processes of a job have written of themselves, each into its own file: launchers mix what ranks print."""
    found = [json.loads(path.read_text()) for path in Path(folder).glob("spent-*.json")]
    in_order = sorted(found, key=lambda one: one["rank"])
    return [Spending(*(one[key] for key in ("name", "spent", "seconds", "examples")), one.get("ready", np.nan)) for one in in_order]


def ours(ranks: int, run: dict[str, Any], idle: bool = False) -> list[Spending]:
    """Carry out a run on as many ranks; on one in this machine's first core alone. Nothing where there is no launcher."""
    start = launch(ranks) if ranks > 1 else []
    if start is None:
        return []
    bound = _one_core if ranks == 1 else None
    with tempfile.TemporaryDirectory() as folder:
        order = json.dumps({"run": run, "idle": idle, "told": folder})
        command = [*start, sys.executable, "-m", f"{_PLACE}.job", order]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=_alone(), preexec_fn=bound)
        if done.returncode:
            raise UserError(f"A run of {ranks} ranks failed: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
        return told(folder)


def _one_core() -> None:
    """Keep this process to one of its cores."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def theirs(network: Training, data: Path, processes: int, threads: int) -> list[Spending]:
    """Carry out the same training in PyTorch, in so many processes (with more than one: DDP over gloo)."""
    with tempfile.TemporaryDirectory() as folder:
        order = {
            "sizes": network.sizes, "batch": network.batch, "epochs": network.epochs, "rule": network.rule, "data": str(data),
            "threads": threads, "processes": processes, "meeting": f"{folder}/meeting", "told": folder,
        }  # fmt: skip
        commands = [[sys.executable, "-m", f"{_PLACE}.torch_job", json.dumps({**order, "rank": r})] for r in range(processes)]
        env = {**_alone(), "GLOO_SOCKET_IFNAME": "lo"}
        started = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) for c in commands]
        try:
            errors = [process.communicate(timeout=1200)[1] for process in started]
        except subprocess.TimeoutExpired:
            raise UserError("PyTorch did not end within 20 minutes; measure a smaller network.") from None
        finally:
            for process in started:
                process.kill()
        for process, error in zip(started, errors, strict=True):
            if process.returncode:
                raise UserError(f"PyTorch failed: {(error.strip().splitlines() or [process.returncode])[-1]}")
        return told(folder)


def _alone() -> dict[str, str]:
    """Return the environment for processes that set their own numbers of threads."""
    return {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def rate(ranks: Sequence[Spending]) -> float:
    """Return the examples per second of a job; NaN where it was not carried out."""
    if not ranks:
        return np.nan
    return sum(rank.examples for rank in ranks) / max(rank.seconds for rank in ranks)


def show(name: str, ranks: Sequence[Spending]) -> None:
    """Print where the processor seconds of each rank went."""
    for rank in ranks:
        spent = "  ".join(f"{cause} {seconds:.2f}" for cause, seconds in rank.spent.items() if seconds >= 0.005)
        print(f"    {name:<44} {rank.name:<12} {spent}", flush=True)


class WholeRuns(Bench):
    """Whole runs on two cores, the processor seconds of each rank by cause, beside PyTorch on 1 and 2 threads and DDP."""

    kind: ClassVar[str] = "run"

    def rows(self, repeat: int) -> list[Row]:
        if find_spec("torch") is None:
            print("    PyTorch is not installed: nothing stands beside these rows (jobs/install --extra torch).")
        out = []
        with tempfile.TemporaryDirectory() as folder:
            for network in (FASHION, SPEECH):
                out += list(self._network(network, Path(folder), repeat))
        return out

    def _network(self, network: Training, folder: Path, repeat: int) -> Iterator[Row]:
        with_test, without = (folder / f"{network.name}-{words}.h5" for words in ("test", "train"))
        shape, classes = str(network.sizes[0]), network.sizes[-1]
        for path, test in ((with_test, network.examples // 6), (without, 0)):
            file.write(path, Random(shape=shape, classes=classes, train=network.examples, test=test).read(), False)

        def run(ranks: int, replicas: int, every: int, data: Path = without, idle: bool = False) -> Callable[[], list[Spending]]:
            return lambda: ours(ranks, tables(network, data, folder, replicas, every, data is with_test), idle)

        jobs = [
            Measured("one process", run(1, 1, 1)),
            Measured("1 replica, n = 1", run(3, 1, 1)),
            Measured("2 replicas, n = 1", run(4, 2, 1)),
            Measured("2 replicas, n = 5", run(4, 2, 5)),
        ]
        if network is FASHION:
            jobs.append(Measured("2 replicas, n = 1, evaluated each epoch", run(4, 2, 1, with_test)))
            jobs.append(Measured("nothing to do", run(4, 2, 1, without, True)))
        if find_spec("torch") is not None:
            jobs += [Measured(f"PyTorch, {n} thread{'s' * (n > 1)}", lambda n=n: theirs(network, without, 1, n)) for n in (1, 2)]
            jobs.append(Measured("DDP, 2 processes", lambda: theirs(network, without, 2, 1)))
        found: dict[str, list[list[Spending]]] = {job.name: [] for job in jobs}
        for _ in range(repeat):
            for job in jobs:
                found[job.name].append(job.run())
        best = {name: max(tries, key=rate) for name, tries in found.items()}
        for name, ranks in best.items():
            show(f"{network.name}, {name}", ranks)
        yield from self._compare(network, {name: [rate(ranks) for ranks in tries] for name, tries in found.items()})
        yield from self._servers(network, best)

    def _compare(self, network: Training, rates: dict[str, list[float]]) -> Iterator[Row]:
        best = {name: max(values) for name, values in rates.items()}
        beside = {
            "one process": best["one process"],
            "PyTorch": max((value for name, value in best.items() if name.startswith("PyTorch")), default=np.nan),
            "DDP": best.get("DDP, 2 processes", np.nan),
        }
        for name, values in rates.items():
            if name == "nothing to do":
                continue
            spread, every = max(values) / min(values), 5 if "n = 5" in name else 1
            against = [""]
            if "evaluated" in name:
                beside["no evaluation"], against = best["2 replicas, n = 1"], ["no evaluation"]
            elif name.startswith("2 replicas"):
                against = [words for words, value in beside.items() if value == value]
            elif name == "one process" and beside["PyTorch"] == beside["PyTorch"]:
                against = ["PyTorch"]
            for words in against:
                other = beside.get(words, np.nan)
                bar = ">= 0.95" if words == "no evaluation" else network.bars.get((every, words), "") if "2 repl" in name else ""
                label = f"{network.name}, {name}"
                yield Row("run", label, best[name], "ex/s", words, other, best[name] / other, bar, spread)

    def _servers(self, network: Training, best: dict[str, list[Spending]]) -> Iterator[Row]:
        """What shard and coordinator take of a core: the rest of theirs is the replicas'."""
        for name, bound in (("2 replicas, n = 1", 2.0), ("nothing to do", 1.0)):
            for rank in best.get(name, ()):
                if rank.name.startswith("replica") or (bound == 2.0 and rank.name != "coordinator"):
                    continue
                seconds = max(one.seconds for one in best[name])
                share = 100 * sum(rank.spent[cause] for cause in rank.spent if cause not in ("start", "end")) / seconds
                label = f"{network.name}, {name}: {rank.name}"
                yield Row("run", label, share, "% core", "bound", bound, share / bound, "<= 1.0", 1.0)
