"""Synchronous steps: R replicas make the steps of one with R times the batch, whoever leaves, is lost or pushes what is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dbnet.checkpoint.master import Checkpoints
from dbnet.commands.plan.command import plan
from dbnet.core.config import build
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.methods.synchronous import Collect
from dbnet.monitor.results import Run
from dbnet.run.outcome import Outcome
from dbnet.run.train import execute
from dbnet.shards.push import Intake, Push, Receiving
from dbnet.shards.shard import Shard


def trained(place: Path, data: Path, replicas: int, minibatch: int, **more: dict) -> Outcome:
    tree = {
        "run": {"name": f"r{replicas}", "folder": str(place), "picture": False},
        "data": {"path": str(data)},
        "model": {
            "layers": [{"kind": "dense", "units": 5, "activation": "tanh"}, {"kind": "dense", "units": 2}],
            "dtype": "float64",
        },
        "method": {"kind": "synchronous", "minibatch": minibatch},
        "rule": {"kind": "adagrad", "rate": 0.1},
        "topology": {"shards": 2, "replicas": replicas},
        "stop": {"steps": 9},
    }
    return execute(build(tree | more), quiet=True)


@pytest.mark.parametrize(("replicas", "partitions"), [(2, 1), (4, 1), (2, 2)])
def test_replicas_equal_one_with_their_batches_together(replicas: int, partitions: int, place: Path, make_data) -> None:
    # Minibatches that hold a whole subset: every step looks at all of the data, in whatever order.
    data = make_data()
    one = trained(place, data, 1, 8)
    topology = {"shards": 2, "replicas": replicas, "partitions": partitions}
    many = trained(place, data, replicas, 8 // replicas, topology=topology)
    np.testing.assert_allclose(many.params, one.params, rtol=0, atol=1e-12)
    events = Run(many.run_file).events
    assert (events.applied == events.fetched).all()
    assert (events.groupby(["shard", "partition", "applied"]).replica.nunique() == replicas).all()


def test_who_has_more_to_do_goes_on_alone(place: Path, make_data) -> None:
    """Subsets of 3, 3 and 2 examples: the third replica has fewer minibatches in an epoch, and leaves earlier."""
    done = trained(place, make_data(), 3, 1, stop={"epochs": 2}, rule={"kind": "sgd", "rate": 0.1})
    events = Run(done.run_file).events
    assert done.finished and events[events.shard == 0].groupby("replica").steps.sum().tolist() == [6, 6, 4]


def test_a_checkpoint_counts_no_gradient_that_waits_for_the_others(place: Path, make_data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's sum is in no checkpoint, so who goes on from one makes these gradients again; what counts as made was applied."""
    shards, waiting = list[Collect](), list[int]()

    def begin(self: Checkpoints, tables: dict[str, np.ndarray], *more: object) -> None:
        applied = min(int(shard.clock[0]) for shard in shards)
        assert (tables["replicas"]["steps"] <= applied).all()
        waiting.append(max(len(shard._came[0]) for shard in shards))
        right(self, tables, *more)

    right, made = Checkpoints.begin, Collect.__init__
    monkeypatch.setattr(Checkpoints, "begin", begin)
    monkeypatch.setattr(Collect, "__init__", lambda self, *parts: (made(self, *parts), shards.append(self))[0])
    often = {"stop": {"steps": 30}, "checkpoint": {"steps": 1, "keep": 99}, "evaluate": {"epochs": 1.0}}
    trained(place, make_data(), 3, 1, **often)
    assert max(waiting) > 0, "no gradient waits: this shows nothing"


def test_a_warmstart_is_refused(place: Path, make_data) -> None:
    with pytest.raises(UserError, match=r"leave the warmstart out \(warmstart.steps= on"):
        trained(place, make_data(), 2, 1, warmstart={"steps": 3})


def test_the_plan_counts_the_sum_of_a_step(run_file: Path) -> None:
    """Beside parameters and Adagrad's register a shard holds the sum: one more vector of its range."""
    ranks = {kind: plan(run_file, [f"method.kind={kind}"]).ranks for kind in ("downpour", "synchronous")}
    lo, hi = map(int, re.findall(r"\d+", ranks["downpour"][1].owns))
    assert ranks["synchronous"][1].memory - ranks["downpour"][1].memory >= 4 * (hi - lo) > 0


class Scene:
    """One shard of ten parameters under sgd with rate 1, and four replicas; parameters 0 .. 5 and 6 .. 9 are of two partitions."""

    def __init__(self) -> None:
        config = SimpleNamespace(topology=SimpleNamespace(replicas=4))
        shard = Shard(
            Range(0, 10), make("shards.rules", {"kind": "sgd", "rate": 1.0}, "rule"), np.zeros(10), np.zeros(2, int), lambda: 0.0
        )
        origins = [(r, p) for r in range(4) for p in range(2)]
        self.collect = Collect(shard, Receiving(config, None, origins, dict))  # type: ignore[arg-type]
        self.ways = {origin: Intake(self.collect) for origin in origins}

    def push(self, replica: int, g: np.ndarray, steps: int = 1, partition: int = 0) -> None:
        part, fetched = (Range(0, 6), Range(6, 10))[partition], int(self.collect.clock[partition])
        push = Push(replica, partition, 0, fetched, steps, 0)
        for lo in range(0, part.size, 2):
            self.ways[replica, partition].take(
                push, g[part.lo + lo : part.lo + lo + 2], [(0, part.lo + lo, 2)], lo == 0, lo + 2 == part.size
            )

    @property
    def clock(self) -> int:
        return int(self.collect.clock[0])


GRADIENTS = np.random.default_rng(1).integers(-9, 10, (4, 10)).astype("f8")


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_whole_numbers_give_the_same_bits_in_any_order(order: tuple[int, ...]) -> None:
    scene = Scene()
    for number, replica in enumerate(order, start=1):
        assert scene.clock == 0 and not scene.collect.params.any()
        scene.push(replica, GRADIENTS[replica])
        assert scene.clock == number // 4
    assert np.array_equal(scene.collect.params[:6], -GRADIENTS.sum(axis=0)[:6] / 4)
    # The other partition has its own clock and has waited for nobody of this one.
    assert scene.collect.clock[1] == 0 and not scene.collect.params[6:].any()


def test_nobody_waits_for_who_has_left_or_is_lost() -> None:
    scene = Scene()
    scene.push(0, GRADIENTS[0])
    scene.push(3, np.zeros(10), steps=0)
    scene.push(1, GRADIENTS[1])
    assert scene.clock == 0
    scene.collect.leave(2)
    assert scene.clock == 1 and np.array_equal(scene.collect.params[:6], -(GRADIENTS[0] + GRADIENTS[1])[:6] / 2)
    # Who pushes again takes part again.
    for replica in (3, 0):
        scene.push(replica, GRADIENTS[replica])
        assert scene.clock == 1
    scene.push(1, GRADIENTS[1])
    assert scene.clock == 2
    events = scene.collect.take_events()
    assert events["replica"].tolist() == [0, 1, 3, 0, 1] and events["applied"].tolist() == [0, 0, 1, 1, 1]


def test_a_refused_gradient_holds_nobody_up() -> None:
    scene, bad = Scene(), GRADIENTS[2].copy()
    bad[0] = np.nan
    for replica in (0, 1, 3):
        scene.push(replica, GRADIENTS[replica])
    scene.push(2, bad)
    assert scene.clock == 1 and len(scene.collect.take_refused()) == 1
    assert np.array_equal(scene.collect.params[:6], -GRADIENTS[[0, 1, 3]].sum(axis=0)[:6] * (1 / 3))
