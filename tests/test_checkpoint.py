"""Checkpoints: whole or not at all, readable by any topology, of one network only; a resumed run is the uninterrupted one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from finished import Finished

from dbnet.checkpoint import REPLICA, Checkpoint, Writer
from dbnet.config import build
from dbnet.errors import UserError
from dbnet.layers.dense import Dense
from dbnet.losses.softmax import Softmax
from dbnet.model import Model
from dbnet.ranges import Range

MODEL = Model([Dense(units=4), Dense(units=2)], Softmax(), (3,), 2, "float32")
TREE = {"data": {"path": "d.h5"}, "model": {"layers": [{"kind": "dense", "units": 4}, {"kind": "dense", "units": 2}]},
        "stop": {"steps": 1}}  # fmt: skip


def begin(path: Path) -> Writer:
    return Writer(path, build(TREE), MODEL, {"shape": [3], "outputs": 2, "vectors": False})


def fill(writer: Writer) -> np.ndarray:
    """Write two registers in slices, and commit; return the parameters."""
    values = np.arange(MODEL.layout.size, dtype=np.float32)
    for lo in range(0, values.size, 7):
        writer.write("params", lo, values[lo : lo + 7])
        writer.write("state.sum", lo, 2 * values[lo : lo + 7])
    ranges = [Range(0, 10), Range(10, 20), Range(20, values.size)]
    writer.commit(np.array([[5], [7], [6]]), ranges, np.array([(1, 2, 3, 4, 5), (6, 7, 8, 9, 10)], REPLICA), 12.5)
    return values


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    values = fill(begin(path))
    point = Checkpoint(path)
    point.require(MODEL)
    assert (point.config, point.seconds, point.size) == (build(TREE), 12.5, values.size)
    assert point.registers == ["params", "state.sum"] and point.replicas["position"].tolist() == [5, 10]
    for part in (Range(0, values.size), Range(5, 9), Range(values.size, values.size)):
        for name, factor in (("params", 1), ("state.sum", 2)):
            out = np.full(part.size, -1, np.float32)
            point.read(name, part, out)
            assert np.array_equal(out, factor * values[part.slice])


def test_clocks_on_another_cut(tmp_path: Path) -> None:
    fill(begin(tmp_path / "c.h5"))
    point = Checkpoint(tmp_path / "c.h5")
    assert point.clock_of(Range(0, 10), 1).tolist() == [5]
    assert point.clock_of(Range(9, 11), 1).tolist() == [7]
    assert point.clock_of(Range(0, MODEL.layout.size), 2).tolist() == [7, 7]
    assert point.clock_of(Range(22, 23), 1).tolist() == [6]


def test_nothing_appears_before_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    fill(begin(path))
    before = path.read_bytes()
    writer = begin(path)
    writer.write("params", 0, np.zeros(3, np.float32))
    assert path.read_bytes() == before
    writer.discard()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.h5"]


def test_another_network_is_refused(tmp_path: Path) -> None:
    fill(begin(tmp_path / "c.h5"))
    with pytest.raises(UserError, match="another network"):
        Checkpoint(tmp_path / "c.h5").require(Model([Dense(units=5), Dense(units=2)], Softmax(), (3,), 2, "float32"))


@pytest.mark.parametrize("what", ["params", "clock", "ranges", "replicas", "config", "layout", "data", "seconds"])
def test_a_checkpoint_without_one_of_its_parts(what: str, tmp_path: Path) -> None:
    fill(begin(tmp_path / "c.h5"))
    with h5py.File(tmp_path / "c.h5", "a") as file:
        del (file if what in file else file.attrs)[what]
    with pytest.raises(UserError):
        Checkpoint(tmp_path / "c.h5")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_checkpoint_that_is_cut_off(share: float, tmp_path: Path) -> None:
    path = tmp_path / "c.h5"
    fill(begin(path))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(UserError):
        Checkpoint(path)


RULES = {
    "sgd": "{kind='sgd', rate=0.1}",
    "adagrad": "{kind='adagrad', rate=0.05}",
    "momentum": "{kind='momentum', rate=0.02}",
    "adam": "{kind='adam', rate=0.01}",
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["downpour", "sgd"])
def test_resumed_equals_uninterrupted_to_the_bit(rule: str, method: str, run_file: Path, dbnet: Callable[..., Finished]) -> None:
    base = ["train", run_file, "--quiet", f"rule={RULES[rule]}", "topology.replicas=1", "stop.epochs=9", f"method.kind={method}"]
    assert dbnet(*base, "run.name=whole", "stop.steps=140").code == 0
    assert dbnet(*base, "run.name=half", "stop.steps=60").code == 0
    assert dbnet(*base, "run.name=rest", "stop.steps=140", "--resume", "out/half.checkpoint.h5").code == 0
    with h5py.File("out/whole.checkpoint.h5") as whole, h5py.File("out/rest.checkpoint.h5") as rest:
        assert sorted(whole) == sorted(rest)
        for name in whole:
            assert np.array_equal(whole[name][:], rest[name][:]), name
        assert rest["clock"][:].tolist() == [[140], [140]] and rest["replicas"]["steps"].tolist() == [140]


def test_a_resumed_run_counts_on(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    from dbnet import open_run

    base = ["train", run_file, "--quiet", "stop.epochs=99"]
    assert dbnet(*base, "stop.steps=50").code == 0
    assert dbnet(*base, "stop.steps=80", "--resume").code == 0
    first, second = open_run("out/run.h5"), open_run("out/run-2.h5")
    assert str(second.about["resumed_from"]) == "out/run.checkpoint.h5"
    for shard in (0, 1):
        before, after = (run.events[run.events["shard"] == shard] for run in (first, second))
        assert after.applied.tolist() == list(range(len(before), len(before) + len(after)))
        for replica in (0, 1):
            assert before[before.replica == replica].push.tolist() == list(range(50))
            assert after[after.replica == replica].push.tolist() == list(range(50, 80))
    assert second.evaluation.seconds.iloc[0] >= first.evaluation.seconds.iloc[-1]
    assert second.evaluation.test_loss.iloc[0] == pytest.approx(first.evaluation.test_loss.iloc[-1])
    assert (second.progress.steps > 50).all()


def test_clocks_on_another_cut_are_the_newest() -> None:
    """A shard that had nothing of a partition must not begin that partition's count anew with old moments."""
    point = object.__new__(Checkpoint)
    point.ranges, point.clock = np.array([[0, 4], [4, 8]]), np.array([[9, 0], [0, 7]])
    assert point.clock_of(Range(0, 4), 1).tolist() == [9]
    assert point.clock_of(Range(4, 8), 1).tolist() == [7]
    assert point.clock_of(Range(4, 8), 2).tolist() == [7, 7]
    assert point.clock_of(Range(0, 8), 3).tolist() == [9, 9, 9]
