"""A machine that is measured: what is fitted to steps that are known, and the file of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from finished import Finished

from dbnet.commands.calibrate import kernels, machine, ranks
from dbnet.core import config as configuration
from dbnet.network.cost import Profile, load_profile
from dbnet.run.setup import EVALUATION_BATCH, setup

WAY = {"latency": 1e-6, "bandwidth": 5.0}


def known(trial: kernels.TrialNetwork, data: Path, profile: Profile) -> kernels.Timed:
    """Return a network whose times are what a machine says."""
    shape = [int(n) for n in trial.shape.split(",")]
    kernels.file.write(data, kernels.Random(shape=trial.shape, classes=trial.classes, train=4, test=0).read(), True)
    model = setup(configuration.load(kernels.tables_of(data, trial))).model
    assert math.prod(model.shapes[0]) == math.prod(shape)
    step, passed = profile.step_seconds(model, model.boxes(), trial.minibatch), profile.forward_seconds(
        model, model.boxes(), EVALUATION_BATCH
    )  # fmt: skip
    return kernels.Timed(model, trial.minibatch, step, 1.0, passed)


def test_rates_come_out_of_steps_that_were_made_with_them(tmp_path: Path) -> None:
    compute = {"rate": 40.0, "step": 3e-5, "layer": 1e-5, "evaluation": 1.5, "apply": 1.0}
    compute["rates"] = {"conv": 10.0, "local": 5.0, "pool": 2.0, "norm": 1.0, "dropout": 0.5}
    profile = Profile.model_validate({"compute": compute, "inside": WAY, "between": WAY})
    found = [known(trial, tmp_path / "data.h5", profile) for trial in kernels.TRIALS]
    made = kernels.fitted(found)
    assert made["rates"] == pytest.approx(compute["rates"], rel=0.01)
    assert [made[name] for name in ("rate", "step", "layer", "evaluation")] == pytest.approx([40.0, 3e-5, 1e-5, 1.5], rel=0.02)
    fit = Profile.model_validate({"compute": made | {"apply": 1.0}, "inside": WAY, "between": WAY})
    assert abs(kernels.misses(found, fit)).max() < 0.01


def test_a_networks_own_step_counts_and_a_part_of_it_as_the_rates_say(tmp_path: Path) -> None:
    profile = Profile.model_validate({"compute": {"rate": 10.0, "step": 1e-3, "apply": 1.0}, "inside": WAY, "between": WAY})
    one = known(kernels.TrialNetwork("64", kernels._dense(256), 10, 20), tmp_path / "data.h5", profile)
    entry = one._replace(step=5e-3, forward=7e-3).entry("mine")
    own = profile.model_copy(update={"compute": profile.compute.model_copy(update={"measured": (entry,)})})
    whole = one.model.boxes()
    assert own.step_seconds(one.model, whole, 20) == pytest.approx(5e-3)
    assert own.forward_seconds(one.model, whole, EVALUATION_BATCH) == pytest.approx(7e-3)
    # Another minibatch is another step.
    assert own.step_seconds(one.model, whole, 21) == profile.step_seconds(one.model, whole, 21)
    half = [*whole[:-2], *[tuple(r._replace(hi=r.hi // 2) for r in box) for box in whole[-2:]]]
    share = profile.step_seconds(one.model, half, 20) / profile.step_seconds(one.model, whole, 20)
    assert own.step_seconds(one.model, half, 20) == pytest.approx(share * 5e-3)


def counted(steps: int, nbytes: int, cost: machine.Costs, flush: float, gradient: float) -> dict[str, Any]:
    """Return what ranks would say of a run whose costs are known."""
    slices = -(-nbytes // 2**20)
    moved = nbytes * cost.copied
    replica = {
        "fetch": 2 * cost.call + 2 * flush + moved, "push": 3 * slices * cost.call + 2 * slices * flush + moved,
        "poll": 2 * cost.turn + cost.step, "gradient": gradient,
    }  # fmt: skip
    shard = {"apply": slices * cost.slice + nbytes * cost.applied, "poll": 5 * cost.turn}
    spent = [{}, shard, replica]
    return {
        "steps": steps, "bytes": nbytes,
        "ranks": [{"spent": {k: steps * v for k, v in one.items()}, "turns": 5 * steps} for one in spent],
    }  # fmt: skip


def test_costs_come_out_of_runs_that_were_made_with_them() -> None:
    cost = machine.Costs(8e-6, 1e-10, 2e-5, 2e-10, 3e-5, 4e-5)
    runs = [counted(4000, 76_840, cost, 1e-6, 1e-4), counted(200, 7_454_760, cost, 1e-6, 3e-3)]
    assert np.array(machine.costs(runs, 1e-4, 1e-6)) == pytest.approx(np.array(cost), rel=1e-3)


def run(base: float, left: float) -> dict[str, Any]:
    """Return what ranks would say of steps of `base` seconds in which a replica left its core so often, 40 us each time."""
    spent = {"gradient": base + 4e-5 * left, "fetch": 1e-5, "push": 2e-5, "poll": 3e-5, "apply": 1.0}
    replica = {"spent": {cause: 100 * value for cause, value in spent.items()}, "switches": 100 * left}
    return {"steps": 100, "ranks": [{}, {}, replica]}


@pytest.mark.parametrize("others", [0.0, 1.5])
def test_what_coming_back_to_a_core_costs_comes_out_of_two_runs(others: float) -> None:
    """Also where others take the cores `others` times a step; where they do so as often as ranks do it is not known."""
    pairs = [(run(base, others), run(base, others + more)) for base, more in ((1e-4, 2.0), (1e-3, 3.0))]
    assert machine.switching(pairs) == pytest.approx(4e-5)
    assert machine.switching([(run(1e-4, others), run(1e-4, others + 0.1))]) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        (
            {"shared": "the system does not let all ranks onto one core (x)"},
            "switch: the system does not let all ranks onto one core",
        ),
        ({"small": (1e-4, 2.0), "middle": (1e-4, 2.0)}, "switch: others computed here, too, and took the cores as often"),
        ({"small": (1e-4 - 1e-3, 0.0), "middle": (1e-4 - 1e-3, 0.0)}, "switch: 540 us came out, more than one can take"),
        # Ranks that have cores enough do not give way, which is no cost of coming back.
        ({"small": (9e-4, 0.0), "middle": (9e-4, 0.0), "small, crowded": (1e-4, 0.0), "middle, crowded": (1e-4, 0.0)}, None),
    ],
)
def test_why_the_cost_of_coming_back_is_unknown_is_said(change: dict[str, Any], said: str | None) -> None:
    runs = {"small": (1e-4, 0.0), "middle": (1e-4, 0.0), "small, one core": (1e-4, 2.0), "middle, one core": (1e-4, 2.0)}
    told = {"inside": {}, "shared": "", **change}
    told["runs"] = {name: run(*of) for name, of in {**runs, **told}.items() if isinstance(of, tuple)}
    if told["shared"]:
        del told["runs"]["small, one core"], told["runs"]["middle, one core"]
    found = [line for line in machine.unmeasured(told, "") if line.startswith("switch")]
    assert [line.startswith(said or "-") for line in found] == [True] * bool(said)
    assert machine._switch(told)[0] == (0.0 if said else pytest.approx(4e-5))


@pytest.mark.parametrize(
    ("others", "fails", "core", "said"),
    [
        ({1, 2}, None, {1}, ""),
        ({0, 1, 2, 3}, OSError(1, "Operation not permitted"), None, "onto one core (Operation not permitted)"),
        ({2}, OSError(22, "Invalid argument"), None, "onto one core (Invalid argument)"),
        ({0}, None, None, "may use one core here"),
    ],
)
def test_ranks_go_onto_one_core_where_they_may(
    monkeypatch: pytest.MonkeyPatch, others: set[int], fails: OSError | None, core: set[int] | None, said: str
) -> None:
    """A system that refuses costs one number, and is asked for nothing more."""
    mine, now = ({0} if others == {0} else {0, 1}), []

    def bind(pid: int, cores: set[int]) -> None:
        if fails:
            raise fails
        now.append(cores)

    monkeypatch.setattr(ranks.os, "sched_getaffinity", lambda pid: mine)
    monkeypatch.setattr(ranks.os, "sched_setaffinity", bind)
    others_say = iter([[others], [""]])
    comm = SimpleNamespace(allgather=lambda own: [own, *next(others_say)])
    with ranks.one_core(comm) as why:
        assert said in why and bool(said) == bool(why)
        assert now == ([core] if core else [])
    assert now == ([core, mine] if core else [])


def test_what_is_different_for_large_networks_comes_out_of_a_run() -> None:
    cost, slower = machine.Costs(8e-6, 1e-10, 2e-5, 2e-10, 3e-5, 4e-5), {"copied": 2.5e-10, "applied": 4e-10}
    run = counted(80, 14_000_000, cost._replace(**slower), 1e-6, 9e-3)
    found = machine.large(run, 7_000_000, cost, 8.3e-3, 1e-6)
    assert found == pytest.approx({"above": 9.9, "bandwidth": 4.0, "apply": 2.5, "step": 0.05}, rel=1e-3)
    # Nothing is faster there, and of an unknown gradient nothing is said.
    fast = machine.large(
        counted(80, 14_000_000, cost._replace(copied=5e-11, applied=1e-10), 1e-6, 9e-3), 7_000_000, cost, 0.0, 1e-6
    )
    assert fast == pytest.approx({"above": 9.9, "bandwidth": 10.0, "apply": 5.0, "step": 0.0}, rel=1e-3)


def test_a_large_network_and_a_rule_are_predicted_by_what_is_different_for_them() -> None:
    large = {"above": 10.0, "bandwidth": 2.0, "apply": 1.0, "step": 0.1}
    compute = {"rate": 1.0, "apply": 5.0, "local": 4.0, "rules": {"sgd": 2.0}, "slice": 0.25}
    profile = Profile.model_validate({"compute": compute, "inside": WAY, "between": WAY, "large": large})
    small, beyond = profile.suited(10_000_000), profile.suited(10_000_001)
    assert (small.inside.bandwidth, small.apply_seconds(10**9), small.cold_seconds(10**9)) == (5.0, 0.45, 0.0)
    assert (beyond.inside.bandwidth, beyond.apply_seconds(10**9), beyond.cold_seconds(10**9)) == (2.0, 1.25, 0.1)
    assert beyond.between.bandwidth == 5.0 and beyond.local_seconds(10**9) == 0.25
    for kind, seconds in (("sgd", 0.75), ("adagrad", 1.25)):
        assert profile.suited(10**8, kind).apply_seconds(10**9) == seconds


@pytest.mark.long
@pytest.mark.mpi
def test_this_machine_is_measured(dbnet: Callable[..., Finished], run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, with less of everything: a file that a simulation takes, and that says what was not measured."""
    trials, timed = kernels.trials, kernels.timed
    monkeypatch.setattr(kernels, "trials", lambda: trials((kernels.TRIALS[0], kernels.TRIALS[5]), 0.01))
    monkeypatch.setattr(kernels, "timed", lambda ready, budget: timed(ready, 0.01))
    said = dbnet("calibrate", "here.toml", "--run", run_file)
    assert said.code == 0, said.err
    said = said.out
    assert "Cores " in said and "Machine file   here.toml" in said
    made, text = load_profile("here.toml"), Path("here.toml").read_text()
    assert set(made.compute.rates) <= {"conv"} and made.host.cores >= 1
    assert made.compute.measured[0].about.startswith(run_file.stem) and made.host.call >= 0
    assert 1 < made.large.above < 100 and made.compute.local > 0 and made.host.look > 0
    # How fast they are here is not said: the machine may be busy.
    assert set(made.compute.rules) == {"adam", "momentum", "sgd"} and min(made.compute.rules.values()) > 0
    assert "Not measured: between: all was on one host" in text and "inside:" not in text
    done = dbnet("simulate", run_file, "--machine", "here.toml", "--dry", "--quiet")
    assert done.code == 0
    again = dbnet("calibrate", "here.toml")
    assert again.code == 2 and "that file exists" in again.err
