"""Downpour SGD (Dean et al. 2012, section 4.1, algorithm 7.1): the client, and the coordinator that hands on what a lost one had.

The server is `shards.shard`.

Where the paper is silent: step 0 both fetches and pushes, so pushes cover 1, n_push, n_push, ... gradients. What is pushed is
the sum of the accrued gradients, each the mean over its minibatch; a remainder is pushed at the end, so every computed gradient
is applied once. The local step (w = w - alpha g) is undone by the next fetch and left out where that comes before the next
gradient. With `overlap` a fetch takes effect one step later and the gradient accrues in a second buffer while the first one
leaves.

Warmstart: replica 0 trains alone; the others join when it has made its steps or reached its accuracy. After the last of these
steps it pushes what it has accrued and waits until all of it is applied and the others have fetched: they begin on these steps
exactly.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dbnet.comm.turns import IDLE, Turns
from dbnet.coordinator.coordinator import Coordinator
from dbnet.coordinator.orders import most_shares
from dbnet.core.config import COUNT, Config
from dbnet.core.errors import UserError
from dbnet.core.ranges import split
from dbnet.data.subsets import hand_out
from dbnet.methods.base import Method
from dbnet.methods.worker import Worker
from dbnet.network.replica import Clipping


class DownpourWorker(Worker):
    """The replica's side."""

    @classmethod
    def intervals(cls, config: Config, examples: int) -> tuple[int, int]:
        return config.method.n_fetch, config.method.n_push

    @classmethod
    def steps_locally(cls, config: Config) -> bool:
        return config.method.n_fetch > 1

    @classmethod
    def accrues(cls, config: Config) -> bool:
        return config.method.n_push > 1

    @classmethod
    def copies(cls, config: Config) -> int:
        method = config.method
        # A step's gradient lies apart where it goes into a sum and moves the replica, or is clipped before; so it never does with
        # 2, 2 and overlap, where every step that adds to a sum is one at which parameters land.
        apart = min(method.n_push, method.n_fetch) > 1 and (max(method.n_push, method.n_fetch) > 2 or not method.overlap)
        apart = apart or (method.n_push > 1 and method.clipping != Clipping())
        return super().copies(config) + apart

    def train(self) -> Turns:
        """Algorithm 7.1, the client."""
        replica, store, orders, method, rule = self.replica, self.store, self.orders, self.config.method, self.config.rule
        alpha = rule.local_rate() if method.local_rate is None else method.local_rate
        warm = self.config.warmstart.steps if self.config.topology.replicas > 1 else 0
        alone = min(replica.steps + orders.made, warm) if self.place == 0 else warm
        # Since it trained last, if it did, others may have: its parameters are old.
        accrued, store.fetched = 0, False
        while not orders.stop and not self.finished:
            step = replica.steps
            first = not store.fetched
            if step % method.n_fetch == 0 or first:
                yield from store.fetch()
            if first:
                yield from self.report(now=True)
            store.accrued(first=accrued == 0)
            # A local step is of no use where other parameters come before the next gradient.
            lost = store.landing or (not store.overlaps and (step + 1) % method.n_fetch == 0)
            local = method.n_fetch > 1 and not lost
            # Its own count stands for the shards' clocks: it is the same on all partitions of a replica.
            rate = alpha * self.factor(1 + self._updates(step, alone)) if local else 0.0
            alone += orders.alone
            replica.accrue(store.w, store.g, accrued, rate)
            accrued += 1
            if step % method.n_push == 0:
                yield from store.push(accrued, step)
                accrued = 0
            yield from store.arrive()
            if orders.alone and replica.steps == self.config.warmstart.steps:
                if accrued:
                    yield from store.push(accrued, step)
                    accrued = 0
                yield from self.let_join()
            yield from self.report()
            yield None
        if accrued:
            yield from store.push(accrued, replica.steps - 1)

    def _updates(self, step: int, alone: int) -> float:
        """Return how many updates the shards have made when this step begins, if all replicas are as far as this one.

        `alone`: steps of the warmstart, which one replica makes; those of others come on top.
        """
        world, each = self.config.topology.replicas, 1 / self.config.method.n_push
        mine = step + self.orders.made
        return each * (alone + (mine - alone) * world if self.place == 0 else alone + mine * world)

    def let_join(self) -> Turns:
        """The warmstart's steps are made: go on when they are applied and the others have begun from there."""
        yield from self.store.confirm()
        while self.orders.alone and not self.orders.stop:
            yield from self.report(now=True)
            yield IDLE


class DownpourCoordinator(Coordinator):
    """The coordinator's side."""

    def run(self) -> Turns:
        active = self.duties.membership.active
        for replica, shares in enumerate(self.facts.subsets):
            self.replicas.give(replica, shares)
        self.duties.evaluation.ask(0)
        if self.warming:
            yield from self.warm()
        self.replicas.go(active)
        while not self.all_done:
            if self.ending.reached:
                self.replicas.stop(self.duties.guard.stops)
            yield from self.manage()
        yield from self.finish()

    @property
    def judged(self) -> bool:
        # Where nothing was made, as when a run that was over is gone on with, the first one is the last one, too.
        nothing = self.status.steps == self.facts.steps.sum() and not self.duties.membership.broken
        return nothing and self.duties.evaluation.last is not None

    def warm(self) -> Turns:
        """Let replica 0 train alone; then let the others begin while it waits."""
        active = self.duties.membership.active
        self.replicas.go([0], alone=True)
        self.duties.progress.say("Warmstart: replica 0 trains alone.")
        while self.warming and not self.ending.reached:
            yield from self.manage()
        self.replicas.go([r for r in active if r])
        while not self.ending.reached and not all(r == 0 or self.status["fetches"][r] or self.replicas.done(r) for r in active):
            yield from self.manage()

    @property
    def warming(self) -> bool:
        """Whether replica 0 is still to train alone."""
        warm, score = self.facts.config.warmstart, self.duties.evaluation.last
        if self.replicas.topology.replicas == 1 or 0 not in self.duties.membership.active or self.replicas.done(0):
            return False
        if warm.accuracy is not None and score is not None and score.accuracy >= warm.accuracy:
            return False
        return bool(self.status["steps"][0] < warm.steps or (warm.accuracy is not None and not warm.steps))

    def inherit(self, lost: int, heirs: list[int]) -> None:
        """Hand on what a lost replica trained on, to a spare one in its place or to all that are left."""
        replicas, seed, parts = self.replicas, self.facts.config.run.seed, self.facts.config.topology.replicas
        sizes = [part.size for part in split(self.facts.examples, parts)]
        members, most = self.duties.membership, most_shares(replicas.topology)
        # A spare one that took a place before is an heir like any other.
        takes_place = len(members.line(lost)) > 1
        made = int(self.status["steps"][lost]) + replicas.made(lost) if takes_place else 0
        # Nobody can get more than there are: shares are cut as long as the last replica could take all of them.
        held = sum(len(replicas.shares(r)) for r in range(replicas.topology.copies) if r == lost or not members.handed_on(r))
        handed = hand_out(replicas.shares(lost), len(heirs), seed, sizes.__getitem__, max(0, most - held))
        for heir, shares in zip(heirs, handed, strict=True):
            replicas.give(heir, shares, made)
        if takes_place and not self.warming:
            replicas.go(heirs)


class Stochastic(Method):
    """Base of the methods that take one minibatch after the other.

    Parameters
    ----------
    clip_norm
        Bound c of the norm of a minibatch's gradient: g = g c / |g| where |g| > c, the 2-norm over the whole replica, all of its
        partitions together (Pascanu et al. 2013); done by each replica before it accrues, pushes or makes a local step.
    clip_value
        Bound c of each value of it: g_i = min(c, max(-c, g_i)); before clip_norm.
    wire
        What pushes and fetches travel as: "float32", or "bfloat16", half the bytes, with 8 bits of precision instead of 24. A
        gradient is rounded once, when it is pushed (to nearest, ties to even), and so are parameters when they are fetched; shards
        add in float32 and hold float32. Evaluations and checkpoints are of these. Default: as the network.
    """

    coordinator: ClassVar[type[Coordinator]] = DownpourCoordinator
    clip_norm: float | None = Field(default=None, gt=0)
    clip_value: float | None = Field(default=None, gt=0)

    wire: Literal["float32", "bfloat16"] | None = None

    @property
    def narrow(self) -> bool:
        return self.wire == "bfloat16"

    @property
    def clipping(self) -> Clipping:
        return Clipping(self.clip_value, self.clip_norm)

    def check(self, config: Config) -> None:
        stop = config.stop
        if self.wire is not None and config.model.dtype != "float32":
            raise UserError(
                f"method.wire = '{self.wire}' is for networks of float32; leave it out with model.dtype = '{config.model.dtype}'."
            )
        if stop.epochs is stop.steps is stop.seconds is stop.accuracy is None:
            raise UserError(f"stop.iterations is for batch methods; with method.kind = '{self.kind}' give stop.epochs or steps.")


class Downpour(Stochastic):
    """Asynchronous stochastic gradient descent with a parameter server."""

    kind: ClassVar[str] = "downpour"
    worker: ClassVar[type[Worker]] = DownpourWorker
    n_fetch: int = Field(default=1, gt=0, le=COUNT, description="steps between fetches of the parameters")
    n_push: int = Field(default=1, gt=0, le=COUNT, description="steps between pushes of the accrued gradient")
    local_rate: float | None = Field(
        default=None, ge=0, description="rate of the local step; default: the rule's fixed-rate equivalent"
    )

    def updates(self, config: Config) -> float:
        return config.topology.replicas / self.n_push

    def remedy(self, config: Config) -> str:
        return f"{super().remedy(config)}, train with a warmstart"
