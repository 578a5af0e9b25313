"""jobs/experiments: the commands of their READMEs run, and their fits find what made a curve."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FIGURE3 = Path(__file__).resolve().parents[2] / "jobs" / "experiments" / "figure3" / "figure3.py"


@pytest.fixture(scope="module")
def figure3() -> ModuleType:
    spec = importlib.util.spec_from_file_location("figure3", FIGURE3)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
