"""The coordinator's everyday work, the same for every method: record, show, have evaluated, have checkpoints written.

It reads what the replicas have written into the coordinator's window and what the shards send; it asks one replica at a time for an
evaluation, in turn, while the others go on. It holds no parameters: the shards write their parts of a checkpoint themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dbnet.checkpoint.format import REPLICA
from dbnet.checkpoint.master import Checkpoints
from dbnet.checkpoint.parts import Saved
from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm.channel import Channel
from dbnet.comm.turns import IDLE, Turns, Wait
from dbnet.coordinator.guard import Guard
from dbnet.coordinator.heartbeat import HeartbeatWatch
from dbnet.coordinator.membership import Membership
from dbnet.coordinator.orders import OrderBook
from dbnet.core.config import Config
from dbnet.data.subsets import SHARE, Share
from dbnet.monitor.display import Display
from dbnet.monitor.runfile import FINISHED, RUNNING, STOPPED, RunFile
from dbnet.monitor.tables import PROGRESS
from dbnet.network.replica import Score
from dbnet.run.signals import Interrupt

INTERVAL = 0.25


class Coordinator:
    """One run as the coordinator sees it.

    Parameters
    ----------
    desk, channel
        Orders and reports of the replicas; messages of the shards.
    record, display
        The run file and what is printed.
    config
        The run.
    examples
        Size of the training set.
    keeper
        Has checkpoints written.
    clock
        Seconds of the run.
    guard
        Counts gradients that are not finite and says when to stop.
    watch
        Signs of life of all ranks; None within one process.
    due
        By what recurring work falls due; within one process not by the clock.
    """

    def __init__(
        self, desk: OrderBook, channel: Channel, record: RunFile, display: Display, config: Config, examples: int,
        keeper: Checkpoints, clock: Callable[[], float], guard: Guard, watch: HeartbeatWatch | None = None,
        due: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        self.desk, self.channel, self.record, self.display, self.config = desk, channel, record, display, config
        self.examples, self.keeper, self.clock, self.guard, self.due = examples, keeper, clock, guard, due or clock
        self.shards, self.watch = config.topology.shards, watch
        self.seconds_before = 0.0
        self._status = desk.status()
        self._shown = {name: values.copy() for name, values in self._status.items()}
        self._next_progress = self._shown_at = 0.0
        self.drained: set[int] = set()
        # How often shards and disk were heard of: what a wait for them takes as progress.
        self.news = 0
        self.turn, self._evaluated_at, self._evaluated_epochs = 0, 0.0, 0.0
        self.last_score: Score | None = None
        self._loss = self._rate = float("nan")
        # What each replica trains on at first.
        self.first_shares: list[list[Share]] = []
        self.roll = Membership(
            desk, channel, watch, self._steps_of, lambda: self.seconds, display.say, lambda loss: record.loss(*loss)
        )
        self.roll.evaluation_lost = self.evaluate
        self._steps_before = np.zeros(desk.topology.copies)
        self._steps_beside = 0
        self._ended: float | None = None
        # What a method adds: handlers of messages from shards, state for checkpoints, its own rows on the display.
        self.handlers: dict[str, Callable[[int, Any], None]] = {
            "closed": self.roll.closed,
            "refused": lambda shard, refusals: guard.take(self.seconds, shard, refusals),
        }
        self.state: Callable[[], dict[str, Any]] = dict
        self.resumed: dict[str, Any] = {}
        self.rows = True
        # Whoever makes the run installs it.
        self.interrupt, self.stopped = Interrupt(), False
        self._trouble = ""

    def resume(self, checkpoint: Checkpoint) -> None:
        """Go on counting from a checkpoint."""
        self.seconds_before = checkpoint.seconds
        self.resumed = checkpoint.state
        self.keeper.resume()
        replicas = self.desk.topology.replicas
        for replica in range(replicas):
            row = checkpoint.replica(replica, replicas)
            self._steps_before[replica] = row["steps"]
            self.desk.resume(replica, **{name: int(row[name]) for name in REPLICA.names})
        self._status = self.desk.status()
        # Replicas of another number have the mean steps of the old ones, which do not add up to what they have made together.
        self._steps_beside = checkpoint.steps - int(self._steps_before.sum())

    # --- what the run has come to ---------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a checkpoint included."""
        return self.seconds_before + (self.clock() if self._ended is None else self._ended)

    def stop_clock(self) -> None:
        """Training has ended: what is saved and evaluated from here on belongs to this moment."""
        self._ended = self.clock() if self._ended is None else self._ended

    @property
    def epochs(self) -> float:
        """Passes over the training set by all replicas together."""
        return float(self._status["examples"].sum()) / self.examples

    @property
    def steps(self) -> np.ndarray:
        """Steps of each replica."""
        return self._status["steps"]

    def made(self, replica: int) -> int:
        """Return the steps of a replica, those that it was resumed with included."""
        return int(self.steps[replica])

    def began(self, replica: int) -> bool:
        """Return whether a replica has fetched parameters."""
        return bool(self._status["fetches"][replica])

    @property
    def all_steps(self) -> int:
        """Steps of all replicas together, those before a checkpoint included."""
        return self._steps_beside + int(self.steps.sum())

    @property
    def beats(self) -> np.ndarray:
        """A number of each replica that changes while it lives, also while it moves data or reads, and polls no orders."""
        polls = self._status["heartbeat"]
        return polls if self.watch is None else polls + self.watch.heard

    @property
    def dropped(self) -> int:
        """Portions that were computed in vain, so far."""
        return int(self._status["dropped"].sum())

    def counted(self, replica: int) -> int:
        """Portions that a replica has computed and not dropped, so far."""
        return int(self._status["computed"][replica] - self._status["dropped"][replica])

    @property
    def all_done(self) -> bool:
        return all(self.desk.done(replica) for replica in self.roll.active)

    @property
    def evaluating(self) -> bool:
        return self.desk.evaluating is not None

    @property
    def asked(self) -> bool:
        """Whether a signal asks the run to write a checkpoint and stop."""
        return self.interrupt.asked or self.roll.asked

    @property
    def reached(self) -> bool:
        """Whether the run is to end now: its time, its accuracy, too many gradients that were refused, or a signal."""
        stop, score = self.config.stop, self.last_score
        by_time = stop.seconds is not None and self.seconds >= stop.seconds
        by_accuracy = stop.accuracy is not None and score is not None and score.test_accuracy >= stop.accuracy
        return self.asked or by_time or by_accuracy or self.guard.stops

    @property
    def halted(self) -> bool:
        """Whether the run cannot or shall not go on."""
        return self.asked or not self.roll.active

    @property
    def finished(self) -> bool:
        """Whether the run has come to its own end."""
        return self.desk.ended and not self.stopped and not self.guard.stopped and bool(self.roll.active)

    @property
    def writing(self) -> bool:
        return self.keeper.writing

    # --- one round ------------------------------------------------------------------------------------------------------------

    def tick(self) -> bool:
        """Take in what has arrived, record and show it; return whether anybody gave a sign of life."""
        before, heard = self.beats, False
        while (message := self.channel.receive()) is not None:
            handle = self.handlers.get(message.kind) or getattr(self, f"_on_{message.kind}")
            handle(message.source - 1, message.content)
            self.news, heard = self.news + 1, True
        if self.keeper.advance():
            self.news, heard = self.news + 1, True
        self._status = self.desk.status()
        self.roll.call()
        self.guard.hear(self._status)
        score = self.desk.collect()
        if score is not None:
            self.last_score = score
            self._evaluated_at, self._evaluated_epochs = self.seconds, self.epochs
            self.record.evaluation(self.seconds, self.turn, self.all_steps, self.epochs, *score)
            self._show(score)
        elif self.due() >= self._next_progress:
            self._show(None)
            self._say_trouble()
        return heard or bool((self.beats != before).any())

    def _say_trouble(self) -> None:
        """Say once that the run file cannot be written, and once that it can again."""
        trouble, path = self.record.trouble, self.record.path
        if trouble and not self._trouble:
            self.display.warn(f"The coordinator cannot write the run file '{path}' ({trouble}). Its rows wait; the run goes on.")
        elif self._trouble and not trouble:
            self.display.warn(f"The run file '{path}' is written again; nothing was lost.")
        self._trouble = trouble

    def _show(self, score: Score | None) -> None:
        """Append a row per replica: means since the last rows."""
        now, then = self._status, self._shown
        since, self._shown_at = self.clock() - self._shown_at, self.clock()
        self._next_progress = self.due() + INTERVAL
        done = now["examples"] - then["examples"]
        # A replica that was resumed starts counting from its checkpoint, not from nought.
        fresh = (then["heartbeat"] > 0) & (done > 0)
        rows = np.zeros(len(done), PROGRESS)
        rows["seconds"], rows["replica"] = self.seconds, np.arange(len(done))
        for name in ("steps", "examples", "pushes", "fetches", "bytes_pushed", "bytes_fetched", "waited"):
            rows[name] = now[name]
        for name, source in (("loss", "loss"), ("accuracy", "right")):
            rows[name] = np.where(fresh, (now[source] - then[source]) / np.maximum(done, 1), np.nan)
        rows["throughput"] = np.where(fresh, done / max(since, 1e-9), 0)
        if fresh.any():
            self.record.progress(rows[fresh])
            self._loss = float((now["loss"] - then["loss"])[fresh].sum() / done[fresh].sum())
            self._rate = float(rows["throughput"].sum())
        self._shown = {name: values.copy() for name, values in now.items()}
        if self.rows:
            row = (self.seconds, self.epochs, self.all_steps, self._loss, self._rate, self.record.mean_staleness, score)
            self.display.row(*row)

    def _on_events(self, shard: int, events: np.ndarray) -> None:
        self.record.events(shard, events)

    def _on_drained(self, shard: int, _: Any) -> None:
        self.drained.add(shard)

    # --- evaluations ----------------------------------------------------------------------------------------------------------

    def evaluation_due(self) -> bool:
        every = self.config.evaluate
        by_epochs = every.epochs is not None and self.epochs - self._evaluated_epochs >= every.epochs
        by_time = every.seconds is not None and self.seconds - self._evaluated_at >= every.seconds
        return (by_epochs or by_time) and not self.evaluating

    def evaluate(self, replica: int | None = None) -> None:
        """Ask a replica, by default the next in turn, if there is one."""
        self._evaluated_epochs = self.epochs
        if not self.roll.active:
            return
        later = [r for r in sorted(self.roll.active) if r > self.turn]
        self.turn = replica if replica is not None else (later or sorted(self.roll.active))[0]
        self.desk.evaluate(self.turn)

    def _steps_of(self, replica: int) -> int:
        """Return the steps that a replica has reported since this run began."""
        return max(0, int(self.steps[replica] - self._steps_before[replica]))

    # --- checkpoints ----------------------------------------------------------------------------------------------------------

    def checkpoint_due(self) -> bool:
        return self.keeper.due(self.all_steps)

    def checkpoint(self) -> None:
        """Have a checkpoint written while the run goes on."""
        self.guard.unsound = False
        tables = {"replicas": self._cursors(), "table.shares": self._shares()}
        self.keeper.begin(tables, self.state(), self.seconds, self.all_steps)

    def _shares(self) -> np.ndarray:
        """Return what is trained on, whoever does it, and how far each share is."""
        replicas = [r for r in range(self.desk.topology.copies) if not self.roll.handed_on(r)]
        return np.array([tuple(share) for r in replicas for share in self.desk.shares(r)], SHARE)

    def _cursors(self) -> np.ndarray:
        """Return a row per replica: its own counters and those of the spare ones that took its place, and where the last stands."""
        rows = np.zeros(self.desk.topology.replicas, REPLICA)
        for replica, row in enumerate(rows):
            for copy in self.roll.line(replica):
                for name in ("steps", "examples", "pushes"):
                    row[name] += int(self._status[name][copy])
                for name in ("epoch", "position"):
                    row[name] = int(self._status[name][copy])
        return rows

    def _on_saving(self, shard: int, _: int) -> None:
        """A shard is still at it: the message alone is a sign of life."""

    def _on_saved(self, shard: int, saved: Saved) -> None:
        self.guard.unsound = self.guard.unsound or not saved.sound
        self.keeper.take(shard, saved)

    def close(self) -> None:
        """End the run's outputs."""
        try:
            self.keeper.close()
        finally:
            lost = self.record.close(STOPPED if self.stopped else FINISHED if self.finished else RUNNING)
            if lost:
                self.display.warn(f"{lost} rows of the run file '{self.record.path}' are lost ({self.record.trouble}).")


# --- the coordinator's side ---------------------------------------------------------------------------------------------------


def manage(pace: Coordinator) -> Turns:
    """One round of everyday work."""
    pace.tick()
    if pace.evaluation_due():
        pace.evaluate()
    if pace.checkpoint_due():
        pace.checkpoint()
    yield IDLE


def finish(pace: Coordinator) -> Turns:
    """When all replicas are done: drain the rings, write the last checkpoint, evaluate (unless asked to stop), let everyone go."""

    def until(done: Callable[[], bool], reason: str, sign: Callable[[], float] = lambda: pace.news) -> Turns:
        last = None
        while not done():
            pace.tick()
            # Others may live as long as they like: progress is a sign of whom it waits for.
            now = sign()
            yield None if now != last else Wait(f"the coordinator waits for {reason}")
            last = now

    def evaluation(which: str) -> Turns:
        def sign() -> float:
            return -1.0 if pace.desk.evaluating is None else float(pace.beats[pace.desk.evaluating])

        yield from until(lambda: not pace.evaluating, f"the {which}evaluation by replica {pace.desk.evaluating}", sign)

    for shard in range(pace.shards):
        pace.channel.send(1 + shard, "drain")
    yield from until(lambda: len(pace.drained) == pace.shards, "the shards to apply what is in their rings")
    yield from evaluation("")
    yield from until(lambda: not pace.writing, "the shards to send a checkpoint")
    pace.stop_clock()
    if pace.guard.conclude():
        pace.checkpoint()
        yield from until(lambda: not pace.writing, "the shards to send the last checkpoint")
    pace.stopped = pace.asked
    if pace.guard.conclude() and not pace.stopped:
        pace.evaluate()
    yield from evaluation("last ")
    pace.roll.part()
    pace.desk.end()
    if pace.roll.broken:
        yield from until(pace.roll.replicas_left, "the replicas to leave", lambda: float(pace.beats.sum()))
    for shard in range(pace.shards):
        pace.channel.send(1 + shard, "end")
    while pace.channel.pending():
        yield IDLE
    while pace.roll.broken and not pace.roll.shards_left():
        yield Wait("the coordinator waits for the shards to leave")
