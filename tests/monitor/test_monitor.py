"""The run file: rows in, frames out, staleness counted, readable while it grows, never over another run's."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from math import nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
from finished import ROOT, Finished
from ledger import taken

from dbnet import open_run
from dbnet.core.config import Config, RecordTable, build, restored
from dbnet.core.errors import UserError
from dbnet.monitor.display import Display
from dbnet.monitor.inspect import describe, facts
from dbnet.monitor.pictures.figure import draw
from dbnet.monitor.results import Run, bar
from dbnet.monitor.runfile import BINS, FINISHED, RUNNING, RunFile, begin
from dbnet.monitor.tables import PROGRESS
from dbnet.network.replica import Score
from dbnet.shards.server import NoInbox, Server
from dbnet.shards.shard import EVENT


def config(**changes: object) -> Config:
    tree = {"data": {"path": "d.h5"}, "model": {"layers": [{"kind": "dense", "units": 2}]}, "stop": {"steps": 1},
            "topology": {"shards": 2}, **changes}  # fmt: skip
    return build(tree)


def events(late: list[int], start: int = 0) -> tuple:
    """Return updates with these stalenesses, applied one after another."""
    rows = np.zeros(len(late), EVENT)
    rows["applied"] = start + np.arange(len(late))
    rows["fetched"] = rows["applied"] - late
    rows["push"] = np.arange(len(late))
    return taken(rows)


def test_rows_come_back(tmp_path: Path) -> None:
    clock = count(0.0, 100.0).__next__
    record = RunFile(tmp_path / "r.h5", config(), {"mpi": "none", "hosts": ["a", "b"], "parameters": 8}, clock)
    rows = np.zeros(3, PROGRESS)
    rows["steps"] = [1, 2, 3]
    record.progress(rows)
    record.evaluation(0.5, 1, 10, 2.0, 0.1, 0.9, 0.2, np.nan)
    record.events(0, *events([0, 0, 2]))
    record.events(1, *events([1]))
    record.events(0, *events([BINS + 7, 1], 500))
    # The table's last row counts all beyond; the mean that is shown does not end there.
    assert record.mean_staleness == (0 + 0 + 2 + 1 + BINS + 7 + 1) / 6
    run = Run(tmp_path / "r.h5")
    assert not run.finished and run.progress.steps.tolist() == [1, 2, 3] and run.accuracy == 0.9
    record.close(True)
    record.close(True)
    run.refresh()
    assert run.finished and restored(run.config) == config()
    assert run.events["shard"].tolist() == [0, 0, 0, 1, 0, 0] and run.events.applied.tolist() == [0, 1, 2, 0, 500, 501]
    assert run.staleness["shard 0"].loc[[0, 1, 2, BINS - 1]].tolist() == [2, 1, 1, 1]
    assert run.staleness.sum().tolist() == [5, 1]
    assert run.about["hosts"] == ["a", "b"] and run.about["parameters"] == 8


def test_rows_are_written_in_blocks(tmp_path: Path) -> None:
    """A row a time would write its block anew each time, at the end of the file: here 8000 of them within seconds."""
    now = [0.0]
    record = RunFile(tmp_path / "r.h5", config(), {}, lambda: now[0])
    record.events(0, *events([0]))
    begun = record.path.stat().st_size, len(Run(record.path).events)
    for number in range(4000):
        now[0] += 2e-4
        record.events(0, *events([0, 1], 2 * number))
    # What fills a block is written, and nothing else before a second is over.
    assert begun[1] == 1 and len(Run(record.path).events) == 4096 and record.waiting == 8001 - 4096
    now[0] += 1
    record.events(0, *events([3], 9000))
    run = Run(record.path)
    assert len(run.events) == 8002 and record.waiting == 0 and run.staleness["shard 0"].loc[[0, 1, 3]].tolist() == [4001, 4000, 1]
    record.close(FINISHED)
    assert record.path.stat().st_size < 300_000


def test_what_is_written_costs_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run goes on no table is opened or asked for its length; without updates no staleness is written."""
    now, written = [0.0], []
    record = RunFile(tmp_path / "r.h5", config(), {"parameters": 8}, lambda: now[0])
    write = h5py.Dataset.__setitem__
    with monkeypatch.context() as patch:
        patch.setattr(h5py.Dataset, "__setitem__", lambda data, *more: written.append(data.name) or write(data, *more))
        for name in ("__getitem__", "__len__"):
            patch.setattr(h5py.Group, name, None)
        patch.setattr(h5py.Dataset, "__len__", None)
        for second in range(4):
            now[0] += 2
            record.events(0, *events([0, 1], 2 * second)) if second % 2 else record.progress(np.zeros(1, PROGRESS))
        assert written == ["/progress", "/events", "/staleness", "/busy"] * 2
        record.events(0, *events([0], 6))
        assert len(written) == 8
    record.close(FINISHED)
    run = Run(record.path)
    assert len(run.events) == 5 and len(run.progress) == 2 and run.staleness["shard 0"].loc[[0, 1]].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("kept", "rows"),
    [({"events": "all"}, 1000), ({"events": "counts"}, 0), ({"whole": 10, "every": 7}, 10 + 142 - 1), ({}, 1000)],
)
def test_updates_that_are_no_rows_count_all_the_same(kept: dict, rows: int) -> None:
    made, told, late = events([i % 3 for i in range(1000)])[0], [], np.zeros(3, int)
    receiver = SimpleNamespace(take_events=lambda: made, heeds=dict)
    channel = SimpleNamespace(send=lambda rank, kind, content: told.append(content))
    server = Server(receiver, NoInbox(), channel, None, lambda: 1.0, RecordTable(**kept))
    server._report(busy=True)
    ((found, (values, counts), _),) = told
    late[values] = counts
    assert late.tolist() == [334, 333, 333] and len(found) == rows
    if "whole" in kept:
        assert found["applied"].tolist() == [*range(10), *range(14, 1000, 7)]


def test_staleness_in_words(tmp_path: Path) -> None:
    """Of many shards the sum and the two extremes; no rows of zeros."""
    about = {"parameters": 8, "mpi": "none", "hosts": ["a"]}
    record = RunFile(tmp_path / "r.h5", config(topology={"shards": 10}), {**about, "idle": "rest"})
    for shard in range(10):
        record.events(shard, *events([0, 0, 2, shard + 5]))
    record.close(FINISHED)
    late = [0, 0, 2] * 10 + list(range(5, 15))
    assert "\n  idle         servers rest\n" in describe(str(tmp_path / "r.h5"))
    words = describe(str(tmp_path / "r.h5")).split("staleness ")[1].splitlines()
    assert [line.split()[:2] for line in words[1:]] == [["10", "shards"], ["shard", "0"], ["shard", "9"]]
    median, q95 = (f"{np.quantile(late, share, method='inverted_cdf'):.0f}" for share in (0.5, 0.95))
    assert words[1].split()[2:7] == ["40", f"{np.mean(late):.2f}", median, q95, "14"]
    assert words[3].split()[7:] == ["█", "▅", "▅"] and bar(np.array([8, 0, 4, 1, 0]), 3) == "█▆ "
    last = facts(str(tmp_path / "r.h5"))["staleness_by_shard"][9]
    assert last == {"updates": 4, "mean": 4.0, "median": 0, "q95": 14, "largest": 14}
    RunFile(tmp_path / "e.h5", config(), about).close(RUNNING)
    assert describe(str(tmp_path / "e.h5")).endswith("no updates yet") and facts(str(tmp_path / "e.h5"))["accuracy"] is None


def test_versions_and_revision_are_stored(tmp_path: Path) -> None:
    RunFile(tmp_path / "r.h5", config(), {}).close(True)
    about = Run(tmp_path / "r.h5").about
    assert set(about["versions"]) >= {"dbnet", "python", "numpy", "numba", "scipy", "h5py", "hdf5"}
    assert about["revision"] and about["started"].endswith("+00:00")


def taking_names(folder: Path, together: Any, pipe: Any) -> None:
    """Begin five runs of one name, each at the same time as other processes do; send their names."""
    wanted, names = config(run={"folder": str(folder), "name": "a"}), []
    for _ in range(5):
        together.wait(30)
        free, record = begin(wanted, {"by": os.getpid()})
        record.close(True)
        names.append(free.run.name)
    pipe.send((os.getpid(), names))


def test_runs_that_begin_at_once_have_names_of_their_own(tmp_path: Path) -> None:
    many = multiprocessing.get_context("fork")
    together, (here, there) = many.Barrier(8), many.Pipe(duplex=False)
    for ending in (".checkpoint.h5", ".checkpoints", ".png"):
        # What is left of a run whose run file is gone.
        (tmp_path / f"a-{len(ending)}{ending}").touch()
    jobs = [many.Process(target=taking_names, args=(tmp_path, together, there)) for _ in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 8
    owners = {name: pid for pid, names in (here.recv() for _ in jobs) for name in names}
    assert set(owners) == {"a", *(f"a-{n}" for n in range(2, 44))} - {"a-4", "a-12", "a-14"}
    for name, pid in owners.items():
        run = Run(tmp_path / f"{name}.h5")
        assert run.about["by"] == pid and run.config.run.name == name and run.finished


def test_a_name_taken_a_moment_ago(run_file: Path, dbnet: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks sees nothing yet."""
    monkeypatch.setattr("os.path.lexists", lambda path: False)
    for _ in range(2):
        assert dbnet("train", run_file, "stop.steps=2", "--quiet").code == 0
    assert [open_run(f"out/{name}.h5").config.run.name for name in ("run", "run-2")] == ["run", "run-2"]
    assert Path("out/run-2.checkpoints/000001.h5").exists() and not Path("out/run.checkpoints/000002.h5").exists()


def test_a_run_file_that_cannot_be_begun_leaves_its_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("unable to lock file")

    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(UserError, match="unable to lock file"):
        begin(config(run={"folder": str(tmp_path), "name": "a"}), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n" + bytes(50)])
def test_a_file_that_is_no_run_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.h5").write_bytes(content)
    with pytest.raises(UserError):
        Run(tmp_path / "r.h5")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_run_file_that_is_cut_off(share: float, tmp_path: Path) -> None:
    path = tmp_path / "r.h5"
    RunFile(path, config(), {}).close(True)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError):
        Run(path)


def test_another_hdf5_file(tmp_path: Path) -> None:
    h5py.File(tmp_path / "r.h5", "w").close()
    with pytest.raises(UserError, match="not a dbnet run file"):
        Run(tmp_path / "r.h5")


def test_a_run_is_read_while_it_goes_on(run_file: Path) -> None:
    command = [sys.executable, "-m", "dbnet", "train", str(run_file), "stop.epochs=1000000", "evaluate.epochs=5"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        end, seen = time.monotonic() + 60, 0
        while not seen and job.poll() is None and time.monotonic() < end:
            try:
                run = open_run("out/run.h5")
                seen = min(len(run.progress), len(run.evaluation), len(run.events))
            except UserError:
                time.sleep(0.01)
        # Only what has been read ends the run, however slow this machine is.
        job.terminate()
        out = job.communicate(timeout=60)[0]
    assert job.returncode == 85, out
    assert seen and not run.stopped and not run.finished, out
    before = run.events.copy()
    run.refresh()
    assert run.stopped and len(run.events) > len(before)
    assert run.events.iloc[: len(before)].equals(before)


def test_events_of_a_run_in_one_process(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    assert dbnet("train", run_file, "--quiet", "method.n_push=3", "method.n_fetch=2", "topology.replicas=3").code == 0
    run = open_run("out/run.h5")
    done = json.loads(run.config.text())
    assert done["topology"]["replicas"] == 3
    for shard in range(2):
        mine = run.events[run.events["shard"] == shard]
        assert mine.applied.tolist() == list(range(len(mine)))
        for _, one in mine.groupby("replica"):
            assert one.push.tolist() == list(range(len(one))) and one.steps.iloc[0] == 1 and set(one.steps.iloc[1:-1]) == {3}
        late = np.bincount(mine.applied - mine.fetched)
        assert run.staleness[f"shard {shard}"].tolist()[: len(late)] == late.tolist()
    steps = run.events[run.events["shard"] == 0].groupby("replica").steps.sum()
    with h5py.File("out/run.checkpoint.h5") as file:
        assert file["replicas"]["steps"].tolist() == steps.tolist()


def test_the_picture_is_a_picture(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    from matplotlib.image import imread

    # Matplotlib would take a part of the name for a formula, and a wrong one.
    name = r"run_$5_\frac{$"
    assert dbnet("train", run_file, "run.picture=true", f"run.name={name}", "--quiet") == (0, "", "")
    picture = Path(f"out/{name}.png")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(picture)
    assert image.shape[0] > 200 and image.shape[1] > 600
    thirds = np.array_split(image[..., :3], 3, axis=1)
    assert all(0.005 < (third < 0.9).any(axis=2).mean() < 0.9 for third in thirds)
    with pytest.raises(UserError, match="Cannot write"):
        draw(open_run(f"out/{name}.h5"), f"out/{name}.h5/run.png")


def test_a_run_without_rows_can_be_drawn(tmp_path: Path) -> None:
    RunFile(tmp_path / "r.h5", config(), {}).close(False)
    draw(Run(tmp_path / "r.h5"), tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("score", "shown", "head"),
    [
        ((0.5, 0.9, nan, nan), ["0.9000", "-"], "test acc  train acc"),
        ((nan, nan, 0.5, 0.9), ["-", "0.9000"], "test acc  train acc"),
        ((0.51, nan, 0.000625, nan), ["0.51", "0.000625"], "test loss train loss"),
        ((nan, nan, 0.000625, nan), ["-", "0.000625"], "test loss train loss"),
        ((nan, nan, nan, nan), ["-", "-"], "test acc  train acc"),
    ],
)
def test_values_are_shown_by_their_loss(score, shown, head, capsys):
    Display().row(0.0, 1.0, 20, 0.25, nan, Score(*score))
    first, row = capsys.readouterr().out.splitlines()
    assert head in first and row.split()[4:6] == shown
