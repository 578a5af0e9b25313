"""The dependencies are stated in setup.cfg; environment.yml names the same ones for conda, pyproject.toml none."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import dbnet

ROOT = Path(__file__).resolve().parents[2]


def setup() -> configparser.ConfigParser:
    """Return setup.cfg."""
    cfg = configparser.ConfigParser()
    cfg.read(ROOT / "setup.cfg")
    return cfg


def conda() -> list[str]:
    """Return the packages of environment.yml: the items under ``dependencies:``, and those that conda leaves to pip."""
    text = (ROOT / "environment.yml").read_text().split("\ndependencies:\n")[1]
    return [item for item in re.findall(r"^ +- (.*\S)\s*$", text, flags=re.MULTILINE) if item not in ("pip:", "-e .")]


def test_conda_installs_what_pip_installs() -> None:
    cfg, packages = setup(), conda()
    python = cfg["options"]["python_requires"].removeprefix(">=")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    extras = cfg["options.extras_require"]
    wanted = cfg["options"]["install_requires"].split() + extras["test"].split() + extras["mpich"].split()
    assert sorted(packages) == sorted([f"python={python}", "pip", *build, *wanted])


def test_pyproject_holds_only_the_build_system() -> None:
    assert list(tomllib.loads((ROOT / "pyproject.toml").read_text())) == ["build-system"]


def test_version_is_the_package_version() -> None:
    assert setup()["metadata"]["version"] == dbnet.__version__


def test_package_imports_only_what_it_depends_on() -> None:
    names = re.findall(r"^([\w-]+)", setup()["options"]["install_requires"], flags=re.MULTILINE)
    known = {"sklearn" if name == "scikit-learn" else name for name in names}
    # What a dependency brings along by necessity: Numba is built on llvmlite, Matplotlib on Pillow.
    known |= {"dbnet", "llvmlite", "pil", *sys.stdlib_module_names}
    # Optional: compared with, never needed.
    optional = set(" ".join(setup()["options.extras_require"].values()).split())
    unknown = set()
    for path in (ROOT / "dbnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            unknown |= {f"{path.name}: {module}" for module in modules if module.split(".")[0].lower() not in known | optional}
    assert not unknown


def test_a_rank_imports_nothing_that_only_commands_need() -> None:
    """Each of hundreds of ranks would pay for it: 0.1 s of processor for SciPy's linear algebra, more for pandas or a plot."""
    look = (
        "import sys, dbnet.run.train\n"
        "from dbnet.core.registry import family\n"
        "[family(name) for name in ('methods', 'network.layers', 'network.losses', 'shards.rules')]\n"
        "print(*{'scipy.linalg', 'pandas', 'matplotlib', 'rich', 'sklearn'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.split() == []
