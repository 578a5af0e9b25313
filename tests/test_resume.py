"""Which checkpoint a run goes on from: the newest whole one of its name; damaged ones are passed over and named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from finished import Finished
from points import TREE, write

from dbnet import open_run
from dbnet.checkpoint import Checkpoint, part_of
from dbnet.config import Config, build
from dbnet.display import Display
from dbnet.errors import UserError
from dbnet.resume import candidates, choose

Command = Callable[..., Finished]


def config(folder: Path, name: str = "run") -> Config:
    return build({**TREE, "run": {"folder": str(folder), "name": name}})


def hurt(path: Path, name: str = "params") -> None:
    """Flip a bit of a dataset."""
    with h5py.File(path) as file:
        at = file[name].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def test_the_newest_by_the_time_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A name that was asked for with its number is another one.
    for name, number in (("run", 1), ("run-2", 1), ("run", 2), ("runner", 9), ("run-x", 9)):
        write(tmp_path, number, name=name)
    mine = config(tmp_path)
    assert candidates(mine) == [tmp_path / "run.checkpoints" / f"00000{number}.h5" for number in (2, 1)]
    newest = tmp_path / "run.checkpoints" / "000002.h5"
    os.utime(newest, (0, 0))
    assert choose(mine, "", Display(True)) == choose(mine, "auto", Display(True)) == str(newest)
    assert choose(mine, None, Display(True)) is None and choose(config(tmp_path, "new"), "auto", Display(True)) is None
    with pytest.raises(UserError, match="No checkpoint of a run named 'new'"):
        choose(config(tmp_path, "new"), "", Display(True))
    assert capsys.readouterr() == ("", "")


def test_damaged_ones_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        write(tmp_path, number, keep=9)
    masters = candidates(config(tmp_path))
    hurt(part_of(masters[0], 1), "state.sum")
    masters[1].write_bytes(masters[1].read_bytes()[:200])
    assert choose(config(tmp_path), "auto", Display(True)) == str(masters[2])
    said = capsys.readouterr().err.splitlines()
    # A master that cannot say when it was written is dated as its file.
    assert sorted(line.split("'")[1] for line in said) == sorted(map(str, masters[:2]))
    assert any(f"'{part_of(masters[0], 1)}': /state.sum, elements 0 .. " in line for line in said)
    part_of(masters[2], 0).unlink()
    with pytest.raises(UserError, match=r"All 3 checkpoints of 'run' in .* are damaged"):
        choose(config(tmp_path), "auto", Display(True))


def test_a_given_one_is_read_through(tmp_path: Path) -> None:
    link = write(tmp_path)
    assert choose(config(tmp_path), str(link), Display(True)) == str(link.resolve())
    hurt(part_of(link.resolve(), 2), "clock")
    with pytest.raises(UserError, match=r"is damaged: .*000001.shard-2.h5': /clock"):
        choose(config(tmp_path), str(link), Display(True))


def test_auto_begins_and_goes_on(run_file: Path, dbnet: Command) -> None:
    words = ["train", run_file, "--quiet", "--resume", "auto", "stop.epochs=99"]
    assert dbnet(*words, "stop.steps=10") == Finished(0, "", "")
    assert dbnet(*words, "stop.steps=20").code == 0
    assert dbnet(*words, "stop.steps=30").code == 0
    assert open_run("out/run-2.h5").about["resumed_from"] == "out/run.checkpoints/000001.h5"
    assert open_run("out/run-3.h5").about["resumed_from"] == "out/run-2.checkpoints/000001.h5"
    last = Checkpoint("out/run-3.checkpoint.h5")
    assert last.replicas["steps"].tolist() == [30, 30]
    assert [(tree["run"]["name"], tree["stop"]["steps"]) for tree in last.chain] == [("run", 10), ("run-2", 20)]
    hurt(part_of(last.path, 0))
    again = dbnet(*words, "stop.steps=30")
    assert again.code == 0 and again.err.count("\n") == 1
    assert "The checkpoint 'out/run-3.checkpoints/000001.h5' is damaged and left out: " in again.err
    assert "'out/run-3.checkpoints/000001.shard-0.h5': /params, elements 0 .. " in again.err
    assert open_run("out/run-4.h5").about["resumed_from"] == "out/run-2.checkpoints/000001.h5"


def test_inspect_verify(run_file: Path, dbnet: Command) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=2").code == 0
    point = "out/run.checkpoint.h5"
    sound = dbnet("inspect", point, "--verify")
    assert sound.code == 0 and sound.out.startswith(f"'{point}' is whole: 3 files, ")
    hurt(Path("out/run.checkpoints/000001.shard-1.h5"), "state.sum")
    damaged = dbnet("inspect", point, "--verify")
    assert damaged.code == 1 and "damaged: 'out/run.checkpoints/000001.shard-1.h5': /state.sum, elements 0 .. 605" in damaged.out
    assert "only checkpoints have checksums" in dbnet("inspect", "out/run.h5", "--verify").err
    assert "No file 'none.h5'" in dbnet("inspect", "none.h5", "--verify").err
    Path("text.h5").write_text("no HDF5")
    assert dbnet("inspect", "text.h5", "--verify").code == 1
    # What it would train on is damaged too.
    assert "state.sum" in dbnet("train", run_file, "--resume", point).err


def test_start_takes_any_checkpoint(run_file: Path, dbnet: Command) -> None:
    assert dbnet("train", run_file, "--quiet", "stop.steps=5").code == 0
    assert dbnet("train", run_file, "--quiet", "stop.steps=5", "run.start=out/run.checkpoint.h5", "run.name=on").code == 0
    assert [tree["run"]["name"] for tree in Checkpoint("out/on.checkpoint.h5").chain] == ["run"]
