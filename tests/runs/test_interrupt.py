"""Signals in one process: what is asked when, the run that stops and goes on, and the marker that job scripts read."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import dbnet
from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm import mpi
from dbnet.coordinator.coordinator import Coordinator
from dbnet.core import errors
from dbnet.core.errors import UserError
from dbnet.core.ranges import Range
from dbnet.monitor.results import Run
from dbnet.run import train
from dbnet.run.outcome import Marker
from dbnet.run.signals import SIGNALS, Interrupt


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(number)
        assert interrupt.asked and interrupt.by == number.name
    assert signal.getsignal(number) is before


def test_a_later_one_stops_at_once_unless_it_is_the_same_request() -> None:
    now = 0.0
    with Interrupt(lambda: now) as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        now = 5.0
        signal.raise_signal(signal.SIGUSR1)
        assert interrupt.by == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_take_no_signals() -> None:
    seen = []
    thread = threading.Thread(target=lambda: seen.append(Interrupt().install().asked))
    thread.start()
    thread.join()
    assert seen == [False]


def test_marker(tmp_path: Path) -> None:
    path = tmp_path / "marker"
    path.write_text("ended 0\n")
    marker = Marker(path)
    assert path.read_text() == ""
    marker.running()
    assert path.read_text() == f"running {os.getpid()} {socket.gethostname()}\n"
    for error, code in (
        (UserError("no"), 2),
        (errors.Refused(), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(7), 7),
        (ValueError(), 1),
    ):
        with pytest.raises(type(error)), marker.failing():
            raise error
        assert path.read_text() == f"ended {code}\n"
    assert list(tmp_path.iterdir()) == [path]
    Marker(None).ended(0)


def interrupted(monkeypatch: pytest.MonkeyPatch, ticks: int, number: signal.Signals = signal.SIGUSR1) -> None:
    """Let a signal come at the coordinator's tick of this number, once."""
    tick, left = Coordinator.tick, [ticks]

    def counted(coordinator: Coordinator) -> bool:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(number)
        return tick(coordinator)

    monkeypatch.setattr(Coordinator, "tick", counted)


@pytest.mark.parametrize("ticks", [1, 2, 40, 200])
def test_downpour_stops_and_goes_on(ticks: int, run_file: Path, dbnet: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, ticks)
    said = dbnet("train", run_file, "stop.epochs=8", "--marker", "marker")
    assert said.code == 85 and Path("marker").read_text() == "ended 85\n"
    assert said.err.count("\n") == 1 and "checkpoint out/run.checkpoint.h5" in said.err and "--resume auto" in said.err
    first = Run("out/run.h5")
    assert first.stopped and not first.finished
    assert "stopped by a signal" in dbnet("inspect", "out/run.h5").out
    again = dbnet("train", run_file, "stop.epochs=8", "--resume", "out/run.checkpoint.h5", "--marker", "marker")
    assert again.code == 0 and Path("marker").read_text() == "ended 0\n"
    second = Run("out/run-2.h5")
    assert second.finished and second.accuracy > 0.85
    # Whenever the signal came, every gradient was computed once and applied once.
    rows = Checkpoint("out/run-2.checkpoint.h5").replicas
    assert rows["epoch"].tolist() == [8, 8]
    applied = [one.events[one.events["shard"] == 0]["steps"].sum() for one in (first, second)]
    assert sum(applied) == rows["steps"].sum()


@pytest.mark.long
@pytest.mark.parametrize("ticks", [3, 60, 400])
def test_sandblaster_goes_on_as_if_it_had_not_stopped(
    ticks: int, run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["method.kind=sandblaster", "stop.epochs=1000", "stop.iterations=12", "model.dtype=float64", "model.decay=1e-3"]
    whole = train.execute(str(run_file), [*changes, "run.name=whole"], quiet=True)
    interrupted(monkeypatch, ticks)
    part = train.execute(str(run_file), [*changes, "run.name=part"], quiet=True)
    assert part.stopped and Run(part.run_file).stopped
    # What it leaves behind is the iterate, and no trial point.
    point, kept = Checkpoint(part.checkpoint), np.zeros_like(part.params)
    point.read("params", Range(0, point.size), kept)
    assert np.array_equal(part.params, kept)
    rest = train.execute(str(run_file), [*changes, "run.name=rest"], resume=str(part.checkpoint), quiet=True)
    assert not rest.stopped
    losses = [*Run(part.run_file).iterations.loss, *Run(rest.run_file).iterations.loss]
    assert losses == Run(whole.run_file).iterations.loss.tolist()
    assert np.array_equal(rest.params, whole.params)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_notebook_is_told_of_the_signal_that_stopped_its_run(
    number: signal.Signals, run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[int, bool]] = []
    before = signal.signal(number, lambda number, _: seen.append((number, Path("out/run.checkpoint.h5").exists())))
    try:
        interrupted(monkeypatch, 40, number)
        done = dbnet.train(str(run_file), ["stop.epochs=8"])
        assert done.stopped and done.signal == number.name and seen == [(number, True)]
        assert f"Stopped by {number.name}; checkpoint out/run.checkpoint.h5" in capsys.readouterr().out
        rest = dbnet.train(str(run_file), ["stop.epochs=8"], resume="auto")
        assert rest.finished and not rest.signal and len(seen) == 1
    finally:
        signal.signal(number, before)


@pytest.mark.long
def test_a_notebook_without_handlers_ends_as_the_signal_says(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(monkeypatch, 40, signal.SIGINT)
    # Started in the background, this process ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        dbnet.train(str(run_file), ["stop.epochs=8"])
    signal.signal(signal.SIGINT, before)
    assert Path("out/run.checkpoint.h5").exists()
    interrupted(monkeypatch, 40, signal.SIGUSR1)
    assert dbnet.train(str(run_file), ["stop.epochs=8"]).stopped
    interrupted(monkeypatch, 40, signal.SIGTERM)
    child = os.fork()
    if not child:
        dbnet.train(str(run_file), ["stop.epochs=8"])
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM and Path("out/run-3.checkpoint.h5").exists()


def test_while_mpi_starts_a_signal_ends_the_process(run_file: Path, dbnet: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own answer, an exception in the middle of starting MPI, was a segmentation fault."""
    before, seen = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(mpi, "world", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    assert dbnet("train", run_file, "stop.epochs=1").code == 0
    assert seen == [signal.SIG_DFL] and signal.getsignal(signal.SIGINT) == before


def test_a_signal_from_outside(run_file: Path) -> None:
    words = [sys.executable, "-m", "dbnet", "train", str(run_file), "stop.epochs=1000000", "--marker", "marker"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    job = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (Path("marker").exists() and Path("marker").read_text()):
        assert job.poll() is None
        time.sleep(0.02)
    assert Path("marker").read_text().split()[:2] == ["running", str(job.pid)]
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 85 and "Stopped by a signal" in err
