#!/usr/bin/env python3
"""Execute notebooks: python jobs/notebooks/execute.py [NAME ...]; each NAME.py beside this file becomes NAME.ipynb, with results.

They run one after the other in one kernel, each with an empty namespace, in a folder of their own, which is removed in the end.
Needs the extra notebooks: jobs/install --extra notebooks.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.util import run_sync

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))
# What the kernel has kept of the one before.
FRESH = "%reset -f\nimport matplotlib.pyplot\nmatplotlib.pyplot.rcdefaults()\n%matplotlib inline"


def execute(names: Sequence[str], folder: str | Path) -> Iterator[tuple[str, nbformat.NotebookNode]]:
    """Yield each notebook with its results, executed in `folder`; nbclient.exceptions.CellExecutionError where a cell fails."""
    manager = AsyncKernelManager(kernel_name="python3")
    try:
        for name in names:
            book = jupytext.read(FOLDER / f"{name}.py")
            book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            book.cells.insert(0, nbformat.v4.new_code_cell(FRESH))
            NotebookClient(book, km=manager, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
            del book.cells[0]
            yield name, clean(book)
    finally:
        if manager.has_kernel:
            run_sync(manager.shutdown_kernel)(now=True)


def clean(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take out what differs from time to time and says nothing: times of execution, random identities."""
    for number, cell in enumerate(book.cells):
        cell.metadata, cell.id = {}, f"cell-{number}"
    counted = [cell for cell in book.cells if cell.cell_type == "code"]
    for number, cell in enumerate(counted, 1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
    return book


def main(names: Sequence[str]) -> int:
    """Execute and write the notebooks of these names, or all."""
    if unknown := set(names) - set(NOTEBOOKS):
        print(f"There is no notebook {min(unknown)}; there are {', '.join(NOTEBOOKS)}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for name, book in execute(names or NOTEBOOKS, folder):
            path = FOLDER / f"{name}.ipynb"
            nbformat.write(book, path)
            print(
                f"{path.relative_to(os.getcwd()) if path.is_relative_to(os.getcwd()) else path}: {path.stat().st_size / 1e3:.0f} kB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
