"""Many runs: how they differ, which repeat one another, their frames as one, and pictures of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from finished import Finished
from ledger import taken
from matplotlib.figure import Figure

from dbnet import open_run, open_runs
from dbnet.core.config import build
from dbnet.core.errors import UserError
from dbnet.monitor.many.differences import Group, differences, groups, said, settings
from dbnet.monitor.pictures import curves
from dbnet.monitor.pictures.against import applied, axis
from dbnet.monitor.pictures.figure import compose, draw
from dbnet.monitor.pictures.panels import together
from dbnet.monitor.pictures.report import report
from dbnet.monitor.runfile import FINISHED, RUNNING, RunFile
from dbnet.monitor.tables import PROGRESS
from dbnet.shards.shard import EVENT

TREE = {"data": {"path": "d.h5"}, "model": {"layers": [{"kind": "dense", "units": 2}]}, "stop": {"steps": 9}}


def made(path: Path, accuracies: list[float], state: int = FINISHED, **changes: object) -> Path:
    """Write a run: an evaluation per second, of 10 steps and an epoch each; two replicas with 100 and 300 examples a second."""
    record = RunFile(path, build({**TREE, "topology": {"replicas": 2}, **changes}), {})
    for second, accuracy in enumerate(accuracies):
        record.evaluation(second, 0, 10 * second, second, 1 - accuracy, accuracy, 0.5, 0.5)
        rows = np.zeros(2, PROGRESS)
        rows["seconds"], rows["replica"], rows["examples"] = second, [0, 1], [100 * second, 300 * second]
        rows["waited"] = [0.0, second / 4]
        record.progress(rows)
        events = np.zeros(2, EVENT)
        events["push"], events["applied"], events["steps"] = second, [2 * second, 2 * second + 1], 3
        events["fetched"], events["replica"], events["seconds"] = events["applied"] - [0, 3], [0, 1], second
        record.events(0, *taken(events))
    record.close(state)
    return path


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """Return a folder with two runs that differ in the seed, one of another rate, one of another method that broke off."""
    for seed, accuracies in ((1, [0.1, 0.5, 0.9]), (2, [0.1, 0.7, 0.7])):
        made(tmp_path / f"a-{seed}.h5", accuracies, run={"name": f"a-{seed}", "seed": seed}, rule={"rate": 0.5})
    made(tmp_path / "b.h5", [0.1, 0.2], rule={"rate": 0.1}, method={"n_fetch": 2}, evaluate={"epochs": 3})
    late = made(tmp_path / "c.h5", [0.1], RUNNING, method={"kind": "synchronous"}, rule={"rate": 0.5})
    os.utime(late, (0, 0))
    (tmp_path / "c.checkpoint.h5").write_text("none")
    return tmp_path


def test_what_differs() -> None:
    more = {**TREE, "model": {"layers": [{"kind": "dense", "units": 3}, {"kind": "dense", "units": 2}]}}
    trees = [TREE, {**TREE, "method": {"kind": "sandblaster"}}, {**more, "rule": {"kind": "sgd"}, "checkpoint": {"keep": 9}}]
    first, second, third = differences([build(tree) for tree in trees])
    assert settings(build(more))["model.layers.1.units"] == 2
    # Options of a kind follow from it; those of a layer that the others have not, do not.
    assert first == {"method.kind": "downpour", "rule.kind": "adagrad", "model.layers.0.units": 2}
    # A batch method has no rule.
    assert second == {"method.kind": "sandblaster", "model.layers.0.units": 2}
    assert third["model.layers.1.kind"] == "dense" and third["rule.kind"] == "sgd" and "checkpoint.keep" not in third
    values = {"method.kind": "downpour", "rule.rate": 0.1, "stop.steps": 2}
    assert said(values, list(values)) == "downpour, rate=0.1, stop.steps=2"
    assert said({"rule.rate": 0.1}, ["rule.rate", "model.layers.0.rate"]) == "rule.rate=0.1"
    assert differences([build(TREE), build({**TREE, "run": {"name": "x"}})]) == [{}, {}]


def test_frames_of_many_runs(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (four / "d.h5").write_text("none")
    runs = open_runs(str(four / "*.h5"))
    assert "Passed over: '" in capsys.readouterr().err
    assert runs.names == ["a-1", "a-2", "b", "c"] and len(runs.events) == 2 * (3 + 3 + 2 + 1)
    assert runs.keys == ["run.seed", "method.kind", "method.n_fetch", "rule.rate"]
    assert repr(runs).splitlines()[1].split()[0] == runs.names[0] and repr(open_run(runs.paths[0])).startswith(
        f"<Run {runs.paths[0]}: "
    )
    mean = runs.evaluation.groupby(["rule.rate", "epochs"]).accuracy.mean()
    assert mean[0.5][1] == pytest.approx(0.6) and mean[0.1][1] == pytest.approx(0.2)
    late = runs.staleness[runs.staleness.run == "a-1"]
    assert late.staleness.tolist() == [0, 3] and late.updates.tolist() == [3, 3]
    table = runs.table.set_index("run")
    assert table.accuracy["a-2"] == 0.7 and table.best["a-1"] == 0.9 and table.staleness["b"] == 1.5
    assert table.ended.tolist() == ["finished", "finished", "finished", "broken off"]
    assert [(group.label, len(group.runs)) for group in groups(list(runs))] == [
        ("downpour, n_fetch=1, rate=0.5", 2), ("downpour, n_fetch=2, rate=0.1", 1), ("synchronous, rate=0.5", 1),
    ]  # fmt: skip
    with pytest.raises(UserError, match="no run file"):
        open_runs(str(four / "none*.h5"))
    with pytest.raises(UserError, match="give a pattern"):
        open_runs([])


def test_runs_are_listed(four: Path, place: Path, dbnet: Callable[..., Finished]) -> None:
    said = dbnet("runs", four).out.splitlines()
    head = ["run", "accuracy", "best", "seconds", "epochs", "staleness", "ended"]
    assert said[0].split() == [*head, "seed", "method", "n_fetch", "rate"]
    assert said[1].split() == ["a-1", "0.9000", "0.9000", "2.0", "2.0", "1.50", "finished", "1", "downpour", "1", "0.5"]
    assert "broken off" in said[4] and len(said) == 5
    table = dbnet("runs", four, "--json").out
    assert '"ended":"broken off"' in table and '"method.n_fetch":1,' in table
    assert "There is no run file" in dbnet("runs").err


def test_axes(four: Path) -> None:
    run = open_run(four / "a-1.h5")
    half = np.array([0.5, 1.0])
    assert axis(run, half, "steps").tolist() == [5, 10] and axis(run, half, "epochs").tolist() == [0.5, 1]
    assert applied(run)[1].tolist() == [3, 6, 9, 12, 15, 18]
    # A push is applied when its last slice is, at whatever shard.
    run.events = pd.DataFrame({"replica": [0, 0, 1], "push": [0, 0, 0], "steps": [2, 2, 1], "seconds": [1.0, 1.5, 1.2]})
    assert [array.tolist() for array in applied(run)] == [[1.2, 1.5], [1, 3]]
    with pytest.raises(UserError, match="no iterations"):
        axis(run, half, "iterations")


def test_rates_are_means_over_a_window(four: Path) -> None:
    run = open_run(four / "a-1.h5")
    total, first, second = curves.throughput(run)
    assert total.y.tolist() == [400, 400] and first.y.tolist() == [100, 100] and second.part == "replica 1"
    mean, _, waits = curves.waiting(run)
    assert waits.y.tolist() == [25, 25] and mean.y.tolist() == [12.5, 12.5]
    times, counts = np.arange(0, 10, 0.25), np.repeat(np.arange(0, 4000, 100), 2)[:40].astype(float)
    # What is counted in bursts of 100 every half second is 200 a second.
    assert set(curves.rate(times, counts, run)[1][4:]) == {200.0}
    lateness = curves.lateness(run)[0]
    assert lateness.y[-1] == 1.5


def test_repetitions_are_a_band(four: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (seen.append(figure), Path(path).touch()))
    draw([open_run(four / f"{name}.h5") for name in ("a-1", "a-2", "b")], tmp_path / "p.svg", ["accuracy"], "steps")
    axes = seen[0].axes[0]
    assert axes.get_xlabel() == "steps of all replicas" and len(axes.lines) == 2
    assert axes.lines[0].get_ydata() == pytest.approx([0.1, 0.6, 0.8])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.9) and band[:, 1].min() == pytest.approx(0.1)
    assert [text.get_text() for text in seen[0].legends[0].get_texts()] == ["n_fetch=1, rate=0.5 (2 runs)", "n_fetch=2, rate=0.1"]
    draw([open_run(four / f"{name}.h5") for name in ("a-1", "a-2")], tmp_path / "p.svg", ["staleness"], each=True)
    assert len(seen[1].axes[0].lines) == 2 and not seen[1].axes[0].collections


def test_many_curves_leave_room_for_each_other(four: Path) -> None:
    run = open_run(four / "a-1.h5")
    shown = [Group(f"n_fetch={n}, n_push=3, rate=0.0{n}", [run]) for n in range(50)]
    for names in (["accuracy"], ["loss", "accuracy", "staleness"]):
        figure = compose(shown, names, "seconds")
        figure.draw_without_rendering()
        (legend,) = figure.legends
        panels = [axes.get_tightbbox() for axes in figure.axes]
        assert len(legend.get_texts()) == 40 and legend.get_texts()[-1].get_text() == "and 11 more"
        assert all(axes.get_window_extent().height > 2.3 * figure.dpi for axes in figure.axes)
        assert not any(legend.get_window_extent().overlaps(box) for box in panels)


def test_the_same_again_is_no_repetition(tmp_path: Path) -> None:
    runs = [
        open_run(made(tmp_path / f"{name}.h5", accuracies, run={"name": name, "seed": seed}))
        for name, seed, accuracies in (("a", 1, [0.1, 0.5]), ("b", 1, [0.1, 0.5]), ("c", 1, [0.1, 0.6]), ("d", 2, [0.1, 0.5]))
    ]
    ((_, kept, copies),) = groups(runs)
    assert [run.config.run.name for run in kept] == ["a", "c", "d"] and copies == 1
    assert groups(runs)[0].count == "(3 runs, 2 seeds, 1 copy left out)"
    assert groups(runs[:2])[0].count == "(1 copy left out)" and groups(runs[::3])[0].count == "(2 runs)"
    report(sorted(tmp_path.glob("*.h5")), tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "1 of the runs came out as another one of the same seed, to the bit: they count once." in page


def test_curves_of_other_places_end_with_the_shortest() -> None:
    line = np.array([0.0, 1.0, 2.0, 3.0])
    x, rows = together([(line, line), (line[:3] + 0.5, line[:3])])
    assert x[0] == 0.5 and x[-1] == 2.5 and rows[0] == pytest.approx(x) and rows[1] == pytest.approx(x - 0.5)
    x, rows = together([(line[:1], np.array([100.0])), (line[:2], np.array([60.0, 40.0]))], shares=True)
    assert rows.tolist() == [[100, 0], [60, 40]]
