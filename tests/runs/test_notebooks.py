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
# What the short form executes, and what in it is made shorter: what it says, what is executed instead.
SHORT = {"1_first_run": ("for seed in (1, 2, 3)", "for seed in (1, 2)"), "5_own_members": ("", "")}
LARGEST = 200_000  # bytes of a notebook with its pictures


@pytest.fixture(scope="module")
def execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.timeout(600)
def test_they_run_to_the_end(execute: ModuleType, place: Path, digits: Path, soak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(digits, place / "digits.h5")
    assert len(execute.NOTEBOOKS) == 6
    names = execute.NOTEBOOKS if soak else [*SHORT]
    for name in names:
        text, (old, new) = (FOLDER / f"{name}.py").read_text(), ("", "") if soak else SHORT[name]
        assert old in text
        (place / f"{name}.py").write_text(text.replace(old, new) if old else text)
    monkeypatch.setattr(execute, "FOLDER", place)
    seen = []
    for name, book in execute.execute(names, place):
        seen.append(name)
        pictures = [o for cell in book.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        assert pictures and not any(o.output_type == "error" for cell in book.cells for o in cell.get("outputs", []))
        # Warnings, of Python or of dbnet.
        assert not [o.text for cell in book.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"], name
    assert seen == names


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[0-9]_*.py")), ids=lambda path: path.stem)
def test_what_is_stored_is_of_this_text(path: Path) -> None:
    stored = path.with_suffix(".ipynb")
    assert stored.exists() and stored.stat().st_size < LARGEST, "run python jobs/notebooks/execute.py"
    text, book = jupytext.read(path), nbformat.read(stored, 4)
    assert [(c.cell_type, c.source) for c in book.cells] == [(c.cell_type, c.source) for c in text.cells], (
        f"run python jobs/notebooks/execute.py {path.stem}"
    )
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
