"""A run as one typed, complete, frozen value: read from TOML, changed by `table.key=value`, stored in every output.

The tables of a run file are [run], [data], [model], [[model.layers]], [method], [rule], [topology], [stop], [warmstart],
[evaluate], [checkpoint], [guard], and for batch methods [sandblaster] and [descent]; every key has a default but the data's path
and the layers. Relative paths in a run file are relative to the folder that the command is given in.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from dbnet.errors import UserError
from dbnet.registry import explain, load_file, make


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunTable(Table):
    """Where the outputs go and what makes the run repeatable."""

    name: str = Field(default="run", min_length=1, description="name of the outputs")
    folder: str = Field(default="runs", description="folder of the outputs: NAME.h5, NAME.checkpoint.h5, NAME.png")
    seed: int = Field(default=1, ge=0, lt=1 << 63, description="seed of initial values, subsets and order")
    start: str | None = Field(default=None, description="checkpoint whose parameters the run starts from; default: random ones")
    picture: bool = Field(default=True, description="draw NAME.png at the end")
    deadline: float = Field(default=60.0, gt=0, description="seconds that any rank waits for another before it gives up")
    heartbeat: float = Field(
        default=20.0, gt=0, description="seconds without a sign of life after which a rank is lost; at most half of the deadline"
    )

    @property
    def bound(self) -> float:
        """Seconds without a sign of life after which a rank is lost."""
        return min(self.heartbeat, self.deadline / 2)

    @field_validator("name", "folder")
    @classmethod
    def _plain(cls, value: str, info: ValidationInfo) -> str:
        if "\0" in value or (info.field_name == "name" and ("/" in value or value in (".", ".."))):
            raise ValueError(f"{value!r} is not a plain name; folders belong into run.folder.")
        return value


class DataTable(Table):
    path: str = Field(description="HDF5 data file; 'dbnet data' makes one")


class ModelTable(Table):
    layers: tuple[dict[str, Any], ...] = Field(
        min_length=1, description="the layers, input side first; each has a kind and its options"
    )
    modules: tuple[str, ...] = Field(default=(), description="your own Python files that define layers, losses or rules")
    loss: str = Field(default="softmax", description="softmax, squared or logistic (one-vs-all)")
    dtype: Literal["float32", "float64"] = "float32"
    decay: float = Field(default=0.0, ge=0, description="weight decay: decay/2 sum w^2 is added to the loss; biases are left out")


class MethodTable(Table):
    kind: str = Field(default="downpour", description="downpour, sgd or sandblaster")
    minibatch: int = Field(default=32, gt=0, description="examples per step")
    n_fetch: int = Field(default=1, gt=0, description="steps between fetches of the parameters")
    n_push: int = Field(default=1, gt=0, description="steps between pushes of the accrued gradient")
    local_rate: float | None = Field(
        default=None, ge=0, description="rate of the local step; default: the rule's fixed-rate equivalent"
    )
    overlap: bool = Field(
        default=False, description="fetch and push on a thread of their own while the next gradient is computed (large networks)"
    )
    slot: int = Field(default=1 << 20, ge=64, description="bytes of one slice of a push")
    slots: int = Field(default=8, ge=2, description="slices in each ring; a full ring makes the replica wait")


class TopologyTable(Table):
    shards: int = Field(default=1, gt=0, description="S, ranks that hold the parameters")
    replicas: int = Field(default=1, gt=0, description="R, copies of the network, each trained on its own subset")
    partitions: int = Field(default=1, gt=0, description="P, ranks over which each copy of the network is cut")
    spares: int = Field(default=0, ge=0, description="replicas that wait and take the place of one that is lost")

    @property
    def world(self) -> int:
        """Number of ranks: one coordinator, the shards, and every partition of every replica."""
        return 1 + self.shards + (self.replicas + self.spares) * self.partitions


class StopTable(Table):
    """The run ends when the first of these is reached."""

    epochs: int | None = Field(default=None, ge=0, description="passes of each replica over its subset")
    steps: int | None = Field(default=None, ge=0, description="steps of each replica")
    seconds: float | None = Field(default=None, gt=0, description="time budget, start-up not counted")
    accuracy: float | None = Field(default=None, gt=0, le=1, description="test accuracy")
    iterations: int | None = Field(default=None, ge=0, description="iterations of a batch method")

    @model_validator(mode="after")
    def _some(self) -> StopTable:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError("the table [stop] is empty; give epochs, steps, seconds, accuracy or iterations.")
        return self


class WarmstartTable(Table):
    """One replica trains alone until the first of these is reached; then the others join."""

    steps: int = Field(default=0, ge=0, description="steps of replica 0 alone")
    accuracy: float | None = Field(default=None, gt=0, le=1, description="test accuracy that replica 0 reaches alone")


class SandblasterTable(Table):
    """How a batch is handed out to the replicas."""

    portion: int = Field(default=512, gt=0, description="examples of a portion; best a multiple of method.minibatch")
    push_every: int = Field(default=4, gt=0, description="portions whose gradients are summed before they are pushed")
    backups: bool = Field(default=True, description="hand portions that are late at the end of a batch to free replicas, too")
    patience: float = Field(
        default=10.0, gt=0, description="seconds without a sign of life after which a replica's portions are handed to others"
    )


class EvaluateTable(Table):
    seconds: float | None = Field(default=None, gt=0, description="an evaluation at least each so many seconds")
    epochs: float | None = Field(default=1.0, gt=0, description="an evaluation each so many epochs of all replicas together")
    train: int = Field(default=1000, ge=0, description="examples of the training set that are evaluated too")


class GuardTable(Table):
    """What happens to gradients that are not finite."""

    finite: bool = Field(default=True, description="shards refuse pushes with NaN or Inf; false: train on with them")
    refused: int = Field(
        default=10, gt=0, description="refused pushes (Sandblaster: passes with any) after which the run stops with a diagnosis"
    )


class CheckpointTable(Table):
    seconds: float | None = Field(default=None, gt=0, description="a checkpoint each so many seconds, besides the one at the end")
    steps: int | None = Field(default=None, gt=0, description="a checkpoint each so many steps of all replicas together")
    keep: int = Field(default=2, gt=0, description="checkpoints that are kept; older ones are removed")


class Config(Table):
    """The whole run."""

    run: RunTable = RunTable()
    data: DataTable
    model: ModelTable
    method: MethodTable = MethodTable()
    rule: dict[str, Any] = Field(default={}, description="the update rule: its kind, by default adagrad, and its options")
    sandblaster: SandblasterTable = SandblasterTable()
    descent: dict[str, Any] = Field(default={}, description="the batch method: its kind, by default lbfgs, and its options")
    topology: TopologyTable = TopologyTable()
    stop: StopTable
    warmstart: WarmstartTable = WarmstartTable()
    evaluate: EvaluateTable = EvaluateTable()
    checkpoint: CheckpointTable = CheckpointTable()
    guard: GuardTable = GuardTable()

    def members(self) -> tuple[list[Any], Any, Any]:
        """Return the layers, the loss and the rule that the tables ask for."""
        layers = [make("layers", entry, f"model.layers.{i}") for i, entry in enumerate(self.model.layers)]
        return (
            layers,
            make("losses", {"kind": self.model.loss}, "model.loss"),
            make("rules", {"kind": "adagrad", **self.rule}, "rule"),
        )

    def batch_method(self) -> Any:
        """Return the member of `descent` that the table asks for."""
        return make("descent", {"kind": "lbfgs", **self.descent}, "descent")

    def output(self, ending: str) -> Path:
        """Return the path of one of the run's outputs."""
        return Path(self.run.folder) / f"{self.run.name}{ending}"

    def text(self) -> str:
        """Return the configuration as JSON, as it is stored in the outputs."""
        return self.model_dump_json()


def load(source: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a run file and apply overrides like ``topology.replicas=4``; members are completed and checked too.

    Raises
    ------
    UserError
        Unreadable file, unknown key, wrong value: one sentence that names the key and what is allowed.
    """
    path = Path(source)
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"No run file '{source}'; the ones that come with dbnet are in jobs/.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"'{source}' is not a readable TOML file: {error}.") from None
    for text in overrides:
        override(tree, text)
    return build(tree)


def build(tree: dict[str, Any]) -> Config:
    """Make a complete configuration from nested tables: every option of every member is filled in."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, Config)) from None
    for path in config.model.modules:
        load_file(path)
    make("methods", {"kind": config.method.kind}, "method")
    layers, _, rule = config.members()
    model = config.model.model_copy(update={"layers": tuple(layer.options() for layer in layers)})
    tables = {"model": model, "rule": rule.options(), "descent": config.batch_method().options()}
    return config.model_copy(update=tables)


def stored(text: str) -> Config:
    """Read a configuration back from an output."""
    return build(json.loads(text))


def override(tree: dict[str, Any], text: str) -> None:
    """Apply one ``table.key=value`` in place; the value is TOML, or else taken as a string."""
    path, sign, value = text.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise UserError(f"'{text}' is not an override; write table.key=value, for example topology.replicas=4.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    place: Any = tree
    for key in keys[:-1]:
        try:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        except (IndexError, ValueError):
            raise UserError(f"'{path}': there is no item {key}; this list has {len(place)} (0 .. {len(place) - 1}).") from None
        if not isinstance(place, dict | list):
            raise UserError(f"'{path}': '{key}' is a value, not a table.")
    if isinstance(place, list):
        raise UserError(f"'{path}': name a key of one list item, for example model.layers.0.units=64.")
    place[keys[-1]] = parsed


def to_toml(config: Config) -> str:
    """Return the configuration as a run file that `load` accepts."""
    lines: list[str] = []
    for table, content in json.loads(config.text()).items():
        layers = content.pop("layers", ()) if table == "model" else ()
        lines += [f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in content.items() if value is not None), ""]
        for layer in layers:
            lines += [
                "[[model.layers]]",
                *(f"{key} = {_toml(value)}" for key, value in layer.items() if value is not None),
                "",
            ]
    return "\n".join(lines)


def _toml(value: Any) -> str:
    """Return a value as TOML writes it on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items() if inner is not None) + "}"
    return json.dumps(value)
