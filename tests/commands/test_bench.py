"""The benchmark of whole runs: what it counts, and that it says what it has run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dbnet.commands.bench import run
from dbnet.commands.bench.command import holds
from dbnet.commands.bench.ranks.job import Account
from dbnet.commands.bench.simulate import Case, Predict, Simulate, judged
from dbnet.commands.plan.predict import Figures
from dbnet.data import file
from dbnet.data.formats.random import Random
from dbnet.network.cost import load_profile


def test_a_processor_second_is_counted_once_and_where_it_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, others = [0.0], [5.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] + others[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    class Shard:
        def apply(self) -> None:
            work(10)

    class Store:
        def push(self):  # type: ignore[no-untyped-def]
            work(1)
            Shard().apply()
            yield "a"
            work(2)

    account = Account()
    account.around(Shard, "apply", "apply")
    account.around_turns(Store, "push", "push")
    work(100)
    account.turn("poll")
    others[0] += 7
    turns = Store().push()
    assert next(turns) == "a"
    # Others have their turn.
    work(1000)
    assert list(turns) == []
    spent = account.close()
    assert {cause: seconds for cause, seconds in spent.items() if seconds} == {
        "start": 105, "push": 3, "apply": 10, "poll": 1000, "other threads": 7,
    }  # fmt: skip


def test_a_run_says_what_its_seconds_went_to(tmp_path: Path) -> None:
    network = run.FASHION._replace(sizes=(30, 40, 5), examples=300, epochs=2, batch=10)
    file.write(tmp_path / "data.h5", Random(shape="30", classes=5, train=300, test=0).read(), False)
    (only,) = run.ours(1, run.tables(network, tmp_path / "data.h5", tmp_path, 1, 1))
    assert only.name == "all roles" and only.examples == 600 and only.seconds > 0
    assert all(only.spent[cause] > 0 for cause in ("start", "gradient", "push", "apply", "poll", "record", "end"))


def test_a_start_says_what_its_seconds_went_to(tmp_path: Path, run_file: Path) -> None:
    words = ["-m", "dbnet.commands.bench.ranks.starting", str(tmp_path), "train", str(run_file), "stop.epochs=1", "--quiet"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    said = json.loads((tmp_path / "spent-0.json").read_text())
    causes = ("interpreter", "imports", "configuration", "data", "kernels", "run file", "run", "end")
    assert [cause for cause in causes if not said["spent"][cause] > 0] == [] and len(said["first"]) == 1


def test_memory_is_that_of_the_simulation_alone(tmp_path: Path) -> None:
    """Not what the process holds that measures it."""
    file.write(tmp_path / "data.h5", Random(shape="784", classes=10, train=100, test=0).read(), False)
    held = np.ones(1 << 29, np.uint8)
    row = Simulate.memory(str(tmp_path), tmp_path / "data.h5", 2, 1.0)
    assert row.name == "memory of 2 replicas" and 0.03 < row.value < held.nbytes / 1e9 and row.ratio == row.value


def test_predictions_are_judged_by_their_median_and_worst_errors() -> None:
    """Steps off by 10, 20 and 60 %, staleness by 50 %; one replica is never stale."""
    made = [Figures(step, 1.0, 1.0, 0.0, staleness, 0.0, 1.0) for step, staleness in ((1.1, 9.0), (0.8, 3.0), (1.6, 1.0))]
    measured = [Figures(1.0, 1.0, 1.0, 0.0, staleness, 0.0, 1.0) for staleness in (1.0, 2.0, 2.0)]
    cases = [Case("digits", 1), Case("digits", 2), Case("fashion", 2, 2)]
    rows = judged(dict(zip(cases, zip(made, measured, strict=True), strict=True)))
    assert [row.name for row in rows[:5]] == [
        "digits R=1 P=1 S=1 n_push=1: step",
        "digits R=2 P=1 S=1 n_push=1: step",
        "digits R=2 P=1 S=1 n_push=1: staleness",
        "fashion R=2 P=2 S=1 n_push=1: step",
        "fashion R=2 P=2 S=1 n_push=1: staleness",
    ]
    assert [row.value for row in rows[5:]] == pytest.approx([20.0, 60.0, 50.0])
    assert [holds(row) for row in rows[5:]] == [False, False, False]
    assert rows[0].value == pytest.approx(1100.0) and rows[0].other == 1000.0


@pytest.mark.long
@pytest.mark.mpi
def test_a_real_run_stands_beside_what_is_predicted_of_it(tmp_path: Path, soak: bool) -> None:
    """What moves is known to the byte, whatever the machine; times are the machine's."""
    if not soak:
        pytest.skip("a real run beside its prediction: tests/run --soak")
    profile = load_profile(Path(__file__).parents[2] / "jobs" / "machines" / "local.toml")
    made, measured = Predict.compare(Case("digits", 2), tmp_path, profile, 0.02)
    assert made.moved == measured.moved > 0 and measured.step > 0 and measured.staleness >= 0
    assert not list(tmp_path.glob("real*"))
