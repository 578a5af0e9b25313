"""A configuration becomes one complete value or one clear sentence, whatever stands in it."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dbnet.core.config import Config, build, load, override, restored, stored, to_toml
from dbnet.core.errors import UserError
from dbnet.core.registry import FAMILIES, family
from dbnet.methods.downpour import Downpour
from dbnet.network.layers.dense import Dense
from dbnet.network.losses.softmax import Softmax
from dbnet.shards.rules.adagrad import Adagrad
from dbnet.shards.rules.sgd import Sgd

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"data": {"path": "d.h5"}, "model": {"layers": [{"kind": "dense", "units": 2}]}, "stop": {"steps": 1}}


def minimal(**tables: Any) -> dict[str, Any]:
    """Return the smallest run, with tables changed."""
    return {**json.loads(json.dumps(MINIMAL)), **tables}


def paths() -> list[str]:
    """Return every key of every table, and some of members."""
    out = [f"{table}.{key}" for table, content in json.loads(build(minimal()).text()).items() for key in content]
    return [*out, "model.layers.0.units", "model.layers.0.activation", "model.layers.0.kind", "rule.kind", "rule", "model", "run"]


def test_defaults_are_filled_in() -> None:
    config = build(minimal())
    assert config.rule == Adagrad() and config.model.loss == Softmax() and config.model.layers == (Dense(units=2),)
    assert config.method.n_push == config.method.n_fetch == 1


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_file_of_the_project_is_good(path: Path) -> None:
    config = load(path)
    assert restored(stored(json.loads(config.text()))) == config


def test_text_and_toml_give_the_same_run_again(tmp_path: Path) -> None:
    strange = 'quo"te \\ back\u00e9\n\ttab \x7f'
    config = build(minimal(run={"name": strange, "seed": 7}, warmstart={"accuracy": 0.5}, rule={"kind": "adam"}))
    assert restored(stored(json.loads(config.text()))) == config
    path = tmp_path / "again.toml"
    path.write_text(to_toml(config))
    assert load(path) == config


def test_every_key_is_written_with_its_meaning(tmp_path: Path) -> None:
    local = [{"kind": "local", "maps": 2, "field": 3}, {"kind": "pool"}, {"kind": "norm"}]
    layers = [*local, {"kind": "dropout", "rate": 0.5}, {"kind": "dense", "units": 2}]
    needed = {"multibatch_lbfgs": {"batch": 8}, "owlqn": {"strength": 1e-3}}
    for rule, descent in zip([*family("shards.rules"), "sgd"], family("methods.descent"), strict=True):
        config = build(
            minimal(
                model={"layers": layers},
                rule={"kind": rule},
                method={"kind": "sandblaster", "descent": {"kind": descent, **needed.get(descent, {})}},
            )
        )
        text = to_toml(config)
        path = tmp_path / "again.toml"
        path.write_text(text)
        assert load(path) == config
        lines = [line for line in text.splitlines() if line and not line.startswith("[")]
        assert all(re.fullmatch(r"(# )?\w+ = ?.* # [\w(/S].{5,}", line) for line in lines), text
        for table, content in json.loads(config.text()).items():
            here = text.split(f"[{table}]\n")[1].split("\n\n")[0]
            missing = [
                key
                for key in content
                if key not in ("layers", "descent", "schedule") and not re.search(rf"^(# )?{key} =", here, re.M)
            ]
            assert not missing, (table, missing)
    assert "\n# seconds =" in text and "\nsteps = 1 " in text and "\n# spread =" in text and "# checkpoint whose parameters" in text


def test_a_key_is_taken_out() -> None:
    tree = minimal(run={"name": "x"}, warmstart={"steps": 4})
    layer = ("model.layers.0.activation=tanh", "model.layers.0.activation=")
    for text in ("stop.steps=", "stop.seconds=1", "stop.accuracy=", "run.name= ", "warmstart=", *layer):
        override(tree, text)
    assert tree == minimal(run={}, stop={"seconds": 1})


def test_another_kind_leaves_out_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    method = {"kind": "sandblaster", "descent": {"kind": "lbfgs"}}
    path.write_text(to_toml(build(minimal(method=method, rule={"kind": "adagrad", "rate": 0.3, "initial_sum": 0.5}))))
    said: list[str] = []
    words = ["rule.kind=sgd", "method.descent.kind=gradient_descent", "model.layers.0.kind=dense"]
    config = load(path, words, said.append)
    assert config.rule == Sgd(rate=0.3) and config.method.descent.kind == "gradient_descent"
    assert said == [
        "method.descent.kind = 'gradient_descent' has no history and no curvature; what the configuration says there is left out.",
        "rule.kind = 'sgd' has no initial_sum; what the configuration says there is left out.",
    ]
    more: list[str] = []
    assert load(path, ["method.kind=downpour"], more.append).method == Downpour()
    left = "portion and no push_every and no backups and no patience and no descent"
    assert more == [f"method.kind = 'downpour' has no {left}; what the configuration says there is left out."]
    assert load(path, ["rule.kind=sgd"]) and capsys.readouterr() == ("", f"dbnet: {said[1]}\n")
    for wrong in (["rule.kind=sgd", "rule.initial_sum=1"], ["rule.kind=sgd", "rule.initial_sum.x=1"]):
        with pytest.raises(UserError, match=r"Unknown key 'rule.initial_sum'|'initial_sum' is a value"):
            load(path, wrong, said.append)


def test_members_of_ones_own_have_options_in_their_tables(tmp_path: Path) -> None:
    """They are made from the configuration's tables and texts; what an output says of them is read without them."""
    own = tmp_path / "own.py"
    own.write_text(
        "from typing import ClassVar\nfrom dbnet import Loss\nfrom dbnet.methods.downpour import Downpour\n\n\n"
        "class Huber(Loss):\n    kind: ClassVar[str] = 'huber'\n    width_of_the_middle: float = 1.0\n\n\n"
        "class Late(Downpour):\n    kind: ClassVar[str] = 'late'\n    by: int = 3\n"
    )
    model = {**MINIMAL["model"], "loss": {"kind": "huber", "width_of_the_middle": 2.0}, "modules": [str(own)]}
    try:
        config = build(minimal(model=model, method={"kind": "late", "by": 4}))
        assert (config.model.loss.width_of_the_middle, config.method.by, config.method.minibatch) == (2.0, 4, 32)
        (tmp_path / "again.toml").write_text(to_toml(config))
        assert load(tmp_path / "again.toml") == config
        shorter = load(tmp_path / "again.toml", ["model.loss=softmax", "method.kind=downpour"], lambda _: None)
        assert json.loads(shorter.text())["model"]["loss"] == "softmax" and shorter.method == Downpour()
    finally:
        FAMILIES["network.losses"].pop("huber", None), FAMILIES["methods"].pop("late", None)
    read = stored(json.loads(config.text()))
    assert (read.model.loss.kind, read.model.loss.width_of_the_middle, read.method.by) == ("huber", 2.0, 4)
    assert read.text() == config.text()
    for damaged in (
        {"method": {"kind": 3}},
        {"rule": [1]},
        {"method": {"kind": "late", "a b": 1}},
        {"method": {"kind": "x", "descent": {"kind": []}}},
    ):
        with pytest.raises(UserError, match="The stored configuration is damaged: "):
            stored({**json.loads(config.text()), **damaged})


def test_a_kind_is_taken_out() -> None:
    """What is left is of the default kind; what that does not know goes with the other one."""
    said: list[str] = []
    adam = minimal(rule={"kind": "adam", "rate": 0.5, "beta1": 0.5})
    assert load(adam, ["rule.kind="], said.append).rule == Adagrad(rate=0.5)
    assert said == ["rule.kind = 'adagrad' has no beta1; what the configuration says there is left out."]


def test_a_run_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        build(minimal()).topology.shards = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("0.5", 0.5), ("true", True), ("'x'", "x"), ("x", "x"), ("a b", "a b"), ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1}),
     ("''", ""), ("a=b", "a=b"), ("1 # c", 1)],
)  # fmt: skip
def test_an_override_is_toml_or_text(text: str, value: object) -> None:
    tree: dict[str, Any] = {}
    override(tree, f"a.b={text}")
    assert tree == {"a": {"b": value}}


def test_overrides_reach_layers_and_come_in_order() -> None:
    tree = minimal()
    for text in ("model.layers.0.units=5", "topology.shards=2", "topology.shards=3"):
        override(tree, text)
    config = build(tree)
    assert config.model.layers[0].units == 5 and config.topology.shards == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topology.replicas", "is not an override; write table.key=value"),
        ("=4", "is not an override"),
        ("topology..replicas=4", "is not an override"),
        ("topology.replica=4", "Unknown key 'topology.replica' (did you mean 'replicas'?)"),
        ("topologie.replicas=4", "Unknown key 'topologie' (did you mean 'topology'?)"),
        ("topology.replicas=0", "topology.replicas = 0 is not allowed: it must be greater than 0."),
        ("topology.replicas=many", "topology.replicas = 'many' is not allowed: it must be a whole number."),
        ("topology.replicas=1.5", "topology.replicas = 1.5 is not allowed: it must be a whole number."),
        ("method.slots=1", "method.slots = 1 is not allowed: it must be at least 2."),
        ("warmstart.accuracy=3", "warmstart.accuracy = 3 is not allowed: it must be at most 1."),
        ("run.picture=maybe", "run.picture = 'maybe' is not allowed: it must be true or false."),
        ("run.name=''", "run.name = '' is not allowed: it must not be empty."),
        ("data.path=true", "data.path = true is not allowed: it must be a text in quotes."),
        ("model.dtype=float16", "model.dtype = 'float16' is not allowed: it must be 'float32' or 'float64'."),
        ("rule=3", "rule = 3 is not allowed: it must be a table"),
        ("stop=3", "stop = 3 is not allowed: it must be a table"),
        ("topology.replicas.x=1", "is not allowed"),
        ("run.seed.x.y=1", "is not allowed"),
        ("data.path.x=1", "'path' is a value, not a table"),
        ("model.layers.7.units=1", "there is no item 7; this list has 1 (0 .. 0)"),
        ("model.layers.first.units=1", "there is no item first"),
        ("model.layers.0=1", "name a key of one list item"),
        ("model.layers=3", "model.layers = 3 is not allowed: it must be a list"),
        ("model.layers=[]", "model.layers = [] is not allowed: it needs 1 or more."),
        ("model.layers=[{}]", "The key 'model.layers.0.kind' is missing; it is one of conv, dense,"),
        ("model.layers.0.unitz=1", "Unknown key 'model.layers.0.unitz' (did you mean 'units'?)"),
        ("model.loss=softmaks", "model.loss = 'softmaks' is not one of logistic, softmax, squared (did you mean 'softmax'?)."),
        ("model.loss=mse", "(did you mean 'squared'?)"),
        ("rule.lr=1", "Unknown key 'rule.lr' (did you mean 'rate'?)"),
        ("method.batch_size=1", "Unknown key 'method.batch_size' (did you mean 'minibatch'?)"),
        ("model.layers.0.neurons=1", "(did you mean 'units'?)"),
        (
            "stop.epoch=",
            "'stop.epoch=' takes a key out of the configuration, but 'stop.epoch' is not in it (did you mean 'epochs'?).",
        ),
        ("rule.rat=", "'rule.rat' is not in it"),
        ("stop.steps=", "the table [stop] is empty"),
        ("rule.kind=adagrat", "(did you mean 'adagrad'?)"),
        ("rule.rat=1", "Unknown key 'rule.rat' (did you mean 'rate'?)"),
        ("method.portion=4", "Unknown key 'method.portion'"),
        ("method.portion=4", " portion is an option of method.kind = 'sandblaster'."),
        ("method.descent.history=4", " descent is an option of method.kind = 'sandblaster'."),
        ("method=3", "method = 3 is not allowed: it must be a table, like {kind = 'x'}."),
        ("model.loss=3", "model.loss = 3 is not allowed: it must be a table, like {kind = 'x'}."),
        ("method.kind=downpoor", "(did you mean 'downpour'?)"),
        ("stop={}", "the table [stop] is empty; give epochs, steps, seconds, accuracy or iterations."),
        ("run.name=a/b", "run.name"),
        ("run.name=..", "run.name"),
        ("stop.seconds=nan", "stop.seconds = nan is not allowed: it must be a finite number."),
        ("method.local_rate=inf", "method.local_rate"),
        ("run.seed=99999999999999999999999", "run.seed"),
        ("rule.rate=nan", "rule.rate"),
        (
            "method={kind='sandblaster', descent.history=1073741824}",
            "method.descent.history = 1073741824 is not allowed: it must be at most 1000.",
        ),
        ("method={kind='sandblaster', descent={kind='owlqn', strength=1, history=1073741824}}", "method.descent.history"),
        ("method={kind='sandblaster', descent.line.trials=1073741824}", "method.descent.line.trials"),
        ("run.heartbeat=1e300", "run.heartbeat"),
        ("run.heartbeat=1e-320", "run.heartbeat"),
        ("run.deadline=1e300", "run.deadline"),
        ("method={kind='sandblaster', patience=1e-320}", "method.patience"),
        ("evaluate.train=4611686018427387904", "evaluate.train"),
        ("topology.replicas=2147483648", "topology.replicas"),
        ("topology.partitions=16384", "topology: these are 16386 ranks; 16384 are the most."),
        ("method.slot=4611686018427387904", "method.slot"),
        ("method.slots=4611686018427387904", "method.slots"),
    ],
)
def test_what_is_wrong_is_said(text: str, said: str) -> None:
    tree = minimal()
    with pytest.raises(UserError) as error:
        override(tree, text)
        build(tree)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("table", ["data", "model", "stop"])
def test_a_missing_table_is_named(table: str) -> None:
    tree = minimal()
    del tree[table]
    with pytest.raises(UserError, match=f"'{table}' is missing"):
        build(tree)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[run", "not a readable TOML file"), (b"\xff\xfe", "not a readable TOML file"), (b"a = 1\na = 2", "not a readable TOML"),
     (b"", "is missing"), (b"\x89HDF\r\n\x1a\n", "not a readable TOML file")],
)  # fmt: skip
def test_a_file_that_is_no_run_file(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load(path)


def test_a_folder_is_no_run_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a readable TOML file"):
        load(tmp_path)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_letters, max_size=6), inner, max_size=3),
    max_leaves=6,
)


def check(tree: dict[str, Any]) -> None:
    """A tree gives a run that can be stored and read back, or a UserError of one line."""
    try:
        config = build(tree)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(config, Config) and restored(stored(json.loads(config.text()))) == config


@given(st.sampled_from(paths()), anything)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_value_for_any_key(path: str, value: object) -> None:
    tree = minimal()
    place: Any = tree
    *keys, last = path.split(".")
    for key in keys:
        place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
    place[last] = value
    check(tree)


@given(anything)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_layer(value: object) -> None:
    tree = minimal()
    tree["model"]["layers"].append(value)
    check(tree)


@given(st.sampled_from(["", *(f"{path}=" for path in paths())]), st.text(max_size=12))
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_override(start: str, text: str) -> None:
    tree = minimal()
    try:
        override(tree, start + text)
    except UserError as error:
        assert isinstance(str(error), str)
        return
    check(tree)
