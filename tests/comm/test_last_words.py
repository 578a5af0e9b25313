"""Ranks that notice together that another is lost: one of a host says it, whoever dies when."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dbnet.comm import mpi
from dbnet.core.errors import Lost

RANKS = 6
FORK = multiprocessing.get_context("fork")


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
    alone = SimpleNamespace(bcast=lambda name: name, Ibarrier=lambda: SimpleNamespace(Test=lambda: True))
    for _ in range(2):
        words = mpi.LastWords()
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
            words.share(alone)
        words.say("the coordinator is lost.")
    assert capfd.readouterr().err == "dbnet: the coordinator is lost.\n" * 2


def test_a_rank_that_does_not_speak_is_ended_or_ends_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a rank itself has to say (its disk is full, say) it says in any case."""
    waited, ended = [], []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mpi, "LAST_WORDS", words := mpi.LastWords())
    words.share(SimpleNamespace(bcast=lambda name: name, Ibarrier=lambda: SimpleNamespace(Test=lambda: True)))
    monkeypatch.setattr(mpi.time, "sleep", waited.append)
    monkeypatch.setattr(mpi.os, "_exit", ended.append)
    comm = SimpleNamespace(rank=1, size=3, Abort=ended.append)
    for error in (Lost("the coordinator is lost."), Lost("the coordinator is lost, too."), mpi.UserError("the disk is full.")):
        with mpi.abort_on_error(comm):
            raise error
    assert capfd.readouterr().err == "dbnet: the coordinator is lost.\ndbnet: the disk is full.\n"
    assert ended == [1, 1, 1, 1, 2, 2] and waited == [0.3, mpi._ENDED, 0.3, 0.3]
