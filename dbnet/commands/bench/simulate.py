"""What simulated time costs this processor, beside the gradients themselves and without any; how close it comes to real runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dbnet.commands.bench.base import Bench, Row, launch
from dbnet.commands.bench.step import dense_replica
from dbnet.commands.plan.predict import Figures, checked, figures, predicted
from dbnet.core import config as configuration
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.data.file import write
from dbnet.monitor.results import Run
from dbnet.network.cost import Profile, load_profile
from dbnet.run.setup import setup
from dbnet.run.simulated.simulate import Simulated, simulate

_REPLICAS, _SHARDS, _STEPS, _MINIBATCH = 200, 16, 10, 50
# GB for so many replicas.
_MEMORY = ((200, 1.0), (2000, 4.0))
# Shards that keep up: rings that fill would be a figure of their own.
_MACHINE = {
    "compute": {"rate": 1.0, "apply": 50.0},
    "inside": {"latency": 1e-6, "bandwidth": 10.0},
    "between": {"latency": 3e-6, "bandwidth": 100.0},
    "noise": {"kind": "gamma"},
}


class Simulate(Bench):
    """Simulated time, 200 replicas of the fashion network on 16 shards: operations a second, cost beside gradients, memory."""

    kind: ClassVar[str] = "simulate"

    def rows(self, repeat: int) -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.h5"
            options = {"kind": "random", "shape": "784", "classes": 10, "train": 20000, "test": 0}
            write(data, make("data.formats", options, "data").read())
            dry = [self._play(folder, data, dry=True) for _ in range(repeat)]
            wet, bare = [], []
            for _ in range(repeat):
                wet.append(self._play(folder, data, dry=False).spent)
                bare.append(self._gradients())
            memory = [self.memory(folder, data, replicas, bound) for replicas, bound in _MEMORY]
        rates = np.array([done.operations / done.spent for done in dry])
        beside = np.array([(one - other) / other for one, other in zip(wet, bare, strict=True)])
        return [
            Row(
                "simulate", "one-sided operations, dry", rates.max(), "1/s", "bound", 200e3, rates.max() / 200e3, ">= 1.0",
                rates.max() / rates.min(),
            ),
            Row(
                "simulate", "processor time beside the gradients", beside.min(), "of them", "bound", 0.3, beside.min() / 0.3,
                "<= 1.0", max(wet) / min(wet),
            ),
            *memory,
        ]  # fmt: skip

    @staticmethod
    def _play(folder: str, data: Path, dry: bool) -> Simulated:
        return simulate(fashion(folder, data, _REPLICAS, _STEPS), Profile.model_validate(_MACHINE), dry=dry, quiet=True)

    @staticmethod
    def memory(folder: str, data: Path, replicas: int, bound: float) -> Row:
        """Return the most memory that a process of its own takes for two steps of so many replicas, beside `bound` GB."""
        code = "import sys; from dbnet.commands.bench.simulate import peak; print(peak(*sys.argv[1:]))"
        took = float(_run([sys.executable, "-c", code, folder, str(data), str(replicas)])) / 1e9
        return Row("simulate", f"memory of {replicas:,} replicas", took, "GB", "bound", bound, took / bound, "<= 1.0", 1.0)

    @staticmethod
    def _gradients() -> float:
        """Return the processor seconds of as many gradients of one replica after the other.

        As in simulated time each has parameters of its own, which were written before (pages of zeros that nobody has written are
        one page, and in cache), and all compute into one gradient, whose memory is there before the clock starts.
        """
        replica = dense_replica((784, 256, 10), _MINIBATCH, 20000)
        first, g = np.zeros(replica.size, np.float32), np.ones(replica.size, np.float32)
        replica.model.layout.draw(Range(0, replica.size), 1, first)
        vectors = [first.copy() for _ in range(_REPLICAS)]
        began = time.process_time()
        for _ in range(_STEPS):
            for w in vectors:
                replica.accrue(w, g, 0, 0.0)
        return time.process_time() - began


def peak(folder: str, data: str, replicas: str) -> int:
    """Play two steps of so many replicas; return the bytes of memory that this process held at most."""
    simulate(fashion(folder, Path(data), int(replicas), 2), Profile.model_validate(_MACHINE), quiet=True)
    # What `getrusage` says is at least what the process held that began this one.
    said = Path("/proc/self/status").read_text()
    return 1024 * int(said.split("VmHWM:")[1].split()[0])


def fashion(folder: str, data: Path, replicas: int, steps: int) -> dict[str, Any]:
    """Return a run of the fashion network as nested tables."""
    return {
        "run": {"folder": folder, "picture": False, "deadline": 1e4},
        "data": {"path": str(data)},
        "model": {"layers": [{"kind": "dense", "units": 256, "activation": "sigmoid"}, {"kind": "dense", "units": 10}]},
        "method": {"minibatch": _MINIBATCH},
        "rule": {"rate": 0.001},
        "topology": {"replicas": replicas, "shards": _SHARDS},
        "stop": {"steps": steps},
        "evaluate": {"train": 0},
    }


# --- beside real runs -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A real run: its network, and replicas, partitions, shards, steps from push to push, whether data move beside gradients."""

    network: str
    replicas: int
    partitions: int = 1
    shards: int = 1
    every: int = 1
    overlap: bool = False

    @property
    def ranks(self) -> int:
        return 1 + self.shards + self.replicas * self.partitions

    def __str__(self) -> str:
        beside = " overlap" if self.overlap else ""
        return f"{self.network} R={self.replicas} P={self.partitions} S={self.shards} n_push={self.every}{beside}"


def _dense(*units: int) -> list[dict[str, Any]]:
    return [{"kind": "dense", "units": n, "activation": "sigmoid"} for n in units]


# Shape of an example, layers below the last one, its units, minibatch.
_NETWORKS: dict[str, tuple[str, list[dict[str, Any]], int, int]] = {
    "digits": ("64", _dense(256), 10, 20),
    "fashion": ("784", _dense(256), 10, 50),
    "middle": ("440", _dense(1024, 1024), 2048, 64),
    "images": ("28,28,1", [{"kind": "conv", "maps": 8, "field": 5, "activation": "relu"}, {"kind": "pool", "field": 2}], 10, 32),
}
_CASES = (
    Case("digits", 1), Case("digits", 2), Case("digits", 4, shards=2), Case("digits", 2, every=5),
    Case("fashion", 1), Case("fashion", 2), Case("fashion", 4), Case("fashion", 2, shards=2, every=5), Case("fashion", 2, 2),
    Case("fashion", 2, overlap=True), Case("fashion", 2, every=5, overlap=True),
    Case("middle", 1), Case("middle", 2, shards=2), Case("middle", 3, every=4), Case("middle", 1, 2),
    Case("images", 2), Case("images", 3, shards=2),
)  # fmt: skip
_SECONDS, _EXAMPLES = 4.0, 4000


class Predict(Bench):
    """Real MPI runs on this machine beside simulation on a profile that is measured first; each run is made once."""

    kind: ClassVar[str] = "predict"
    cases: ClassVar[Sequence[Case]] = _CASES

    def rows(self, repeat: int) -> list[Row]:
        if launch(2) is None:
            print("    There is no mpirun beside this Python or in PATH: nothing can be compared.")
            return []
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            profile = self._calibrate(Path(folder))
            for case in self.cases:
                found[case] = pair = self.compare(case, Path(folder), profile)
                print("\n".join([f"    {case}", *(f"  {line}" for line in checked(*pair))]), flush=True)
        return judged(found)

    def _calibrate(self, folder: Path) -> Profile:
        """Measure this machine and the networks."""
        out, options = folder / "machine.toml", []
        for name in dict.fromkeys(case.network for case in self.cases):
            path = folder / f"{name}.toml"
            path.write_text(configuration.to_toml(configuration.load(run_of(Case(name, 1), folder, 1))))
            options += ["--run", str(path)]
        _run([sys.executable, "-m", "dbnet", "calibrate", str(out), *options])
        return load_profile(out)

    @staticmethod
    def compare(case: Case, folder: Path, profile: Profile, seconds: float = _SECONDS) -> tuple[Figures, Figures]:
        """Return what is predicted of a run of about so many seconds, and what it was."""
        made, _ = predicted(setup(configuration.load(run_of(case, folder, 1000))), profile)
        # As long as it takes to count, whatever the network.
        steps = max(40, min(20_000, int(seconds / made.step)))
        path = folder / f"{case.network}-run.toml"
        path.write_text(configuration.to_toml(configuration.load(run_of(case, folder, steps))))
        _run([*(launch(case.ranks) or []), sys.executable, "-m", "dbnet", "train", str(path), "--quiet"])
        measured = figures(Run(folder / "real.h5"))
        for left in folder.glob("real*"):
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        return made, measured


def run_of(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Return the run of a case as nested tables; its data are made where they are not there."""
    shape, layers, classes, minibatch = _NETWORKS[case.network]
    moves = {"n_fetch": case.every, "n_push": case.every, "overlap": case.overlap}
    data = folder / f"{case.network}.h5"
    if not data.exists():
        options = {"kind": "random", "shape": shape, "classes": classes, "train": _EXAMPLES, "test": 0}
        write(data, make("data.formats", options, "data").read())
    return {
        "run": {"folder": str(folder), "name": "real", "picture": False},
        "data": {"path": str(data)},
        "model": {"layers": [*layers, {"kind": "dense", "units": classes}]},
        "method": {"kind": "downpour", "minibatch": minibatch, **moves},
        "rule": {"kind": "adagrad", "rate": 1e-3},
        "topology": {"shards": case.shards, "replicas": case.replicas, "partitions": case.partitions},
        "stop": {"steps": steps},
        "evaluate": {"epochs": 1e9, "train": 0},
    }


def _run(command: list[str]) -> str:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    alone = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=alone | root)
    if done.returncode:
        raise UserError(f"'{' '.join(command)}' failed: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}")
    return done.stdout


def judged(found: Mapping[Case, tuple[Figures, Figures]]) -> list[Row]:
    """Return all figures as rows, and their median and worst errors against the bars."""
    out, off = [], {"step": [], "staleness": []}
    for case, (made, measured) in found.items():
        for name, unit, scale in (("step", "ms", 1e3), ("staleness", "updates", 1.0)):
            one, other = scale * getattr(made, name), scale * getattr(measured, name)
            # One replica is never stale.
            if name == "step" or case.replicas > 1:
                off[name].append(abs(one / other - 1) if other else np.inf)
                out.append(
                    Row("predict", f"{case}: {name}", one, unit, "measured", other, one / other if other else np.inf, "", 1.0)
                )
    for words, name, value, bound in (
        ("time of a step, median error", "step", np.median, 15.0),
        ("time of a step, worst error", "step", np.max, 35.0),
        ("mean staleness, median error", "staleness", np.median, 20.0),
    ):
        if off[name]:
            error = 100 * float(value(off[name]))
            out.append(Row("predict", words, error, "%", "bound", bound, error / bound, "<= 1.0", 1.0))
    return out
