"""The shape of the source: imports go strictly downward, few modules know MPI, Numba and HDF5, files and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dbnet"
FAMILIES = ("layers", "losses", "rules", "methods", "data", "descent", "benches")
# A family stands for its members; these may import their family's base and members that come before them in MEMBERS.
TIERS = (
    ("errors", "ranges", "gemm", "linesearch", "channel", "interrupt", "disk", "rows", "patience", "mappings"),
    ("jit", "registry", "mpi", "waiting", "topology", "link", "parameters", "patches", "table", "untrusted"),
    ("config", "vector", "activations", "filters", "losses", "rules", "data", "mover", "marker", "usage", "window"),
    ("layers", "batches", "shard", "space", "monitor"),
    ("model", "accrual", "history", "portions", "plot", "shares", "intake"),
    ("network", "partition", "checkpoint", "routes", "tasks", "descent", "orders"),
    ("exchange", "store", "display", "pulse", "saving", "verify"),
    ("direct", "roll", "guard", "keeper", "resume", "inspect", "starting"),
    ("replica", "pace", "predictions"),
    ("driver",),
    ("build", "methods", "benches"),
    ("outcome",),
    ("run", "infer", "plan", "bench"),
    ("slurm",),
    ("__init__", "__main__"),
)
LIBRARIES = {
    "mpi4py": {"mpi", "topology", "window", "link"},
    "numba": {"jit"},
    "llvmlite": {"jit"},
    "h5py": {"disk", "checkpoint", "saving", "verify", "monitor", "data.base", "table", "untrusted"},
    "torch": {"benches.layers", "benches.step"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name(path: Path) -> str:
    """Return a module's name within the package; a family's __init__ is the family."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Yield the absolute name of everything a module imports, wherever in it; not what is for type checkers alone."""
    hidden = {
        inner
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = PACKAGE.parent / (node.module or "").replace(".", "/") / alias.name
                yield f"{node.module}.{alias.name}" if inner.with_suffix(".py").exists() or inner.is_dir() else str(node.module)


def tier(module: str) -> int:
    family = module.split(".")[0]
    found = [i for i, members in enumerate(TIERS) if family in members]
    assert len(found) == 1, f"dbnet/{module.replace('.', '/')}.py has no tier, or several; give it one in this test"
    return found[0]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_downward(path: Path) -> None:
    me = name(path)
    wrong = []
    for target in imports(path):
        if target == "dbnet" or not target.startswith("dbnet."):
            continue
        other = target.removeprefix("dbnet.")
        if me.split(".")[0] in FAMILIES and me.split(".")[0] == other.split(".")[0]:
            # Within a family: its base, or (a variant of a method or layer) one other member, never in a circle.
            back = [t for t in imports(PACKAGE / (other.replace(".", "/") + ".py")) if t == f"dbnet.{me}"]
            wrong += back
        elif tier(other) >= tier(me):
            wrong.append(f"{me} (tier {tier(me)}) imports {other} (tier {tier(other)})")
    assert not wrong


def test_only_the_command_line_and_the_registry_import_late() -> None:
    """An import within a function hides a dependency; libraries that are slow to load, and starting MPI, are the exceptions."""
    late = set()
    for path in MODULES:
        for function in ast.walk(tree(path)):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dbnet"):
                        late.add(name(path))
    assert late <= {"__init__", "__main__"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_only_a_few_modules_know(library: str) -> None:
    users = {name(path) for path in MODULES for target in imports(path) if target.split(".")[0] == library}
    assert users <= LIBRARIES[library]


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 60} == {}


def test_importing_the_package_starts_nothing() -> None:
    code = "import dbnet, sys; print([m for m in ('mpi4py', 'numba', 'h5py', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"


def test_importing_everything_compiles_nothing_and_starts_no_mpi() -> None:
    code = (
        "import sys, dbnet.run, dbnet.jit as jit\n"
        "print(len(jit.KERNELS) > 0, sum(len(k.signatures) for _, k in jit.KERNELS), 'mpi4py' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == ["True", "0", "False"]
