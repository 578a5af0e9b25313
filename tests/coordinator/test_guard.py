"""Gradients that are not finite: refused slice by slice, counted once, named, and at the bound the run ends with a diagnosis."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from batch_world import BatchWorld, Ones
from harness import World
from hypothesis import given, settings
from hypothesis import strategies as st

from dbnet.core import config
from dbnet.core.errors import Stopped, UserError
from dbnet.core.kernels.vector import first_bad
from dbnet.core.ranges import Range
from dbnet.core.registry import family, make
from dbnet.data.batches import Batches
from dbnet.data.file import write
from dbnet.data.portions import Reader
from dbnet.monitor import inspect
from dbnet.monitor.results import Run
from dbnet.network.layers.activations import ACTIVATIONS
from dbnet.network.replica import Replica
from dbnet.run import roles, setup, train
from dbnet.shards.push import Intake, Push
from dbnet.shards.shard import Shard

SLICE = 8  # numbers in 64 bytes


# --- kernels ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [first_bad, first_bad.py_func], ids=["compiled", "interpreted"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_first_bad_value_is_found(kernel: Callable, dtype: str) -> None:
    x = np.random.default_rng(1).standard_normal(9000).astype(dtype)
    x[7:90], x[100:200], x[200] = np.finfo(dtype).max, -np.finfo(dtype).max, np.finfo(dtype).tiny / 2
    top = np.finfo(dtype).max
    assert kernel(x, top) == -1 and kernel(x[:0], top) == -1
    assert kernel(x, top / 2) == 7 and kernel(x[90:], top / 2) == 10 and kernel(x[200:], top / 2) == -1
    for bad in (np.nan, np.inf, -np.inf):
        for at in (8999, 4096, 4095, 0):
            y = x.copy()
            y[at], y[-1] = bad, np.nan
            assert kernel(y, top) == at


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_activations_keep_nan(kind: str, dtype: str, compiled: bool) -> None:
    forward = ACTIVATIONS[kind].forward
    y = np.full((3, 37), 0.5, dtype)
    y[1, 5] = y[2, 36] = np.nan
    (forward if compiled else forward.py_func)(y, np.zeros(3, dtype))
    assert np.argwhere(np.isnan(y)).tolist() == [[1, 5], [2, 36]]


@pytest.mark.parametrize("unit", [0, 4, 9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", sorted(family("network.losses")))
def test_a_nan_output_makes_the_loss_nan(kind: str, dtype: str, unit: int) -> None:
    loss, label = family("network.losses")[kind](), np.arange(20) % 10
    y = np.random.default_rng(2).standard_normal((10, 20)).astype(dtype)
    y[unit, 13] = np.nan
    stats, dy = np.zeros((loss.width, 20), dtype), np.zeros_like(y)
    loss.reduce(y, label, 0, stats, dy)
    loss.combine(stats[None].copy(), stats)
    assert np.isnan(loss.score(stats, label, 20)[0])
    assert np.isfinite(loss.score(stats, label, 13)[0])


@pytest.mark.parametrize("unit", [0, 4, 9])
@pytest.mark.parametrize("kind", ["logistic", "softmax"])
def test_a_nan_output_makes_the_interpreted_loss_nan(kind: str, unit: int) -> None:
    module = __import__(f"dbnet.network.losses.{kind}", fromlist=["reduce"])
    width, y = family("network.losses")[kind].width, np.zeros((10, 4))
    y[unit, 2] = np.nan
    stats = np.zeros((width, 4))
    module.reduce.py_func(y, np.arange(4), 0, stats, np.zeros_like(y))
    if kind == "softmax":
        module.combine.py_func(stats[None].copy(), stats)
    assert np.isnan(stats[0]).tolist() == [False, False, True, False]


# --- slices -------------------------------------------------------------------------------------------------------------------


def spoiled(bad: dict[tuple[int, int], int], value: float = np.nan) -> Callable[[int, int, np.ndarray], np.ndarray]:
    """Return gradients of whole numbers, but for one value in those of the given (replica, step)."""

    def gradient(replica: int, step: int, w: np.ndarray) -> np.ndarray:
        g = np.round(100 * np.sin(1 + np.arange(w.size) * (1 + replica) + 7 * step))
        if (replica, step) in bad:
            g[bad[replica, step]] = value
        return g

    return gradient


def applied(world: World) -> np.ndarray:
    """Return the sum of what the shards should have applied: of each push what stands before its first bad slice at the shard."""
    total = np.zeros(world.w.size)
    for replica in world.replicas:
        for g in replica.computed:
            for part in world.ranges:
                bad = np.flatnonzero(~np.isfinite(g[part.slice]))
                stop = part.lo + bad[0] // SLICE * SLICE if bad.size else part.hi
                total[part.lo : stop] += g[part.lo : stop]
    return total


@pytest.mark.parametrize("rule", ["adagrad", "adam", "sgd"])
def test_a_gradient_whose_square_is_beyond_all_numbers_is_refused_where_squares_are_kept(rule: str) -> None:
    """Else the sum of squares is infinite for ever and the parameter never moves again."""
    largest = make("shards.rules", {"kind": rule}, "rule").largest(np.dtype("f8"))
    for value, fits in ((-1.1 * largest, False), (largest, True)) if rule != "sgd" else ((1e300, True),):
        world = World(40, 2, 2, 4, spoiled({(1, 2): 30}, value), ("slot=64", "slots=2"), {"kind": rule, "rate": 0.1})
        world.run()
        refused = world.shards[1].take_refused()
        assert [(r.push.replica, r.push.step, r.index, r.value) for r in refused] == [] if fits else [(1, 2, 30, value)]
        registers = [x for shard in world.shards for x in shard.registers().values()]
        assert all(np.isfinite(x).all() for x in registers)
    assert make("shards.rules", {"kind": rule}, "rule").largest(np.dtype("f4")) <= (3.5e38 if rule == "sgd" else 1.8e19)


def test_from_its_first_bad_slice_on_a_push_is_refused_at_that_shard() -> None:
    """Parameters 20 .. 39 are shard 1's; its slices are 20 .. 27, 28 .. 35, 36 .. 39."""
    world = World(40, 2, 2, 4, spoiled({(1, 2): 30}), ("slot=64", "slots=2"))
    world.run()
    np.testing.assert_array_equal(world.w, -applied(world))
    assert [int(shard.clock[0]) for shard in world.shards] == [8, 7]
    assert world.shards[0].take_refused() == []
    ((push, index, value),) = world.shards[1].take_refused()
    assert (push.replica, push.partition, push.number, push.steps, push.step, index) == (1, 0, 2, 1, 2, 30)
    assert np.isnan(value) and world.shards[1].take_refused() == []
    events = world.shards[1].take_events()
    assert (1, 2) not in set(zip(events["replica"].tolist(), events["push"].tolist(), strict=True))


def test_a_slice_of_several_pieces_goes_where_they_lie() -> None:
    shard = Shard(
        Range(100, 110), make("shards.rules", {"kind": "sgd", "rate": 1.0}, "rule"), np.zeros(10), np.zeros(1, int), lambda: 0.0
    )
    pieces, push = [(0, 6, 2), (2, 0, 3)], Push(0, 0, 0, 0, 1, 0)
    assert Intake(shard).take(push, np.arange(1.0, 6.0), pieces, True, True)
    assert shard.params.tolist() == [-3, -4, -5, 0, 0, 0, -1, -2, 0, 0]
    for bad, index in ((0, 106), (3, 101)):
        g = np.ones(5)
        g[bad] = np.inf
        assert not Intake(shard).take(push, g, pieces, True, True)
        assert [refusal.index for refusal in shard.take_refused()] == [index]


def test_a_refused_push_counts_all_of_its_gradients() -> None:
    """n_push = 3: pushes hold gradients 0; 1 .. 3; 4 .. 6; 7."""
    world = World(8, 1, 1, 8, spoiled({(0, 2): 5}, np.inf), ("n_push=3", "local_rate=0.0"))
    world.run()
    ((push, index, value),) = world.shards[0].take_refused()
    assert (push.number, push.steps, push.step, index, value) == (1, 3, 3, 5, np.inf)
    assert world.shards[0].take_events()["steps"].tolist() == [1, 3, 1]


def test_without_the_guard_bad_values_are_applied() -> None:
    world = World(8, 1, 1, 3, spoiled({(0, 1): 5}), guard=False)
    world.run()
    assert np.flatnonzero(np.isnan(world.w)).tolist() == [5] and world.shards[0].clock[0] == 3


@settings(max_examples=40, deadline=None)
@given(
    shards=st.integers(1, 4),
    replicas=st.integers(1, 3),
    steps=st.integers(0, 6),
    bad=st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 5)), st.integers(0, 29), max_size=6),
    moves=st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=60),
)
def test_computed_is_applied_and_refused_and_in_flight(shards, replicas, steps, bad, moves) -> None:
    """Pushes that fit their ring: the ledger of each shard balances after every turn, whatever is bad."""
    world = World(30, shards, replicas, steps, spoiled(bad), ("slot=64", "slots=64"))
    counted = [0] * shards

    def balance() -> None:
        sent = sum(store.counts.pushes for store in world.stores)
        for s, shard in enumerate(world.shards):
            counted[s] += int(shard.take_events()["steps"].sum()) + sum(r.push.steps for r in shard.take_refused())
            local = world.memory.at(1 + s).local
            flying = sum(
                int(local["header"][row, n % 64, 3])
                for row, o in enumerate(world.users[s])
                for n in range(int(local["tail"][o]), int(local["head"][o]))
            )
            assert counted[s] + flying == sent

    for work, index in moves:
        world.work(index % replicas) if work else world.serve(index % shards)
        balance()
    world.run()
    balance()
    assert counted == [replicas * steps] * shards
    np.testing.assert_array_equal(world.w, -applied(world))


# --- runs in one process ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(11)
    x, y = rng.standard_normal((80, 6)), rng.integers(0, 3, 80)
    x[np.arange(80), y] += 3
    write(tmp_path / "data.h5", {"train/x": x[:60], "train/y": y[:60], "test/x": x[60:], "test/y": y[60:], "classes": 3})
    return tmp_path / "data.h5"


def table(data: Path, *changes: str) -> config.Config:
    tree = {
        "run": {"folder": str(data.parent / "runs"), "seed": 5},
        "data": {"path": str(data)},
        "model": {"layers": [{"kind": "dense", "units": 5, "activation": "sigmoid"}, {"kind": "dense", "units": 3}]},
        "method": {"minibatch": 7},
        "rule": {"kind": "sgd", "rate": 0.1},
        "topology": {"shards": 2, "replicas": 2},
        "stop": {"epochs": 40},
        "evaluate": {"epochs": 100.0},
    }
    for text in changes:
        config.override(tree, text)
    return config.build(tree)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Return a function that has one example read wrongly from memory: what no check of the file can see."""

    def spoil(example: int, value: float) -> None:
        for kind in (Batches, Reader):

            def filled(self, x, right=kind.next):
                count = right(self, x)
                if not isinstance(self, Batches) or self._order_of is not None:
                    x[:, [j for j in range(count) if self.example(j) == example]] = value
                return count

            monkeypatch.setattr(kind, "next", filled)

    return spoil


def test_a_column_knows_its_example(data: Path) -> None:
    ready = setup.setup(table(data))
    everything, x = ready.data.read("train").x.astype(np.float32), np.zeros((6, 7), np.float32)
    batches = roles.load_replica(ready, 1).train
    for _ in range(9):
        count = batches.next(x)
        np.testing.assert_array_equal(x[:, :count].T, everything[[batches.example(j) for j in range(count)]])
        assert batches.filled == count


@pytest.mark.parametrize("changes", [(), ("method.n_fetch=3", "method.n_push=2"), ("method.kind=sgd", "topology.replicas=1")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_example_is_named(data: Path, spoil: Callable, value: float, changes: tuple, capsys) -> None:
    spoil(17, value)
    with pytest.raises(Stopped, match=r"after \d+ refused pushes.*Example 17 of the training set.*mend the data\. There is no ch"):
        train.execute(table(data, "guard.refused=4", *changes))
    assert capsys.readouterr().out.count("Further ones are counted") == 1
    read = Run(data.parent / "runs" / "run.h5")
    assert not read.finished and not (data.parent / "runs" / "run.checkpoint.h5").exists()
    # Replicas read their orders each 20 ms, so a few more come than the bound says.
    count = len(read.refused.drop_duplicates(["replica", "push"]))
    assert 4 <= count == read.refused["shard"].value_counts().max()
    assert f"refused      {count} pushes whose gradient is not finite" in inspect.describe(str(read.path))
    assert read.evaluation.loss.notna().all()


def test_below_the_bound_the_run_goes_on_and_its_ledger_balances(data: Path, spoil: Callable) -> None:
    """One bad example: each epoch one push of the replica that has it is refused, at both shards."""
    spoil(17, np.nan)
    done = train.execute(table(data, "stop.epochs=6", "topology.shards=3"), quiet=True)
    read = Run(done.run_file)
    assert read.finished and np.isfinite(done.params).all() and done.checkpoint.exists()
    last = read.progress.groupby("replica").steps.max()
    for shard in range(3):
        taken = read.events[read.events["shard"] == shard].groupby("replica").steps.sum()
        refused = read.refused[read.refused["shard"] == shard].groupby("replica").steps.sum()
        assert refused.tolist() == [6]
        assert taken.add(refused, fill_value=0).tolist() == last.tolist() == [30, 30]


def test_a_run_without_the_guard_trains_on_but_its_checkpoint_would_be_of_no_use(data: Path, spoil: Callable) -> None:
    spoil(17, np.nan)
    done = train.execute(table(data, "guard.finite=false", "stop.epochs=2"), quiet=True)
    assert np.isnan(done.params).all() and Run(done.run_file).finished
    assert "not finite" in done.unsaved and not done.checkpoint.exists()


@pytest.mark.parametrize("changes", [(), ("model.layers.0.activation=relu",), ("rule.kind=adagrad",), ("checkpoint.seconds=1e-6",)])
def test_a_rate_that_is_too_high_is_named(data: Path, changes: tuple) -> None:
    with pytest.raises(Stopped, match=r"The parameters have grown .*: lower rule\.rate \(1e\+30\), train with a warmstart"):
        train.execute(table(data, "rule.rate=1e30", *changes), quiet=True)
    assert not Run(data.parent / "runs" / "run.h5").finished


def test_parameters_that_overflow_with_the_last_push_are_not_kept(data: Path) -> None:
    with pytest.raises(Stopped, match=r"lower rule\.rate \(3e\+38\)"):
        train.execute(table(data, "rule.rate=3e38", "stop={steps=1}"), quiet=True)
    assert not (data.parent / "runs" / "run.checkpoint.h5").exists()


def test_earlier_checkpoints_are_kept(data: Path, spoil: Callable) -> None:
    """The first checkpoint of a run that soon stops is there, whole, and finite."""
    spoil(17, np.nan)
    with pytest.raises(Stopped, match=r"The checkpoint before is kept: .*run\.checkpoint\.h5\."):
        train.execute(table(data, "checkpoint.seconds=1e-6"), quiet=True)
    from dbnet.checkpoint.reader import Checkpoint

    point = Checkpoint(data.parent / "runs" / "run.checkpoint.h5")
    w = np.zeros(point.size, point.dtype)
    point.read("params", Range(0, point.size), w)
    assert np.isfinite(w).all() and w.any()


def test_an_example_beyond_float32_is_refused_when_it_is_read(data: Path) -> None:
    x = np.ones((20, 6))
    x[13, 2] = 1e300
    path = data.with_name("large.h5")
    write(path, {"train/x": x, "train/y": np.arange(20) % 3, "classes": 3})
    for kind in ("method.kind=downpour", "method.kind=sandblaster"):
        with pytest.raises(UserError, match=r"Example 13 holds 1e\+300, which times the data's scale \(1\) is beyond float32"):
            train.execute(table(path, kind), quiet=True)
    assert train.execute(table(path, "model.dtype=float64", "stop.epochs=1", "rule.rate=0.0001"), quiet=True)


# --- batch methods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descent", ["{kind='lbfgs'}", "{kind='multibatch_lbfgs', batch=40, overlap=8}"])
def test_a_batch_that_is_not_finite_from_the_first_on_stops_the_run(data: Path, spoil: Callable, descent: str) -> None:
    spoil(17, np.nan)
    batch = ("method.kind=sandblaster", "method.portion=7", "stop.iterations=5", f"method.descent={descent}")
    with pytest.raises(Stopped, match=r"after 1 refused pass, the first by shard .*Example 17 of the training set"):
        train.execute(table(data, *batch), quiet=True)
    assert not Run(data.parent / "runs" / "run.h5").finished


def test_a_batch_method_whose_step_is_too_long_is_told_so(data: Path) -> None:
    batch = ("method.kind=sandblaster", "stop.iterations=50", "model.layers.0.activation=relu")
    wild = "method.descent={kind='multibatch_lbfgs', batch=40, overlap=8, rate=1e30}"
    with pytest.raises(Stopped, match=r"lower method\.descent\.rate \(1e\+30\)"):
        train.execute(table(data, *batch, wild), quiet=True)


def test_a_pass_with_a_refused_bundle_has_an_infinite_loss_and_the_next_one_is_whole() -> None:
    class Once(Ones):
        """The gradient of example 3 is not finite in pass 1, where w[0] = 1."""

        def accrue_share(self, w, g, fresh):
            out = super().accrue_share(w, g, fresh)
            if w[0] == 1 and g[3]:
                g[3] = np.nan
            return out

    world = BatchWorld(12, 2, 2, 2, [Range(0, 12), Range(0, 12)])
    for worker in world.workers:
        worker.replica.__class__ = Once
    world.finish()
    (first, _), (second, gradient) = world.results
    assert first == np.inf and second == sum(range(1, 13)) / 12
    np.testing.assert_allclose(gradient, np.full(12, 2 / 12))
    assert world.coordinator.duties.guard.keys == {1}


def test_a_line_search_comes_back_from_where_nothing_is_finite(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are spoiled in the second pass only: it is refused, the step gets shorter, and the run comes to its end."""
    right, calls = Replica.accrue_share, []

    def spoiled(self, w, g, fresh):
        out = right(self, w, g, fresh)
        calls.append(out[0])
        if 60 < sum(calls) <= 120 and out[0]:
            g[3] = np.inf
        return out

    monkeypatch.setattr(Replica, "accrue_share", spoiled)
    batch = ("method.kind=sandblaster", "method.backups=false", "stop={iterations=4}", "topology.replicas=1")
    read = Run(train.execute(table(data, *batch), quiet=True).run_file)
    assert read.finished and set(read.refused.fetched) == {2} and set(read.refused["index"]) == {3}
    assert read.iterations.loss.is_monotonic_decreasing and read.iterations.passes[0] > 2
