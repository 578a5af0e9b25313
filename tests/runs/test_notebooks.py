"""The notebooks run from their text to the end, and what is stored of them is of that text."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "jobs" / "notebooks"
# What makes sweeps and runs shorter in the short form: the notebook, what it says, what is executed instead.
SHORT = [
    ("1_first_run", "for seed in (1, 2, 3)", "for seed in (1, 2)"),
    ("2_staleness", "sizes = [1, 2, 4, 8, 16]", "sizes = [1, 4]"),
    ("3_model_parallelism", "sizes = [1, 2, 4, 8, 16]", "sizes = [1, 4]"),
    ("4_downpour_and_sandblaster", "stop.iterations=120", "stop.iterations=50"),
    ("6_paper_figure", "SIZES, SEEDS = [1, 2, 4, 8, 16], [1, 2]", "SIZES, SEEDS = [2, 4], [1, 2]"),
]
LARGEST = 200_000  # bytes of a notebook with its pictures


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.timeout(600)
def test_all_run_to_the_end(execute: ModuleType, place: Path, digits: Path, soak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(digits, place / "digits.h5")
    texts = {name: (FOLDER / f"{name}.py").read_text() for name in execute.NOTEBOOKS}
    for name, old, new in () if soak else SHORT:
        assert texts[name].count(old) == 1
        texts[name] = texts[name].replace(old, new)
    for name, text in texts.items():
        (place / f"{name}.py").write_text(text)
    monkeypatch.setattr(execute, "FOLDER", place)
    seen = []
    for name, book in execute.execute(execute.NOTEBOOKS, place):
        seen.append(name)
        pictures = [o for cell in book.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        assert pictures and not any(o.output_type == "error" for cell in book.cells for o in cell.get("outputs", []))
        # Warnings, of Python or of dbnet.
        assert not [o.text for cell in book.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"], name
    assert seen == execute.NOTEBOOKS and len(seen) == 6


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[0-9]_*.py")), ids=lambda path: path.stem)
def test_what_is_stored_is_of_this_text(path: Path) -> None:
    stored = path.with_suffix(".ipynb")
    assert stored.exists() and stored.stat().st_size < LARGEST, "run python jobs/notebooks/execute.py"
    text, book = jupytext.read(path), nbformat.read(stored, 4)
    assert [(c.cell_type, c.source) for c in book.cells] == [(c.cell_type, c.source) for c in text.cells], (
        f"run python jobs/notebooks/execute.py {path.stem}"
    )
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
