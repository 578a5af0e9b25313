"""Sandblaster: batch optimisation on the shards (Dean et al. 2012, section 4.2 and algorithm 7.2).

The coordinator runs a batch method, by default L-BFGS, without access to a vector: parameters, gradient and history are registers
on the shards. For each loss and gradient it hands out portions of the batch until all have a result (`work_queue`); replicas fetch
the parameters once per pass, sum the gradients of a few portions and push the sums; shards add them up (`accrual`).

Where the paper is silent: a bundle of portions is pushed when the coordinator has accepted it, so a portion counts once whatever
backups, silence and return do. The loss is the mean over the batch, plus model.decay / 2 |w|^2 over the weights (not the biases),
which the shards add. The history's state is that of a pass under way, so a checkpoint is taken while one is.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dbnet.coordinator.coordinator import Coordinator
from dbnet.core.config import COUNT, Config
from dbnet.core.errors import UserError
from dbnet.core.registry import Family, member
from dbnet.methods.base import Method
from dbnet.methods.sandblaster.coordinator import SandblasterCoordinator
from dbnet.methods.sandblaster.recording import RecordingCoordinator
from dbnet.methods.sandblaster.worker import SandblasterWorker
from dbnet.methods.worker import Worker
from dbnet.shards.accrual import Accrual
from dbnet.shards.push import Receiver

AnyDescent = member("methods.descent", "method.descent", "lbfgs")


class Sandblaster(Method):
    """Batch methods with portions handed out by a coordinator that owns no vector."""

    kind: ClassVar[str] = "sandblaster"
    worker: ClassVar[type[Worker]] = SandblasterWorker
    receiver: ClassVar[type[Receiver]] = Accrual
    coordinator: ClassVar[type[Coordinator]] = SandblasterCoordinator
    recorder: ClassVar[type[Coordinator] | None] = RecordingCoordinator
    portion: int = Field(default=512, gt=0, le=COUNT, description="examples of a portion; best a multiple of method.minibatch")
    push_every: int = Field(default=4, gt=0, le=COUNT, description="portions whose gradients are summed before they are pushed")
    backups: bool = Field(default=True, description="hand portions that are late at the end of a batch to free replicas, too")
    patience: float = Field(
        default=10.0, ge=0.01, le=1e9, description="seconds without a sign of life after which a replica's portions go to others"
    )
    descent: AnyDescent = Field(default={}, validate_default=True, description="the batch method: its kind, and its options")

    def check(self, config: Config) -> None:
        if config.stop.steps is not None:
            raise UserError("stop.steps counts minibatches; with method.kind = 'sandblaster' give stop.iterations.")
        if config.warmstart.steps or config.warmstart.accuracy is not None:
            raise UserError("Sandblaster has no warmstart of its own; set run.start to a checkpoint of a Downpour run.")
        schedule = config.rule.schedule
        if schedule.kind != "constant" or schedule.warmup:
            raise UserError(
                "A batch method finds its own steps, so no rate can follow rule.schedule; take [rule.schedule] out, or train with "
                "method.kind = 'downpour'."
            )
        for i, layer in enumerate(config.model.layers):
            if layer.random:
                raise UserError(
                    f"model.layers.{i} ({layer.kind}) draws random numbers at every step, but a batch method needs a loss that "
                    "stays the same; set its rate to 0, or train with method.kind = 'downpour'."
                )
        strange = set(self.descent.reads()) - {"weights"}
        if strange:
            raise UserError(f"method.descent.mask = {strange.pop()!r} is no register; 'weights' is 1 on all weights, 0 on biases.")

    def doubts(self, config: Config, examples: int) -> list[str]:
        replicas, portions, out = config.topology.replicas, -(-examples // self.portion), []
        if portions < replicas <= examples:
            out.append(
                f"topology.replicas = {replicas}, but a pass has {portions} portions: {replicas - portions} have nothing to do; "
                "make method.portion smaller."
            )
        rule = config.rule
        given = ["kind"] if rule.kind != Family.of(Config, "rule").default else []
        usual = {name: field.get_default(call_default_factory=True) for name, field in type(rule).model_fields.items()}
        # A schedule is refused before.
        given += [name for name, value in usual.items() if name != "schedule" and getattr(rule, name) != value]
        if given:
            said = ", ".join(f"rule.{name}" for name in given)
            out.append(f"{said}: batch methods have no update rule, so [rule] is not used; method.descent has their options.")
        return out

    def remedy(self, config: Config) -> str:
        rate = getattr(self.descent, "rate", None)
        return f"lower method.descent.rate ({rate:g})" if rate else "begin elsewhere with run.start"
