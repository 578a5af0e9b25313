"""Sandblaster: what it is made of, and what it cannot do."""

from __future__ import annotations

from typing import ClassVar

from dbnet.coordinator.coordinator import Coordinator
from dbnet.core.config import Config
from dbnet.core.errors import UserError
from dbnet.methods.base import Method
from dbnet.methods.sandblaster.coordinator import SandblasterCoordinator
from dbnet.methods.sandblaster.worker import SandblasterWorker
from dbnet.methods.worker import Worker
from dbnet.shards.accrual import Accrual
from dbnet.shards.push import Receiver


class Sandblaster(Method):
    """Batch methods with portions handed out by a coordinator that owns no vector."""

    kind: ClassVar[str] = "sandblaster"
    worker: ClassVar[type[Worker]] = SandblasterWorker
    receiver: ClassVar[type[Receiver]] = Accrual
    coordinator: ClassVar[type[Coordinator]] = SandblasterCoordinator

    def check(self, config: Config) -> None:
        if config.stop.steps is not None:
            raise UserError("stop.steps counts minibatches; with method.kind = 'sandblaster' give stop.iterations.")
        if config.warmstart.steps or config.warmstart.accuracy is not None:
            raise UserError("Sandblaster has no warmstart of its own; set run.start to a checkpoint of a Downpour run.")
        for i, layer in enumerate(config.members()[0]):
            if layer.random:
                raise UserError(
                    f"model.layers.{i} ({layer.kind}) draws random numbers at every step, but a batch method needs a loss that "
                    "stays the same; set its rate to 0, or train with method.kind = 'downpour'."
                )
        mask = config.descent.get("mask", "")
        if mask not in ("", "weights"):
            raise UserError(f"descent.mask = {mask!r} is no register; 'weights' is 1 on all weights and 0 on biases.")
