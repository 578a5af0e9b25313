"""What `dbnet plan` says of memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from finished import Finished

from dbnet import plan
from dbnet.commands.plan.ranks import network_memory
from dbnet.commands.plan.words import recorded
from dbnet.core import config
from dbnet.methods.downpour import Downpour
from dbnet.network.network import Network, held
from dbnet.run.roles import window_layouts
from dbnet.run.setup import setup

IMAGES = (
    "model.layers=[{kind='local', maps=3, field=3}, {kind='norm', radius=1}, {kind='pool', over='l2', field=2},"
    " {kind='conv', maps=4, field=2}, {kind='dropout', rate=0.1}, {kind='dense', units=10}]"
)


@pytest.mark.parametrize(("replicas", "shards"), [(100, 1), (4, 3)])
def test_rings_are_no_larger_than_what_is_pushed(replicas: int, shards: int, run_file: Path) -> None:
    ready = setup(config.load(run_file, [f"topology.replicas={replicas}", f"topology.shards={shards}"]))
    size = ready.model.layout.size
    rings = sum(layout.nbytes for layout in window_layouts(ready)[1 : 1 + shards])
    assert rings <= 1.1 * 4 * (size + replicas * 8 * (size + shards)) + 4096 * replicas * shards
    ready = setup(config.load(run_file, ["method.slot=64"]))
    assert ready.rings.slot == 64


def test_vectors_of_one_network_share_its_working_arrays(run_file: Path) -> None:
    ready = setup(config.load(run_file, [IMAGES]))
    network = Network(ready.model, 5)
    vectors = np.zeros((4, network.size), ready.model.dtype)
    first, second = (network.bind(*pair) for pair in (vectors[:2], vectors[2:]))
    mine = [held(a.scratch) for a in first]
    assert sum(mine) > 0 and sum(mine) <= network.nbytes
    for a, b in zip(first, second, strict=True):
        for name, value in a.scratch.items():
            assert value is b.scratch[name] or held(value) == 0, f"{name} is made again for every vector"


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_planned_as_large_as_it_is(training: bool, run_file: Path) -> None:
    ready = setup(config.load(run_file, [IMAGES]))
    assert network_memory(ready, 0, 37, training) == Network(ready.model, 37, training=training).nbytes


def test_many_ranks_are_few_lines(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    many = ["topology.shards=30", "topology.replicas=40", "topology.partitions=2", "method.minibatch=1"]
    lines = [line.split() for line in dbnet("plan", run_file, *many).out.splitlines()]
    ranks = [line for line in lines if line and re.fullmatch(r"\d+(-\d+)?", line[0])]
    assert [line[:3] for line in ranks] == [["0", "the", "coordinator"], ["1-30", "30", "shards"], ["31-110", "80", "ranks"]]
    # 64 x 16 + 16 + 16 x 10 + 10 parameters over 30 shards; a partition has half of the units.
    assert ranks[1][3:6] == ["40", "-", "41"] and int(ranks[2][5]) == 1210 // 2


def test_a_plan_for_scripts(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    made = json.loads(dbnet("plan", run_file, "--json").out)
    assert made["parameters"] == 1210 and [rank["name"] for rank in made["ranks"]][1:4] == ["shard 0", "shard 1", "replica 0"]
    assert made["layers"][0] == {"kind": "dense", "shape": [16], "parameters": 1040, "options": {"activation": "sigmoid"}}
    assert made["memory"] == sum(rank["memory"] for rank in made["ranks"])
    assert "1,040 parameters   activation sigmoid\n" in dbnet("plan", run_file).out


def test_what_moves_is_divided_by_the_steps_in_which_it_does(run_file: Path) -> None:
    """Of 1,210 parameters of 4 bytes, fetched every five steps and pushed every three; at the shard those of two replicas."""
    made = plan(run_file, ["topology.shards=1", "topology.replicas=2", "method.n_fetch=5", "method.n_push=3"])
    assert [rank.per_step for rank in made.ranks] == [0, 2 * 4840 // 5 + 2 * 4840 // 3, *[4840 // 5 + 4840 // 3] * 2]
    # The second partition uses 40 tied parameters, which the first one pushes, and has 725 of its own.
    tied = ["topology.partitions=2", "model.layers=[{kind='conv', maps=4, field=3}, {kind='dense', units=10}]"]
    assert plan(run_file, [*tied, "method.n_fetch=5", "method.n_push=3"]).ranks[-1].per_step == 4 * 765 // 5 + 4 * 725 // 3
    # Each of 16 units goes to the other partition and its delta back, for 20 examples.
    assert "16 values cross below it, 2.5 KiB per step up and down" in str(plan(run_file, ["topology.partitions=2"]))


def test_what_a_run_file_comes_to_in_a_day(run_file: Path) -> None:
    def day(*changes: str) -> float:
        return recorded(setup(config.load(run_file, ["topology.shards=1", *changes])))

    default, most = day(), day("topology.replicas=500")
    assert day("record.events=counts") < default < most < 500e6 < 1.7e9 < day("record.events=all")
    assert default - day("record.events=counts") == 10 * (1e6 + (2000 * 86400 - 1e6) / 100)


@pytest.mark.parametrize(
    ("users", "longest", "given", "ring"),
    [
        (2, 167 << 20, {}, (1 << 20, 8)),
        (32, 167 << 20, {}, (1 << 20, 8)),
        (200, 167 << 20, {}, (256 << 10, 4)),
        (200, 50_000, {}, (50_000, 8)),
        (16000, 167 << 20, {}, (16 << 10, 4)),
        (200, 167 << 20, {"slot": 4096, "slots": 9}, (4096, 9)),
        (200, 167 << 20, {"rings": 1 << 31}, (1 << 20, 8)),
    ],
)
def test_rings_of_many_replicas_are_small(users: int, longest: int, given: dict, ring: tuple[int, int]) -> None:
    assert Downpour(**given).ring(users, longest) == ring


def test_the_plan_says_what_rings_take(run_file: Path) -> None:
    said = str(plan(run_file, ["topology.replicas=2", "topology.shards=1", "method.slot=1024", "method.slots=3"]))
    assert "slices of at most 1.0 KiB, 3 per ring; all rings of a shard take 6.0 KiB" in said
