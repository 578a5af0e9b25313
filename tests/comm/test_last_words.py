"""Ranks that notice together that another is lost: one of a host says it, whoever dies when."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbnet.comm import mpi
from dbnet.comm.patience import Patience
from dbnet.core.errors import Lost

RANKS = 6
ALONE: Any = SimpleNamespace(bcast=lambda name: name, Ibarrier=lambda: SimpleNamespace(Test=lambda: True))
FORK = multiprocessing.get_context("fork")


def failing(call: Callable, number: int) -> Callable:
    """Return a call of the system that fails on one open file."""

    def fails(file: int, *more: Any) -> Any:
        if file == number:
            raise OSError(errno.EIO, "not today")
        return call(file, *more)

    return fails


class World:
    """What ranks of one host share: a name, and a barrier that none leaves before all have come."""

    def __init__(self) -> None:
        self._barrier = FORK.Barrier(RANKS)

    def bcast(self, mine: str) -> str:
        return "words-of-a-test"

    def Ibarrier(self) -> Any:
        self._barrier.wait(60)
        return SimpleNamespace(Test=lambda: True)


def ask(world: World, noticed: Any, firsts: Any) -> None:
    words = mpi.LastWords()
    words.share(world)
    noticed.wait(60)
    firsts.put(words.mine())
    # As one that is ended: nothing of it is closed in order.
    firsts.close()
    firsts.join_thread()
    os._exit(0)


@pytest.mark.parametrize("together", [True, False])
def test_one_rank_of_a_host_speaks(together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    world, firsts = World(), FORK.Queue()
    signs = [FORK.Event() for _ in range(RANKS)]
    ranks = [FORK.Process(target=ask, args=(world, sign, firsts)) for sign in signs]
    for rank in ranks:
        rank.start()
    for rank, sign in zip(ranks, signs, strict=True):
        sign.set()
        if not together:
            # Whoever has spoken is dead when the next one notices.
            rank.join(60)
    assert sorted(firsts.get(timeout=60) for _ in ranks) == [False] * (RANKS - 1) + [True]
    for rank in ranks:
        rank.join(60)
    assert not list(tmp_path.iterdir())


def test_every_rank_speaks_where_there_is_no_room_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        words = mpi.LastWords()
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
            words.share(ALONE)
        words.say("the coordinator is lost.")
    assert capfd.readouterr().err == "dbnet: the coordinator is lost.\n" * 2


def test_a_rank_that_does_not_speak_is_ended_or_ends_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a rank itself has to say (its disk is full, say) it says in any case."""
    waited, ended = [], []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mpi, "LAST_WORDS", words := mpi.LastWords())
    words.share(ALONE)
    monkeypatch.setattr(mpi.time, "sleep", waited.append)
    monkeypatch.setattr(mpi.os, "_exit", ended.append)
    comm = SimpleNamespace(rank=1, size=3, Abort=ended.append)
    for error in (Lost("the coordinator is lost."), Lost("the coordinator is lost, too."), mpi.UserError("the disk is full.")):
        with mpi.abort_on_error(comm):
            raise error
    assert capfd.readouterr().err == "dbnet: the coordinator is lost.\ndbnet: the disk is full.\n"
    assert ended == [1, 1, 1, 1, 2, 2] and waited == [0.3, mpi._ENDED, 0.3, 0.3]


@pytest.mark.parametrize("call", ["flock", "fstat", "ftruncate"])
def test_a_rank_whose_file_fails_speaks_and_ends_the_job(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A disk without locks, a file that another host has removed, no room: whatever happens to it the others must be ended."""
    ended = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mpi, "LAST_WORDS", words := mpi.LastWords())
    words.share(ALONE)
    monkeypatch.setattr(mpi.os, "_exit", ended.append)
    room = mpi.fcntl if call == "flock" else mpi.os
    monkeypatch.setattr(room, call, failing(getattr(room, call), words._file))
    with mpi.abort_on_error(SimpleNamespace(rank=1, size=3, Abort=ended.append)):
        raise Lost("the coordinator is lost.")
    assert capfd.readouterr().err == "dbnet: the coordinator is lost.\n"
    assert ended == [1, 1]


def test_a_full_disk_and_a_rank_that_hangs_keep_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = mpi.LastWords()
    words.share(ALONE)
    monkeypatch.setattr(mpi.os, "write", failing(os.write, words._file))
    assert [words.mine(), words.mine()] == [True, False]
    hanging = os.open(f"/proc/self/fd/{words._file}", os.O_RDWR)
    fcntl.flock(hanging, fcntl.LOCK_EX)
    assert not words.mine()
    os.close(hanging)


@pytest.mark.parametrize("reads", [True, False])
def test_whoever_ends_the_job_waits_until_its_words_are_read(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that is told to end the job drops what it has not read; one that reads nothing is not waited for for ever."""
    there, here = os.pipe()
    os.write(here, b"dbnet: the coordinator is lost.")
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds
        if reads and len(slept) == 4:
            os.read(there, 100)

    monkeypatch.setattr(mpi.time, "sleep", sleep)
    monkeypatch.setattr(mpi, "Patience", lambda bound: Patience(bound, lambda: now[0]))
    mpi.hand_over(here)
    assert len(slept) == 4 if reads else mpi._TAKEN < sum(slept) < mpi._ENDED
    os.close(there)
    os.close(here)


def test_whoever_stops_all_hands_its_words_over_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(mpi, "LAST_WORDS", SimpleNamespace(say=done.append))
    monkeypatch.setattr(mpi, "hand_over", lambda: done.append("handed over"))
    monkeypatch.setattr(mpi.os, "_exit", done.append)
    monkeypatch.setattr(mpi.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: done.append("bounded")))
    mpi.stop_all(SimpleNamespace(Abort=lambda code: done.append(f"abort {code}")), "lost.")
    assert done == ["lost.", "handed over", "bounded", "abort 1", 1]
