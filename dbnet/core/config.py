"""A run as one typed, complete, frozen value: read from TOML, changed by `table.key=value`, stored in every output.

The tables of a configuration are [run], [data], [model], [[model.layers]], [method], [rule], [topology], [stop], [warmstart],
[evaluate], [checkpoint], [guard] and [record]; every key has a default but the data's path and the layers. Layers, loss, method
and rule are members of families: their options are whatever the member's class says. Relative paths start at the present folder.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationInfo, field_validator, model_validator

from dbnet.core.errors import UserError, nearest
from dbnet.core.registry import Family, asked, load_file, meaning, member, shown, take, valid
from dbnet.core.toml import tables, written

# What counts in a run travels as float64, too; more ranks than these nobody has, and their roles alone would fill the memory.
COUNT = 1 << 53
RANKS = 1 << 14
AnyLoss = member("network.losses", "model.loss", short=True)
AnyMethod = member("methods", "method", "downpour")
AnyRule = member("shards.rules", "rule", "adagrad")
AnyLayers = Annotated[tuple[Any, ...], PlainSerializer(lambda layers: [shown(layer) for layer in layers]), Family("network.layers")]


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunTable(Table):
    """Where the outputs go and what makes the run repeatable."""

    name: str = Field(default="run", min_length=1, description="name of the outputs")
    folder: str = Field(default="runs", description="folder of the outputs: NAME.h5, NAME.checkpoint.h5, NAME.png")
    seed: int = Field(default=1, ge=0, lt=1 << 63, description="seed of initial values, subsets and order")
    start: str | None = Field(default=None, description="checkpoint whose parameters it starts from, or .safetensors, .npz")
    picture: bool = Field(default=True, description="draw NAME.png at the end")
    threads: int | None = Field(
        default=None, gt=0, le=RANKS, description="threads of each rank's kernels and BLAS; default: its share of the cores"
    )
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
    # First, since what follows may be defined there.
    modules: tuple[str, ...] = Field(default=(), description="your own Python files that define layers, losses, rules or methods")
    layers: AnyLayers = Field(
        min_length=1, max_length=1000, description="the layers, input side first; each has a kind and its options"
    )
    loss: AnyLoss = Field(default="softmax", validate_default=True, description="softmax, squared or logistic (one-vs-all)")
    dtype: Literal["float32", "float64"] = Field(default="float32", description="of parameters and everything computed")
    decay: float = Field(default=0.0, ge=0, description="weight decay: decay/2 sum w^2 is added to the loss; biases are left out")

    @field_validator("modules")
    @classmethod
    def _run(cls, paths: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for path in paths:
            if asked(info, "modules"):
                load_file(path)
        return paths

    @field_validator("layers")
    @classmethod
    def _made(cls, entries: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        made = asked(info, "members")
        return tuple(take("network.layers", entry, f"model.layers.{i}", made=made) for i, entry in enumerate(entries))


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

    epochs: int | None = Field(default=None, ge=0, le=COUNT, description="passes of a replica over its subset, or of all over all")
    steps: int | None = Field(default=None, ge=0, le=COUNT, description="steps of each replica")
    seconds: float | None = Field(default=None, gt=0, description="time budget, start-up not counted")
    accuracy: float | None = Field(default=None, gt=0, le=1, description="accuracy on evaluate.part")
    iterations: int | None = Field(default=None, ge=0, le=COUNT, description="iterations of a batch method")

    @model_validator(mode="after")
    def _some(self) -> StopTable:
        if all(value is None for value in self.model_dump().values()):
            raise ValueError("the table [stop] is empty; give epochs, steps, seconds, accuracy or iterations.")
        return self


class WarmstartTable(Table):
    """One replica trains alone until the first of these is reached; then the others join."""

    steps: int = Field(default=0, ge=0, le=COUNT, description="steps of replica 0 alone, exactly")
    accuracy: float | None = Field(default=None, gt=0, le=1, description="accuracy on evaluate.part that replica 0 reaches alone")


class EvaluateTable(Table):
    seconds: float | None = Field(default=None, gt=0, description="an evaluation at least each so many seconds")
    epochs: float | None = Field(default=1.0, gt=0, description="an evaluation each so many epochs of all replicas together")
    part: Literal["test", "validation"] = Field(default="test", description="which part of the data is evaluated")
    train: int = Field(default=1000, ge=0, le=COUNT, description="examples of the training set that are evaluated too")


class GuardTable(Table):
    """What happens to gradients that are not finite."""

    finite: bool = Field(default=True, description="shards refuse pushes with NaN or Inf; false: train on with them")
    refused: int = Field(
        default=10, gt=0, le=COUNT, description="refused pushes (Sandblaster: passes with any) after which the run is stopped"
    )


class CheckpointTable(Table):
    seconds: float | None = Field(default=None, gt=0, description="a checkpoint each so many seconds, besides the one at the end")
    steps: int | None = Field(default=None, gt=0, le=COUNT, description="a checkpoint each so many steps of all replicas together")
    keep: int = Field(default=2, gt=0, le=COUNT, description="checkpoints that are kept; older ones are removed")


class RecordTable(Table):
    """What the run file holds of the updates, and what makes an asynchronous run one that can be repeated to the bit."""

    events: Literal["all", "sampled", "counts"] = Field(default="sampled", description="updates that are rows: all, some, or none")
    whole: int = Field(default=1_000_000, ge=0, le=COUNT, description="sampled: updates of each shard of which all are rows")
    every: int = Field(default=100, gt=0, le=COUNT, description="sampled: after them one update in so many is a row")
    schedule: bool = Field(default=False, description="record NAME.schedule, what 'dbnet replay' plays again")
    limit: int = Field(default=1 << 30, gt=0, le=COUNT, description="bytes of it; past them recording ends and the run goes on")
    tensorboard: bool = Field(default=False, description="write NAME.tensorboard, event files for TensorBoard, too")
    trace: bool = Field(default=False, description="trace what every rank does when, NAME.trace, for 'dbnet trace'")
    spans: int = Field(default=1 << 19, gt=0, le=COUNT, description="of it: the newest so many of each rank, 40 bytes each")
    steps: int | None = Field(default=None, gt=0, le=COUNT, description="of it: one step in so many; default: what costs little")


class Config(Table):
    """The whole run."""

    run: RunTable = RunTable()
    data: DataTable
    model: ModelTable
    method: AnyMethod = Field(
        default={}, validate_default=True, description="how the network is trained: its kind, by default downpour, and its options"
    )
    rule: AnyRule = Field(
        default={}, validate_default=True, description="the update rule: its kind, by default adagrad, and its options"
    )
    topology: TopologyTable = TopologyTable()
    stop: StopTable
    warmstart: WarmstartTable = WarmstartTable()
    evaluate: EvaluateTable = EvaluateTable()
    checkpoint: CheckpointTable = CheckpointTable()
    guard: GuardTable = GuardTable()
    record: RecordTable = RecordTable()

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
        Path of a configuration file, nested tables like those in it, or a configuration.
    say
        Is told what an override makes superfluous in the configuration.

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


def described(tree: dict[str, Any], keys: Sequence[str]) -> type[BaseModel] | None:
    """Return the class whose fields are the keys of the table at `keys`; None where there is none, or its file is not at hand."""
    model: type[BaseModel] | None = Config
    place: Any = tree
    mark: Family | None = None
    for key in keys:
        if isinstance(place, list):
            place = place[int(key)]
        else:
            place, mark, field = place.get(key, {}), Family.of(model, key), model.model_fields.get(key) if model else None
            inner = None if field is None else field.annotation
            model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
        if mark is not None and not isinstance(place, list):
            model = mark.member(place)
    return model


def fitting(tree: dict[str, Any], changes: Sequence[str]) -> list[str]:
    """Where a change gives a member another kind, take out, in place, what the configuration says and that kind does not know.

    Returns
    -------
    A sentence for each such member.
    """
    out, changed = [], {text.partition("=")[0].strip() for text in changes}
    for path in sorted(changed):
        *keys, last = path.split(".")
        member = described(tree, keys) if keys and last == "kind" else None
        if member is None:
            continue
        entry: Any = tree
        for key in keys:
            entry = entry[int(key)] if isinstance(entry, list) else entry[key]
        table = ".".join(keys)
        strange = [key for key in entry if key != "kind" and key not in member.model_fields]
        # What was asked for together with the kind stays, and is refused.
        strange = [key for key in strange if not any(f"{name}.".startswith(f"{table}.{key}.") for name in changed)]
        for key in strange:
            del entry[key]
        if strange:
            out.append(
                f"{table}.kind = '{member.kind}' has no {' and no '.join(strange)}; what the configuration says there is left out."
            )
    return out


def build(tree: dict[str, Any]) -> Config:
    """Make a complete configuration from nested tables: own modules are run, every member is made with all of its options."""
    return valid(Config, tree)


def stored(tree: dict[str, Any]) -> Config:
    """Take a configuration from an output. It is complete: no member is made, and nothing that it names is run."""
    return valid(Config, tree, members=False, modules=False)


def restored(config: Config) -> Config:
    """Make the members of a stored configuration; its own modules are running."""
    return valid(Config, json.loads(config.text()), modules=False)


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
        table = described(tree, keys[:-1])
        known = place if table is None else table.model_fields
        if keys[-1] not in known:
            raise UserError(f"'{text}' takes a key out of the configuration, but '{path}' is not in it{nearest(keys[-1], known)}.")


def to_toml(config: Config) -> str:
    """Return the configuration as TOML that `load` accepts; beside each key its meaning, keys without a value as comments."""
    lines: list[str] = []
    for table, content in json.loads(config.text()).items():
        lines += _written(f"[{table}]", content, described({table: content}, [table]))
    return "\n".join(lines)


def _written(head: str, content: dict[str, Any], model: type[BaseModel] | None) -> list[str]:
    """Return the lines of a table, and those of the tables in it."""
    lines, inner, name = [head], [], head.strip("[]")
    for key, value in content.items():
        mark = Family.of(model, key)
        annotation = model.model_fields[key].annotation if model and key in model.model_fields else None
        if isinstance(value, list) and mark is not None:
            for entry in value:
                inner += _written(f"[[{name}.{key}]]", entry, mark.member(entry))
        elif isinstance(value, dict) and mark is not None:
            inner += _written(f"[{name}.{key}]", value, mark.member(value))
        elif isinstance(value, dict) and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            inner += _written(f"[{name}.{key}]", value, annotation)
        else:
            given = f"# {key} =" if value is None else f"{key} = {written(value)}"
            said = meaning(model, key) if model is not None else ""
            lines.append(f"{given:<37} # {said}" if said else given)
    return [*lines, "", *inner]
