"""A run on a terminal: what is shown of it while it goes on, from itself and from its run file."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from finished import ROOT, Finished
from ledger import taken
from rich.console import Console

from dbnet.core.config import build
from dbnet.monitor.display import Display, recent
from dbnet.monitor.live import LiveDisplay, Snapshot, display_for, duration, snapshot, view
from dbnet.monitor.results import Run
from dbnet.monitor.runfile import RUNNING, RunFile
from dbnet.monitor.tables import PROGRESS
from dbnet.network.replica import Score
from dbnet.shards.shard import EVENT

TREE = {"data": {"path": "d.h5"}, "model": {"layers": [{"kind": "dense", "units": 2}]}, "stop": {"epochs": 8, "steps": 100}}


def rows(seconds: list[float], examples: list[int], replica: int = 0, waited: float = 0.0) -> np.ndarray:
    """Return rows of the table `progress`; a replica waits the share `waited` of its time."""
    out = np.zeros(len(seconds), PROGRESS)
    out["seconds"], out["examples"], out["replica"], out["loss"] = seconds, examples, replica, 0.5
    out["waited"], out["throughput"], out["steps"] = waited * out["seconds"], 7.0, np.array(examples) // 10
    return out


def shot(**changes: object) -> Snapshot:
    """Return a run of four replicas after 10 s."""
    config = build({**TREE, "topology": {"shards": 2, "replicas": 4}})
    speeds = recent(np.concatenate([rows([9.0, 10.0], [0, 100 * (r + 1)], r, 0.25) for r in range(4)]))
    counts = np.array([[6, 2, 1, 1], [10, 0, 0, 0]])
    made = Snapshot("mine", config, "running", 10.0, 2.0, 40, 0, 0.5, Score(0.1, 0.9, 0.2, 1.0), speeds, counts)
    return made._replace(**changes)


def text(drawn: object, width: int = 120) -> str:
    """Return what rich prints of it."""
    out = io.StringIO()
    Console(file=out, width=width).print(drawn)
    return out.getvalue()


def test_a_rate_is_a_mean_over_the_last_seconds() -> None:
    # 430 a second, reported in turns of 0.2 and 0.6 of a second's work.
    seconds = np.arange(0, 20.25, 0.25)
    counts = np.repeat(215 * np.arange(41), 2)[:81]
    (speed,) = recent(rows(list(seconds), list(counts), waited=0.25))
    assert speed.rate == pytest.approx(430, rel=0.02) and speed.waited == pytest.approx(0.25)
    assert recent(rows([3.0], [50]))[0].rate == 7.0 and recent(rows([], [])) == []
    gone = np.concatenate([rows([1.0, 2.0], [10, 20], replica=1), rows([1.0, 9.0], [10, 20])])
    assert [speed.replica for speed in recent(gone)] == [0]


def test_the_plain_lines_show_that_mean(capsys: pytest.CaptureFixture[str]) -> None:
    display, counts = Display(), np.zeros((1, 4), np.int64)
    for second in range(4):
        display.report(rows([second, second + 0.5], [100 * second, 100 * second], replica=0), counts)
    display.row(3.5, 1.0, 10, 0.5, 1.0, Score(0.1, 0.9, 0.1, 0.9))
    assert capsys.readouterr().out.splitlines()[1].split()[-2] == f"{300 / 3.5:.0f}"


def test_the_way_to_the_end() -> None:
    share, words = shot().goal()
    assert (share, words) == (0.25, "2.0 of 8 epochs") and shot().left == pytest.approx(30)
    assert shot(steps=320).goal() == (0.8, "80 of 100 steps of each replica")
    assert np.isnan(shot(config=build({**TREE, "stop": {"accuracy": 0.9}})).left)
    assert [duration(s) for s in (7.2, 75, 3675, float("nan"))] == ["7 s", "1:15", "1:01:15", "?"]


def test_what_is_shown() -> None:
    wide, narrow = text(view(shot(), 120)), text(view(shot(), 80), 80)
    assert "mine  downpour, 2 shards, 4 replicas  running  10 s" in wide and "25 %  2.0 of 8 epochs, 30 s left" in wide
    assert "test accuracy 0.9000" in wide
    vectors = shot(score=Score(0.1, np.nan, 0.2, np.nan), errors={"R2": 0.75, "train R2": 0.8})
    assert "test loss 0.1000   R2 0.75 " in text(view(vectors, 120)).replace("\n", " ")
    assert "train R2" not in text(view(vectors, 120))
    for said in (wide, narrow):
        # Examples a second, waiting, and a bar in proportion; staleness with its quantiles.
        assert re.search(r"^3 +400 +25.0 % +█{12}( |$)", said, re.MULTILINE) and re.search(r"all 4 +1,000 +25.0 %", said)
        assert re.search(r"0 +0.70 +0 +3 +3  █▃▂▂", said)
    assert max(map(len, narrow.splitlines())) <= 80
    many = shot(speeds=shot().speeds * 100, counts=np.repeat(shot().counts, 50, axis=0))
    assert len(text(view(many, 80), 80).splitlines()) <= 14


def test_a_run_that_broke_off(tmp_path: Path, place: Path, dbnet: Callable[..., Finished]) -> None:
    record = RunFile(tmp_path / "r.h5", build(TREE), {})
    record.progress(rows([0.0, 1.0, 2.0], [0, 100, 200]))
    record.evaluation(1.0, 0, 10, 0.5, 2.0, 0.3, 2.0, 0.4)
    events = np.zeros(2, EVENT)
    events["applied"] = [0, 2]
    record.events(0, *taken(events))
    record.lost(1, 1.5, 3, 2)
    record.close(RUNNING)
    # A run may be silent for as long as it may wait.
    for silent, state in ((80, "running"), (100, "broken off")):
        os.utime(tmp_path / "r.h5", (0, time.time() - silent))
        assert Run(tmp_path / "r.h5").ended == state
    made = snapshot(Run(tmp_path / "r.h5"))
    assert (made.steps, made.epochs, made.state, made.seconds) == (20, 1.0, "broken off", 2.0)
    assert made.score == Score(2.0, 0.3, 2.0, 0.4) and made.counts[0].tolist() == [1, 0, 1]
    said = dbnet("watch", tmp_path / "r.h5")
    assert said.code == 0 and "Lost: replica 1 at 1.5 s." in said.out and "broken off" in said.out and "\x1b" not in said.out
    assert "'none.h5'; a run prints the path of its own" in dbnet("watch", "none.h5").err


def test_a_terminal_that_takes_no_more(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has hung up, or its letters are others: the run goes on in plain lines."""

    class Broken:
        is_started, console = True, Console(file=io.StringIO())

        def update(self, *_: object, **__: object) -> None:
            raise UnicodeEncodeError("latin-1", "x", 0, 1, "no such letter")

        stop = update

    shown = LiveDisplay()
    shown.begin(build(TREE), "run")
    shown._live = Broken()
    shown.row(1.0, 0.5, 10, 0.3, 0.0, Score(0.3, 0.9, 0.2, 0.95))
    shown.say("It goes on.")
    shown.end("finished")
    said = capsys.readouterr()
    assert said.out.rstrip().endswith("It goes on.") and said.err.count("does not take the live display") == 1
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert type(display_for(False)) is Display


def test_on_a_terminal(run_file: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dbnet", "train", str(run_file)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "100", "PYTHONUTF8": "1"}
    said = b""
    with subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as job:
        os.close(theirs)
        while True:
            try:
                more = os.read(ours, 1 << 16)
            except OSError:
                # All who could write have left.
                break
            said += more
            if not more:
                break
        os.close(ours)
        assert job.wait(60) == 0, said
    shown = said.decode()
    assert "\x1b[?25l" in shown and shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor comes back"
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "run  downpour, 2 shards, 2 replicas  running" in plain and "run  downpour, 2 shards, 2 replicas  finished" in plain
    assert "100 %  2.0 of 2 epochs" in plain and "seconds   epochs" in plain and "Run file       out/run.h5" in plain


def test_no_terminal_no_colours(run_file: Path, dbnet: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in dbnet("train", run_file, "stop.steps=2").out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert type(display_for(False)) is type(display_for(True)) is Display
