"""Checkpoints: whole or not at all, readable by any topology, sound or refused; a resumed run is the uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pytest
from finished import Finished
from hypothesis import given, settings
from hypothesis import strategies as st
from points import MODEL, REGISTERS, REPLICAS, ROWS, SIZE, TREE, VALUES, jobs, tree, write

from dbnet import open_run
from dbnet.checkpoint import master, parts
from dbnet.checkpoint.format import REPLICA, part_of, texts
from dbnet.checkpoint.master import Checkpoints
from dbnet.checkpoint.parts import PartWriter
from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.verify import damage
from dbnet.comm.channel import Mailboxes
from dbnet.core.config import build, restored
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range, split
from dbnet.core.registry import make
from dbnet.data.subsets import SHARE
from dbnet.monitor.display import Display
from dbnet.network.layers.dense import Dense
from dbnet.network.losses.softmax import Softmax
from dbnet.network.model import Model
from dbnet.shards.shard import Shard

Command = Callable[..., Finished]


def read(point: Checkpoint, name: str = "params", part: Range | None = None) -> np.ndarray:
    part = part or Range(0, point.size)
    out = np.full(part.size, np.nan, np.float32)
    point.read(name, part, out)
    return out


# --- what is written comes back -----------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    link = write(tmp_path)
    point = Checkpoint(link)
    point.require(MODEL)
    assert link.is_symlink() and not os.path.isabs(os.readlink(link))
    assert restored(point.config) == build({**tree(), "run": {"folder": str(tmp_path), "name": "run"}})
    assert (point.seconds, point.size, point.state, point.chain, point.name) == (12.5, SIZE, {"k": 1}, [], "run")
    assert list(point.registers) == ["params", "state.sum"] and point.clock.tolist() == [[5, 0], [6, 1], [7, 2]]
    assert np.array_equal(point.replicas, REPLICAS) and np.array_equal(point.tables["cursors"], ROWS)
    assert damage(link) == []


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 3, 7, SIZE, SIZE + 2]), st.integers(1, SIZE + 3))
def test_written_by_some_shards_read_by_others(tmp_path_factory: pytest.TempPathFactory, writers: int, readers: int) -> None:
    folder = tmp_path_factory.mktemp("points")
    point = Checkpoint(write(folder, shards=writers))
    for name, values in REGISTERS.items():
        for part in split(SIZE, readers):
            assert np.array_equal(read(point, name, part), values[part.slice])
    shutil.rmtree(folder)


def test_one_path_opens_as_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs see global arrays, through the link and from anywhere."""
    link = write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (link, Path("..") / link.name, link.resolve()):
        with h5py.File(path) as file:
            assert all(np.array_equal(file[name][:], values) for name, values in REGISTERS.items())


def test_every_byte_has_a_checksum(tmp_path: Path) -> None:
    master = write(tmp_path).resolve()
    for path in (master, *(part_of(master, shard) for shard in range(3))):
        with h5py.File(path) as file:
            assert file.id.get_create_plist().get_version()[0] >= 2 and not file.attrs
            assert all(data.is_virtual or data.fletcher32 for data in file.values())


def test_clocks_on_another_cut(tmp_path: Path) -> None:
    point = Checkpoint(write(tmp_path))
    bounds = point.ranges
    assert point.clock_of(bounds[1], 2).tolist() == [6, 1]
    assert point.clock_of(Range(bounds[0].hi - 1, bounds[1].lo + 1), 2).tolist() == [6, 1]
    assert point.clock_of(Range(0, SIZE), 3).tolist() == [7, 7, 7]
    # A shard that had nothing of a partition must not begin that partition's count anew with old moments.
    assert point.clock_of(bounds[0], 2).tolist() == [5, 5]


def test_replicas_of_another_number_go_on_at_the_mean_progress() -> None:
    point = object.__new__(Checkpoint)
    # Two subsets of 50: one stands in epoch 3 at 25, the other in epoch 4 at 0; 3.75 epochs each.
    point.config = build({**TREE, "topology": {"replicas": 2}})
    point.replicas = np.array([(10, 175, 20, 3, 25), (13, 200, 21, 4, 0)], REPLICA)
    point.tables = {"shares": np.array([(0, 0, 50, 3, 25), (1, 0, 20, 4, 0), (1, 20, 50, 4, 0)], SHARE)}
    assert point.progress == 3.75
    assert [point.replica(r, 2).item() for r in range(2)] == point.replicas.tolist()
    rows = [point.replica(r, 3) for r in range(3)]
    assert sum(row["examples"] for row in rows) == 375
    assert {(row["steps"], row["pushes"]) for row in rows} == {(12, 21)}


def test_replicas_that_made_no_step_do_not_pull_the_others_back() -> None:
    point = object.__new__(Checkpoint)
    point.config = build({**TREE, "topology": {"replicas": 3}})
    point.replicas = np.array([(10, 175, 20, 3, 25), (0, 0, 0, 0, 0), (13, 200, 21, 4, 0)], REPLICA)
    assert [point.replica(r, 2)["steps"] for r in range(2)] == [12, 12]


# --- what is not sound --------------------------------------------------------------------------------------------------------


def test_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another network"):
        Checkpoint(write(tmp_path)).require(Model([Dense(units=5), Dense(units=2)], Softmax(), (3,), 2, "float32"))


@pytest.mark.parametrize(
    "what", ["params", "clock", "ranges", "replicas", "about", "config", "layout", "data", "method", "chain", "modules"]
)
def test_a_master_without_one_of_its_datasets(what: str, tmp_path: Path) -> None:
    link = write(tmp_path)
    with h5py.File(link, "a") as file:
        del file[what]
    assert any(what in flaw for flaw in damage(link))
    with pytest.raises(UserError):
        Checkpoint(link)


def test_a_missing_part(tmp_path: Path) -> None:
    master = write(tmp_path).resolve()
    alone = shutil.copy(master, tmp_path / "alone.h5")
    with pytest.raises(UserError, match=r"lacks its part 'alone.shard-0.h5'; copy"):
        Checkpoint(alone)
    part_of(master, 1).unlink()
    assert len(damage(master)) == 1 and "000001.shard-1.h5' is missing" in damage(master)[0]
    write(tmp_path, 2)
    shutil.copy(part_of(master.with_name("000002.h5"), 1), part_of(master, 1))
    with pytest.raises(UserError, match="belongs to another checkpoint"):
        Checkpoint(master)
    assert "belongs to another checkpoint" in damage(master)[0]
    with pytest.raises(UserError, match=r"one shard's part of a checkpoint; give 000001.h5"):
        Checkpoint(part_of(master, 1))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("which", [None, 2])
def test_a_file_that_is_cut_off(which: int | None, share: float, tmp_path: Path) -> None:
    master = write(tmp_path).resolve()
    path = master if which is None else part_of(master, which)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert path.name in damage(master)[0]
    with pytest.raises(UserError):
        Checkpoint(master)


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def places(path: Path) -> dict[str, int]:
    """Return for every dataset that is stored in a file the place of one byte in the middle of it."""
    with h5py.File(path) as file:
        stored = {name: data.id.get_chunk_info(0) for name, data in file.items() if not data.is_virtual}
        return {name: info.byte_offset + info.size // 2 for name, info in stored.items()}


def test_a_flipped_byte_in_any_dataset_is_named(tmp_path: Path) -> None:
    master, tried = write(tmp_path).resolve(), 0
    for path in (master, *(part_of(master, shard) for shard in range(3))):
        for name, at in places(path).items():
            flip(path, at)
            (flaw,) = damage(master)
            assert flaw.startswith(f"'{path}': /{name}, elements 0 .. ")
            flip(path, at)
            tried += 1
    assert tried == 12 + 3 * 5 and damage(master) == []


@pytest.mark.long
def test_any_flipped_byte_is_found_or_harmless(tmp_path: Path, soak: bool) -> None:
    master, chance = write(tmp_path).resolve(), random.Random(3)
    files = [master, *(part_of(master, shard) for shard in range(3))]
    found, flips = 0, 400 if soak else 24
    for _ in range(flips):
        path = chance.choice(files)
        at, bit = chance.randrange(path.stat().st_size), 1 << chance.randrange(8)
        flip(path, at, bit)
        flaws = damage(master)
        if flaws:
            assert path.name in flaws[0]
            found += 1
        else:
            point = Checkpoint(master)
            assert all(np.array_equal(read(point, name), values) for name, values in REGISTERS.items())
            assert np.array_equal(point.replicas, REPLICAS) and np.array_equal(point.tables["cursors"], ROWS)
        flip(path, at, bit)
    print(f"of {flips} flipped bytes {found} were found, the others are not in use")
    assert found > flips / 8


# --- generations --------------------------------------------------------------------------------------------------------------


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    for number in range(1, 6):
        link = write(tmp_path, number, keep=3)
    (tmp_path / "run.checkpoints" / "notes.txt").touch()
    left = sorted(path.name for path in (tmp_path / "run.checkpoints").glob("*.h5"))
    assert left == sorted(f"00000{n}{end}.h5" for n in (3, 4, 5) for end in ("", ".shard-0", ".shard-1", ".shard-2"))
    assert np.array_equal(read(Checkpoint(link)), 5 * VALUES)
    write(tmp_path, 6, keep=1, shards=1)
    left = sorted(path.name for path in (tmp_path / "run.checkpoints").iterdir())
    assert left == ["000006.h5", "000006.shard-0.h5", "notes.txt"]


@pytest.mark.long
@pytest.mark.parametrize("keep", [1, 2])
def test_whatever_ends_the_writing_the_link_is_whole(keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files as they are before each of the writer's operations on files, in order."""
    (tmp_path / "a").mkdir()
    write(tmp_path / "a")
    link = write(tmp_path / "a", 2)
    moments: list[np.ndarray] = []
    busy = False

    def looked_at(real: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal busy
            if not busy:
                busy = True
                # What a process would find that starts after this one has died here.
                snapshot = shutil.copytree(tmp_path / "a", tmp_path / "now", symlinks=True)
                masters = [path for path in (snapshot / "run.checkpoints").glob("*.h5") if path.name.count(".") == 1]
                assert all(damage(path) == [] for path in (snapshot / link.name, *masters))
                moments.append(read(Checkpoint(snapshot / link.name)))
                shutil.rmtree(snapshot)
                busy = False
            return real(*arguments, **options)

        return call

    steps = list(jobs(tmp_path / "a", 3, keep=keep))
    for operation in ("fsync", "replace", "symlink", "unlink"):
        monkeypatch.setattr(os, operation, looked_at(getattr(os, operation)))
    for job in steps:
        job()
    monkeypatch.undo()
    seen = [int(np.median(w / VALUES)) for w in moments]
    assert seen == sorted(seen) and set(seen) == {2, 3} and len(seen) > 15
    assert all(np.array_equal(w, n * VALUES) for w, n in zip(moments, seen, strict=True))


def test_a_part_holds_each_slice_as_it_was_when_it_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard goes on between taking a slice of two numbers and its writing: each job here is run one update late."""
    monkeypatch.setattr(parts, "CHUNK", 8)
    boxes, clock = Mailboxes(2), np.zeros(1, np.int64)
    shard = Shard(Range(3, 7), make("shards.rules", {"kind": "adagrad"}, "rule"), np.ones(4, np.float32), clock, lambda: 0.0)
    for job in PartWriter(shard, boxes.at(1), lambda: 0.0)._jobs(tmp_path / "part.h5", 0):
        for register in shard.registers().values():
            register += 1
        clock += 1
        job()
    with h5py.File(tmp_path / "part.h5") as file:
        # After the beginning, after each slice of params, after each slice of the sum.
        w = file["params"][:]
        assert w.tolist() == [2, 2, 3, 3] and file["state.sum"][:].tolist() == [3, 3, 4, 4] and file["clock"][:].tolist() == [5]
        assert file["range"][:].tolist() == [3, 7]
    saved = boxes.at(0).receive().content
    assert saved.clock.tolist() == [5] and saved.digests["params"] == sha256(w.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "value", "sound"), [("params", -2e15, False), ("state.sum", 2e15, True), ("state.sum", np.inf, False)]
)
def test_parameters_beyond_all_learning_leave_nothing(name: str, value: float, sound: bool, tmp_path: Path) -> None:
    boxes = Mailboxes(2)
    rule = make("shards.rules", {"kind": "adagrad"}, "rule")
    shard = Shard(Range(0, 4), rule, np.ones(4, np.float32), np.zeros(1, np.int64), lambda: 0.0)
    shard.registers()[name][2] = value
    saver = PartWriter(shard, boxes.at(1), lambda: 0.0, inline=True)
    saver.begin(master.master_of(tmp_path, 1), 0, "id")
    while saver.advance():
        pass
    saved = boxes.at(0).receive().content
    assert saved.sound is sound and (saved.failure == "") is sound and ("beyond all learning" in saved.failure) is not sound
    assert [path.name for path in tmp_path.iterdir()] == ["000001.shard-0.h5"] * sound


def test_a_part_of_another_run_makes_no_checkpoint(tmp_path: Path) -> None:
    """Two runs with one folder: who wrote the part last has it, the other's master is not written."""
    link = write(tmp_path)
    *steps, master, _, _ = jobs(tmp_path, 2)
    for job in steps:
        job()
    path = link.resolve().with_name("000002.h5")
    shutil.copy(part_of(link.resolve(), 1), part_of(path, 1))
    with pytest.raises(OSError, match=r"000002\.shard-1\.h5' was written by another run"):
        master()
    assert not path.exists()


def test_what_is_half_made_goes_with_the_next(tmp_path: Path) -> None:
    write(tmp_path)
    steps = list(jobs(tmp_path, 2))
    for job in steps[: len(steps) // 2]:
        job()
    assert len(list((tmp_path / "run.checkpoints").glob("000002*"))) >= 2
    write(tmp_path, 3)
    assert not list((tmp_path / "run.checkpoints").glob("000002*"))


# --- runs ---------------------------------------------------------------------------------------------------------------------

RULES = {
    "sgd": "{kind='sgd', rate=0.1}",
    "adagrad": "{kind='adagrad', rate=0.05}",
    "momentum": "{kind='momentum', rate=0.02}",
    "adam": "{kind='adam', rate=0.01}",
}


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["downpour", "sgd"])
def test_resumed_equals_uninterrupted_to_the_bit(rule: str, method: str, run_file: Path, dbnet: Command) -> None:
    falls = "rule.schedule={kind='cosine', warmup=0.2, length=3}"
    base = ["train", run_file, "--quiet", f"rule={RULES[rule]}", falls, "topology.replicas=1", "stop.epochs=9"]
    base += [f"method.kind={method}", "method.clip_norm=0.5"]
    assert dbnet(*base, "run.name=whole", "stop.steps=140").code == 0
    assert dbnet(*base, "run.name=half", "stop.steps=60").code == 0
    assert dbnet(*base, "run.name=rest", "stop.steps=140", "--resume", "out/half.checkpoint.h5").code == 0
    texts = {"about", "config", "chain"}
    with h5py.File("out/whole.checkpoint.h5") as whole, h5py.File("out/rest.checkpoint.h5") as rest:
        assert sorted(whole) == sorted(rest)
        for name in set(whole) - texts:
            assert np.array_equal(whole[name][:], rest[name][:]), name
        assert rest["clock"][:].tolist() == [[140], [140]] and rest["replicas"]["steps"].tolist() == [140]
    assert [tree["run"]["name"] for tree in Checkpoint("out/rest.checkpoint.h5").chain] == ["half"]


def test_a_resumed_run_counts_on(run_file: Path, dbnet: Command) -> None:
    base = ["train", run_file, "--quiet", "stop.epochs=99"]
    assert dbnet(*base, "stop.steps=50").code == 0
    assert dbnet(*base, "stop.steps=80", "--resume").code == 0
    first, second = open_run("out/run.h5"), open_run("out/run-2.h5")
    assert str(second.about["resumed_from"]) == "out/run.checkpoints/000001.h5"
    for shard in (0, 1):
        before, after = (run.events[run.events["shard"] == shard] for run in (first, second))
        assert after.applied.tolist() == list(range(len(before), len(before) + len(after)))
        for replica in (0, 1):
            assert before[before.replica == replica].push.tolist() == list(range(50))
            assert after[after.replica == replica].push.tolist() == list(range(50, 80))
    assert second.evaluation.seconds.iloc[0] >= Checkpoint("out/run.checkpoint.h5").seconds > 0
    assert second.evaluation.loss.iloc[0] == pytest.approx(first.evaluation.loss.iloc[-1])
    assert (second.progress.steps > 50).all()


def test_from_eight_shards_and_three_replicas_to_others(run_file: Path, dbnet: Command) -> None:
    base = ["train", run_file, "--quiet"]
    assert dbnet(*base, "topology.shards=8", "topology.replicas=3", "stop.epochs=2").code == 0
    old = Checkpoint("out/run.checkpoint.h5")
    assert dbnet(*base, "topology.shards=3", "topology.replicas=2", "stop.epochs=2", "--resume").code == 0
    new = Checkpoint("out/run-2.checkpoint.h5")
    # All replicas have made their two epochs: nothing is left to do, and nothing may change.
    assert all(np.array_equal(read(old, name), read(new, name)) for name in ("params", "state.sum"))
    assert new.replicas["epoch"].tolist() == [2, 2] and new.replicas["examples"].sum() == old.replicas["examples"].sum()
    assert dbnet(*base, "topology.shards=3", "topology.replicas=2", "stop.epochs=3", "--resume").code == 0
    last = Checkpoint("out/run-3.checkpoint.h5")
    assert last.replicas["epoch"].tolist() == [3, 3] and [tree["run"]["name"] for tree in last.chain] == ["run", "run-2"]
    assert open_run("out/run-3.h5").accuracy > 0.8


@pytest.mark.long
def test_by_steps(run_file: Path, dbnet: Command) -> None:
    words = ["stop.steps=2000", "stop.epochs=99", "topology.replicas=1", "checkpoint.steps=100", "checkpoint.keep=99"]
    assert dbnet("train", run_file, "--quiet", *words).code == 0
    masters = sorted(path for path in Path("out/run.checkpoints").iterdir() if path.name.count(".") == 1)
    steps = [int(Checkpoint(path).replicas["steps"].sum()) for path in masters]
    # As many as had time to be written, and the one at the end; each after another multiple.
    assert len(steps) > 1 and steps[-1] == 2000 and len({n // 100 for n in steps[:-1]}) == len(steps) - 1 and steps[0] >= 100


@pytest.mark.parametrize("resumed", [False, True])
def test_when_one_is_due(resumed: bool, tmp_path: Path) -> None:
    config = build({**TREE, "run": {"folder": str(tmp_path)}, "checkpoint": {"steps": 10, "seconds": 5.0}})
    now, boxes = [0.0], Mailboxes(2)
    said = texts(config, "run", MODEL.layout, {}, [])
    checkpoints = Checkpoints(boxes.at(0), Display(quiet=True).warn, config, said, lambda: now[0], resumed=resumed)
    # Steps that a resumed run has behind it do not count.
    assert not checkpoints.due(0) and checkpoints.due(47) is not resumed and checkpoints.due(51)
    checkpoints.begin({"replicas": REPLICAS}, {}, 0.0, 51)
    assert checkpoints.writing and not checkpoints.due(99) and boxes.at(1).receive().kind == "checkpoint"
    checkpoints.writing = False
    assert not checkpoints.due(59) and checkpoints.due(60)
    now[0] = 5.0
    assert checkpoints.due(51)
