"""What a step of a cut replica takes on a machine: by hand for small networks; what it counts is what partitions really send."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import product

import numpy as np
import pytest
from geometries import CLASSES, Geometry
from test_partition import NETWORKS, case, dense, model_of

from dbnet.commands.plan.step import replica_step
from dbnet.commands.see.checks import partitioned
from dbnet.network.cost import Profile
from dbnet.network.model import Model
from dbnet.network.partition import Cut, cut_boxes, grids
from dbnet.run.simulated.noise import Noise

RATE, LATENCY, SPEED, CALL = 1e6, 1e-3, 1e6, 1e-5


def machine(ranks: int = 1, speed: float = SPEED, **more: object) -> Profile:
    """Return a machine of round numbers."""
    slow, fast = {"latency": LATENCY, "bandwidth": speed / 1e9}, {"latency": LATENCY / 10, "bandwidth": speed / 1e8}
    tables = {"compute": {"rate": RATE / 1e9, "apply": 1.0}, "host": {"ranks": ranks, "call": CALL}}
    return Profile.model_validate({**tables, "between": slow, "inside": fast, **more})


def gathered(cut: Cut, latency: float, speed: float) -> float:
    """Return the seconds in which the partitions tell each other the loss's statistics."""
    others = cut.partitions - 1
    return others.bit_length() * (latency + CALL) + others * cut.model.loss.width * 8 * cut.batch / speed


@pytest.mark.parametrize("name", NETWORKS)
def test_an_uncut_replica_takes_what_it_computes(name: str) -> None:
    model, profile = case(name)[0], machine(compute={"rate": 1.0, "rates": {"dense": 0.3}, "step": 1e-4, "apply": 1.0})
    cut = Cut(model, 1, 6)
    step, copied = replica_step(profile, cut), sum(int(load.copied.sum()) for load in cut.loads)
    assert step.compute == pytest.approx(profile.step_seconds(model, model.boxes(), 6), rel=1e-12)
    # Values that the next layer does not look at are left out by a copy, and their deltas.
    assert step.waited == pytest.approx(2 * copied * 6 * 8 / (10 * SPEED), rel=1e-9, abs=1e-15)
    assert (copied > 0) == (name in ("images", "gaps", "tiny"))


@pytest.mark.parametrize("speed", [1e5, 1e8])
def test_dense_layers_wait_for_all_values_and_hide_deltas_behind_the_gradient(speed: float) -> None:
    """4 inputs -> 6 units -> 2 units on two hosts: 3 values go each way, before the second layer and after it."""
    cut = Cut(model_of([dense(6), dense(2, "identity")], (4,), 2), 2, 10)
    first, second = 3 * 4 * 2 * 10 / RATE, 6 * 2 * 10 / RATE
    moves = LATENCY + 3 * 8 * 10 / speed
    up = first + 2 * CALL + moves + second
    down = second + 2 * CALL + max(second, moves) + first
    step = replica_step(machine(speed=speed), cut)
    assert step.total == pytest.approx(up + gathered(cut, LATENCY, speed) + down, rel=1e-12)
    assert step.compute == pytest.approx(2 * first + 3 * second, rel=1e-12)


@pytest.mark.parametrize("speed", [1e4, 1e9])
def test_images_compute_their_interior_meanwhile(speed: float) -> None:
    """A column of 10 pixels, fields of 3: of 3 outputs 2 need nothing of the neighbour, who sends 1 value."""
    layer = {"kind": "local", "maps": 1, "field": [3, 1], "cut": [2, 1]}
    cut = Cut(model_of([layer, layer], (10, 1, 1), 6), 2, 10)
    one = 3 * 2 * 10 / RATE
    moves = LATENCY + 8 * 10 / speed
    up = 4 * one + 2 * CALL + max(2 * one, moves) + one
    down = 3 * one + 2 * CALL + max(3 * one, moves) + 4 * one
    assert replica_step(machine(speed=speed), cut).total == pytest.approx(up + gathered(cut, LATENCY, speed) + down, rel=1e-12)


def test_partitions_of_a_host_share_its_card_and_their_neighbours_pay_less() -> None:
    """Each of four partitions has 2 values for the others: alone on hosts, two by two, all on one."""
    cut = Cut(model_of([dense(8), dense(4, "identity")], (1,), 4), 4, 100)
    each, first, second, found = 2 * 8 * 100, 2 * 2 * 100 / RATE, 8 * 2 * 100 / RATE, []
    for ranks, faster in ((1, 1), (2, 1), (4, 10), (0, 10)):
        rest = 2 * first + 2 * second + 12 * CALL + gathered(cut, LATENCY / faster, SPEED * faster)
        found.append(replica_step(machine(ranks), cut).total - rest)
    far, near = LATENCY + 3 * each / SPEED, LATENCY / 10 + 3 * each / SPEED / 10
    # A card sends what its two partitions have for the two on the other host.
    card = LATENCY + 4 * each / SPEED
    assert found == pytest.approx([moved + max(second, moved) for moved in (far, card, near, near)], rel=1e-9)


def test_a_card_takes_in_what_all_others_send_it() -> None:
    """Three hosts have two values each for a single unit on one of them, whose own value goes to another one.

    So 4 values come in there, and then 1; on the way back 1, and 4 that leave.
    """
    cut = Cut(model_of([dense(6), dense(1), dense(2, "identity")], (4,), 2), 3, 10)
    slow, slower = (replica_step(machine(speed=speed), cut).total - gathered(cut, LATENCY, speed) for speed in (200.0, 100.0))
    assert (slower - slow) / (1 / 100 - 1 / 200) == pytest.approx(10 * 8 * 10, rel=1e-9)


def test_a_part_of_a_network_that_no_cache_holds_takes_longer_by_what_is_in_it() -> None:
    """44 parameters of 8 bytes, of which each of two partitions has a half; 1 s for each GB."""
    model = model_of([dense(6), dense(2, "identity")], (4,), 2)
    warm, cold = machine(), machine(large={"above": 0.0, "bandwidth": 1.0, "apply": 1.0, "step": 1.0})
    for boxes in Cut(model, 2, 10).boxes:
        longer = cold.step_seconds(model, boxes, 10) - warm.step_seconds(model, boxes, 10)
        assert longer == pytest.approx(22 * 8e-9, rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_counted_is_what_partitions_send(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and messages of every pair of partitions, up and down, of random fields that overlap or leave gaps."""
    geometry, partitions, batch = Geometry(seed), 2 + seed % 4, 3
    model: Model = model_of(geometry.layers, geometry.shape, CLASSES)
    sent: Counter[tuple[int, int, int]] = Counter()
    start = partitioned.ThreadLink.start

    def counting(link, transfers):
        for kind, buffer, queue in transfers:
            if kind == "send":
                source, target, _ = next(key for key, value in link._hub._queues.items() if value is queue)
                sent[source, target, buffer.nbytes] += 1
        start(link, transfers)

    monkeypatch.setattr(partitioned.ThreadLink, "start", counting)
    x, w = np.ones((*geometry.shape, batch)), np.zeros(model.layout.size)
    cut = partitioned.run(model, partitions, batch, w, x, np.zeros(batch, int), batch).cut
    counted: Counter[tuple[int, int, int]] = Counter()
    for load in cut.loads:
        for source, target, values in zip(load.source, load.target, load.values, strict=True):
            counted[source, target, values * batch * 8] += 1
            counted[target, source, values * batch * 8] += 1
    assert counted == sent


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("partitions", [3, 4, 6])
def test_what_decides_on_grids_is_what_would_be_sent(name: str, partitions: int) -> None:
    """Messages and values of each partition, counted at once and from the list of messages, for all pairs of grids."""
    cut = Cut(case(name)[0], partitions)
    shapes = cut.model.shapes
    for i in range(1, len(cut.model.layers)):
        below, above = ([cut_boxes(shape, grid, partitions) for grid in grids(shape, partitions)] for shape in shapes[i : i + 2])
        for owned, wanted in product(below, above):
            moved = np.zeros((2, partitions), int)
            for message in cut._crossing(i, owned, wanted):
                for end in (message.source, message.target):
                    moved[:, end] += 1, message.size
            assert np.array_equal(cut._moved(i, owned, wanted), moved)


def test_the_slowest_of_many_is_what_their_distribution_says() -> None:
    def slowest(n: int, **noise: object) -> float:
        return machine(noise=noise).slowest(n)

    harmonic = sum(1 / i for i in range(1, 41))
    assert slowest(40, kind="none") == 1
    assert slowest(40, kind="exponential") == pytest.approx(harmonic, rel=1e-12)
    # A gamma distribution whose standard deviation is its mean is the exponential one.
    assert slowest(40, kind="gamma", variation=1.0) == pytest.approx(harmonic, rel=1e-5)
    assert slowest(1, kind="gamma", variation=0.1) == pytest.approx(1, rel=1e-5)
    for noise in ({"kind": "gamma", "variation": 0.3}, {"kind": "tail", "share": 0.05, "longest": 20.0}):
        draws = Noise(machine(noise=noise), 1)
        drawn = np.array([[draws.step(entity, event) for event in range(2000)] for entity in range(8)])
        assert slowest(8, **noise) == pytest.approx(drawn.max(axis=0).mean(), rel=0.04)


def test_large_networks_are_predicted_of_their_shapes_alone() -> None:
    """1.6 billion parameters, of which no array is made."""
    stage = [{"kind": "local", "maps": 36, "field": 10}, {"kind": "pool", "field": 5, "stride": 1, "padding": 2}]
    model = model_of([*stage, *stage, stage[0]], (100, 100, 3), 73 * 73 * 36, "logistic", "float32")
    tracemalloc.start()
    try:
        alone, four = (replica_step(machine(compute={"rate": 100.0, "apply": 1.0}), Cut(model, p, 100)) for p in (1, 4))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert model.layout.size > 1.6e9
    assert alone.compute / 4.2 < four.compute < alone.compute / 3.8
