"""Update rules against their textbook formulas, compiled and interpreted, on slices and whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dbnet import open_run
from dbnet.core.ranges import Range, split
from dbnet.core.registry import family, make
from dbnet.shards.push import Intake, Push
from dbnet.shards.rules import adagrad, adam, momentum, sgd
from dbnet.shards.rules.base import Rule
from dbnet.shards.shard import Shard

KERNELS = [(sgd.descend, 1, (0.1,)), (adagrad.adagrad, 2, (0.1,)), (momentum.momentum, 2, (0.1, 0.9, True)),
           (adam.adam, 3, (0.1, 0.9, 0.99, 1e-3, 0.5))]  # fmt: skip


@pytest.mark.parametrize(("kernel", "vectors", "scalars"), KERNELS, ids=lambda k: getattr(k, "__name__", ""))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_interpreted_equals_compiled(kernel, vectors, scalars, dtype):
    rng = np.random.default_rng(1)
    one = [np.abs(rng.standard_normal(37)).astype(dtype) for _ in range(vectors + 1)]
    two = [v.copy() for v in one]
    kernel(*one, *scalars)
    kernel.py_func(*two, *scalars)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6 if dtype == "float32" else 1e-14)


# As large as the gradients, so that it shows where epsilon stands.
OPTIONS = {"adam": {"epsilon": 0.5}}


def textbook(kind, gradients, w):
    """The formulas of the papers, in NumPy."""
    w, h, v = w.copy(), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        if kind == "sgd":
            w = w - 0.1 * g
        elif kind == "adagrad":
            h = h + g**2
            w = w - 0.1 * np.divide(g, np.sqrt(h), out=np.zeros_like(g), where=h > 0)
        elif kind == "momentum":
            v = 0.9 * v + g
            w = w - 0.1 * v
        else:
            v, h = 0.9 * v + 0.1 * g, 0.999 * h + 0.001 * g**2
            w = w - 0.1 * (v / (1 - 0.9**t)) / (np.sqrt(h / (1 - 0.999**t)) + OPTIONS["adam"]["epsilon"])
    return w


@pytest.mark.parametrize("kind", sorted(family("shards.rules")))
def test_rules_follow_their_papers_on_slices(kind):
    rng = np.random.default_rng(2)
    w = rng.standard_normal(23)
    gradients = rng.standard_normal((6, 23))
    gradients[:, 5] = 0
    rule = make("shards.rules", {"kind": kind, "rate": 0.1, **OPTIONS.get(kind, {})}, "rule")
    shard = Shard(Range(0, 23), rule, w.copy(), np.zeros(1, np.int64), lambda: 0.0)
    for number, g in enumerate(gradients):
        t = shard.begin(0)
        for part in split(23, 4):
            shard.apply(part.lo, g[part.slice], t)
        shard.finish(Push(0, 0, number, number, 1, number))
    np.testing.assert_allclose(shard.params, textbook(kind, gradients, w), rtol=1e-12)


def test_adagrad_leaves_a_coordinate_alone_whose_gradients_were_all_zero():
    rule = make("shards.rules", {"kind": "adagrad", "rate": 0.5}, "rule")
    w, state = np.array([1.0, 2.0]), {"sum": np.zeros(2)}
    rule.apply(w, np.array([0.0, -3.0]), state, 1)
    assert w.tolist() == [1.0, 2.5]
    assert state["sum"].tolist() == [0.0, 9.0]


def test_adagrad_starts_from_its_initial_sum():
    rule = make("shards.rules", {"kind": "adagrad", "rate": 1.0, "initial_sum": 7.0}, "rule")
    shard = Shard(Range(0, 1), rule, np.zeros(1), np.zeros(1, np.int64), lambda: 0.0)
    shard.apply(0, np.array([3.0]), 1)
    assert shard.params[0] == -3.0 / 4.0


def test_nesterov_looks_ahead():
    rule = make("shards.rules", {"kind": "momentum", "rate": 0.1, "momentum": 0.5, "nesterov": True}, "rule")
    w, state = np.zeros(1), {"velocity": np.array([2.0])}
    rule.apply(w, np.array([1.0]), state, 1)
    assert w[0] == pytest.approx(-0.1 * (1.0 + 0.5 * 2.0))


def test_events_grow_and_keep_their_order():
    shard = Shard(Range(0, 1), make("shards.rules", {"kind": "sgd"}, "rule"), np.zeros(1), np.zeros(1, np.int64), lambda: 0.0)
    for number in range(3000):
        shard.finish(Push(0, 0, number, number, 1, number))
    events = shard.take_events()
    assert events["push"].tolist() == list(range(3000)) == events["applied"].tolist()
    assert len(shard.take_events()) == 0
    shard.finish(Push(0, 0, 3000, 3000, 1, 3000))
    assert events["push"][0] == 0, "what was taken stays as it was"


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_of_squares_stay_finite_in_the_parameters_type(kind, dtype):
    shard = Shard(Range(0, 1), make("shards.rules", {"kind": kind}, "rule"), np.zeros(1, dtype), np.zeros(1, np.int64), lambda: 0.0)
    with np.errstate(over="ignore"):
        square = np.dtype(dtype).type(shard.largest) ** 2
        assert np.isfinite(square * 2**31) and not np.isfinite(square * 2**34)


def test_what_a_rule_has_where_nothing_is_said():
    made = {kind: make("shards.rules", {"kind": kind}, "rule") for kind in ("sgd", "adagrad", "momentum", "adam")}
    assert {kind: rule.rate for kind, rule in made.items()} == {"sgd": 0.1, "adagrad": 0.1, "momentum": 0.1, "adam": 0.001}
    adam_, heavy = made["adam"], made["momentum"]
    assert (adam_.beta1, adam_.beta2, adam_.epsilon) == (0.9, 0.999, 1e-8), "those of Kingma & Ba"
    assert (heavy.momentum, heavy.nesterov, made["adagrad"].initial_sum) == (0.9, False, 0.0)


@pytest.mark.parametrize(
    ("options", "local"),
    [
        ({"kind": "sgd", "rate": 0.3}, 0.3),
        ({"kind": "adam", "rate": 0.3}, 0.3),
        # Adagrad's rate is about ten times the best fixed one.
        ({"kind": "adagrad", "rate": 0.3}, 0.03),
        # A constant gradient moves momentum by rate / (1 - momentum) a step.
        ({"kind": "momentum", "rate": 0.3, "momentum": 0.75}, 1.2),
        ({"kind": "momentum", "rate": 0.3, "momentum": 0.75, "nesterov": True}, 1.2),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_replicas_local_steps_have_the_rules_fixed_rate(options, local):
    rule = make("shards.rules", dict(options), "rule")
    assert rule.local_rate() == pytest.approx(local, rel=1e-15)
    if options["kind"] == "momentum":
        w, state = np.zeros(1), {"velocity": np.zeros(1)}
        for t in range(200):
            before = w[0]
            rule.apply(w, np.ones(1), state, t + 1)
        assert before - w[0] == pytest.approx(rule.local_rate(), rel=1e-12)


def test_an_informed_rule_is_told_of_each_push():
    """Slices of two pushes come between each other, a third is refused: what the rule sees is what the events say."""
    told = []

    class Informed(Rule):
        kind = ""
        informed = True

        def apply(self, w, g, state, t, arrival):
            told.append((arrival.replica, arrival.steps, arrival.staleness))

    clock = np.array([5], np.int64)
    shard = Shard(Range(0, 4), Informed(), np.zeros(4), clock, lambda: 0.0)
    one, two, bad = (Intake(shard) for _ in range(3))
    early, late = Push(0, 0, 0, 5, 1, 0), Push(1, 0, 0, 3, 2, 1)
    good, nan = np.ones(2), np.full(2, np.nan)
    one.take(early, good, [(0, 0, 2)], True, False)
    two.take(late, good, [(0, 0, 1), (1, 1, 1)], True, False)
    bad.take(Push(2, 0, 0, 0, 1, 0), nan, [(0, 0, 2)], True, True)
    one.take(early, good, [(0, 2, 2)], False, True)
    two.take(late, good, [(0, 2, 2)], False, True)
    assert told == [(0, 1, 0), (1, 2, 2), (1, 2, 2), (0, 1, 0), (1, 2, 2)]
    two.take(Push(1, 0, 1, 5, 1, 2), np.ones(4), [(0, 0, 4)], True, True)
    event = shard.take_events()[-1]
    assert told[-1] == (1, 1, 2) and event["applied"] - event["fetched"] == 2


def test_a_staleness_aware_run_divides_the_rate_and_is_replayed(run_file, dbnet):
    file = Path(__file__).parents[1] / "support" / "staleness_aware.py"
    words = [f"model.modules=['{file}']", "rule={kind='staleness_aware', rate=0.1}", "topology.partitions=2", "stop.steps=8"]
    # A push of two gradients is as stale as the older one, though there are a fetch and pushes of others between them.
    recorded = ["--record", "--quiet", "topology.replicas=3", "rule.schedule.warmup=2", "method.n_push=2", "warmstart.steps=3"]
    done = dbnet("train", run_file, *words, *recorded)
    assert (done.code, done.err) == (0, "")
    run = open_run("out/run.h5")
    assert run.staleness.index.max() > 1, "nothing is stale: this shows nothing"
    again = dbnet("replay", "out/run.h5", "--trust-modules")
    assert again.code == 0 and "identical" in again.out, again
    # Clocks count on from the checkpoint's, slices from nought.
    more = [*words, *recorded, "stop.steps=16", "--resume"]
    assert dbnet("train", run_file, *more).code == 0 and open_run("out/run-2.h5").staleness.index.max() < 10
    again = dbnet("replay", "out/run-2.h5", "--trust-modules")
    assert again.code == 0 and "identical" in again.out, again
    plain = dbnet("train", run_file, *words, "rule.kind=sgd", "--quiet", "topology.replicas=3", "run.name=plain")
    assert plain.code == 0 and open_run("out/plain.h5").accuracy != run.accuracy
    synchronous = ["method.kind=synchronous", "topology.partitions=1", "--quiet"]
    for name, kind in (("a", "sgd"), ("b", "staleness_aware")):
        assert dbnet("train", run_file, *words, *synchronous, f"rule.kind={kind}", f"run.name={name}").code == 0
    a, b = (open_run(f"out/{name}.h5").evaluation.drop(columns="seconds") for name in "ab")
    assert a.equals(b), "synchronous steps are never stale"
