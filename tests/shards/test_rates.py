"""Learning-rate schedules against their formulas, and rules that follow them."""

from __future__ import annotations

import numpy as np
import pytest

from dbnet import train
from dbnet.core.config import load
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, split
from dbnet.core.registry import family, make
from dbnet.run.setup import setup
from dbnet.shards.push import Push
from dbnet.shards.rules.schedules.base import Horizon, scheduled
from dbnet.shards.shard import Shard

HORIZON = Horizon(per_epoch=8.0, epochs=6.0)
UPDATES = np.arange(1, 61)
E = (UPDATES - 1) / 8
TEXTBOOK = {
    "constant": ({}, np.ones(60)),
    "step": ({"every": 1.5, "gamma": 0.5}, 0.5 ** ((UPDATES - 1) // 12)),
    "linear": ({"last": 0.25}, np.interp(UPDATES, [1, 49], [1, 0.25])),
    "cosine": ({"length": 5}, 0.5 * (1 + np.cos(np.pi * np.minimum(UPDATES - 1, 40) / 40))),
}


@pytest.mark.parametrize("kind", sorted(family("shards.rules.schedules")))
def test_a_schedule_is_its_formula(kind):
    options, wanted = TEXTBOOK[kind]
    schedule = make("shards.rules.schedules", {"kind": kind, **options}, "rule.schedule")
    schedule.check(HORIZON)
    np.testing.assert_allclose([schedule.factor(t, HORIZON) for t in UPDATES], wanted, rtol=1e-12, atol=1e-15)
    assert schedule.factor(1, HORIZON) == 1


@pytest.mark.parametrize("kind", sorted(family("shards.rules.schedules")))
def test_a_warm_up_grows_by_the_same_each_update_and_then_the_schedule_begins(kind):
    options = TEXTBOOK[kind][0] | {"warmup": 1.0}
    schedule = make("shards.rules.schedules", {"kind": kind, **options}, "rule.schedule")
    np.testing.assert_allclose([schedule.factor(t, HORIZON) for t in UPDATES[:8]], np.arange(1, 9) / 8)
    assert schedule.factor(9, HORIZON) == 1
    if hasattr(schedule, "last"):
        end = 8 * (schedule.length or 6)
        assert schedule.factor(9 + (end - 8) / 2, HORIZON) == pytest.approx((1 + schedule.last) / 2)
        assert schedule.factor(end + 1, HORIZON) == schedule.factor(end + 99, HORIZON) == pytest.approx(schedule.last, abs=1e-15)


def test_drops_at_given_epochs():
    schedule = make("shards.rules.schedules", {"kind": "step", "at": [0.7, 2], "gamma": 0.1}, "rule.schedule")
    horizon = Horizon(10 / 3, None)
    found = [schedule.factor(t, horizon) for t in range(1, 10)]
    np.testing.assert_allclose(found, [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("kind", sorted(family("shards.rules")))
def test_a_rule_follows_its_schedule_on_all_slices_of_an_update(kind):
    rng, options = np.random.default_rng(2), {"kind": "cosine", "warmup": 0.25}
    w, gradients = rng.standard_normal(23), rng.standard_normal((6, 23))
    rule = make("shards.rules", {"kind": kind, "rate": 0.1, "schedule": options}, "rule")
    shard = Shard(Range(0, 23), scheduled(rule, HORIZON)[0], w.copy(), np.zeros(1, np.int64), lambda: 0.0)
    state = {name: np.full(23, rule.initial(name)) for name in rule.state}
    for number, g in enumerate(gradients):
        t = shard.begin(0)
        for part in split(23, 4):
            shard.apply(part.lo, g[part.slice], t)
        shard.finish(Push(0, 0, number, number, 1, number))
        rate = 0.1 * rule.schedule.factor(number + 1, HORIZON)
        make("shards.rules", {"kind": kind, "rate": rate}, "rule").apply(w, g, state, number + 1)
    np.testing.assert_array_equal(shard.params, w)


def test_a_constant_rate_is_the_rule_itself():
    rule = make("shards.rules", {"kind": "sgd"}, "rule")
    assert scheduled(rule, HORIZON)[0] is rule


@pytest.mark.parametrize(
    ("options", "horizon", "said"),
    [
        ({"kind": "cosine"}, Horizon(8, None), "must know its end: give rule.schedule.length"),
        ({"kind": "linear", "warmup": 6}, HORIZON, "leaves nothing of the 6 epochs"),
        ({"kind": "step"}, HORIZON, "needs every .* or at"),
        ({"kind": "step", "every": 2, "at": [1]}, HORIZON, "one of them"),
        ({"kind": "step", "at": [3, 2]}, HORIZON, r"at = \[3.0, 2.0\] must be epochs above 0 that grow"),
    ],
)
def test_what_does_not_fit_is_refused(options, horizon, said):
    with pytest.raises(UserError, match=said):
        make("shards.rules.schedules", options, "rule.schedule").check(horizon)


@pytest.mark.parametrize(
    ("change", "jumps"), [("topology.replicas=3", True), ("topology.shards=3", False), ("method.n_push=2", None)]
)
def test_a_resumed_run_says_where_its_rate_jumps(change, jumps, run_file):
    """A schedule goes by updates; synchronous steps of more replicas are fewer updates in an epoch."""
    kind = "downpour" if jumps is None else "synchronous"
    words = [f"method.kind={kind}", "rule.schedule={kind='cosine', length=4}", "stop.epochs=2", "warmstart.steps="]
    begun = train(run_file, [*words])
    ready = setup(load(run_file, [*words, change]), str(begun.checkpoint))
    assert any("the rate jumps" in doubt for doubt in ready.doubts()) == (jumps is not False)
