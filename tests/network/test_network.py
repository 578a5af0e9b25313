"""The serial network: gradients against finite differences, buffers, initial values, weight decay."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, split
from dbnet.core.registry import family, make
from dbnet.network.layers.dense import Dense
from dbnet.network.losses.logistic import Logistic
from dbnet.network.losses.softmax import Softmax
from dbnet.network.losses.squared import Squared
from dbnet.network.model import Model
from dbnet.network.network import Network


def build(activation="sigmoid", loss=None, dtype="float64", decay=0.0, sizes=(7, 6, 5, 4), batch=9):
    layers = [Dense(units=n, activation=activation) for n in sizes[1:-1]] + [Dense(units=sizes[-1])]
    model = Model(layers, loss or Softmax(), (sizes[0],), sizes[-1], dtype, decay)
    network = Network(model, batch)
    rng = np.random.default_rng(3)
    w = rng.standard_normal(network.size).astype(dtype)
    network.x[:] = rng.standard_normal(network.x.shape)
    return model, network, w, rng


def total(network, w, target, count, decay):
    loss, _ = network.score(w, target, count)
    weights = sum(np.sum(v**2) for name, v in network.model.layout.views(w).items() if name.endswith("W"))
    return loss / count + decay / 2 * weights


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "tanh", "relu"])
@pytest.mark.parametrize("kind", sorted(family("network.losses")))
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_gradient_equals_finite_differences(activation, kind, decay):
    """Also with padding columns, and when it is added to an accrued one."""
    model, network, w, rng = build(activation, family("network.losses")[kind](), decay=decay)
    target, count = rng.integers(0, 4, network.batch), network.batch - 2
    g = np.empty_like(w)
    network.loss_and_gradient(w, g, target, count, accumulate=False)
    judge, h = Network(model, network.batch, training=False), 1e-6
    judge.x[:] = network.x
    numeric = np.empty_like(w)
    for i in range(w.size):
        ends = []
        for sign in (1, -1):
            v = w.copy()
            v[i] += sign * h
            ends.append(total(judge, v, target, count, decay))
        numeric[i] = (ends[0] - ends[1]) / (2 * h)
    np.testing.assert_allclose(g, numeric, atol=3e-8, rtol=1e-6)
    again = g.copy()
    network.loss_and_gradient(w, again, target, count, accumulate=True)
    np.testing.assert_allclose(again, 2 * g, rtol=1e-12, atol=1e-15)


def test_vector_targets_of_the_squared_error():
    _, network, w, rng = build("tanh", Squared())
    target, g = rng.standard_normal((4, network.batch)), np.empty_like(w)
    loss, right = network.loss_and_gradient(w, g, target, network.batch, False)
    y = network.bind(w, g)[-1].y
    assert right == 0
    assert loss == pytest.approx(0.5 * np.sum((y - target) ** 2))
    np.testing.assert_allclose(g[-4:], (y - target).mean(axis=1), rtol=1e-12)


def test_padding_columns_count_nothing():
    _, network, w, rng = build()
    target, g, other = rng.integers(0, 4, 9), np.empty_like(w), np.empty_like(w)
    first = network.loss_and_gradient(w, g, target, 5, False)
    network.x[:, 5:] = 1e3
    second = network.loss_and_gradient(w, other, target, 5, False)
    assert first == second
    np.testing.assert_array_equal(g, other)


def test_loss_and_accuracy_are_the_textbook_ones():
    _, network, w, rng = build("relu")
    target = rng.integers(0, 4, 9)
    loss, right = network.score(w, target, 9)
    z = network.bind(w, None)[-1].y
    log_p = z - z.max(0) - np.log(np.exp(z - z.max(0)).sum(0))
    assert loss == pytest.approx(-log_p[target, np.arange(9)].sum(), rel=1e-13)
    assert right == np.sum(z.argmax(0) == target)


def test_float32_is_close_to_float64():
    results = {}
    for dtype in ("float32", "float64"):
        _, network, w, rng = build(dtype=dtype, sizes=(50, 40, 30), batch=16)
        g = np.empty_like(w)
        loss, _ = network.loss_and_gradient(w, g, rng.integers(0, 30, 16), 16, False)
        results[dtype] = np.append(g, loss).astype(np.float64)
    np.testing.assert_allclose(results["float32"], results["float64"], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("loss", [Softmax(), Squared(), Logistic()])
def test_a_step_allocates_no_array(loss):
    _, network, w, rng = build(loss=loss, sizes=(300, 300, 200), batch=64)
    target, g = rng.integers(0, 200, 64), np.empty_like(w)
    network.loss_and_gradient(w, g, target, 64, False)
    tracemalloc.start()
    for _ in range(5):
        network.loss_and_gradient(w, g, target, 64, False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000, f"{peak} bytes; one activation is {300 * 64 * 8}"


@pytest.mark.parametrize("how", ["uniform", "normal"])
def test_initial_values_do_not_depend_on_the_cut(how):
    layers = [Dense(units=400, activation="sigmoid", init=f"glorot_{how}"), Dense(units=10)]
    model = Model(layers, Softmax(), (300,), 10, "float64")
    whole = np.empty(model.layout.size)
    model.layout.draw(Range(0, whole.size), 7, whole)
    for shards in (2, 3, 7):
        parts = []
        for part in split(whole.size, shards):
            parts.append(np.empty(part.size))
            model.layout.draw(part, 7, parts[-1])
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    other = np.empty_like(whole)
    model.layout.draw(Range(0, whole.size), 8, other)
    assert not np.array_equal(other, whole)
    first = model.layout.views(whole)["0.dense.W"]
    assert abs(first.mean()) < 1e-2 * np.abs(first).max()
    if how == "uniform":
        assert 0.99 * model.layout.entries[0].initial.spread < np.abs(first).max() <= model.layout.entries[0].initial.spread
    assert not model.layout.views(whole)["0.dense.b"].any()


VARIANCES = {
    "glorot": lambda n_in, n_out: 2 / (n_in + n_out), "he": lambda n_in, n_out: 2 / n_in, "lecun": lambda n_in, n_out: 1 / n_in
}  # fmt: skip


@pytest.mark.parametrize("how", ["uniform", "normal"])
@pytest.mark.parametrize("name", VARIANCES)
def test_initializers_have_the_variance_of_their_papers(name, how):
    """Of a dense layer 300 -> 400, and of convolutions: 5 x 5 fields of 4 maps, 8 maps, an input seen by 25 / 4 of them."""
    dense = {"kind": "dense", "units": 400, "init": f"{name}_{how}"}
    conv = {"kind": "conv", "maps": 8, "field": 5, "stride": 2, "init": f"{name}_{how}"}
    for entry, shape, n_in, n_out in ((dense, (300,), 300, 400), (conv, (11, 11, 4), 100, 50)):
        layer = make("network.layers", entry, "layer")
        model = Model([layer], Squared(), shape, int(np.prod(layer.output_shape(shape))), "float64")
        values = [np.empty(model.layout.size) for _ in range(40 if layer.kind == "conv" else 1)]
        for seed, drawn in enumerate(values):
            model.layout.draw(Range(0, drawn.size), seed, drawn)
        w = np.concatenate([model.layout.views(drawn)[f"0.{layer.kind}.W"].ravel() for drawn in values])
        wanted = VARIANCES[name](n_in, n_out)
        assert abs(w.mean()) < 4 * np.sqrt(wanted / w.size)
        assert w.var() == pytest.approx(wanted, rel=0.03)
        # Flatness: the fourth moment of a uniform distribution is 1.8 variances squared, of a normal one 3.
        assert (w**4).mean() == pytest.approx((1.8 if how == "uniform" else 3) * wanted**2, rel=0.06)
        assert not model.layout.views(values[0])[f"0.{layer.kind}.b"].any()


def test_scaled_and_constant_initializers():
    def drawn(options):
        return make("network.parameters.initializers", options, "init").drawn(300, 100, "relu")

    for kind, options in {"he_normal": {"scale": 2}, "glorot_normal": {"mode": "fan_avg"}, "lecun_normal": {}}.items():
        assert drawn({"kind": "scaled", "distribution": "normal", **options}).spread == pytest.approx(drawn({"kind": kind}).spread)
    assert drawn({"kind": "scaled", "mode": "fan_out"})[1] == pytest.approx(np.sqrt(3 / 100))
    model = Model(
        [make("network.layers", {"kind": "dense", "units": 2, "init": {"kind": "constant", "value": 0.5}}, "layer")],
        Squared(),
        (3,),
        2,
        "float64",
    )
    w = np.empty(8)
    model.layout.draw(Range(0, 8), 1, w)
    assert w.tolist() == [0.5] * 6 + [0, 0]


def test_units_that_do_not_fit_the_classes_are_one_sentence():
    with pytest.raises(UserError, match="The last layer has 4 units but the data ask for 10; set its units to 10"):
        Model([Dense(units=4)], Softmax(), (7,), 10, "float32")


@pytest.mark.parametrize("kind", ["local", "conv", "dense"])
def test_initial_values_keep_the_variance_from_layer_to_layer(kind):
    """Over four layers; with twice the variance a layer it would grow to 16 times."""
    image = {"maps": 8, "field": 5, "padding": 2}
    entry = {"kind": kind, **({"units": 512} if kind == "dense" else image)}
    shape = (512,) if kind == "dense" else (16, 16, 8)
    layers = [make("network.layers", dict(entry), "layer") for _ in range(4)]
    model = Model(layers, Squared(), shape, int(np.prod(shape)), "float64")
    network, w = Network(model, 16), np.empty(model.layout.size)
    model.layout.draw(Range(0, w.size), 3, w)
    network.x[:] = np.random.default_rng(1).standard_normal(network.x.shape)
    squares = []
    for cell in network.forward(w, np.zeros((network.x.shape[0], 16))):
        # Without the border, where outputs see less.
        inner = cell.y if kind == "dense" else cell.y[6:-6, 6:-6]
        squares.append(float((inner**2).mean()))
    assert 0.5 < squares[-1] < 1.6, squares
