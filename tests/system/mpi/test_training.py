"""Downpour over one-sided windows on 3 to 6 ranks: it learns, and no gradient is lost, doubled or miscounted."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import ledger
import numpy as np
import pytest
import sums

from dbnet import train
from dbnet.__main__ import main
from dbnet.data.file import write
from dbnet.monitor.results import Run
from dbnet.monitor.trace.timeline import TraceView
from dbnet.run import inference

MPICH = any(one.metadata["Name"] == "mpich" for one in importlib.metadata.distributions())
TOGETHER = ["method.kind=synchronous", "rule={kind='sgd', rate=0.05}", "model.dtype=float64", "stop.epochs=99", "stop.steps=12"]
TINY = ["model.layers=[{kind='dense', units=1}]", "model.loss=squared", "rule={kind='sgd', rate=0.05}", "evaluate.train=0"]


def tiny(folder: Path, examples: int) -> Path:
    """Write data for y = 2 x + 1 with one input and one output: a network of two parameters."""
    path = folder / f"line-{examples}.h5"
    x = np.linspace(-1, 1, max(2, examples), dtype=np.float32)[:examples, None]
    write(path, {"train/x": x, "train/y": 2 * x + 1, "test/x": x, "test/y": 2 * x + 1})
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with small data files."""
    folder = tmp_path_factory.mktemp("line")
    tiny(folder, 40)
    tiny(folder, 1)
    return folder


@pytest.fixture(scope="module")
def on3(trainings: Callable[..., Path]) -> Path:
    shape = ["topology.shards=1", "topology.replicas=1"]
    return trainings(
        3,
        {
            "sgd": ["method.kind=sgd", "rule={kind='sgd', rate=0.5}", *shape],
            "plain": shape,
            "decay": ["model.decay=0.001", "rule={kind='adam', rate=0.003}", "checkpoint.seconds=0.05", *shape],
        },
    )


@pytest.fixture(scope="module")
def on4(trainings: Callable[..., Path], small: Path) -> Path:
    two_shards, two_replicas = ["topology.shards=2", "topology.replicas=1"], ["topology.shards=1", "topology.replicas=2"]
    return trainings(
        4,
        {
            "sgd": ["method.kind=sgd", "method.wire=bfloat16", "rule={kind='sgd', rate=0.5}", *two_shards],
            "sgd-momentum": ["method.kind=sgd", "rule={kind='momentum', rate=0.1}", "method.slot=256", *two_shards],
            "shards": ["method.n_push=3", "method.n_fetch=2", "rule.rate=0.05", *two_shards],
            "replicas": two_replicas,
            "overlap": ["method.overlap=true", "method.slot=4096", "method.slots=3", "record={trace=true, steps=1}", *two_replicas],
            "tally-overlap": [*sums.overrides(small), "method.overlap=true", "method.n_push=3", *two_replicas],
            "overlap-seldom": [
                "method.overlap=true",
                "method.wire=bfloat16",
                "method.n_push=4",
                "method.n_fetch=4",
                "record.schedule=true",
                "rule={rate=0.02, schedule={kind='cosine', warmup=1, length=30}}",
                "method.clip_norm=5",
                "stop.epochs=15",
                *two_replicas,
            ],
        },
    )


@pytest.fixture(scope="module")
def on6(trainings: Callable[..., Path], small: Path, on3: Path) -> Path:
    shape, tall = ["topology.shards=2", "topology.replicas=3"], ["topology.shards=3", "topology.replicas=2"]
    halves = ["topology.shards=1", "topology.replicas=2", "topology.partitions=2"]
    falls = ["rule.schedule={kind='linear', warmup=0.5}", "method.clip_norm=1", "run.threads=1"]
    return trainings(
        6,
        {
            "sgd": ["method.kind=sgd", "rule={kind='sgd', rate=0.5}", "topology.shards=4", "topology.replicas=1"],
            "wide": shape,
            "rings": [
                "method.slot=64",
                "method.slots=2",
                "rule={kind='momentum', rate=0.02}",
                "stop.epochs=2",
                "record={schedule=true, trace=true, steps=1}",
                *shape,
            ],
            "tally": [*sums.overrides(small), *shape],
            "tally-seldom": [*sums.overrides(small), "method.n_push=3", "method.n_fetch=2", *shape],
            "float64": ["model.dtype=float64", "rule={kind='sgd', rate=0.3}", "warmstart.steps=50", "record.schedule=true", *shape],
            "cut": [
                "rule={kind='adam', rate=0.02}",
                "method.slot=512",
                "method.n_push=2",
                "record={schedule=true, trace=true, steps=1}",
                *falls,
                *halves,
            ],
            "empty-shard": [f"data.path={small / 'line-40.h5'}", *TINY, "method.minibatch=4", "stop.epochs=40", *tall],
            "idle-replica": [f"data.path={small / 'line-1.h5'}", *TINY, "stop.epochs=20", *tall],
            "together": [f"data.path={small / 'line-40.h5'}", *TINY, *TOGETHER, "method.minibatch=20", *tall],
            "more": [*shape, "stop.epochs=8", f"--resume={on3 / 'plain.checkpoint.h5'}"],
            "cut-together": [*TOGETHER, "rule.rate=0.3", "method.minibatch=999", "record.schedule=true", *halves],
        },
        timeout=110,
    )


ALL = [
    *(("on3", name) for name in ("sgd", "plain", "decay")),
    *(("on4", name) for name in ("sgd", "sgd-momentum", "shards", "replicas", "overlap", "tally-overlap", "overlap-seldom")),
    *(("on6", name) for name in ("sgd", "wide", "rings", "tally", "tally-seldom", "float64", "empty-shard", "idle-replica", "cut")),
    *(("on6", name) for name in ("together", "cut-together")),
]


@pytest.fixture
def run(request: pytest.FixtureRequest, opened: Callable[[Path], Run]) -> Run:
    folder, name = request.param
    return opened(request.getfixturevalue(folder) / f"{name}.h5")


def every(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", cases, ids=["/".join(case) for case in cases], indirect=True)


@every([case for case in ALL if case[1].split("-")[0] not in ("empty", "idle", "rings", "tally", "together", "cut")])
def test_it_learns(run: Run) -> None:
    assert run.accuracy >= 0.85
    # Others may have trained before the first replica looks at the parameters.
    assert run.config.topology.replicas > 1 or run.evaluation.accuracy.iloc[0] < 0.4


@every(ALL)
def test_every_push_is_applied_once_and_in_order_on_every_shard(run: Run) -> None:
    ledger.pushes_are_applied_once(run)


@every(ALL)
def test_clocks_count_up_by_one(run: Run) -> None:
    ledger.clocks_count_up(run)


@every(ALL)
def test_gradients_are_conserved(run: Run) -> None:
    ledger.gradients_are_conserved(run)


@every([case for case in ALL if case[1].startswith("tally")])
def test_what_shards_hold_is_the_sum_of_all_gradients_to_the_bit(run: Run) -> None:
    """Contents and not counts: a slice lost, doubled, torn or in a wrong place changes a sum that no schedule may change."""
    sums.check(run)


@every(ALL)
def test_staleness_is_the_histogram_of_the_events(run: Run) -> None:
    ledger.staleness_is_that_of_the_events(run)


@every([("on4", "shards"), ("on4", "overlap-seldom")])
def test_pushes_cover_the_steps_between_them(run: Run) -> None:
    n = run.config.method.n_push
    for _, mine in run.events.groupby(["shard", "replica"]):
        assert mine.steps.iloc[0] == 1
        assert set(mine.steps.iloc[1:-1]) == {n} and 1 <= mine.steps.iloc[-1] <= n


@every([("on3", "sgd"), ("on4", "sgd"), ("on4", "sgd-momentum"), ("on6", "sgd")])
def test_sgd_is_never_stale(run: Run) -> None:
    assert (run.events.applied == run.events.fetched).all()


@every([("on4", "sgd"), ("on4", "sgd-momentum"), ("on4", "overlap-seldom")])
def test_as_bfloat16_half_the_bytes_travel(run: Run) -> None:
    last, size = run.progress.groupby("replica").last(), run.about["parameters"]
    each = (2 if run.config.method.wire == "bfloat16" else 4) * size
    assert (last.bytes_fetched == each * last.fetches).all() and (last.bytes_pushed == each * last.pushes).all()
    assert (last.pushes > 0).all()


@every([("on3", "sgd"), ("on4", "sgd"), ("on4", "sgd-momentum"), ("on6", "sgd")])
def test_sgd_equals_the_run_in_one_process_to_the_bit(run: Run, tmp_path: Path) -> None:
    config = run.config.model_copy(update={"run": run.config.run.model_copy(update={"folder": str(tmp_path)})})
    alone = train(config)
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file, h5py.File(alone.checkpoint) as other:
        assert sorted(file) == sorted(other)
        # The others name the run, its folder and its time.
        for name in set(file) - {"about", "config", "chain"}:
            assert np.array_equal(file[name][:], other[name][:]), name


@every([("on6", "together"), ("on6", "cut-together")])
def test_synchronous_replicas_equal_one_with_their_batches_together(run: Run, tmp_path: Path) -> None:
    assert (run.events.applied == run.events.fetched).all()
    config = run.config
    # Every step looks at all of the data.
    changes = {
        "run": config.run.model_copy(update={"folder": str(tmp_path)}),
        "topology": config.topology.model_copy(update={"replicas": 1, "partitions": 1}),
        "method": config.method.model_copy(update={"minibatch": 10**6}),
    }
    alone = train(config.model_copy(update=changes))
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file, h5py.File(alone.checkpoint) as other:
        np.testing.assert_allclose(file["params"][:], other["params"][:], rtol=0, atol=1e-12)


@every([("on4", "overlap-seldom"), ("on6", "rings"), ("on6", "float64"), ("on6", "cut"), ("on6", "cut-together")])
def test_a_recorded_run_replays_to_the_bit(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipeline, slices that interleave, a warmstart, cut networks, four rules; evaluations and rule states included."""
    code, said = main(["replay", str(run.path)]), capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"identical: {len(run.events):,} updates, {len(run.evaluation)} evaluations, "), said
    assert code == 0 and len(set(run.events.replica)) > 1
    assert (run.events.applied > run.events.fetched).any() or ledger.in_step(run), "nothing was stale, so nothing was shown"


@every([("on4", "overlap"), ("on6", "rings"), ("on6", "cut")])
def test_a_trace_holds_what_every_rank_did(run: Run) -> None:
    """Each update with its staleness, the push it came from, the gradients before it, and who waited."""
    view, seen = TraceView(run.path.with_suffix(".trace")), set()
    view.write(run.path.with_suffix(".pb"), force=False)
    assert view.flows == len(run.events) and view.backward == 0 and view.clocks == "One clock."
    for lane in view.lanes:
        named = np.array([lane.names[number][0] for number in lane.spans["name"]], str)
        seen |= {f"{lane.about['track']}: {name.split()[0]}" for name in named}
        if "shard" in lane.about:
            mine, whole = run.events[run.events["shard"] == lane.about["shard"]], lane.spans[lane.spans["staleness"] >= 0]
            assert whole["staleness"].tolist() == (mine.applied - mine.fetched).tolist()
        elif lane.about["track"] == "replica":
            steps = lane.spans["number"][named == "gradient"]
            assert steps.tolist() == list(range(len(steps))) and len(steps) >= 40
    moves = "transfers" if run.config.method.overlap else "replica"
    wanted = {"shard: apply", "shard: checkpoint", "replica: gradient", "replica: forward", "coordinator: round", f"{moves}: push"}
    wanted |= {"replica: receive", "replica: orders"} if run.config.topology.partitions > 1 else set()
    wanted |= {"replica: replica"} if run.config.method.slots == 2 else set()
    assert wanted | {f"{moves}: fetch", "evaluations: evaluation", "checkpoints: checkpoint", "shard: idle"} <= seen


@every([("on6", "rings")])
def test_rings_fill_and_wrap(run: Run) -> None:
    assert (run.events.groupby(["shard", "replica"]).size() == run.events.push.max() + 1).all()
    assert run.progress.waited.max() > 0


@every([("on6", "float64")])
def test_warmstart_lets_one_replica_begin_alone(run: Run) -> None:
    ledger.warmstart_is_exact(run)
    assert set(run.events.replica) == {0, 1, 2}


@every([("on6", "empty-shard"), ("on6", "idle-replica")])
def test_more_shards_than_parameters(run: Run) -> None:
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        assert file["ranges"][:].tolist() == [[0, 1], [1, 2], [2, 2]]
        w, b = file["params"][:]
    if "line-40" in run.config.data.path:
        assert abs(w - 2) < 0.3 and abs(b - 1) < 0.3
    else:
        # One example, (-1, -1), decides only b - w, and only one replica has it.
        assert set(run.events.replica) == {0}


def test_checkpoint_continues_on_another_topology(on6: Path, on3: Path, opened: Callable[[Path], Run]) -> None:
    """A checkpoint of 1 + 1 + 1 goes on as 1 + 2 + 3, counting on."""
    run = opened(on6 / "more.h5")
    with h5py.File(on3 / "plain.checkpoint.h5") as file:
        clock, pushes = int(file["clock"][0, 0]), int(file["replicas"]["pushes"][0])
    assert run.evaluation.accuracy.iloc[0] > 0.85
    assert ((run.busy > 0) & (run.occupancy <= 1)).all()
    for shard in (0, 1):
        mine = run.events[run.events["shard"] == shard]
        assert mine.applied.tolist() == list(range(clock, clock + len(mine)))
        assert mine[mine.replica == 0].push.min() == pushes


def test_evaluation_of_a_run_on_ranks_is_the_same_in_one_process(on3: Path) -> None:
    score, *_ = inference.evaluate(str(on3 / "plain.checkpoint.h5"), None, "test")
    run = Run(on3 / "plain.h5")
    assert score.accuracy == pytest.approx(run.accuracy)
    assert json.loads(run.config.text())["run"]["name"] == "plain"


@pytest.mark.long
def test_without_shared_memory(trainings: Callable[..., Path], opened: Callable[[Path], Run]) -> None:
    """Over TCP nothing moves unless the target helps."""
    env = {"MPIR_CVAR_NUM_CLIQUES": "2", "UCX_TLS": "tcp,self"}
    folder = trainings(4, {"tcp": ["stop.epochs=8", "topology.replicas=2", "record.trace=true"]}, **env)
    assert opened(folder / "tcp.h5").accuracy > 0.8
    # With MPICH each half took the other's clock for another host's, and compared them.
    found = [(lane.about["offset"], lane.about["error"]) for lane in TraceView(folder / "tcp.trace").lanes]
    assert {error > 0 for _, error in found} == ({False, True} if MPICH else {False}) and all(
        abs(offset) <= error for offset, error in found
    )
