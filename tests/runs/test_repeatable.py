"""Runs in one process are the same again to the bit: parameters, state, cursors, and every row but what a clock measured."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fingerprint import contents, differing, fingerprint, stored

from dbnet.comm import turns
from dbnet.core.registry import make
from dbnet.data.file import write
from dbnet.run.outcome import Outcome
from dbnet.run.train import execute

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SMALL = [f"model.layers.{i}.units=24" for i in range(4)]
THIN = [f"model.layers.{i}.field=3" for i in (0, 1, 3, 6)]
# What shortens each configuration, and the shape and number of classes of its data.
SHIPPED: dict[str, tuple[str, int, list[str]]] = {
    "digits": ("64", 10, ["stop.epochs=4", "evaluate.epochs=1", "checkpoint.steps=90"]),
    "fashion": ("28,28,1", 10, ["stop.epochs=6", "evaluate.epochs=1", "model.layers.0.units=32", "warmstart.steps=7"]),
    "speech": ("440", 12, ["stop.epochs=2", "evaluate.epochs=0.4", "method.minibatch=20", "model.layers.4.units=12", *SMALL]),
    "images": (
        "24,24,3", 5,
        ["method.minibatch=20", "topology.replicas=2", "model.layers.9.units=5", *THIN],
    ),
    "a9a": (
        "30", 2,
        ["stop.iterations=8", "evaluate.epochs=3", "method.portion=30", "method.minibatch=3", "topology.replicas=3"],
    ),
}  # fmt: skip


@pytest.fixture
def again(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Outcome, Outcome]]:
    """Return a function that makes a run twice, the second time with interruptions: no turn takes as long as before."""

    def make_twice(run_file: Path, changes: Sequence[str]) -> tuple[Outcome, Outcome]:
        changes = ["run.folder=out", "run.picture=false", "checkpoint.steps=17", "checkpoint.keep=100", *changes]
        done = [execute(run_file, changes, quiet=True)]
        taking, rng = turns.take_turns, random.Random(1)

        def disturbed(role: turns.Turns) -> turns.Turns:
            for wait in role:
                if rng.random() < 0.02:
                    time.sleep(0.03)
                yield wait

        with monkeypatch.context() as patch:
            patch.setattr("dbnet.run.process.take_turns", lambda roles, *more: taking([disturbed(role) for role in roles], *more))
            done.append(execute(run_file, changes, quiet=True))
        return done[0], done[1]

    return make_twice


def assert_same(one: Outcome, two: Outcome) -> None:
    """Both runs must be the same; every checkpoint on the way, too."""
    assert one.run_file != two.run_file
    first, second = contents(one.run_file), contents(two.run_file)
    assert differing(first, second) == []
    assert fingerprint(first) == fingerprint(second)
    points = [sorted(run.run_file.with_suffix(".checkpoints").glob("??????.h5")) for run in (one, two)]
    assert len(points[0]) == len(points[1]) > 1
    for before, after in zip(*points, strict=True):
        assert differing(stored(before), stored(after)) == [], before
    np.testing.assert_array_equal(one.params, two.params)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.long
def test_every_run_file_that_comes_with_dbnet(name: str, again: Callable[..., Any], digits: Path, tmp_path: Path) -> None:
    shape, classes, changes = SHIPPED[name]
    data = digits
    if name != "digits":
        data = tmp_path / "data.h5"
        write(
            data,
            make("data.formats", {"kind": "random", "shape": shape, "classes": classes, "train": 200, "test": 40}, "data").read(),
        )
    assert_same(*again(JOBS / f"{name}.toml", [f"data.path={data}", *changes]))


def test_rounds_of_turns_are_the_clock() -> None:
    def role(turns: int) -> turns.Turns:
        for _ in range(turns):
            yield None

    rounds = turns.Rounds(0.5)
    turns.take_turns([role(3), role(5)], rounds)
    assert rounds() == 3.0  # five rounds, and the one in which the last role ends


def test_no_run_file_is_left_out() -> None:
    assert {path.stem for path in JOBS.glob("*.toml")} == set(SHIPPED)
