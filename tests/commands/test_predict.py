"""Predictions: a dry simulation's figures, and beside them those of a run that was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from finished import Finished

from dbnet.commands.plan.predict import figures
from dbnet.monitor.results import Run

MACHINE = """
about = "Steps of a millisecond."
[compute]
rate = {rate}
apply = 1.0
step = {step}
[host]
ranks = 0
cores = {cores}
[inside]
latency = 1e-6
bandwidth = 5.0
[between]
latency = 1e-6
bandwidth = 5.0
"""


@pytest.fixture
def machine(place: Path) -> Callable[..., str]:
    """Return a function that writes a machine file and returns its name."""

    def write(name: str = "machine.toml", rate: float = 1e6, step: float = 1e-3, cores: int = 0) -> str:
        Path(name).write_text(MACHINE.format(rate=rate, step=step, cores=cores))
        return name

    return write


def test_a_prediction_is_what_the_simulation_gives(
    dbnet: Callable[..., Finished], run_file: Path, machine: Callable[..., str]
) -> None:
    """Beside a run that was simulated on that machine nothing is off; on one with slower steps the steps are, and so it is said."""
    made = dbnet("simulate", run_file, "--machine", machine(), "--dry", "--quiet", "stop.steps=60", "stop.epochs=")
    assert made.code == 0
    run = Run("out/run.h5")
    measured = figures(run)
    assert measured.step == pytest.approx(1e-3, rel=0.2) and measured.moved == pytest.approx(8 * run.about["parameters"], rel=0.1)
    same = dbnet("plan", "--check", "out/run.h5", "--machine", "machine.toml")
    assert same.code == 0 and "Steps of a millisecond." in same.out
    off = [line.split()[-2] for line in same.out.splitlines() if line.endswith((" %", " pt"))]
    assert len(off) == 7 and {float(value) for value in off} == {0.0}
    # An epoch is 36 steps of 20 examples for each of two replicas.
    assert dbnet("simulate", run_file, "--machine", "machine.toml", "--dry", "--quiet", "stop.epochs=1", "run.name=one").code == 0
    assert "beside 36 dry steps" in dbnet("plan", "--check", "out/one.h5", "--machine", "machine.toml").out
    other = json.loads(dbnet("plan", "--check", "out/run.h5", "--machine", machine("slow.toml", step=3e-3), "--json").out)
    assert other["predicted"]["step"] / other["measured"]["step"] == pytest.approx(3, rel=0.1)
    assert other["measured"]["moved"] == other["predicted"]["moved"]


def test_figures_are_those_of_all_replicas_by_hand() -> None:
    """Two pushes in 2 s and one in 4, of two steps each; another shard and another partition say nothing more of them."""
    columns = ["replica", "partition", "shard", "push", "seconds"]
    events = [(0, 0, 0, 0, 1.0), (1, 0, 0, 0, 0.5), (0, 0, 1, 2, 9.0), (0, 0, 0, 2, 3.0), (1, 0, 0, 1, 4.5), (1, 1, 0, 9, 8.0)]
    progress = pd.DataFrame({
        "replica": [0, 0, 1], "seconds": [1.0, 4.0, 5.0], "waited": [1.0, 1.0, 3.0], "steps": [2, 10, 3],
        "examples": [20, 100, 60], "bytes_fetched": [0, 800, 300], "bytes_pushed": [0, 200, 300],
    })  # fmt: skip
    run = SimpleNamespace(
        path="run.h5", config=SimpleNamespace(method=SimpleNamespace(n_push=2)), events=pd.DataFrame(events, columns=columns),
        progress=progress, staleness=pd.DataFrame({0: [3, 0, 1], 1: [2, 2, 0]}), busy=pd.Series([2.0, 3.0]),
    )  # fmt: skip
    # 10 examples a step of 0.5 s and 20 a step of 2 s; of 8 updates 2 are one late, 1 two.
    assert figures(run) == pytest.approx((1.25, 1.25, 30.0, 0.425, 0.5, 0.6, 150.0))


def test_cores_that_are_short_show_in_the_plan(dbnet: Callable[..., Finished], run_file: Path, machine: Callable[..., str]) -> None:
    """With two replicas on one core a step takes twice as long, and the plan says so without any run."""
    found, parameters = {}, json.loads(dbnet("plan", run_file, "--json").out)["parameters"]
    # Half of a step is what no cache holds, which counts in both of the plan's figures.
    cold = f"[large]\nabove = 0\nbandwidth = 5.0\napply = 1.0\nstep = {5e-4 / (4e-9 * parameters)}\n"
    for cores in (0, 1):
        name = machine(f"{cores}.toml", step=5e-4, cores=cores)
        Path(name).write_text(Path(name).read_text() + cold)
        done = dbnet("plan", run_file, "--machine", name, "topology.replicas=2", "--json")
        found[cores], gradient = (json.loads(done.out)[key] for key in ("predicted", "seconds_per_gradient"))
        # By the machine, too, and of a replica by itself.
        assert gradient == pytest.approx(1e-3, rel=0.05)
    assert found[1]["step"] / found[0]["step"] == pytest.approx(2, rel=0.1)
    assert found[1]["updates"] / found[0]["updates"] == pytest.approx(0.5, rel=0.1)
    said = dbnet("plan", run_file, "--machine", "1.toml", "topology.replicas=2").out
    assert "Predicted by" in said and "each rank with a core of this machine" in said
    assert "mean staleness" in said and not Path("out").exists()


def test_how_a_run_is_recorded_does_not_matter(dbnet: Callable[..., Finished], run_file: Path, machine: Callable[..., str]) -> None:
    """Nor threads, nor pushes that are seldom, nor that one replica begins alone; also where data move beside gradients."""
    words = ("plan", run_file, "--machine", machine(), "method.n_push=30", "method.n_fetch=30", "method.overlap=true", "--json")
    found = []
    for more in ((), ("record.events=counts", "record.schedule=true", "run.threads=2", "warmstart.steps=50")):
        done = dbnet(*words, *more)
        assert done.code == 0, done.err
        found.append(json.loads(done.out)["predicted"])
    assert found[0] == found[1] and found[0]["staleness"] > 0


def test_what_cannot_be_predicted_is_said(dbnet: Callable[..., Finished], run_file: Path, machine: Callable[..., str]) -> None:
    name = machine()
    for words, sentence in (
        (("plan",), "'dbnet plan' needs RUN.toml"),
        (("plan", "--check", "out/run.h5"), "--check RUN.h5 --machine MACHINE.toml"),
        (("plan", "--check", "out/none.h5", "--machine", name), "No record of a run 'out/none.h5'"),
        (("plan", run_file, "--machine", name, "method.kind=sandblaster"), "method.kind = 'sandblaster' goes by what it computes"),
        (("plan", run_file, "--machine", name, "--slurm"), "--slurm prints no prediction; leave --machine out"),
        (("plan", "--check", "out/none.h5", "--machine", name, "--ranks", "-n", "4"), "leave --ranks and -n out"),
    ):
        done = dbnet(*words)
        assert done.code == 2 and sentence in done.err, done.err
    assert dbnet("train", run_file, "stop.epochs=1", "--quiet").code == 0
    done = dbnet("plan", "--check", "out/run.h5", "--machine", name)
    assert done.code == 2 and "trained in one process" in done.err
