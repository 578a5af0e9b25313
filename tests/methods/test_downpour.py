"""Downpour as a whole in one process: against a textbook loop, its phases, warmstart, stops, odd sizes."""

from __future__ import annotations

from types import SimpleNamespace

import ledger
import numpy as np
import pytest

from dbnet.comm.turns import take_turns
from dbnet.core import config
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.data.batches import Cursor
from dbnet.data.file import DataFile, write
from dbnet.data.subsets import Share
from dbnet.methods.downpour import DownpourWorker
from dbnet.network.replica import Replica
from dbnet.run import process, roles, setup, train
from dbnet.shards.push import Counts


@pytest.fixture
def data(tmp_path):
    """60 + 20 random examples of 6 units in 3 classes."""
    rng = np.random.default_rng(11)
    x, y = rng.standard_normal((80, 6)), rng.integers(0, 3, 80)
    x[np.arange(80), y] += 3
    path = tmp_path / "data.h5"
    write(path, {"train/x": x[:60], "train/y": y[:60], "test/x": x[60:], "test/y": y[60:], "classes": 3})
    return path


def settings(data, *overrides, **stop):
    tree = {
        "run": {"folder": str(data.parent / "runs"), "seed": 5},
        "data": {"path": str(data)},
        "model": {
            "layers": [{"kind": "dense", "units": 5, "activation": "sigmoid"}, {"kind": "dense", "units": 3}],
            "dtype": "float64",
        },
        "method": {"minibatch": 7},
        "rule": {"kind": "sgd", "rate": 0.25},
        "stop": stop or {"epochs": 3},
    }
    for text in overrides:
        config.override(tree, text)
    return config.build(tree)


def textbook(ready, steps, factor=lambda t: 1.0, most=np.inf, bound=np.inf):
    """Minibatch SGD in ten lines of NumPy, float64; `factor` of the rate, the largest norm and value of a gradient."""
    layout, part = ready.model.layout, roles.load_replica(ready, 0).train.present.part
    w = np.empty(layout.size)
    layout.draw(Range(0, w.size), ready.config.run.seed, w)
    p, at, epoch, order = layout.views(w), 0, -1, np.zeros(0, int)
    for step in range(steps):
        if at >= len(order):
            epoch, at = epoch + 1, 0
            order = np.random.Generator(np.random.Philox(key=[5, 0], counter=[0, 0, epoch, 1])).permutation(len(part))
        rows, at = order[at : at + 7], at + 7
        x, label = part.x[rows].T.copy(), part.y[rows]
        h = 1 / (1 + np.exp(-(p["0.dense.W"] @ x + p["0.dense.b"][:, None])))
        z = p["1.dense.W"] @ h + p["1.dense.b"][:, None]
        dz = np.exp(z - z.max(0)) / np.exp(z - z.max(0)).sum(0)
        dz[label, np.arange(len(rows))] -= 1
        dz /= len(rows)
        dh = p["1.dense.W"].T @ dz * (h * (1 - h))
        gradient = {"0.dense.W": dh @ x.T, "0.dense.b": dh.sum(1), "1.dense.W": dz @ h.T, "1.dense.b": dz.sum(1)}
        gradient = {name: np.clip(g, -bound, bound) for name, g in gradient.items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            p[name] -= 0.25 * factor(step + 1) * min(1.0, most / norm) * g
    return w


@pytest.mark.parametrize("method", ["downpour", "sgd"])
@pytest.mark.parametrize("shards", [1, 3])
def test_one_replica_is_textbook_sgd(data, method, shards):
    cfg = settings(data, f'method.kind="{method}"', f"topology.shards={shards}", steps=40)
    done = train.execute(cfg, quiet=True)
    np.testing.assert_allclose(done.params, textbook(setup.setup(cfg), 40), rtol=1e-11, atol=1e-13)


def test_one_replica_with_a_schedule_and_a_bounded_gradient_is_textbook_sgd(data):
    """60 examples in minibatches of 7: 9 updates an epoch, of which the warm-up takes one and the cosine the other two."""
    cosine = "rule.schedule={kind='cosine', warmup=1, last=0.1}"
    cfg = settings(data, "method.clip_norm=0.5", "method.clip_value=0.2", cosine, "topology.shards=2", epochs=3)

    def factor(t):
        return t / 9 if t <= 9 else 0.1 + 0.45 * (1 + np.cos(np.pi * (t - 10) / 18))

    wanted = textbook(setup.setup(cfg), 27, factor, 0.5, 0.2)
    np.testing.assert_allclose(train.execute(cfg, quiet=True).params, wanted, rtol=1e-11, atol=1e-13)
    assert np.abs(wanted - textbook(setup.setup(cfg), 27, factor, 0.5)).max() > 1e-4
    assert np.abs(wanted - textbook(setup.setup(cfg), 27, factor, np.inf, 0.2)).max() > 1e-4


@pytest.mark.parametrize(("method", "updates"), [("downpour", 2 * 5 / 3), ("synchronous", 5)])
def test_an_epoch_of_a_schedule_is_an_epoch_of_the_run(data, method, updates):
    """Two replicas have 30 examples each, 5 minibatches; every third step of Downpour pushes."""
    n_push = {"downpour": ["method.n_push=3"], "synchronous": []}[method]
    cfg = settings(data, f"method.kind={method}", "topology.replicas=2", *n_push, steps=10)
    assert setup.setup(cfg).horizon == pytest.approx((updates, 2))


def test_one_replica_is_the_same_kernels_in_a_plain_loop_to_the_bit(data):
    """n_fetch = n_push = R = S = P = 1: the protocol adds and loses nothing."""
    cfg = settings(data, steps=40)
    ready = setup.setup(cfg)
    replica, w = roles.load_replica(ready, 0), np.empty(ready.model.layout.size)
    ready.model.layout.draw(Range(0, w.size), 5, w)
    g = np.empty_like(w)
    for _ in range(40):
        count = replica.train.next(replica.network.x)
        replica.network.loss_and_gradient(w, g, replica.train.target, count, accumulate=False)
        w -= 0.25 * g
    np.testing.assert_array_equal(train.execute(cfg, quiet=True).params, w)


def test_a_run_in_one_process_can_be_repeated_to_the_bit(data):
    cfg = settings(data, "topology.replicas=3", "topology.shards=2", "method.n_push=2", "method.n_fetch=3")
    one, two = train.execute(cfg, quiet=True), train.execute(cfg, quiet=True)
    np.testing.assert_array_equal(one.params, two.params)
    assert one.run_file != two.run_file


def test_steps_between_fetches_are_local(data):
    """With n_fetch = n_push = 4: within a period the replica goes its own way, the shards change once."""
    linear = "rule.schedule={kind='linear', length=3}"
    options = ["method.n_fetch=4", "method.n_push=4", "method.local_rate=0.25", linear, "method.clip_norm=0.5"]
    cfg = settings(data, *options, steps=9)
    done = train.execute(cfg, quiet=True)
    # Pushes come at steps 0, 4, 8: the shards get the sums of gradients 0; 1..4; 5..8. A fetch brings what the replica has anyway,
    # but for the gradients that were not pushed yet: 1..3 at step 4, 5..7 at step 8.
    ready = setup.setup(cfg)
    replica, w = roles.load_replica(ready, 0), np.empty(ready.model.layout.size)
    ready.model.layout.draw(Range(0, w.size), 5, w)
    local, g, total = w.copy(), np.empty_like(w), np.zeros_like(w)
    for step in range(9):
        if step % 4 == 0:
            local = w.copy()
        count = replica.train.next(replica.network.x)
        replica.network.loss_and_gradient(local, g, replica.train.target, count, accumulate=False)
        g *= min(1, 0.5 / np.linalg.norm(g))
        total += g
        # 9 minibatches an epoch, a push for 4 of them: an update is 4/9 of an epoch, a local step 1/9.
        local -= 0.25 * (1 - step / 9 / 3) * g
        if step % 4 == 0:
            w -= 0.25 * (1 - step / 4 * 4 / 9 / 3) * total
            total[:] = 0
    np.testing.assert_allclose(done.params, w, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("n_push", "late"), [(1, 0), (3, 0), (1, 5)])
def test_warmstart_lets_the_others_wait(data, n_push, late, monkeypatch):
    from dbnet.monitor.results import Run

    cfg = settings(data, "topology.replicas=3", "topology.shards=2", "warmstart.steps=8", f"method.n_push={n_push}", steps=15)

    def lazy(role):
        for wait in role:
            yield from [wait] * (1 + late)

    monkeypatch.setattr(process, "take_turns", lambda roles, rounds: take_turns([*roles[:-1], lazy(roles[-1])], rounds))
    read = Run(train.execute(cfg, quiet=True).run_file)
    ledger.warmstart_is_exact(read)
    assert (read.events.groupby(["shard", "replica"]).steps.sum() == 15).all()


def test_local_steps_follow_the_schedule_through_a_warmstart(data, monkeypatch):
    """Alone a replica makes all updates; then each of its steps stands for one of every replica."""
    rates, accrue = {}, Replica.accrue

    def seen(replica, w, g, accrued, rate):
        rates.setdefault(replica.seed, {})[replica.steps] = rate
        return accrue(replica, w, g, accrued, rate)

    monkeypatch.setattr(Replica, "accrue", seen)
    options = ["method.n_fetch=4", "method.n_push=2", "method.local_rate=0.5", "rule.schedule={kind='linear', length=40}"]
    cfg = settings(data, "topology.replicas=3", "warmstart.steps=8", *options, steps=15)
    ready = setup.setup(cfg)
    train.execute(cfg, quiet=True)
    first, *others = rates.values()

    def rate(updates):
        return 0.5 * (1 - updates / ready.horizon.per_epoch / 40)

    for step, found in first.items():
        assert found == pytest.approx(0 if step % 4 == 3 else rate((step if step < 8 else 8 + 3 * (step - 8)) / 2))
    for found in others:
        assert {step for step, value in found.items() if not value} == {3, 7, 11}
        assert all(value == pytest.approx(rate((8 + 3 * step) / 2)) for step, value in found.items() if value)


def test_a_resumed_warmstart_makes_the_steps_that_are_left(data):
    from dbnet.monitor.results import Run

    begun = train.execute(settings(data, steps=5), quiet=True)
    for steps, alone in ((9, 4), (3, 0)):
        cfg = settings(data, "topology.replicas=2", f"warmstart.steps={steps}", steps=20)
        events = Run(train.execute(cfg, resume=str(begun.checkpoint), quiet=True).run_file).events
        first = events[events.replica == 1].iloc[0]
        # Without a warmstart both begin at once, in turns.
        assert (events[events.applied < first.fetched].replica == 0).sum() == (alone or 1)


class Still:
    """A store that moves nothing."""

    fetched = landing = overlaps = False
    w = g = None
    number, counts = 0, Counts()

    def fetch(self):
        self.fetched = True
        return iter(())

    def push(self, steps, step):
        return iter(())

    def accrued(self, first):
        pass

    def arrive(self):
        return iter(())


class Taken:
    """Shares of which nothing is read."""

    cursor, cursors = Cursor(0, 0), ()

    def __init__(self, taken):
        self.taken = taken

    def __len__(self):
        return 30

    def take(self, share, beat):
        self.taken += 1


@pytest.mark.parametrize("lost", [3, 6])
def test_a_spare_in_replica_0s_place_counts_the_warmstart_once(data, lost):
    """Its local steps have the rate that they would have had, be it lost amid the warmstart or after."""
    warm, cfg = 4, settings(data, "topology={replicas=2, spares=1}", "warmstart.steps=4", "method.n_fetch=20", steps=12)

    def updates(number, subset, made):
        """Return how many updates a replica, or a spare that takes its place after `made` steps, takes to be made at each step."""
        found = []
        replica = SimpleNamespace(train=Taken(number < 2), steps=0, examples=0, loss=0, right=0, trouble=None)
        orders = SimpleNamespace(
            replica=number, made=made, given=1, stop=False, suspect=False, alone=number == 0, evaluation_wanted=False, beat=None,
            poll=lambda *_: None, share=lambda n: Share(subset, 0, 30),
        )  # fmt: skip

        def accrue(*_):
            replica.steps += 1
            orders.alone = number == 0 and replica.steps < min(warm, lost)

        replica.accrue = accrue
        worker = DownpourWorker(replica, Still(), orders, cfg, lambda t: found.append(t) or 1.0)
        for turns in (worker.report(), worker.train()):
            for _ in turns:
                pass
        return found

    first = updates(0, 0, 0)
    assert first[:3] == [1, 2, 3] and updates(2, 0, lost) == first[lost:]
    assert updates(2, 1, lost) == updates(1, 1, 0)[lost:] != first[lost:]


def test_warmstart_until_an_accuracy(data):
    from dbnet.monitor.results import Run

    cfg = settings(data, "topology.replicas=2", "warmstart.accuracy=0.7", "evaluate.epochs=0.1", epochs=20)
    read = Run(train.execute(cfg, quiet=True).run_file)
    first = read.events[read.events.replica == 1].index.min()
    assert first > 0
    assert read.evaluation.accuracy.max() >= 0.7


def test_a_wanted_accuracy_stops_the_run(data):
    from dbnet.monitor.results import Run

    done = train.execute(settings(data, "evaluate.epochs=0.5", accuracy=0.6, epochs=500), quiet=True)
    assert done.accuracy >= 0.6
    assert Run(done.run_file).progress.steps.max() < 500 * 9


def test_a_time_budget_stops_the_run(data):
    from dbnet.monitor.results import Run

    read = Run(train.execute(settings(data, seconds=0.4), quiet=True).run_file)
    assert read.finished
    assert 0.4 <= read.evaluation.seconds.max() < 20


@pytest.mark.parametrize(("replicas", "minibatch"), [(70, 5), (20, 10), (7, 100)])
def test_more_replicas_than_data_and_subsets_below_a_minibatch(data, replicas, minibatch):
    from dbnet.monitor.results import Run

    cfg = settings(data, f"topology.replicas={replicas}", f"method.minibatch={minibatch}", epochs=2)
    read = Run(train.execute(cfg, quiet=True).run_file)
    assert read.finished
    last = read.progress.groupby("replica").examples.max()
    assert last.sum() == 2 * 60
    assert len(last) == min(replicas, 60)


def test_every_example_is_used_once_per_epoch(data):
    ready = setup.setup(settings(data, "topology.replicas=4"))
    seen = []
    for r in range(4):
        batches = roles.load_replica(ready, r).train
        x = np.zeros((6, 7))
        while batches.cursor.epoch == 0:
            count = batches.next(x)
            seen += [tuple(column) for column in x[:, :count].T]
    everything = ready.data.read("train").x
    assert sorted(seen) == sorted(map(tuple, everything))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", ["sgd", "adagrad", "momentum", "adam"])
def test_every_rule_trains(data, rule, dtype):
    rate = 0.02 if rule == "adam" else 0.1
    cfg = settings(data, "topology.replicas=2", "topology.shards=2", f'model.dtype="{dtype}"', epochs=30).model_copy(
        update={"rule": {"kind": rule, "rate": rate}}
    )
    assert train.execute(cfg, quiet=True).accuracy >= 0.8


def test_evaluation_leaves_training_alone(data):
    """However often it is evaluated, the parameters come out the same."""
    often = settings(data, "evaluate.epochs=0.05", "method.n_fetch=3")
    never = settings(data, "evaluate.epochs=1000", "method.n_fetch=3")
    np.testing.assert_array_equal(train.execute(often, quiet=True).params, train.execute(never, quiet=True).params)


def test_the_end_is_evaluated_once(data):
    """Whether an evaluation falls due at the end, is under way then, or nothing was made since the one before."""
    from dbnet.monitor.results import Run

    for every, rows in ((3, [0, 3]), (0.01, None)):
        done = train.execute(settings(data, "topology.replicas=2", f"evaluate.epochs={every}"), quiet=True)
        evaluation = Run(done.run_file).evaluation
        epochs = evaluation.epochs.tolist()
        assert epochs == sorted(set(epochs)) and epochs == (rows or epochs) and epochs[-1] == 3, epochs
        assert evaluation.seconds.is_monotonic_increasing and evaluation.steps.is_monotonic_increasing
    again = train.execute(settings(data, "topology.replicas=2"), resume=str(done.checkpoint), quiet=True)
    assert Run(again.run_file).evaluation.epochs.tolist() == [3] and again.accuracy == done.accuracy


def test_a_run_file_with_cuts_runs_cut_in_one_process(data):
    """It computes what the uncut network does, in sums of other orders, and can be repeated to the bit."""
    plain = settings(data, "topology.shards=2", steps=10)
    cut = settings(data, "topology.shards=2", "topology.partitions=2", "model.layers.0.cut=[2]", steps=10)
    one, two, again = (train.execute(config, quiet=True) for config in (plain, cut, cut))
    np.testing.assert_allclose(two.params, one.params, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(two.params, again.params)
    from dbnet.monitor.results import Run

    assert set(Run(two.run_file).events.partition) == {0, 1} and set(Run(one.run_file).events.partition) == {0}


def test_a_run_that_would_never_end_is_refused(data):
    with pytest.raises(UserError, match=r"stop\.iterations is for batch methods"):
        setup.setup(settings(data, iterations=5))
    blind = data.with_name("blind.h5")
    part = DataFile(data).read("train")
    write(blind, {"train/x": part.x, "train/y": part.y, "classes": 3})
    with pytest.raises(UserError, match=r"stop\.accuracy needs labelled test examples"):
        setup.setup(settings(data, f"data.path='{blind}'", accuracy=0.9))


def test_no_output_of_an_earlier_run_is_overwritten(data):
    done = train.execute(settings(data, steps=2), quiet=True)
    done.run_file.unlink()
    again = train.execute(settings(data, steps=2), quiet=True)
    assert again.checkpoint != done.checkpoint
    assert done.checkpoint.exists()


def test_replicas_at_the_same_step_draw_masks_of_their_own(data):
    layers = "model.layers=[{kind='dropout', rate=0.5}, {kind='dense', units=3}]"
    ready = setup.setup(settings(data, layers, "topology.replicas=2"))
    kept = []
    for index in (0, 1, 0):
        replica = roles.load_replica(ready, index)
        w = np.zeros(ready.model.layout.size)
        network = replica.network
        network.x[:] = 1
        network.forward(w, replica.train.target, np.zeros_like(w), 5, replica.seed)
        kept.append(network.above(1)[0] > 0)
    assert np.array_equal(kept[0], kept[2])
    assert 0.2 < (kept[0] != kept[1]).mean() < 0.8


@pytest.mark.parametrize(
    ("rule", "local"), [("{kind='adagrad', rate=2.5}", 0.25), ("{kind='momentum', rate=0.05, momentum=0.8}", 0.25)]
)
def test_local_steps_have_the_rules_own_rate_by_default(data, rule, local):
    common = ["method.n_fetch=4", "method.n_push=4", f"rule={rule}"]
    one, same, other = (
        train.execute(settings(data, *common, *changes, steps=6), quiet=True).params
        for changes in ([], [f"method.local_rate={local}"], [f"method.local_rate={2 * local}"])
    )
    np.testing.assert_allclose(one, same, rtol=1e-12)
    assert not np.allclose(one, other)
