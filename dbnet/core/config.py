"""A run as one typed, complete, frozen value: read from TOML, changed by `table.key=value`, stored in every output.

The tables of a run file are [run], [data], [model], [[model.layers]], [method], [rule], [topology], [stop], [warmstart],
[evaluate], [checkpoint], [guard], and for batch methods [sandblaster] and [descent]; every key has a default but the data's path
and the layers. Relative paths in a run file are relative to the folder that the command is given in.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from dbnet.core.errors import UserError, nearest
from dbnet.core.registry import family, load_file, make, meaning, valid
from dbnet.core.toml import tables, written

# What counts in a run travels as float64, too; more ranks than these nobody has, and their roles alone would fill the memory.
COUNT = 1 << 53
RANKS = 1 << 14
# Tables of a run file that are members -> their family.
FAMILY = {"layers": "network.layers", "rule": "shards.rules", "descent": "methods.descent"}


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunTable(Table):
    """Where the outputs go and what makes the run repeatable."""

    name: str = Field(default="run", min_length=1, description="name of the outputs")
    folder: str = Field(default="runs", description="folder of the outputs: NAME.h5, NAME.checkpoint.h5, NAME.png")
    seed: int = Field(default=1, ge=0, lt=1 << 63, description="seed of initial values, subsets and order")
    start: str | None = Field(default=None, description="checkpoint whose parameters the run starts from; default: random ones")
    picture: bool = Field(default=True, description="draw NAME.png at the end")
    deadline: float = Field(default=60.0, ge=0.01, le=1e6, description="seconds that any rank waits for another before it gives up")
    heartbeat: float = Field(
        default=20.0, ge=0.01, le=1e6, description="seconds without a sign of life after which a rank is lost; at most deadline / 2"
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
        min_length=1, max_length=1000, description="the layers, input side first; each has a kind and its options"
    )
    modules: tuple[str, ...] = Field(default=(), description="your own Python files that define layers, losses or rules")
    loss: str = Field(default="softmax", description="softmax, squared or logistic (one-vs-all)")
    dtype: Literal["float32", "float64"] = Field(default="float32", description="of parameters and everything computed")
    decay: float = Field(default=0.0, ge=0, description="weight decay: decay/2 sum w^2 is added to the loss; biases are left out")


class MethodTable(Table):
    kind: str = Field(default="downpour", description="downpour, sgd or sandblaster")
    minibatch: int = Field(default=32, gt=0, le=COUNT, description="examples per step")
    n_fetch: int = Field(default=1, gt=0, le=COUNT, description="steps between fetches of the parameters")
    n_push: int = Field(default=1, gt=0, le=COUNT, description="steps between pushes of the accrued gradient")
    local_rate: float | None = Field(
        default=None, ge=0, description="rate of the local step; default: the rule's fixed-rate equivalent"
    )
    overlap: bool = Field(
        default=False, description="fetch and push on a thread of their own while the next gradient is computed (large networks)"
    )
    slot: int = Field(default=1 << 20, ge=64, le=1 << 30, description="bytes of one slice of a push, if it is that long")
    slots: int = Field(default=8, ge=2, le=1 << 16, description="slices in each ring; a full ring makes the replica wait")


class TopologyTable(Table):
    shards: int = Field(default=1, gt=0, le=RANKS, description="S, ranks that hold the parameters")
    replicas: int = Field(default=1, gt=0, le=RANKS, description="R, copies of the network, each trained on its own subset")
    partitions: int = Field(default=1, gt=0, le=RANKS, description="P, ranks over which each copy of the network is cut")
    spares: int = Field(default=0, ge=0, le=RANKS, description="replicas that wait and take the place of one that is lost")

    @model_validator(mode="after")
    def _started(self) -> TopologyTable:
        if self.world > RANKS:
            raise ValueError(f"these are {self.world} ranks; {RANKS} are the most.")
        return self

    @property
    def world(self) -> int:
        """Number of ranks: one coordinator, the shards, and every partition of every replica."""
        return 1 + self.shards + (self.replicas + self.spares) * self.partitions


class StopTable(Table):
    """The run ends when the first of these is reached."""

    epochs: int | None = Field(
        default=None, ge=0, le=COUNT, description="passes of each replica over its subset (Sandblaster: over all)"
    )
    steps: int | None = Field(default=None, ge=0, le=COUNT, description="steps of each replica")
    seconds: float | None = Field(default=None, gt=0, description="time budget, start-up not counted")
    accuracy: float | None = Field(default=None, gt=0, le=1, description="test accuracy")
    iterations: int | None = Field(default=None, ge=0, le=COUNT, description="iterations of a batch method")

    @model_validator(mode="after")
    def _some(self) -> StopTable:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError("the table [stop] is empty; give epochs, steps, seconds, accuracy or iterations.")
        return self


class WarmstartTable(Table):
    """One replica trains alone until the first of these is reached; then the others join."""

    steps: int = Field(default=0, ge=0, le=COUNT, description="steps of replica 0 alone, exactly")
    accuracy: float | None = Field(default=None, gt=0, le=1, description="test accuracy that replica 0 reaches alone")


class SandblasterTable(Table):
    """How a batch is handed out to the replicas."""

    portion: int = Field(default=512, gt=0, le=COUNT, description="examples of a portion; best a multiple of method.minibatch")
    push_every: int = Field(default=4, gt=0, le=COUNT, description="portions whose gradients are summed before they are pushed")
    backups: bool = Field(default=True, description="hand portions that are late at the end of a batch to free replicas, too")
    patience: float = Field(
        default=10.0, ge=0.01, le=1e9, description="seconds without a sign of life after which a replica's portions go to others"
    )


class EvaluateTable(Table):
    seconds: float | None = Field(default=None, gt=0, description="an evaluation at least each so many seconds")
    epochs: float | None = Field(default=1.0, gt=0, description="an evaluation each so many epochs of all replicas together")
    train: int = Field(default=1000, ge=0, le=COUNT, description="examples of the training set that are evaluated too")


class GuardTable(Table):
    """What happens to gradients that are not finite."""

    finite: bool = Field(default=True, description="shards refuse pushes with NaN or Inf; false: train on with them")
    refused: int = Field(
        default=10,
        gt=0,
        le=COUNT,
        description="refused pushes (Sandblaster: passes with any) after which the run stops with a diagnosis",
    )


class CheckpointTable(Table):
    seconds: float | None = Field(default=None, gt=0, description="a checkpoint each so many seconds, besides the one at the end")
    steps: int | None = Field(default=None, gt=0, le=COUNT, description="a checkpoint each so many steps of all replicas together")
    keep: int = Field(default=2, gt=0, le=COUNT, description="checkpoints that are kept; older ones are removed")


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
        layers = [make("network.layers", entry, f"model.layers.{i}") for i, entry in enumerate(self.model.layers)]
        return (
            layers,
            make("network.losses", {"kind": self.model.loss}, "model", "model.loss"),
            make("shards.rules", {"kind": "adagrad", **self.rule}, "rule"),
        )

    def batch_method(self) -> Any:
        """Return the member of `descent` that the table asks for."""
        return make("methods.descent", {"kind": "lbfgs", **self.descent}, "descent")

    def output(self, ending: str) -> Path:
        """Return the path of one of the run's outputs."""
        return Path(self.run.folder) / f"{self.run.name}{ending}"

    def text(self) -> str:
        """Return the configuration as JSON, as it is stored in the outputs."""
        return self.model_dump_json()


def warn(*sentences: str) -> None:
    """Print sentences that do not end anything."""
    for sentence in sentences:
        print(f"dbnet: {sentence}", file=sys.stderr, flush=True)


def load(
    source: str | Path | Mapping[str, Any] | Config, overrides: Iterable[str] = (), say: Callable[[str], None] = warn
) -> Config:
    """Take a configuration and apply overrides like ``topology.replicas=4``; members are completed and checked too.

    Parameters
    ----------
    source
        Path of a run file, nested tables like those of one, or a configuration.
    say
        Is told what an override makes superfluous in the run file.

    Raises
    ------
    UserError
        Unreadable file, unknown key, wrong value: one sentence that names the key and what is allowed.
    """
    if isinstance(overrides, str):
        raise UserError(f"Changes are a list of texts: write [{overrides!r}] instead of {overrides!r}.")
    tree = json.loads(source.text()) if isinstance(source, Config) else tables(source)
    changes = list(overrides)
    for text in changes:
        override(tree, text)
    for left in fitting(tree, changes):
        say(left)
    return build(tree)


def fitting(tree: dict[str, Any], changes: Sequence[str]) -> list[str]:
    """Where a change gives a member another kind, take out, in place, what the run file says and that kind does not know.

    Returns
    -------
    A sentence for each such member.
    """
    out, changed = [], {text.partition("=")[0].strip() for text in changes}
    for path in sorted(changed):
        if not (found := re.fullmatch(r"(rule|descent|model\.layers\.\d+)\.kind", path)):
            continue
        table = found[1]
        entry = tree["model"]["layers"][int(table.rpartition(".")[2])] if table.startswith("model") else tree[table]
        member = family(FAMILY["layers"] if table.startswith("model") else FAMILY[table]).get(entry.get("kind"))
        strange = [] if member is None else [key for key in entry if key != "kind" and key not in member.model_fields]
        # What was asked for together with the kind stays, and is refused.
        strange = [key for key in strange if not any(f"{name}.".startswith(f"{table}.{key}.") for name in changed)]
        for key in strange:
            del entry[key]
        if strange:
            out.append(
                f"{table}.kind = '{entry['kind']}' has no {' and no '.join(strange)}; what the run file says there is left out."
            )
    return out


def build(tree: dict[str, Any]) -> Config:
    """Make a complete configuration from nested tables: own modules are run, every option of every member is filled in."""
    config = valid(Config, tree)
    for path in config.model.modules:
        load_file(path)
    make("methods", {"kind": config.method.kind}, "method")
    layers, _, rule = config.members()
    model = config.model.model_copy(update={"layers": tuple(layer.options() for layer in layers)})
    complete = {"model": model, "rule": rule.options(), "descent": config.batch_method().options()}
    return config.model_copy(update=complete)


def stored(tree: dict[str, Any]) -> Config:
    """Take a configuration from an output. It is complete: no member is built, and nothing that it names is run."""
    config = valid(Config, tree)
    for entry in (config.rule, config.descent, *config.model.layers):
        if not isinstance(entry.get("kind"), str) or not all(key.isidentifier() for key in entry):
            raise UserError(f"The stored configuration is damaged: {entry} is no rule, batch method or layer.")
    return config


def override(tree: dict[str, Any], text: str) -> None:
    """Apply one ``table.key=value`` in place; the value is TOML, or else taken as a string; ``table.key=`` takes the key out."""
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
    if value.strip():
        place[keys[-1]] = parsed
    elif place.pop(keys[-1], None) is None:
        table = Config.model_fields[keys[0]].annotation if len(keys) == 2 and keys[0] in Config.model_fields else None
        known = table.model_fields if isinstance(table, type) and issubclass(table, BaseModel) else place
        if keys[-1] not in known:
            raise UserError(f"'{text}' takes a key out of the run file, but '{path}' is not in it{nearest(keys[-1], known)}.")


def to_toml(config: Config) -> str:
    """Return the configuration as a run file that `load` accepts; beside each key its meaning, keys without a value as comments."""
    lines: list[str] = []
    for table, content in json.loads(config.text()).items():
        layers = content.pop("layers", ()) if table == "model" else ()
        lines += _written(f"[{table}]", content, _described(table, content))
        for layer in layers:
            lines += _written("[[model.layers]]", layer, _described("layers", layer))
    return "\n".join(lines)


def _described(table: str, content: dict[str, Any]) -> type[BaseModel] | None:
    """Return the class whose fields are the keys of a table; None where its file is not at hand."""
    if table in FAMILY:
        return family(FAMILY[table]).get(content["kind"])
    return Config.model_fields[table].annotation


def _written(head: str, content: dict[str, Any], model: type[BaseModel] | None) -> list[str]:
    """Return the lines of a table, and those of the tables in it."""
    lines, inner = [head], []
    for key, value in content.items():
        annotation = model.model_fields[key].annotation if model is not None and key in model.model_fields else None
        if isinstance(value, dict) and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            inner += _written(f"[{head.strip('[]')}.{key}]", value, annotation)
            continue
        given = f"# {key} =" if value is None else f"{key} = {written(value)}"
        said = meaning(model, key) if model is not None else ""
        lines.append(f"{given:<37} # {said}" if said else given)
    return [*lines, "", *inner]
