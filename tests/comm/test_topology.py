"""Who is what: the numbering is a bijection, and every message about a wrong world says how to start the right one."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnet.comm.communicators import cores_for
from dbnet.comm.topology import Role, Topology
from dbnet.core.errors import UserError

worlds = st.builds(Topology, st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))


@given(worlds)
def test_every_rank_has_one_role(world: Topology) -> None:
    roles = [world.role(rank) for rank in range(world.size)]
    assert roles.count(Role.COORDINATE) == 1 and roles[0] is Role.COORDINATE
    assert roles.count(Role.SERVE) == world.shards and roles.count(Role.WORK) == world.origins
    shards = [world.shard_rank(s) for s in range(world.shards)]
    origins = {world.origin_rank(r, p): (r, p) for r in range(world.replicas) for p in range(world.partitions)}
    assert sorted([0, *shards, *origins]) == list(range(world.size))
    assert all(world.place(rank) == place for rank, place in origins.items())
    assert len({world.name(rank) for rank in range(world.size)}) == world.size


@given(worlds, st.integers(0, 50))
def test_shards_own_every_parameter_once(world: Topology, parameters: int) -> None:
    owned = [i for r in world.shard_ranges(parameters) for i in range(r.lo, r.hi)]
    assert owned == list(range(parameters)) and len(world.shard_ranges(parameters)) == world.shards


def test_a_wrong_world_is_named() -> None:
    world = Topology(2, 3, 2)
    world.check(9, "")
    with pytest.raises(UserError) as error:
        world.check(4, "dbnet train a.toml")
    said = str(error.value)
    assert "1 coordinator + 2 shards + 3 replicas x 2 partitions = 9 ranks" in said
    assert "4 were started" in said and "mpirun -n 9 dbnet train a.toml" in said


def test_cores_without_mpi_are_those_of_the_process() -> None:
    assert cores_for(None, True) == (len(os.sched_getaffinity(0)),) * 2


class Node:
    """A node whose ranks have the cores given."""

    def __init__(self, others: list[tuple[list[int], bool]]) -> None:
        self.others = others

    def allgather(self, mine: tuple[list[int], bool]) -> list[tuple[list[int], bool]]:
        return [mine, *self.others]


def test_computing_ranks_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert cores_for(Node([]), True) == (4, 4)
    assert cores_for(Node([([0, 1, 2, 3], True)]), True) == (2, 4)
    assert cores_for(Node([([0, 1, 2, 3], False)]), True) == (4, 4)
    assert cores_for(Node([([4, 5], True)]), True) == (4, 4)
    assert cores_for(Node([([0], True)] * 9), True) == (1, 4)
