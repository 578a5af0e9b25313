"""Ranks on hosts that share no memory: what is trained is the same over TCP, and a cut link ends the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import ledger
import numpy as np
import pytest
from hosts import until

from dbnet import train
from dbnet.monitor.results import Run
from dbnet.monitor.trace.timeline import TraceView
from dbnet.run import inference

pytestmark = pytest.mark.long
TWO = ["topology.shards=2", "topology.replicas=2"]
CUT = ["method.kind=sgd", "rule={kind='sgd', rate=0.2}", "topology.shards=2", "topology.partitions=2", "stop.epochs=1"]
BATCH = [
    "method={kind='sandblaster', minibatch=32, slot=4096, slots=3, portion=64, push_every=2}",
    "evaluate={epochs=1000, train=0}",
    "stop={iterations=4}",
]


@pytest.fixture(scope="module")
def runs(trainings: Callable[..., Path], hosts, digits: Path) -> Path:
    """The coordinator, shard 1 and replica 1 (or partition 1) on one host; shard 0 and replica 0 (or partition 0) on the other.

    Then an evaluation, cut over all of them.
    """
    exact = "model.dtype=float64"
    return trainings(
        5, {"downpour": [*TWO, "record.trace=true"], "sandblaster": [exact, *BATCH, *TWO], "cut": [exact, *CUT]}, hosts.launch,
        [["evaluate", "out/cut.checkpoint.h5", digits]],
    )  # fmt: skip


def alone(run: Run, folder: Path) -> Run:
    """Return the same run in one process, of the uncut network."""
    moved = run.config.run.model_copy(update={"folder": str(folder)})
    uncut = run.config.topology.model_copy(update={"partitions": 1})
    return Run(train(run.config.model_copy(update={"run": moved, "topology": uncut})).run_file)


def params(run: Run) -> np.ndarray:
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        return file["params"][:]


def test_the_hosts_share_no_memory(hosts) -> None:
    code = (
        "import socket\nfrom mpi4py import MPI\nfrom dbnet.comm.communicators import node_of\n"
        "print(f'{socket.gethostname()} {MPI.COMM_WORLD.rank} {node_of(MPI.COMM_WORLD).size}\\n', end='', flush=True)"
    )
    for ranks, wanted in ((3, ["h1 0 2", "h1 2 2", "h2 1 1"]), ((2, 1), ["h1 0 2", "h1 1 2", "h2 2 1"])):
        said = hosts.launch(ranks, "-c", code, timeout=100).good().out
        assert sorted(said.splitlines()) == wanted


def test_the_doctor_tries_every_host(hosts) -> None:
    said = hosts.launch((2, 1), "-m", "dbnet", "doctor", "--json", timeout=100).good().out
    rows = {(row["subject"], row["state"]): row for row in json.loads(said[said.index("[") :])}
    moved, waits = (
        next(row for (subject, _), row in rows.items() if subject == f"{what} to h2") for what in ("one-sided", "progress")
    )
    assert "Put, Get, Accumulate, Fetch_and_op are right" in moved["said"] and waits["state"] != "broken"
    assert {"one-sided on this host", "clocks", "MPI", "threads", "windows"} <= {subject for subject, _ in rows}
    assert not [key for key in rows if key[1] == "broken"] and rows["Python", "ok"]["where"] == ["h1", "h2"]


def test_downpour_learns_and_loses_nothing(runs: Path, opened: Callable[[Path], Run]) -> None:
    run = opened(runs / "downpour.h5")
    assert run.accuracy >= 0.85 and run.about["idle"] == "look without rest: ranks are on several hosts"
    ledger.check(run)
    # The hosts of this test have one clock.
    view = TraceView(run.path.with_suffix(".trace"))
    found = {lane.about["host"]: (lane.about["offset"], lane.about["error"]) for lane in view.lanes}
    assert found["h1"] == (0, 0) and abs(found["h2"][0]) <= found["h2"][1] and "aligned" in view.clocks


def test_sandblaster_equals_one_process(runs: Path, opened: Callable[[Path], Run], tmp_path: Path) -> None:
    run = opened(runs / "sandblaster.h5")
    np.testing.assert_allclose(run.iterations.loss, alone(run, tmp_path).iterations.loss, rtol=1e-10)


def test_a_replica_cut_over_hosts_equals_one_process(runs: Path, opened: Callable[[Path], Run], tmp_path: Path) -> None:
    run = opened(runs / "cut.h5")
    np.testing.assert_allclose(params(run), params(alone(run, tmp_path)), rtol=0, atol=1e-11)


def test_a_network_cut_over_hosts_is_evaluated(runs: Path, digits: Path) -> None:
    score, n, _ = inference.evaluate(str(runs / "cut.checkpoint.h5"), str(digits), "test")
    said = f"test: {n} examples, loss {score.loss:.4f}, accuracy {score.accuracy:.4f}"
    assert (runs / "said").read_text().splitlines().count(said) == 1


@pytest.mark.parametrize(
    ("kind", "ranks"), [("downpour", (2, 2)), ("downpour", 4), ("sandblaster", (2, 2))], ids=["replicas", "shard", "sandblaster"]
)
def test_a_cut_link_ends_the_run_with_a_named_peer(kind: str, ranks, hosts, digits: Path, tmp_path: Path) -> None:
    """All replicas, or the shard and one of them, are cut off: both sides notice, say for whom they waited, and are gone."""
    (tmp_path / "run.toml").write_text(
        f'run = {{folder = "out", deadline = 3}}\ndata.path = "{digits}"\nmodel.layers = [{{kind = "dense", units = 10}}]\n'
        f'method.kind = "{kind}"\nstop = {{seconds = 600, iterations = 1000000}}\nevaluate = {{epochs = 1e6, train = 0}}\n'
        "checkpoint.seconds = 0.2\ntopology = {shards = 1, replicas = 2}\n"
    )
    here = hosts.hosts

    def living() -> list[int]:
        return [len(here.processes(name, "dbnet train")) for name in here.names]

    with hosts.start(ranks, "-m", "dbnet", "train", "run.toml", cwd=tmp_path) as job:
        first = tmp_path / "out" / "run.checkpoint.h5"
        until(lambda: first.exists() or job.poll() is not None, 120, "a first checkpoint")
        assert first.exists(), "".join(job.communicate(timeout=60))
        assert living() == [2, 2]
        here.cut("h2")
        until(lambda: living() == [0, 0], 40, "all ranks are gone")
        # The launcher itself may wait for ever for its other half behind the link.
        hosts.kill(job)
        said = "".join(job.communicate(timeout=60)).lower()
    named = [f"{name} is lost" for name in ("shard 0", "replica 0", "replica 1", "the coordinator")]
    assert any(words in said for words in (*named, "in vain for")), said
