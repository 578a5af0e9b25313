"""The reference that is made from the code: complete, current, and read by its command."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from finished import ROOT, Finished

from dbnet.commands.see.reference import FAMILIES, description, options, page, tables
from dbnet.core.registry import family

MEMBERS = [(name, kind) for name, (path, *_) in FAMILIES.items() for kind in sorted(family(path)) if kind != "gain"]


def test_the_page_is_current() -> None:
    """Own members that other tests have defined in this process are not in it."""
    kept = re.sub(r"\n### [a-z]+\.(?!(?:" + "|".join(kind for _, kind in MEMBERS) + r")\n).*?(?=\n##)", "", page(), flags=re.DOTALL)
    assert kept == (ROOT / "jobs" / "REFERENCE.md").read_text(), "run: dbnet help --page > jobs/REFERENCE.md"


@pytest.mark.parametrize(("name", "kind"), MEMBERS)
def test_a_member_is_explained(name: str, kind: str, dbnet: Callable[..., Finished]) -> None:
    member, said = family(FAMILIES[name][0])[kind], dbnet("help", f"{name}.{kind}").out
    assert said.startswith(f"{name}.{kind}  ") and description(member).split("\n")[0] in said and "----" not in said
    for option in options(member):
        assert f"\n  {option.name} = {option.default}\n      {option.type}" in said
        assert option.meaning, f"nobody says what {option.name} means"


def test_types_defaults_and_ranges(dbnet: Callable[..., Finished]) -> None:
    said = dbnet("help", "layers.dense", "rule.adam", "topology", "layers.conv").out
    for words in (
        'activation = "identity"\n      "identity" or "sigmoid" or "tanh" or "relu"\n',
        "units = required\n      whole number, > 0\n",
        "beta1 = 0.9\n      number, >= 0, < 1\n",
        "[topology]\n\n  shards = 1\n      whole number, > 0, <= 16384\n      S, ranks that hold the parameters",
        "field = required\n      whole number or [whole number, whole number]\n",
        "y = f(W x + b), the same filters",
    ):
        assert words in said, words


def test_what_there_is(dbnet: Callable[..., Finished]) -> None:
    said = dbnet("help").out
    assert all(f"  {name} " in said for name in tables()) and all(f"  {name}.{kind} " in said for name, kind in MEMBERS)
    assert "rule.adagrad" in dbnet("help", "rule").out and "layers." not in dbnet("help", "rule").out
    # A kind is enough; of one in two families there are both.
    assert dbnet("help", "adam").out == dbnet("help", "rule.adam").out
    assert dbnet("help", "sgd").out == dbnet("help", "method.sgd", "rule.sgd").out
    for words, answer in (
        ("rule.adagard", "There is no 'rule.adagard' (did you mean 'adagrad'?); rule has adagrad, adam, momentum, sgd"),
        ("topologi", "There is no table or family 'topologi' (did you mean 'topology'?)"),
        ("adm", "(did you mean 'adam'?)"),
        ("run.name", "There is no table or family"),
    ):
        wrong = dbnet("help", words)
        assert wrong.code == 2 and answer in wrong.err
