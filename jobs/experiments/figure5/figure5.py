"""Figure 5 of Dean et al. (NIPS 2012) in simulated time: how long Downpour and Sandblaster take to an accuracy, by machines.

    python jobs/experiments/figure5/figure5.py FOLDER

FOLDER holds recordings of the Free Spoken Digit Dataset (github.com/Jakobovski/free-spoken-digit-dataset); without it, made-up
sounds stand in, whose times say nothing. Each run is a row of runs.csv as soon as it has ended, and is not made again. Then the
tables of README.md are printed and figure5.png is drawn. Gradients are real; times are those of `machine`.
"""

from __future__ import annotations

import argparse
import csv
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from sounds import CLASSES, COMPONENTS, prepare
from tables import CUT, RULES, SHARD_MACHINES, Pass, draw, told

import dbnet
from dbnet.data.file import write
from dbnet.network.cost import Profile

HERE = Path(__file__).parent
# The paper's speech network, and what it does not say: the minibatch (as for Figure 3), and a machine's FLOP/s.
PAPER_SIZE, PAPER_MINIBATCH, PAPER_RATE = 41_777_152, 100, 100e9
# Four machines are 1.85 times as fast as one (Figure 3).
CUT_SPEEDUP = 1.85
HIDDEN, MINIBATCH, SHARDS = 64, 4, 4
SIZE = (COMPONENTS + 1) * HIDDEN + (HIDDEN + 1) * CLASSES
# A whole run, and one whose passes are timed.
BATCH = ("Sandblaster", "passes")
# Multiplications and additions of an example's gradient: the first layer has none of its inputs. The paper's is a small part.
WORK, PAPER_WORK = 4 * COMPONENTS * HIDDEN + 6 * HIDDEN * CLASSES, 6 * PAPER_SIZE


class Study(NamedTuple):
    """What is run.

    Attributes
    ----------
    goal, warm
        The accuracy that counts; steps of one replica that all begin from.
    replicas, rates, tuned_at
        Of Downpour; the rates that are tried, and with how many replicas: the best one with the first number is taken everywhere,
        those with the others for these in addition.
    gradients, steps
        Of all replicas, after which a run that has not reached the goal ends; steps that each makes at least.
    whole, iterations
        Replicas of Sandblaster's whole runs, and their iterations at most.
    batch_replicas, passes
        Replicas with which a pass of Sandblaster is timed, and how.
    gigabits, faster, seeds
        Of the cards, and of those that Downpour with the replicas of `tuned_at` runs by, too; of the runs.
    """

    goal: float = 0.5
    warm: int = 1000
    replicas: tuple[int, ...] = (10, 20, 100, 200)
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("fixed rate", (0.005, 0.01, 0.02, 0.04)),
        ("Adagrad", (0.05, 0.1, 0.2)),
    )
    tuned_at: tuple[int, ...] = (100, 200)
    gradients: int = 16_000
    steps: int = 120
    whole: int = 20
    iterations: int = 200
    batch_replicas: tuple[int, ...] = (500, 1000, 2000, 5000)
    passes: tuple[Pass, ...] = (Pass(1.0, 1.0), Pass(1.0, 390.0), Pass(1.0, 39.0, 6000), Pass(10.0, 1.0))
    gigabits: float = 1.0
    faster: float = 10.0
    seeds: tuple[int, ...] = (1, 2, 3)


class Case(NamedTuple):
    """One run, the key of its row."""

    method: str
    replicas: int
    gigabits: float
    rate: float
    seed: int
    # How many of the paper's examples take as long as one of ours, or, where a pass is timed, as one of its portions.
    each: float = PAPER_MINIBATCH / MINIBATCH
    # Of a timed pass; how many times as long as over our examples it is.
    portions: int = 0
    longer: float = 1.0


def machine(case: Case) -> Profile:
    """Return jobs/machines/cluster2012-*.toml for a network that is smaller: a step and its messages take as long as the paper's.

    GB/s are divided by how much larger its network is, GFLOP/s by how much more work its minibatch is. A Downpour
    replica is four machines: their speed together, four cards. Each of the shards stands for 64 machines, with their cards.
    """
    smaller, each, gigabits = PAPER_SIZE / SIZE, SHARD_MACHINES // SHARDS, case.gigabits
    together, faster, pause = (1, 1.0, 0.5) if case.method in BATCH else (CUT, CUT_SPEEDUP, 0.01)
    step = case.each
    if case.method == "passes":
        step /= portion_steps(case)
        # A hundredth of a portion.
        pause = max(pause, 0.01 * case.each * PAPER_WORK / PAPER_RATE)
    tables = {
        # Nobody waits for an evaluation.
        "compute": {
            "rate": PAPER_RATE / 1e9 * faster * WORK / PAPER_WORK / step,
            "apply": 2.0 * each / smaller,
            "slice": 20e-6,
            "evaluation": 1e6,
        },
        "host": {"ranks": 1, "shard_cards": each // together, "pause": pause},
        "inside": {"latency": 1e-6, "bandwidth": 4.0},
        "between": {"latency": 50e-6 if gigabits == 1 else 20e-6, "bandwidth": gigabits / 8 * together / smaller},
        "noise": {"kind": "gamma", "variation": 0.1},
    }
    return Profile.model_validate(tables)


def configuration(case: Case, study: Study, folder: Path, examples: int) -> dict[str, Any]:
    """Return what `dbnet.simulate` is to run."""
    tree: dict[str, Any] = {
        "run": {"name": name_of(case), "folder": str(folder / "runs"), "seed": case.seed},
        "data": {"path": str(folder / "digits.h5")},
        "model": {"layers": [{"kind": "dense", "units": HIDDEN, "activation": "sigmoid"}, {"kind": "dense", "units": CLASSES}]},
        "method": {"minibatch": MINIBATCH},
        "topology": {"shards": SHARDS, "replicas": case.replicas},
        "evaluate": {"epochs": 200 * MINIBATCH / examples, "train": 0},
        "record": {"events": "counts"},
    }
    tree["run"] |= {"picture": False, "deadline": 1e5}
    if case.method == "warmstart":
        return tree | {"rule": {"kind": "sgd", "rate": case.rate}, "stop": {"steps": study.warm}}
    tree["run"]["start"] = str(folder / "runs" / f"{name_of(warm(case.seed))}.checkpoint.h5")
    if case.method not in BATCH:
        tree["rule"] = {"kind": RULES[case.method], "rate": case.rate}
        if case.method == "Adagrad":
            # Between median and mean of what the squared gradients of a warmstart sum up to.
            tree["rule"]["initial_sum"] = 0.1
        return tree | {"stop": {"accuracy": study.goal, "steps": max(study.gradients // case.replicas, study.steps)}}
    # Two portions a pass and replica, each pushed by itself.
    portion = max(1, -(-examples // (2 * case.replicas)))
    tree["method"] = {"kind": "sandblaster", "minibatch": min(portion, 256), "portion": portion, "push_every": 1, "patience": 1e5}
    tree["evaluate"]["epochs"] = 1.0
    if case.method == "passes":
        # Times depend on how many portions there are, and on how long their steps take, alone: a step is one example.
        tree["data"]["path"] = str(few(case, folder))
        tree["method"] |= {"portion": portion_steps(case), "minibatch": 1}
        return tree | {"evaluate": {"epochs": None, "train": 0}, "stop": {"iterations": 1}}
    return tree | {"stop": {"iterations": study.iterations, "accuracy": study.goal}}


def portion_steps(case: Case) -> int:
    """Return the steps of a portion of a timed pass: between two a replica sees whether it comes too late.

    What takes little time beside the pass needs few: small portions, and those of thousands of replicas for a short pass.
    """
    return 8 if case.portions == 2 * case.replicas and case.each > 500 else 2


def few(case: Case, folder: Path) -> Path:
    """Return a data file with as many examples as a timed pass has steps, made if it is not there."""
    steps = case.portions * portion_steps(case)
    path = folder / f"digits{steps}.h5"
    if not path.exists():
        with h5py.File(folder / "digits.h5") as file:
            contents: dict[str, Any] = {"classes": CLASSES}
            for part, most in (("train", steps), ("test", 10)):
                rows = np.arange(most) % len(file[f"{part}/y"])
                contents |= {f"{part}/x": file[f"{part}/x"][:][rows], f"{part}/y": file[f"{part}/y"][:][rows]}
        write(path, contents)
    return path


def name_of(case: Case) -> str:
    return "-".join(map(str, case)).replace(" ", "-")


def warm(seed: int) -> Case:
    """Return the run of one replica that those of a seed begin from."""
    return Case("warmstart", 1, 1.0, 0.02, seed)


def measured(case: Case, study: Study, folder: Path, examples: int) -> dict[str, Any]:
    """Run a case; return its row."""
    # What an interrupted run of it has left would give this one another name than those that begin from it know.
    for left in (folder / "runs").glob(f"{name_of(case)}.*"):
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    began = resource.getrusage(resource.RUSAGE_SELF)
    try:
        done = dbnet.simulate(configuration(case, study, folder, examples), machine(case), quiet=True)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the runs that have ended are kept.") from None
    ended = resource.getrusage(resource.RUSAGE_SELF)
    run = dbnet.open_run(done.outcome.run_file)
    rows = run.evaluation
    reached = rows[rows.accuracy >= study.goal]
    found: dict[str, Any] = dict.fromkeys(("seconds", "gradients", "passes"), "")
    if len(reached) and case.method != "passes":
        found["seconds"] = round(float(reached.seconds.iloc[0]), 3)
        found["gradients"] = int(reached.steps.iloc[0])
    passes = int(run.iterations.passes.sum())
    if passes:
        last = float(run.iterations.seconds.iloc[-1])
        before = run.iterations[run.iterations.seconds <= (found["seconds"] or last)]
        found["passes"] = int(before.passes.sum()) if found["seconds"] != "" else ""
    counts = run.staleness.to_numpy().sum(axis=1)
    stale = float(counts @ np.arange(len(counts)) / counts.sum()) if counts.sum() else 0.0
    in_all = float(run.iterations.seconds.iloc[-1]) if passes else done.seconds
    spent = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return (
        case._asdict()
        | found
        | {
            "seconds_in_all": round(in_all, 3),
            "passes_in_all": passes,
            "gradients_in_all": int(rows.steps.iloc[-1]),
            "accuracy": "" if case.method == "passes" else round(float(rows.accuracy.iloc[-1]), 4),
            "staleness": round(stale, 1),
            "processor_seconds": round(spent, 1),
        }
    )


class Results:
    """The rows of runs.csv; what is in it is not run again."""

    def __init__(self, study: Study, folder: Path, examples: int) -> None:
        self._study, self._folder, self.examples, self.path = study, folder, examples, folder / "runs.csv"
        self.rows: dict[Case, dict[str, Any]] = {}
        if self.path.exists():
            with self.path.open() as file:
                for row in csv.DictReader(file):
                    values = {name: _read(value) for name, value in row.items()}
                    self.rows[Case(*(values[name] for name in Case._fields))] = values

    def run(self, case: Case) -> dict[str, Any]:
        """Return the row of a case, run now if it was not yet."""
        if case not in self.rows:
            row = measured(case, self._study, self._folder, self.examples)
            first = not self.path.exists()
            with self.path.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if first:
                    writer.writeheader()
                writer.writerow(row)
            print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
            self.rows[case] = row
        return self.rows[case]


def _read(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def tuned(results: Results, study: Study, method: str, at: int) -> float:
    """Return the rate that is soonest at the goal with `at` replicas, first seed; where none is, the one that comes closest."""
    tried = {case.rate: results.rows[case] for case in trials(study, method, at) if case in results.rows}
    if not tried:
        raise SystemExit(f"{results.path} has no rows of {method} with {at} replicas; without --show they are made.")
    return min(tried, key=lambda rate: (tried[rate]["seconds"] or np.inf, -tried[rate]["accuracy"]))


def trials(study: Study, method: str, at: int) -> list[Case]:
    return [Case(method, at, study.gigabits, rate, study.seeds[0]) for rate in dict(study.rates)[method]]


def cases(results: Results, study: Study) -> Iterator[Case]:
    """Yield all runs, what matters most first."""
    methods = [method for method, _ in study.rates]
    for seed in study.seeds:
        yield warm(seed)
    for at in study.tuned_at:
        for method in methods:
            yield from trials(study, method, at)
    best = {method: tuned(results, study, method, study.tuned_at[0]) for method in methods}
    for seed in study.seeds:
        for method, rate in best.items():
            for replicas in study.replicas:
                yield Case(method, replicas, study.gigabits, rate, seed)
            for at in study.tuned_at[1:]:
                yield Case(method, at, study.gigabits, tuned(results, study, method, at), seed)
        yield Case("Sandblaster", study.whole, study.gigabits, 0.0, seed)
    yield from timed(results.examples, study)
    for seed in study.seeds:
        for method, rate in best.items():
            yield from (Case(method, at, study.faster, rate, seed) for at in study.tuned_at)


def timed(examples: int, study: Study) -> Iterator[Case]:
    """Yield the runs that time passes of Sandblaster."""
    for one in study.passes:
        for replicas in study.batch_replicas:
            paper = one.longer * PAPER_MINIBATCH / MINIBATCH * examples
            portions = round(paper / one.pushed) if one.pushed else 2 * replicas
            yield Case("passes", replicas, one.gigabits, 0.0, study.seeds[0], paper / portions, portions, one.longer)


def main(words: Sequence[str] | None = None, study: Study | None = None) -> None:
    parser = argparse.ArgumentParser(description="Figure 5 of Dean et al. 2012 in simulated time.")
    parser.add_argument("recordings", nargs="?", type=Path, metavar="FOLDER", help="of spoken digits; default: made-up sounds")
    parser.add_argument("--out", type=Path, default=HERE, help="where runs.csv and the picture are (default: beside this file)")
    parser.add_argument("--show", action="store_true", help="run nothing: tables and picture of the rows that are there")
    options = parser.parse_args(words)
    study, data = study or Study(), options.out / "digits.h5"
    if not (options.show or data.exists()):
        prepare(options.recordings, data)
    results = Results(study, options.out, 0 if options.show else examples_of(data))
    if not options.show:
        for case in cases(results, study):
            results.run(case)
    rates = {at: {method: tuned(results, study, method, at) for method, _ in study.rates} for at in study.tuned_at}
    rows = list(results.rows.values())
    print(told(rows, rates, study))
    draw(rows, rates, study, options.out / "figure5.png")


def examples_of(data: Path) -> int:
    with h5py.File(data) as file:
        return len(file["train/y"])


if __name__ == "__main__":
    main()
