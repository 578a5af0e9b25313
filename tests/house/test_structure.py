"""The house: rooms in a strict order, no circles, small rooms that name their files; few know MPI, Numba, HDF5; short files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dbnet

PACKAGE = Path(__file__).resolve().parents[2] / "dbnet"
# Ground floor first: a room imports rooms before it. The door stands for __init__ and __main__.
ROOMS = ("core", "comm", "data", "network", "checkpoint", "shards", "monitor", "coordinator", "methods", "run", "commands")
MOST = 10
LIBRARIES = {
    "mpi4py": {"comm.mpi", "comm.communicators", "comm.window", "comm.link", "commands.see.doctor.onesided"},
    "numba": {"core.jit", "core.kernels.compiler", "core.kernels.tiles"},
    "llvmlite": {"core.kernels.objects", "core.kernels.compiler", "core.kernels.tiles"},
    "h5py": {
        "core.files",
        "core.untrusted.opening",
        "data.file",
        "checkpoint",
        "monitor",
        "commands.replay.moment",
        "commands.see.doctor.software",
        "commands.bench.ranks.torch_job",
    },
    "pandas": {"monitor"},
    "matplotlib": {"monitor"},
    "rich": {"monitor", "commands.training.bar"},
    "onnx": {"checkpoint.onnx"},
    "tensorboardX": {"monitor.tensorboard"},
    "PIL": {"data.formats.images"},
    "torch": {"commands.bench.layers", "commands.bench.step", "commands.bench.ranks.torch_job"},
}
FORBIDDEN = {"utils", "util", "common", "misc", "helpers", "tools"}
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES} - {PACKAGE})


def name(path: Path) -> str:
    """Return a module's name within the package; the __init__ of a folder is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree(path)))


@cache
def imports(path: Path) -> frozenset[str]:
    """Return the absolute name of everything a module imports, wherever in it; not what is for type checkers alone."""
    return frozenset(imported(path))


def imported(path: Path) -> Iterator[str]:
    hidden = {
        inner
        for node in nodes(path)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in nodes(path):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = PACKAGE.parent / (node.module or "").replace(".", "/") / alias.name
                yield f"{node.module}.{alias.name}" if inner.with_suffix(".py").exists() or inner.is_dir() else str(node.module)


def within(path: Path) -> set[str]:
    """Return the modules of dbnet that a module imports, as names within the package."""
    return {target.removeprefix("dbnet.") for target in imports(path) if target.startswith("dbnet.")}


def room(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return len(ROOMS) if room(module) in ("__init__", "__main__") else ROOMS.index(room(module))


def things(folder: Path) -> list[str]:
    """Return the files and folders of a room by name."""
    return sorted(
        path.stem
        for path in folder.iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and path.stem != "__init__"
    )


def test_the_first_floor_is_the_rooms_and_the_door() -> None:
    assert set(things(PACKAGE)) == {*ROOMS, "__main__"}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_go_downward(path: Path) -> None:
    me = name(path)
    assert [other for other in within(path) if floor(other) > floor(me)] == []
    # Nobody takes something from the door, and the rooms of methods and runs meet through the registry alone.
    assert "dbnet" not in imports(path)
    assert not (room(me) == "run" and any(room(other) == "methods" for other in within(path)))


def test_no_circle_inside_a_room() -> None:
    arrows = {name(path): {other for other in within(path) if room(other) == room(name(path))} for path in MODULES}
    free: set[str] = set()
    while ready := {me for me, others in arrows.items() if me not in free and others <= free}:
        free |= ready
    assert set(arrows) - free == set()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: ".".join(folder.relative_to(PACKAGE).parts))
def test_rooms_are_small_and_say_what_is_in_them(folder: Path) -> None:
    found = things(folder)
    assert len(found) <= MOST + (folder.parent != PACKAGE)
    assert not FORBIDDEN & set(found)
    face = tree(folder / "__init__.py")
    assert len(face.body) == 1, "a room's __init__ holds its docstring and nothing else: no re-exports"
    text = ast.get_docstring(face)
    assert text and re.fullmatch(r"[^\n]{10,}[.:]?", text.split("\n")[0])
    family = "family" in text.split("\n")[0]
    missing = [thing for thing in found if not re.search(rf"\b{thing}\b", text)]
    assert missing == [] or (family and "base" not in missing)


def test_only_the_door_and_the_registry_import_late() -> None:
    """An import within a function hides a dependency; libraries that are slow to load, and starting MPI, are the exceptions."""
    late = set()
    for path in MODULES:
        for function in nodes(path):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dbnet"):
                        late.add(name(path))
    assert late <= {"__init__"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_only_a_few_modules_know(library: str) -> None:
    users = {name(path) for path in MODULES for target in imports(path) if target.split(".")[0] == library}
    assert {user for user in users if not {user, room(user)} & LIBRARIES[library]} == set()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
    functions = [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 60} == {}


def test_one_name_means_one_thing() -> None:
    """A public class or type alias has a name that nothing else of the house has, whatever room or family it is in."""
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        for what in kinds(path):
            homes.setdefault(what, []).append(name(path))
    assert len(homes) > 100
    assert {what: where for what, where in homes.items() if len(where) > 1} == {}


def kinds(path: Path) -> Iterator[str]:
    """Yield the public classes and type aliases that a module defines: an alias is a name in capitals and small letters."""
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        else:
            names = [ast.unparse(node.target)] if isinstance(node, ast.AnnAssign) else []
        yield from (what for what in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", what))


def test_importing_the_package_starts_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import dbnet; new = set(sys.modules) - before\n"
        "print(sorted(name for name in new if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "['dbnet']"


def test_public_names_are_found_and_described() -> None:
    for what in set(dbnet.__all__) - {"__version__"}:
        text = getattr(dbnet, what).__doc__
        assert text and len(text.split("\n")[0]) > 15, what
        if what not in ("Layer", "Loss", "Method", "Rule"):
            assert "Parameters\n" in text or "Attributes\n" in text, what
    assert set(dbnet.__all__) <= set(dir(dbnet))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dbnet.trian


def test_importing_everything_compiles_nothing_and_starts_no_mpi() -> None:
    code = (
        "import sys, dbnet.run.train, dbnet.core.jit as jit\n"
        "print(len(jit.KERNELS) > 0, sum(len(k.signatures) for _, k in jit.KERNELS), 'mpi4py' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=PACKAGE.parent)
    assert done.stdout.split() == ["True", "0", "False"]
