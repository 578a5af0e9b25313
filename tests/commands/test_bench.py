"""The benchmark of whole runs: what it counts, and that it says what it has run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dbnet.commands.bench import run
from dbnet.commands.bench.ranks.job import Account
from dbnet.data import file
from dbnet.data.formats.random import Random


def test_a_processor_second_is_counted_once_and_where_it_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, others = [0.0], [5.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] + others[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    class Shard:
        def apply(self) -> None:
            work(10)

    class Store:
        def push(self):  # type: ignore[no-untyped-def]
            work(1)
            Shard().apply()
            yield "a"
            work(2)

    account = Account()
    account.around(Shard, "apply", "apply")
    account.around_turns(Store, "push", "push")
    work(100)
    account.turn("poll")
    others[0] += 7
    turns = Store().push()
    assert next(turns) == "a"
    # Others have their turn.
    work(1000)
    assert list(turns) == []
    spent = account.close()
    assert {cause: seconds for cause, seconds in spent.items() if seconds} == {
        "start": 105, "push": 3, "apply": 10, "poll": 1000, "other threads": 7,
    }  # fmt: skip


def test_a_run_says_what_its_seconds_went_to(tmp_path: Path) -> None:
    network = run.FASHION._replace(sizes=(30, 40, 5), examples=300, epochs=2, batch=10)
    file.write(tmp_path / "data.h5", Random(shape="30", classes=5, train=300, test=0).read(), False)
    (only,) = run.ours(1, run.tables(network, tmp_path / "data.h5", tmp_path, 1, 1))
    assert only.name == "all roles" and only.examples == 600 and only.seconds > 0
    assert all(only.spent[cause] > 0 for cause in ("start", "gradient", "push", "apply", "poll", "record", "end"))
