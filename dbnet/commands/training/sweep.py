"""`dbnet sweep`: train every run of a grid that is not there yet, several at once; say what came out."""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dbnet.commands.plan.ranks import ranks
from dbnet.commands.plan.slurm import array
from dbnet.commands.training.bar import Bar, share
from dbnet.commands.training.grid import GridPoint, grid
from dbnet.commands.training.state import PointState, alone, states
from dbnet.commands.training.table import rows, table
from dbnet.commands.training.worker import LAUNCH, STOPPED, Answer, Launch, WorkerProcess
from dbnet.core import config as configuration
from dbnet.core.errors import UserError
from dbnet.monitor.results import Run, reached
from dbnet.monitor.runfile import make_folder
from dbnet.run.setup import setup
from dbnet.run.signals import Interrupt


def sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train every combination of values, and compare what came out.\n\n"
        "  dbnet sweep jobs/digits.toml rule.rate=0.01,0.03,0.1 run.seed=1..3 --jobs 2      9 runs, two at once\n\n"
        "1..9 counts, 2..8..2 counts by twos; commas in quotes, brackets and braces belong to a value. Outputs are called after\n"
        "what is their own: digits_rate-0.01_seed-1.h5. What is done is not done again, however the sweep ended: the same command\n"
        "trains what is left, from its checkpoint where there is one. A run that fails is named; the others go on (exit code 1)."
    )
    parser.add_argument("configuration", metavar="RUN.toml", help="the configuration; examples are in jobs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="table.key=value,...", help="changes, with one value or several"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1); each has its share of the cores"
    )
    parser.add_argument("--mpi", action="store_true", help="one rank per role, by jobs/launch; default: each run in one process")
    parser.add_argument(
        "--list", action="store_true", help="print the runs, which of them are done, and what came out; train nothing"
    )
    parser.add_argument(
        "--json", action="store_true", help="print what came out as JSON, for scripts; what goes on: standard error"
    )
    parser.add_argument(
        "--words", type=int, metavar="I", help="print what run I (0, 1, ...) gives jobs/launch; nothing: it is done"
    )
    parser.add_argument("--slurm", action="store_true", help="print a batch script for Slurm: an array with a task for every run")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="--slurm: nodes of a run; default: as few as have a core for each rank"
    )
    parser.add_argument("--cores", type=int, metavar="C", help="--slurm: cores of a node, shared by its ranks; default: one a rank")
    parser.add_argument("--time", default="01:00:00", metavar="HH:MM:SS", help="--slurm: time limit of a run (default: 01:00:00)")


def run_sweep(options: argparse.Namespace) -> int:
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs} would train nothing; give at least 1.")
    ranked = options.mpi or options.slurm or options.words is not None
    if ranked and not LAUNCH.exists():
        raise UserError(f"There is no {LAUNCH}, which starts the ranks; use dbnet from its source folder (jobs/install).")
    points = grid(options.configuration, options.overrides, not ranked)
    if options.slurm:
        print(_script(options, points), end="")
        return 0
    if options.words is not None:
        print("".join(f"{word}\n" for word in _words(options, points)), end="")
        return 0
    if options.list:
        found = states(points, options.mpi)
        if not options.json:
            print(
                "\n".join(
                    f"{i:5d}  {point.name}  {state.words}" for i, (point, state) in enumerate(zip(points, found, strict=True))
                )
            )
        return _conclude(options, points, found, {})
    if not options.mpi:
        _require_cores(options.jobs, points)
    make_folder(points[0].config)
    with Interrupt() as interrupt:
        folder = Path(points[0].config.run.folder)
        with alone(folder, points[0].base, configuration.warn, lambda: interrupt.asked):
            found = states(points, options.mpi)
            failed, stopped = Sweep(options, points, found, interrupt).run()
            found = states(points, options.mpi, lambda sentence: None)
    return _conclude(options, points, found, failed, stopped)


def _require_cores(jobs: int, points: Sequence[GridPoint]) -> None:
    """Refuse more threads than a run's share of the cores: UserError."""
    count, cores = min(jobs, len(points)), len(os.sched_getaffinity(0))
    each, most = max(1, cores // count), max(point.config.run.threads or 1 for point in points)
    if most > each:
        fix = f"give --jobs {cores // most}" if most <= cores else f"make it at most {cores}"
        raise UserError(f"run.threads = {most}, but with {count} runs at once each has {each} of the {cores} cores here; {fix}.")


def _script(options: argparse.Namespace, points: Sequence[GridPoint]) -> str:
    """Return the batch script of an array; a task's resources are enough for the largest run."""
    needs = []
    for point in points:
        ready = setup(point.config, None, False)
        needs.append((ready.topology, [rank.memory for rank in ranks(ready)]))
    grid_words = [options.configuration, *options.overrides]
    return array(points[0].base, needs, grid_words, nodes=options.nodes, cores=options.cores, time=options.time)


def _words(options: argparse.Namespace, points: Sequence[GridPoint]) -> list[str]:
    """Return what one run of the grid gives jobs/launch; nothing where it is done."""
    if not 0 <= options.words < len(points):
        raise UserError(f"--words {options.words}: the grid has the runs 0 .. {len(points) - 1}.")
    point = points[options.words]
    (state,) = states([point], True)
    if state.run_file is not None:
        return []
    return [options.configuration, *point.words, *(["--resume", str(state.checkpoint)] if state.checkpoint else [])]


def _conclude(
    options: argparse.Namespace,
    points: Sequence[GridPoint],
    found: Sequence[PointState],
    failed: dict[str, str],
    stopped: bool = False,
) -> int:
    """Print what came out, and what did not; return the exit code."""
    came = rows(points, [state.run_file for state in found])
    done = sum(state.run_file is not None for state in found)
    if options.json:
        print(json.dumps(came, indent=1))
    elif done:
        print(f"\n{table(came, points[0].config.evaluate.part)}")
        folder = points[0].config.run.folder
        pattern = shlex.quote(str(Path(folder) / points[0].base))
        print(
            f"\ndbnet plot {pattern}_*.h5 --against epochs --out sweep.svg draws them; dbnet runs {shlex.quote(folder)} lists them."
        )
    if failed:
        print(
            f"dbnet: {len(failed)} of {len(points)} runs failed: {', '.join(failed)}; the same command tries them again.",
            file=sys.stderr,
        )
    if stopped:
        print(
            f"dbnet: Stopped by a signal; {len(points) - done} of {len(points)} runs are left. The same command goes on.",
            file=sys.stderr,
        )
        return STOPPED
    return 1 if failed else 0


class Sweep:
    """Trains the runs of a grid that are not done, several at once.

    Parameters
    ----------
    found
        What there is of each.
    interrupt
        Whether a signal has asked to stop: then what is under way writes a checkpoint, and nothing else begins.
    """

    def __init__(
        self, options: argparse.Namespace, points: Sequence[GridPoint], found: Sequence[PointState], interrupt: Interrupt
    ) -> None:
        self._todo: queue.SimpleQueue[tuple[GridPoint, Path | None]] = queue.SimpleQueue()
        for point, state in zip(points, found, strict=True):
            if state.run_file is None:
                self._todo.put((point, state.checkpoint))
        self._points, self._done, self._interrupt = points, len(points) - self._todo.qsize(), interrupt
        self._events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._count = min(options.jobs, max(1, self._todo.qsize()))
        self._players = [self._player(options, number) for number in range(self._count)]
        self._bar = Bar(len(points), sys.stderr if options.json else sys.stdout)
        self._under_way: dict[str, tuple[GridPoint, float]] = {}
        self._failed: dict[str, str] = {}
        self._stopped = False

    def _player(self, options: argparse.Namespace, number: int) -> WorkerProcess | Launch:
        if options.mpi:
            return Launch(options.configuration, self._said)
        cores = sorted(os.sched_getaffinity(0))
        each = max(1, len(cores) // self._count)
        mine = [cores[(number * each + i) % len(cores)] for i in range(each)]
        return WorkerProcess(options.configuration, [] if self._count == 1 else mine, self._said)

    def _said(self, name: str, line: str) -> None:
        self._events.put(("said", (name, line)))

    def run(self) -> tuple[dict[str, str], bool]:
        """Train; return why which runs failed, and whether a signal has stopped the sweep."""
        if self._done:
            self._bar.say(f"{self._done} of {len(self._points)} runs are done already.")
        threads = [threading.Thread(target=self._play, args=(player,), daemon=True) for player in self._players]
        try:
            for thread in threads:
                thread.start()
            self._watch(len(threads))
        except KeyboardInterrupt:
            for player in self._players:
                player.stop(signal.SIGKILL if isinstance(player, WorkerProcess) else signal.SIGTERM)
            raise
        finally:
            self._bar.end()
        return self._failed, self._stopped

    def _play(self, player: WorkerProcess | Launch) -> None:
        """One thread's part: run after run until none is left."""
        try:
            while not self._interrupt.asked:
                try:
                    point, checkpoint = self._todo.get_nowait()
                except queue.Empty:
                    break
                began = time.time()
                self._events.put(("begun", (point, began)))
                try:
                    answer = player.play(point, checkpoint)
                except OSError as error:
                    answer = Answer(f"it could not be started ({error}).")
                self._events.put(("ended", (point, answer, time.time() - began)))
            player.close()
        finally:
            self._events.put(("idle", None))

    def _watch(self, active: int) -> None:
        """The main thread's part: show what happens, hand a signal on."""
        asked, looked = False, 0.0
        while active:
            if self._interrupt.asked and not asked:
                asked = self._stopped = True
                for player in self._players:
                    player.stop()
            try:
                what, about = self._events.get(timeout=0.2)
            except queue.Empty:
                if self._bar.shown and time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    self._show()
                continue
            if what == "begun":
                self._under_way[about[0].name] = about
            elif what == "said":
                self._bar.warn(f"{about[0]}: {about[1].removeprefix('dbnet: ')}")
            elif what == "ended":
                self._ended(*about)
            else:
                active -= 1
            self._show()

    def _show(self) -> None:
        parts = [share(point.config, since) for point, since in self._under_way.values()] if self._bar.shown else []
        self._bar.at(self._done + sum(parts), ", ".join(self._under_way))

    def _ended(self, point: GridPoint, answer: Answer, took: float) -> None:
        del self._under_way[point.name]
        if answer.stopped:
            return
        self._done += 1
        # Of thousands of runs this one's files alone.
        (state,) = states([point], isinstance(self._players[0], Launch), lambda sentence: None, point.name)
        if answer.failed or state.run_file is None:
            why = answer.failed or "it has ended well, but its run file is not there."
            self._failed[point.name] = why
            self._bar.warn(f"{point.name} failed: {why}")
            return
        run = Run(state.run_file, ["evaluation"])
        result = ", ".join(reached(run, run.evaluation.iloc[-1])) if len(run.evaluation) else ""
        number = f"{self._done:{len(str(len(self._points)))}d} of {len(self._points)}"
        self._bar.say(f"{number}  {point.name}  {result or f'no {run.part} set'}  {took:.1f} s")
