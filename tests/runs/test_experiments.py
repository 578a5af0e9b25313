"""jobs/experiments: the commands of their READMEs run, and their fits find what made a curve."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "jobs" / "experiments"
FIGURE3, FIGURE5 = (EXPERIMENTS / name / f"{name}.py" for name in ("figure3", "figure5"))


def script(path: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> ModuleType:
    """Load a script; as when it is started, modules beside it are found."""
    if monkeypatch is not None:
        monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figure3() -> ModuleType:
    return script(FIGURE3)


def test_figure3_tells_and_draws_what_is_shipped(
    figure3: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure3, "fit", lambda model, curve, profile: (0.2, 1e-4, 0.5))
    figure3.main(["--most", "4", "--picture", str(tmp_path / "figure3.png")])
    out = capsys.readouterr().out
    assert "| speech 42 M (here 41.8 M) | 1 | 2 | 4 |" in out and "| measured | 1.00 | 1.36 | 1.85 |" in out
    assert "| images 1.7 B (here 1,652.2 M) | 1 | 2 | 4 |" in out and "| images 330 M | 1.60 | 100 | 0.50 |" in out
    assert (tmp_path / "figure3.png").read_bytes().startswith(b"\x89PNG")


def test_figure3_finds_the_constants_that_made_a_curve(figure3: ModuleType) -> None:
    model, profile, constants = figure3.speech(), figure3.load_profile(FIGURE3.parent / "cluster2012.toml"), (0.3, 3e-4, 0.5)
    machines = (2, 4, 8, 16, 32)
    made = figure3.speedups(model, machines, figure3.with_constants(profile, constants))
    curve = [(1, 1.0), *zip(machines, made, strict=True)]
    assert figure3.fit(model, curve, profile) == pytest.approx(constants, rel=0.02)


def test_figure5_runs_a_small_study_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made-up sounds, two replicas, a handful of gradients; the second time everything is there."""
    figure5 = script(FIGURE5, monkeypatch)
    prepare = figure5.prepare
    monkeypatch.setattr(figure5, "prepare", lambda folder, path: prepare(folder, path, each=1))
    study = figure5.Study(goal=0.01, warm=2, replicas=(2,), rates=(("fixed rate", (0.01,)), ("Adagrad", (0.1,))), tuned_at=(2,))
    study = study._replace(
        gradients=8, steps=1, whole=2, iterations=1, batch_replicas=(2,), passes=(figure5.Pass(1.0, 1.0),), seeds=(1,)
    )
    # What an interrupted run left behind is not begun from.
    left = tmp_path / "runs" / f"{figure5.name_of(figure5.warm(1))}.h5"
    left.parent.mkdir()
    left.touch()
    with pytest.raises(SystemExit, match="without --show they are made"):
        figure5.main(["--show", "--out", str(tmp_path)], study)
    figure5.main(["--out", str(tmp_path)], study)
    assert {path.name for path in left.parent.glob("*-2.h5")} == set()
    out = capsys.readouterr().out
    assert "| Downpour, Adagrad | 2 | 264 |" in out and "| Sandblaster L-BFGS | 2 | 258 |" in out and "1 of 1" in out
    assert (tmp_path / "figure5.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "runs.csv").read_bytes()
    assert len(before.splitlines()) == 1 + 1 + 2 + 1 + 1 + 2
    monkeypatch.setattr(figure5, "measured", None)
    figure5.main(["--show", "--out", str(tmp_path)], study)
    figure5.main(["--out", str(tmp_path)], study)
    assert (tmp_path / "runs.csv").read_bytes() == before


def test_figure5_steps_take_as_long_as_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of 100 examples of 41.8 M parameters on four machines, and its 167 MB through their cards."""
    figure5 = script(FIGURE5, monkeypatch)
    machine = figure5.machine(figure5.Case("Adagrad", 10, 1.0, 0.1, 1))
    layers = [{"kind": "dense", "units": figure5.HIDDEN}, {"kind": "dense", "units": figure5.CLASSES}]
    model = script(FIGURE3).model_of(layers, (figure5.COMPONENTS,), "softmax")
    seconds = machine.step_seconds(model, model.boxes(), figure5.MINIBATCH)
    assert seconds == pytest.approx(100 * 6 * 41_777_152 / (1.85 * 100e9), rel=0.03)
    assert 4 * model.layout.size / (machine.between.bandwidth * 1e9) == pytest.approx(4 * 41_777_152 / 4 / 0.125e9, rel=1e-9)


def test_figure5_passes_are_as_long_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Portions and the time of their steps make up the pass, and each kind of pass finds its own rows again."""
    figure5 = script(FIGURE5, monkeypatch)
    passes, examples = (figure5.Pass(1.0, 1.0), figure5.Pass(1.0, 39.0), figure5.Pass(1.0, 39.0, 6000)), 100_000
    made = list(figure5.timed(examples, figure5.Study(batch_replicas=(500, 5000), passes=passes)))
    assert [case.portions for case in made] == [1000, 10_000] * 2 + [16_250] * 2
    for case, longer in zip(made, (1, 1, 39, 39, 39, 39), strict=True):
        steps = case.portions * figure5.portion_steps(case)
        # The paper's minibatch is 25 times ours; 6 operations a parameter, 100 GFLOP/s a machine.
        seconds = longer * 25 * examples * 6 * 41_777_152 / 100e9
        assert figure5.WORK / (figure5.machine(case).compute.rate * 1e9) * steps == pytest.approx(seconds)
    rows = [case._asdict() | {"seconds_in_all": 2.0 * i, "passes_in_all": 2} for i, case in enumerate(made)]
    assert [sys.modules["tables"].pass_seconds(rows, one) for one in passes] == [
        {500: 0, 5000: 1},
        {500: 2, 5000: 3},
        {500: 4, 5000: 5},
    ]
