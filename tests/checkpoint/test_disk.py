"""A full disk, a folder that cannot be written: the run goes on, says so, tries again; nothing crashes or is half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import h5py
import numpy as np
import pytest
from finished import ROOT, Finished
from ledger import taken
from points import TREE, write

from dbnet import open_run
from dbnet.checkpoint import master, parts
from dbnet.checkpoint.master import Checkpoints
from dbnet.checkpoint.reader import Checkpoint
from dbnet.checkpoint.verify import damage
from dbnet.core.config import build
from dbnet.core.files import Shelter, give_blocks, hdf5, reserve
from dbnet.monitor.results import Run
from dbnet.monitor.runfile import RunFile
from dbnet.shards.shard import EVENT

Command = Callable[..., Finished]
SIZE = 32 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that is a disk of its own, of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk can be mounted by root alone ({done.stderr.strip() or 'mount failed'})")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Fill a disk but for some bytes; return the file that does."""
    filler, state = folder / "filler", os.statvfs(folder)
    with open(filler, "wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - left)
    return filler


# --- HDF5 files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 5 << 12, 1 << 20, 3 << 20])
def test_hdf5_ends_well_on_a_full_disk(left: int, disk: Path) -> None:
    fill(disk, left)
    with pytest.raises(OSError, match="No space left"), hdf5(disk / "a.h5") as file:
        for i in range(4):
            file.create_dataset(f"d{i}", data=np.random.default_rng(i).normal(size=1 << 17), chunks=(1000,))


def test_what_a_shelter_holds_is_the_file(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(300, 70))
    with hdf5(tmp_path / "a.h5") as file:
        file["x"] = x
        file["packed"] = x.round()
        del file["packed"]
        file.create_dataset("again", data=x, compression="gzip")
    with h5py.File(tmp_path / "a.h5") as file:
        assert sorted(file) == ["again", "x"] and np.array_equal(file["x"][:], x) and np.array_equal(file["again"][:], x)
    with pytest.raises(IsADirectoryError):
        Shelter(tmp_path)


@pytest.mark.long
def test_data_on_a_full_disk(disk: Path) -> None:
    fill(disk, 1 << 14)
    words = [sys.executable, "-m", "dbnet", "data", "digits", str(disk / "d.h5")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert f"Cannot write '{disk}/d.h5': No space left on device" in done.stderr
    assert [path.name for path in disk.iterdir()] == ["filler"]


# --- the run file -------------------------------------------------------------------------------------------------------------


def events(n: int) -> tuple:
    rows, chance = np.zeros(n, EVENT), np.random.default_rng(n)
    rows["push"], rows["seconds"] = chance.integers(1, 1 << 60, n), chance.random(n)
    return taken(rows)


@pytest.mark.parametrize("freed", [True, False])
def test_rows_wait_for_room(freed: bool, disk: Path) -> None:
    record = RunFile(disk / "r.h5", build(TREE), {}, count(0.0, 100.0).__next__)
    record.events(0, *events(1000))
    assert record.trouble == "" and len(Run(record.path).events) == 1000
    filler, given = fill(disk), 1000
    while record.trouble == "":
        record.events(0, *events(3000))
        given += 3000
    record.events(0, *events(500))
    given += 500
    assert record.trouble == "No space left on device" and len(Run(record.path).events) == given - 3500
    if freed:
        filler.unlink()
    lost = record.close(True)
    assert lost == (0 if freed else 3500) and record.close(True) == 0
    run = Run(record.path)
    assert run.finished and len(run.events) == given - lost and (run.events.push > 0).all()


# --- checkpoints --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False])
def test_a_full_disk_costs_checkpoints_alone(
    asked: bool, disk: Path, run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the first checkpoint is due and has room for the next; whether or not it is asked for room first."""
    if not asked:
        monkeypatch.setattr(parts, "require_room", lambda *_: None)
    fail = Checkpoints._fail
    begin = Checkpoints.begin

    def filled(self: Checkpoints, *content: object) -> None:
        if self._number == 0:
            fill(disk)
        begin(self, *content)

    def freed(self: Checkpoints, reason: str) -> None:
        fail(self, reason)
        (disk / "filler").unlink()

    monkeypatch.setattr(Checkpoints, "begin", filled)
    monkeypatch.setattr(Checkpoints, "_fail", freed)
    words = [f"run.folder={disk}", "checkpoint.steps=100", "stop.steps=1000", "stop.epochs=99"]
    done = dbnet("train", run_file, "--quiet", *words)
    assert done.code == 0 and done.err.count("could not be written") == 1
    assert "could not be written (shard 0 and 1 more: No space left on device). The run goes on." in done.err
    point = Checkpoint(disk / "run.checkpoint.h5")
    assert damage(point.path) == [] and point.replicas["steps"].tolist() == [1000, 1000]
    assert not [path for path in (disk / "run.checkpoints").iterdir() if path.name.startswith("000001") or path.suffix == ".part"]
    assert len(open_run(disk / "run.h5").events) == 2 * 2 * 1000


@pytest.mark.long
def test_a_disk_that_stays_full(disk: Path, run_file: Path) -> None:
    """In a process of its own: HDF5 would crash at its end."""
    fill(disk, 3 << 20)
    words = ["train", str(run_file), f"run.folder={disk}", "checkpoint.seconds=0.1", "stop.epochs=4"]
    command, env = [sys.executable, "-m", "dbnet", *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1, done.stderr
    assert "The run has ended, but its last checkpoint could not be written: there is none." in done.stderr
    assert "Checkpoint     the last one could not be written" in done.stdout and "Traceback" not in done.stderr
    assert not list(disk.rglob("*.part")) and not list((disk / "run.checkpoints").iterdir())
    assert open_run(disk / "run.h5").finished


def test_a_folder_that_cannot_be_written(run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, but not into a file."""
    begin, blocked = Checkpoints.begin, Path("out/run.checkpoints")

    def changed(self: Checkpoints, *content: object) -> None:
        if self._number == 0:
            blocked.touch()
        elif self._number == 1:
            blocked.unlink()
        begin(self, *content)

    monkeypatch.setattr(Checkpoints, "begin", changed)
    done = dbnet("train", run_file, "--quiet", "checkpoint.steps=100", "stop.steps=1000", "stop.epochs=99")
    assert done.code == 0 and done.err.count("\n") == 1
    assert "could not be written (the coordinator: File exists ('out/run.checkpoints')). The run goes on." in done.err
    assert damage("out/run.checkpoint.h5") == []


def test_one_shard_that_cannot_write(run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others have written of this checkpoint goes, and the one before stays."""
    made = parts.PartFile.__init__

    def refuse(self: parts.PartFile, path: Path, *more: object) -> None:
        if "000002.shard-1" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        made(self, path, *more)

    monkeypatch.setattr(parts.PartFile, "__init__", refuse)
    done = dbnet("train", run_file, "checkpoint.steps=100", "checkpoint.keep=99", "stop.steps=2000", "stop.epochs=99")
    assert done.code == 0
    assert done.err.count("(shard 1: Permission denied ('out/run.checkpoints/000002.shard-1.h5')). The run goes on.") == 1
    numbers = {path.name[:6] for path in Path("out/run.checkpoints").iterdir()}
    assert {"000001", "000003"} <= numbers and "000002" not in numbers


def test_old_ones_that_cannot_be_removed(run_file: Path, dbnet: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(master, "prune", refuse)
    done = dbnet("train", run_file, "--quiet", "stop.steps=2")
    assert done.code == 0 and "Old checkpoints could not be removed (the coordinator: Read-only file system)." in done.err
    assert damage("out/run.checkpoint.h5") == []


def test_a_link_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before it stays the newest, and whole."""
    link = write(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    with pytest.raises(OSError, match="not permitted"):
        write(tmp_path, 2)
    assert os.readlink(link) == "run.checkpoints/000001.h5" and damage(link) == []


@pytest.mark.parametrize("known", [True, False])
def test_a_mapped_file_is_given_its_blocks(known: bool, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr("dbnet.core.files._ALLOCATE", None)
    with open(disk / "a", "w+b", buffering=0) as file:
        file.truncate(8 << 20)
        give_blocks(file.fileno(), 0, 1 << 20)
        assert os.stat(disk / "a").st_blocks * 512 >= 1 << 20
        fill(disk)
        with pytest.raises(OSError, match="No space left"):
            give_blocks(file.fileno(), 1 << 20, 3 << 20)
        assert os.path.getsize(disk / "a") == 8 << 20


@pytest.mark.parametrize("known", [True, False])
def test_reserved_blocks_can_be_written_on_a_full_disk(known: bool, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr("dbnet.core.files._ALLOCATE", None)
    with open(disk / "a", "wb", buffering=0) as file:
        reserve(file.fileno(), disk, 1 << 20)
        assert os.path.getsize(disk / "a") == 0
        fill(disk)
        if known:
            assert file.write(bytes(1 << 20)) == 1 << 20
        with pytest.raises(OSError, match="No space left"):
            reserve(file.fileno(), disk, 3 << 20)
