"""What must hold of every finished run's events: each push is applied once and in order, and no gradient is lost."""

from __future__ import annotations

import h5py
import numpy as np

from dbnet.monitor.results import Run
from dbnet.monitor.runfile import BINS


def taken(rows: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return updates as a shard sends them when it records all: rows, and all of them by staleness."""
    return rows, np.unique(rows["applied"] - rows["fetched"], return_counts=True)


def check(run: Run) -> None:
    """Fail unless the whole ledger of a run balances."""
    for part in (pushes_are_applied_once, clocks_count_up, gradients_are_conserved, staleness_is_that_of_the_events):
        part(run)


def in_step(run: Run) -> bool:
    """Return whether all replicas' gradients of a step are applied at once; a last push without any then says who is done."""
    return run.config.method.kind == "synchronous"


def pushes_are_applied_once(run: Run) -> None:
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        pushes, layout = file["replicas"]["pushes"].tolist(), file["ranges"][:]
    assert sum(pushes) > 0
    for shard, (lo, hi) in enumerate(layout.tolist()):
        mine = run.events[run.events["shard"] == shard]
        for replica, n in enumerate(pushes):
            own = mine[mine.replica == replica]
            counted = list(range(n - in_step(run) if hi > lo else 0))
            assert [push for _, one in own.groupby("partition") for push in one.push] == counted * max(1, own.partition.nunique())
            assert run.config.topology.partitions > 1 or set(own.partition) <= {0}


def clocks_count_up(run: Run) -> None:
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        clocks = file["clock"][:]
    for (shard, partition), clock in np.ndenumerate(clocks):
        mine = run.events[(run.events["shard"] == shard) & (run.events.partition == partition)]
        if in_step(run):
            assert mine.applied.drop_duplicates().tolist() == list(range(clock))
            assert not mine.duplicated(["applied", "replica"]).any()
        else:
            assert mine.applied.tolist() == list(range(clock))
        assert (mine.fetched <= mine.applied).all() and (mine.fetched >= 0).all()
        assert mine.seconds.is_monotonic_increasing


def warmstart_is_exact(run: Run) -> None:
    """Before the first fetch of any other replica exactly the warmstart's steps of replica 0 were applied at every shard."""
    for _, mine in run.events.groupby("shard"):
        for replica, own in mine[mine.replica > 0].groupby("replica"):
            before = mine[(mine.applied < own.fetched.iloc[0]) & (mine.replica == 0)]
            assert before.steps.sum() == run.config.warmstart.steps, f"replica {replica}"


def gradients_are_conserved(run: Run) -> None:
    steps = run.progress.groupby("replica").steps.max()
    with h5py.File(run.path.with_suffix(".checkpoint.h5")) as file:
        done = file["replicas"]["steps"].tolist()
    for (_, _, replica), applied in run.events.groupby(["shard", "partition", "replica"]).steps.sum().items():
        assert applied == done[replica]
    assert all(done[replica] >= n for replica, n in steps.items())


def staleness_is_that_of_the_events(run: Run) -> None:
    late = np.minimum(run.events.applied - run.events.fetched, BINS - 1)
    for shard in range(run.config.topology.shards):
        counts = np.bincount(late[run.events["shard"] == shard], minlength=BINS)
        stated = run.staleness[f"shard {shard}"].to_numpy()
        assert stated.tolist() == counts[: len(stated)].tolist() and not counts[len(stated) :].any()
