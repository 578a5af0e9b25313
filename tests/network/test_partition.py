"""Cut networks equal uncut ones; every crossing value is sent once; nothing else is."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dbnet.commands.see.checks.partitioned import run
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, intersect, relative, size_of, whole
from dbnet.core.registry import make
from dbnet.network.cost import Machine
from dbnet.network.layers.base import Layer
from dbnet.network.model import Model, footprint
from dbnet.network.network import Network
from dbnet.network.partition import Cut, cut_boxes

PARTS = (1, 2, 3, 4, 6, 8)


def model_of(layers, shape, outputs, loss="softmax", dtype="float64", decay=0.0) -> Model:
    made: list[Layer] = [make("network.layers", dict(entry), "layer") for entry in layers]
    return Model(made, make("network.losses", {"kind": loss}, "loss"), shape, outputs, dtype, decay)


def dense(units, activation="sigmoid", **more):
    return {"kind": "dense", "units": units, "activation": activation, **more}


NETWORKS = {
    "speech": ([dense(13), dense(11), dense(11, "tanh"), dense(10, "identity")], (9,), 10, "softmax"),
    "images": (
        [
            {"kind": "local", "maps": 3, "field": 4, "activation": "relu"},
            {"kind": "pool", "over": "l2", "field": 2, "stride": 1},
            {"kind": "norm", "radius": 1},
            {"kind": "local", "maps": 2, "field": 3, "activation": "tanh"},
            {"kind": "pool", "over": "max", "field": 2},
            dense(12, "identity"),
        ],
        (15, 13, 2),
        12,
        "logistic",
    ),
    "conv": (
        [
            {"kind": "conv", "maps": 4, "field": 3, "padding": 1, "activation": "tanh"},
            {"kind": "pool", "over": "average", "field": 3, "stride": 2},
            {"kind": "conv", "maps": 3, "field": [3, 2], "stride": [2, 1], "activation": "sigmoid"},
            {"kind": "dropout", "rate": 0.4},
            dense(7),
            dense(5, "identity"),
        ],
        (11, 9, 1),
        5,
        "softmax",
    ),
    "gaps": (
        [
            {"kind": "local", "maps": 2, "field": 2, "activation": "tanh"},
            {"kind": "pool", "field": [1, 2], "stride": 3},
            {"kind": "conv", "maps": 3, "field": 1, "stride": [2, 3]},
            dense(4, "identity"),
        ],
        (23, 17, 1),
        4,
        "softmax",
    ),
    "tiny": (
        [{"kind": "local", "maps": 2, "field": 2}, {"kind": "pool", "field": 2}, dense(3, "relu"), dense(2, "identity")],
        (5, 4, 1),
        2,
        "squared",
    ),
}  # fmt: skip


def case(name, batch=6, whole_numbers=False, decay=0.0):
    layers, shape, outputs, loss = NETWORKS[name]
    if whole_numbers:
        layers = [{**layer, "activation": "relu"} if "activation" in layer else layer for layer in layers]
        loss = "squared"
    model, rng = model_of(layers, shape, outputs, loss, decay=decay), np.random.default_rng(8)
    w, x = 0.5 * rng.standard_normal(model.layout.size), rng.standard_normal((*shape, batch))
    if whole_numbers:
        w, x = np.round(2 * w), np.round(2 * x)
    return model, w, x, rng.integers(0, outputs, batch)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("partitions", PARTS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_cut_network_equals_the_uncut_one(name, partitions, accumulate):
    model, w, x, target = case(name, decay=0.1)
    one = run(model, 1, 6, w, x, target, 5, accumulate, start=0.25)
    cut = run(model, partitions, 6, w, x, target, 5, accumulate, start=0.25)
    np.testing.assert_allclose(cut.y, one.y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(cut.g, one.g, rtol=0, atol=1e-12)
    assert cut.score[0] == pytest.approx(one.score[0], rel=1e-12)
    assert all(part.score == cut.score for part in cut.parts)
    assert cut.score[1] == one.score[1]


@pytest.mark.parametrize("name", ["speech", "tiny"])
@pytest.mark.parametrize("partitions", PARTS)
def test_whole_numbers_give_the_same_bits(name, partitions):
    model, w, x, target = case(name, batch=8, whole_numbers=True)
    one, cut = (run(model, p, 8, w, x, target, 8) for p in (1, partitions))
    np.testing.assert_array_equal(cut.y, one.y)
    np.testing.assert_array_equal(cut.g, one.g)


@pytest.mark.parametrize("shape", [(2, 12), (1, 9), (7, 4)], ids=str)
@pytest.mark.parametrize("loss", ["softmax", "squared", "logistic"])
@pytest.mark.parametrize("partitions", [3, 4])
def test_an_image_as_the_output_is_judged_unit_by_unit(shape, loss, partitions):
    """Labels, and vectors where the loss takes them, fall on the same units whoever owns these."""
    outputs, rng = shape[0] * (shape[1] - 2) * 2, np.random.default_rng(7)
    model = model_of([{"kind": "local", "maps": 2, "field": [1, 3]}], (*shape, 1), outputs, loss)
    w, x = rng.standard_normal(model.layout.size), rng.standard_normal((*shape, 1, 5))
    targets = [rng.integers(0, outputs, 5)] + [rng.standard_normal((outputs, 5))] * (loss == "squared")
    for target in targets:
        one, cut = (run(model, p, 5, w, x, target, 5) for p in (1, partitions))
        np.testing.assert_allclose(cut.g, one.g, rtol=0, atol=1e-12)
        assert cut.score == (pytest.approx(one.score[0], rel=1e-12), one.score[1])


def test_a_cut_of_the_last_layer_into_columns_is_refused():
    model = model_of([{"kind": "pool", "over": "average", "cut": [2, 2]}], (8, 8, 1), 16)
    with pytest.raises(UserError, match=r"model.layers.0.cut = \[2, 2\] .* not neighbours.*cut it into rows, \[4, 1\]"):
        Cut(model, 4)
    assert Cut(model, 4, given=False).chosen == [(4, 1)]


IMAGE_LAYERS = [
    {"kind": "local", "maps": 3, "field": 3},
    {"kind": "local", "maps": 2, "field": [2, 4], "stride": [3, 2], "padding": [1, 2]},
    {"kind": "conv", "maps": 3, "field": 3, "padding": 2},
    {"kind": "conv", "maps": 2, "field": [1, 3], "stride": 2},
    {"kind": "pool", "over": "max", "field": 3, "stride": 2, "padding": 1},
    {"kind": "pool", "over": "average", "field": [2, 3]},
]


@pytest.mark.parametrize("layer", IMAGE_LAYERS, ids=lambda e: "-".join(map(str, e.values())))
@pytest.mark.parametrize("cut", [[1, 2], [2, 1], [2, 2], [3, 2], [1, 6], [8, 1], [4, 2]], ids=str)
def test_every_image_layer_on_every_grid_gives_the_same_bits(layer, cut):
    """Whole numbers through two such layers, also with more parts than rows and with neighbours cut differently."""
    below = {"kind": "local", "maps": 2, "field": 2, "activation": "relu", "cut": cut}
    top = dense(4, "identity")
    rng, shape, batch = np.random.default_rng(9), (9, 8, 2), 4
    partitions = cut[0] * cut[1]
    whole_model = model_of([below, {**layer, "cut": cut[::-1]}, top], shape, 4, "squared")
    w, x = np.round(rng.standard_normal(whole_model.layout.size) * 2), np.round(rng.standard_normal((*shape, batch)) * 2)
    if layer.get("over") == "average":
        w[:] = 6 * w
    target = rng.integers(0, 4, batch)
    one = run(model_of([{**below, "cut": None}, layer, top], shape, 4, "squared"), 1, batch, w, x, target, batch)
    many = run(whole_model, partitions, batch, w, x, target, batch)
    np.testing.assert_array_equal(many.y, one.y)
    np.testing.assert_allclose(many.g, one.g, rtol=1e-13)
    if layer.get("over") != "average":
        np.testing.assert_array_equal(many.g, one.g)


def edges(layer, x_shape, y_shape):
    """Return for each output unit the inputs that move it, by brute force through `needs` of single units."""
    for unit in product(*(range(n) for n in y_shape)):
        yield unit, layer.needs(x_shape, tuple(Range(i, i + 1) for i in unit))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("partitions", [2, 3, 4, 8])
def test_every_crossing_value_is_sent_once_and_nothing_else(name, partitions):
    """Counted by the exchange = distinct (crossing unit, destination) pairs of the connectivity graph, up; the same number down."""
    model, w, x, target = case(name)
    result, pairs = run(model, partitions, 6, w, x, target, 6), 0
    for i in range(1, len(model.layers)):
        owner = np.full(model.shapes[i], -1)
        for p in range(partitions):
            owner[relative(result.cut.boxes[p][i], whole(model.shapes[i]))] = p
        assert (owner >= 0).all(), "every unit has an owner"
        wanted = set()
        above = np.full(model.shapes[i + 1], -1)
        for p in range(partitions):
            above[relative(result.cut.boxes[p][i + 1], whole(model.shapes[i + 1]))] = p
        for unit, need in edges(model.layers[i], model.shapes[i], model.shapes[i + 1]):
            for source in product(*(range(r.lo, r.hi) for r in need)):
                if owner[source] != above[unit]:
                    wanted.add((source, int(above[unit])))
        pairs += len(wanted)
        assert result.cut.crossing(i) == len(wanted)
    assert sum(part.exchange.values for part in result.parts) == 2 * pairs


def test_nothing_is_sent_where_nothing_crosses():
    model = model_of(
        [{"kind": "pool", "field": 2, "cut": [4, 1]}, {"kind": "pool", "field": 1, "cut": [4, 1]}], (8, 8, 1), 16, "squared"
    )
    assert Cut(model, 4).messages(1) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_cut_not_copied(name):
    """The sum over the partitions is one network's, but for shared parameters."""
    model, *_ = case(name)
    shared = sum(e.range.size for e in model.layout.entries if e.name.split(".")[1] == "conv")
    for partitions in (2, 4):
        result = run(model, partitions, 6, *case(name)[1:], 6)
        assert sum(part.size for part in result.parts) == model.layout.size + (partitions - 1) * shared


def test_memory_of_all_partitions_is_about_one_rank():
    """Parameters and activations of a local image network of some size, P ranks against one."""
    layers = [
        {"kind": "local", "maps": 8, "field": 10},
        {"kind": "pool", "over": "l2", "field": 5, "stride": 1},
        {"kind": "norm", "radius": 2},
        {"kind": "local", "maps": 8, "field": 10},
        dense(50, "identity"),
    ]
    model = model_of(layers, (100, 100, 3), 50, "logistic", "float32")
    item, batch = 4, 8

    def memory(boxes, size):
        return 2 * size * item + Network(model, batch, boxes).nbytes

    one = memory(model.boxes(), model.layout.size)
    for partitions in (2, 4, 8):
        cut = Cut(model, partitions, batch)
        together = sum(memory(boxes, footprint(model, boxes, True).size) for boxes in cut.boxes)
        assert together <= 1.15 * one, f"{partitions} partitions: {together / one:.3f}"


@pytest.mark.parametrize(
    ("shape", "grid", "partitions"),
    [((7, 5, 3), (2, 3), 6), ((2, 2, 1), (4, 2), 8), ((10,), (4,), 4), ((3,), (5,), 5), ((6, 6, 2), (2, 1), 4)],
)
def test_boxes_tile_the_layer(shape, grid, partitions):
    boxes, seen = cut_boxes(shape, grid, partitions), np.zeros(shape, int)
    for box in boxes:
        seen[relative(box, whole(shape))] += 1
    assert (seen == 1).all()
    assert all(size_of(intersect(a, b)) == 0 for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_cost_model_prefers_rows_and_columns_for_square_images():
    model = model_of(
        [{"kind": "local", "maps": 4, "field": 5}, {"kind": "local", "maps": 4, "field": 5}, dense(4, "identity")], (64, 64, 1), 4
    )
    cut = Cut(model, 16, 32)
    assert cut.chosen[0] == cut.chosen[1]
    assert cut.chosen[0] in {(4, 4), (2, 8), (8, 2)}


def test_a_cut_that_does_not_fit_is_one_sentence():
    model = model_of([dense(8, cut=[3]), dense(4, "identity")], (5,), 4)
    with pytest.raises(UserError, match=r"model.layers.0.cut = \[3\] does not fit a layer of shape 8 and 2 partitions"):
        Cut(model, 2)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("partitions", [1, 2, 4])
def test_the_plan_counts_what_all_partitions_do_together(name, partitions):
    """The loss's statistics, from each partition to all others, and the sum of shared gradients."""
    model, *rest = case(name)
    result, item, batch = run(model, partitions, 6, *rest, 6), model.dtype.itemsize, 6
    sent = sum(part.network.stats.nbytes * (partitions - 1) for part in result.parts)
    assert result.cut.statistics * item * batch == sent
    assert result.cut.shared == max(part.network.share.size for part in result.parts)
    assert (result.cut.shared > 0) == (name in ("conv", "gaps") and partitions > 1)
    slow = Cut(model, partitions, batch, Machine(rate=1e30, bandwidth=1e-3, latency=0.0, memory=1e30))
    least = (sent + 2 * result.cut.shared * item * (partitions - 1)) / partitions / 1e-3
    moved = 0.0 if partitions == 1 else sum(slow.exchange_seconds(slow.messages(i)) for i in range(1, len(model.layers)))
    assert slow.seconds == pytest.approx(moved + least, rel=1e-9, abs=1e-9)
