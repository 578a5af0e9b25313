"""How runs differ, and which repeat one another.

Runs that differ in nothing but the seed, names and what only concerns their output repeat one another: a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dbnet.core.config import Config
from dbnet.core.toml import written
from dbnet.monitor.results import Run

SEED = "run.seed"
# What says nothing of how a network is trained: keys, and tables.
_OUTPUT = {"run.name", "run.folder", "run.picture", "run.deadline", "run.heartbeat"}
_SEEING = ("evaluate.", "checkpoint.", "record.")
# Figures for the test set and for the validation set are not to be compared.
_JUDGED = "evaluate.part"
# Tables whose keys are known by their last part.
_SHORT = ("run.", "model.", "method.", "rule.", "topology.")


class Group(NamedTuple):
    """Runs that repeat one another, what tells them from the other groups, and how many more are copies of one of them."""

    label: str
    runs: list[Run]
    copies: int = 0

    @property
    def seeds(self) -> int:
        """How many different seeds they have."""
        return len({run.config.run.seed for run in self.runs})

    @property
    def count(self) -> str:
        """How many runs these are, in words; nothing of one."""
        words = [f"{len(self.runs)} runs"] if len(self.runs) > 1 else []
        words += [f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"] if self.seeds < len(self.runs) else []
        words += [f"{self.copies} cop{'ies' if self.copies > 1 else 'y'} left out"] if self.copies else []
        return f"({', '.join(words)})" if words else ""

    @property
    def tests(self) -> float:
        """The best accuracy of all on what is evaluated; NaN where there is none."""
        return max((run.evaluation.accuracy.max() for run in self.runs if len(run.evaluation)), default=float("nan"))


def settings(config: Config) -> dict[str, Any]:
    """Return every key of a configuration with its value, like ``{"model.layers.0.units": 256, ...}``."""
    out: dict[str, Any] = {}

    def walk(key: str, value: Any) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if inner is None:
            out[key] = value
        for name, content in inner or ():
            walk(f"{key}.{name}" if key else str(name), content)

    walk("", json.loads(config.text()))
    return out


def differences(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Return for each run the keys whose values are not the same in all, the seed among them.

    How often a run is evaluated and saved is no difference, nor are options that one kind of member has and another does not know:
    they follow from the kind. Batch methods have no rule.
    """
    trees = [_training(settings(config)) for config in configs]
    keys = together(trees)

    def differs(key: str) -> bool:
        values = [written(tree[key]) if tree.get(key) is not None else "" for tree in trees if key in tree]
        return len(set(values)) > 1 or (len(values) < len(trees) and not explained(key))

    def explained(key: str) -> bool:
        above = "method" if key.startswith("rule.") and any(map(_ruleless, trees)) else key.rpartition(".")[0]
        kinds = [tree.get(f"{above}.kind") for tree in trees]
        return bool(above) and ((None not in kinds and len(set(kinds)) > 1) or explained(above))

    different = [key for key in keys if differs(key)]
    return [{key: tree[key] for key in different if tree.get(key) is not None} for tree in trees]


def together(trees: Iterable[dict[str, Any]]) -> list[str]:
    """Return the keys of all, table by table as in a configuration, kinds first."""
    order = list(Config.model_fields)
    keys = dict.fromkeys(key for tree in trees for key in tree)
    return sorted(keys, key=lambda key: (order.index(key.partition(".")[0]), not key.endswith(".kind")))


def _training(tree: dict[str, Any]) -> dict[str, Any]:
    """Return those of a run's settings that say how it trains, and what is evaluated."""
    unused = (*_SEEING, "rule.") if _ruleless(tree) else _SEEING
    return {key: value for key, value in tree.items() if key == _JUDGED or (key not in _OUTPUT and not key.startswith(unused))}


def _ruleless(tree: dict[str, Any]) -> bool:
    """Return whether a batch method trains, which finds its own steps."""
    return any(key.startswith("method.descent.") for key in tree)


def short(keys: Sequence[str]) -> dict[str, str]:
    """Return a short name of each key: its last part (of a kind: what it is a kind of) where that is one key's alone."""
    last = {key: key.removesuffix(".kind").rpartition(".")[2] if key.startswith(_SHORT) else key for key in keys}
    once = list(last.values())
    return {key: name if once.count(name) == 1 and not name.isdecimal() else key for key, name in last.items()}


def said(values: dict[str, Any], keys: Sequence[str]) -> str:
    """Return in words what tells a run from others that differ in `keys`: ``synchronous, rate=0.1``; a kind stands for itself."""
    name = short(keys)
    return ", ".join(
        str(value) if key.endswith(".kind") and key.count(".") == 1 else f"{name[key]}={spelled(value)}"
        for key, value in values.items()
    )


def spelled(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def groups(runs: Sequence[Run], each: bool = False) -> list[Group]:
    """Return the groups of runs in the order in which they come; `each`: every run a group of its own, by name.

    A run that came out as another one with its seed, to the bit, is that one again and tells nothing of a spread: it is left out.
    """
    if each or len(runs) == 1:
        return [Group(name, [run]) for name, run in zip(names([run.path for run in runs]), runs, strict=True)]
    made: dict[str, list[Run]] = {}
    varied = differences([run.config for run in runs])
    keys = together(varied)
    for run, values in zip(runs, varied, strict=True):
        made.setdefault(said({key: value for key, value in values.items() if key != SEED}, keys), []).append(run)
    found = [_group(label or "all else", members) for label, members in made.items()]
    return found if len(found) > 1 else [_group(runs[0].config.run.name, list(runs))]


def _group(label: str, members: list[Run]) -> Group:
    """Return a group of these runs, but for copies."""
    different: dict[bytes, Run] = {}
    for run in members:
        # Seconds are a machine's.
        numbers = run.evaluation.drop(columns="seconds").to_numpy(float)
        key = numbers.tobytes() + str(run.config.run.seed).encode() if len(numbers) else str(run.path).encode()
        different.setdefault(key, run)
    return Group(label, list(different.values()), len(members) - len(different))


def names(paths: Sequence[Path]) -> list[str]:
    """Return a short name of each file: its own without the ending, or its path where several have the same."""
    own = [path.name.removesuffix(".h5") for path in paths]
    return [name if own.count(name) == 1 else str(path) for name, path in zip(own, paths, strict=True)]
