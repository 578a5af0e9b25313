"""How ranks come together: the guardian of a start, signs of life before training, signals while there is nothing to save."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dbnet.comm.topology import Topology
from dbnet.comm.window import LocalWindow, WindowLayout
from dbnet.coordinator.heartbeat import Heartbeat, HeartbeatWatch, heartbeat_fields
from dbnet.coordinator.orders import coordinator_fields
from dbnet.core.errors import Lost
from dbnet.run.ranks import woken
from dbnet.run.signals import Interrupt, at_once
from dbnet.run.starting import Guardian, Starting, look_after

WORLD, BOUND, DEADLINE = Topology(shards=1, replicas=2), 5.0, 20.0


def child(work: Callable[[], None]) -> tuple[int, str]:
    """Do something in a child process; return how it ended, and what it and its own children wrote until the last had ended."""
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(into, 2)
        os.close(into)
        work()
        os._exit(7)
    os.close(into)
    said = b""
    while select.select([out], [], [], 60)[0] and (more := os.read(out, 1000)):
        said += more
    os.close(out)
    return os.waitpid(pid, 0)[1], said.decode()


def test_a_start_that_takes_too_long_is_ended_with_one_sentence() -> None:
    def hang() -> None:
        Guardian(0.1, "the ranks did not come together")
        time.sleep(60)

    status, said = child(hang)
    assert os.WTERMSIG(status) == signal.SIGKILL and said == "dbnet: the ranks did not come together\n"


@pytest.mark.parametrize("dismissed", [True, False])
def test_a_guardian_ends_when_it_is_dismissed_and_with_its_process(dismissed: bool) -> None:
    def end() -> None:
        guardian = Guardian(1000.0, "the ranks did not come together")
        if dismissed:
            guardian.dismiss()
            guardian.dismiss()

    status, said = child(end)
    assert os.WEXITSTATUS(status) == 7 and not said


class Start:
    """All ranks' signs of life while a run starts; `doing` says what each rank does, silent ones do not give any."""

    def __init__(self, silent: tuple[int, ...] = (), doing: Callable[[int, float], str] = lambda rank, now: "waits") -> None:
        self.now, self._silent, self._doing = 0.0, silent, doing
        fields = [*coordinator_fields(WORLD), *heartbeat_fields(WORLD)]
        memory = LocalWindow([WindowLayout(fields), *(WindowLayout(()) for _ in range(1, WORLD.size))])
        self.watch = HeartbeatWatch(memory, WORLD, BOUND, self.clock)
        self._pulses = {r: Heartbeat(memory, WORLD, r, BOUND, lambda: False, self.clock) for r in range(1, WORLD.size)}

    def clock(self) -> float:
        return self.now

    def turn(self, watch: HeartbeatWatch) -> bool:
        self.now += 0.5
        watch.say(self._doing(0, self.now))
        for rank, pulse in self._pulses.items():
            if rank not in self._silent:
                pulse.beat(self._doing(rank, self.now))
        return self.now < 10 * DEADLINE

    def run(self) -> None:
        look_after(self.watch, WORLD, DEADLINE, self.turn, self.clock)


def test_a_rank_that_dies_while_others_read_is_named() -> None:
    start = Start(silent=(1, 3), doing=lambda rank, now: "")
    with pytest.raises(Lost, match=r"^shard 0 and replica 1 gave no sign of life for 5 s while the run was starting"):
        start.run()
    assert BOUND < start.now <= BOUND + 1


@pytest.mark.parametrize("rank", [0, 2])
def test_reading_and_compiling_take_as_long_as_they_take(rank: int) -> None:
    start = Start(doing=lambda who, now: "waits" if who != rank or int(now) % 15 else "")
    start.run()
    assert start.now == 10 * DEADLINE


def test_when_all_only_wait_the_start_ends_after_the_deadline() -> None:
    start = Start()
    with pytest.raises(Lost, match="All ranks waited 20 s for others to start") as raised:
        start.run()
    assert DEADLINE < start.now <= DEADLINE + 1 and "Who waits for whom" in str(raised.value)


def test_who_falls_silent_while_all_wait_is_named() -> None:
    """It gave its last sign of life after all had begun to wait."""
    start = Start()
    start.watch.bound, turn = DEADLINE, start.turn

    def falls_silent(watch: HeartbeatWatch) -> bool:
        start._silent = (3,) if start.now >= 2 else ()
        return turn(watch)

    start.turn = falls_silent  # type: ignore[method-assign]
    with pytest.raises(Lost, match=r"^replica 1 gave no sign of life for 20 s"):
        start.run()


def test_while_there_is_nothing_to_save_signals_end_the_process() -> None:
    before = signal.getsignal(signal.SIGINT)
    with at_once():
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before
    with at_once():
        interrupt = Interrupt().install()
    signal.raise_signal(signal.SIGINT)
    assert interrupt.asked
    interrupt.remove()
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("ranks", "direct", "everywhere", "rings", "words"),
    [
        (5, True, True, True, "rest until they are woken"),
        (5, True, False, True, "rest for 10 ms at a time: ranks cannot wake each other"),
        (5, False, True, False, "look without rest: transfers wait for the looks of their target"),
        (3, True, False, False, "look without rest: ranks are on several hosts"),
    ],
)
def test_a_start_says_whether_servers_rest(ranks: int, direct: bool, everywhere: bool, rings: bool, words: str) -> None:
    closed: list[bool] = []
    bells: Any = SimpleNamespace(everywhere=everywhere, close=lambda: closed.append(True))
    comms: Any = SimpleNamespace(node=SimpleNamespace(size=ranks), world=SimpleNamespace(size=5))
    window: Any = SimpleNamespace(direct=lambda comm: direct)
    assert woken(comms, window, bells) == (bells if rings else None, words) and bool(closed) is not rings


def test_who_waits_in_a_run_gives_the_runs_signs_of_life_once_it_has_begun() -> None:
    start, said = object.__new__(Starting), list[str]()
    start._lifted, start._signs = threading.Event(), None
    start._thread = start._limit = SimpleNamespace(join=lambda: None, lift=lambda: None)  # type: ignore[assignment]
    start.beat("waits")
    assert not said and not start.graph()
    signs: Any = SimpleNamespace(beat=said.append, graph=lambda: "who waits")
    start.lift(signs)
    start.beat("waits for values")
    assert said == ["waits for values"] and start.graph() == "who waits"
