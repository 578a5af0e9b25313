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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from scipy.io import wavfile

import dbnet
from dbnet.data.file import write
from dbnet.network.cost import Profile

HERE = Path(__file__).parent
# The paper's speech network, and the minibatch that it does not say (as for Figure 3).
PAPER_SIZE, PAPER_MINIBATCH = 41_777_152, 100
# Figure 5: 4 machines a Downpour replica, 1 a Sandblaster replica, 256 for shards; four are 1.85 times as fast as one (Figure 3).
SHARD_MACHINES, CUT, CUT_SPEEDUP, CORES = 256, 4, 1.85, 20
COMPONENTS, HIDDEN, CLASSES, MINIBATCH, SHARDS = 60, 64, 30, 4, 4
SIZE = (COMPONENTS + 1) * HIDDEN + (HIDDEN + 1) * CLASSES
# A whole run, and one whose passes are timed.
BATCH = ("Sandblaster", "passes")
# Multiplications and additions of an example's gradient: the first layer has none of its inputs. The paper's is a small part.
WORK, PAPER_WORK = 4 * COMPONENTS * HIDDEN + 6 * HIDDEN * CLASSES, 6 * PAPER_SIZE
RULES = {"fixed rate": "sgd", "Adagrad": "adagrad"}


class Study(NamedTuple):
    """What is run.

    Attributes
    ----------
    goal, warm
        The accuracy that counts; steps of one replica that all begin from.
    replicas, rates, tuned_at
        Of Downpour; the rates that are tried, and with how many replicas: the best one is taken everywhere.
    gradients, steps
        Of all replicas, after which a run that has not reached the goal ends; steps that each makes at least.
    batch_replicas, iterations, few
        Of Sandblaster; iterations of a whole run; those by which the time of a pass is measured.
    whole
        Replicas of the whole runs: the first for each seed, the others for the first seed.
    gigabits, seeds
        Of the cards; of the runs.
    """

    goal: float = 0.5
    warm: int = 1000
    replicas: tuple[int, ...] = (10, 20, 100, 200)
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("fixed rate", (0.01, 0.02, 0.04)),
        ("Adagrad", (0.05, 0.1, 0.2)),
    )
    tuned_at: int = 100
    gradients: int = 16_000
    steps: int = 120
    whole: int = 20
    iterations: int = 200
    batch_replicas: tuple[int, ...] = (500, 1000, 2000, 5000)
    passes: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.0, 390.0), (10.0, 1.0))
    gigabits: float = 1.0
    seeds: tuple[int, ...] = (1, 2, 3)


class Case(NamedTuple):
    """One run, the key of its row."""

    method: str
    replicas: int
    gigabits: float
    rate: float
    seed: int
    # How many of the paper's examples take as long as one of ours.
    each: float = PAPER_MINIBATCH / MINIBATCH


# --- data ---------------------------------------------------------------------------------------------------------------------


def energies(sound: np.ndarray) -> np.ndarray:
    """Return the logarithms of 40 filter-bank energies, [frames, 40], of a sound of 8 kHz: 25 ms each, 10 ms apart."""
    mel = np.linspace(2595 * np.log10(1 + 60 / 700), 2595 * np.log10(1 + 4000 / 700), 42)
    edges, bins = 700 * (10 ** (mel / 2595) - 1), np.arange(129)[:, None] * 8000 / 256
    up, down = (bins - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - bins) / np.diff(edges)[1:]
    at = np.arange(0, len(sound) - 199, 80)[:, None] + np.arange(200)
    power = np.abs(np.fft.rfft(sound[at] * np.hamming(200), 256)) ** 2
    return np.log(power @ np.maximum(0, np.minimum(up, down)) + 1)


def examples(sounds: Sequence[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return 11 frames x 40 energies around every frame, and its class: the digit, and in which third of the sound it is."""
    x, y = [], []
    for digit, sound in sounds:
        own = energies(sound)
        around = np.clip(np.arange(len(own))[:, None] + np.arange(-5, 6), 0, len(own) - 1)
        x.append(own[around].reshape(len(own), -1).astype(np.float32))
        y.append(3 * digit + np.arange(len(own)) * 3 // len(own))
    return np.concatenate(x), np.concatenate(y)


def recordings(folder: Path) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return (digit, sound) of digit_speaker_index.wav; indices 0 to 4 are the official test set."""
    out: dict[str, list[tuple[int, np.ndarray]]] = {"train": [], "test": []}
    for path in sorted(folder.glob("*.wav")):
        digit, _, index = path.stem.split("_")
        out["test" if int(index) < 5 else "train"].append((int(digit), wavfile.read(path)[1].astype(float)))
    if not all(out.values()):
        raise SystemExit(f"'{folder}' holds no recordings like 0_george_5.wav for training and 0_george_0.wav for the test.")
    return out


def made_up(each: int) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Return sounds that stand in: ten pairs of tones that move, in noise."""
    generator, moments = np.random.default_rng(1), np.arange(3200) / 8000

    def sound(digit: int) -> np.ndarray:
        pitch = 300 * (1 + digit) * generator.normal(1, 0.05) * (1 + moments)
        return 1000 * np.sin(2 * np.pi * pitch * moments) + 300 * generator.standard_normal(moments.size)

    return {part: [(digit, sound(digit)) for digit in range(10) for _ in range(n)] for part, n in (("train", each), ("test", 2))}


def prepare(folder: Path | None, path: Path, each: int = 60) -> None:
    """Write the data file: the first principal components of the training set's examples, with the variances that they have."""
    sounds = recordings(folder) if folder else made_up(each)
    parts = {part: examples(some) for part, some in sounds.items()}
    x = parts["train"][0]
    mean, spread = x.mean(0), x.std(0)
    _, axes = np.linalg.eigh(np.cov(((x[::10] - mean) / spread).T))
    axes = axes[:, ::-1][:, :COMPONENTS] / spread[:, None]
    contents: dict[str, Any] = {"classes": CLASSES, "name": "spoken digits" if folder else "made-up sounds"}
    for part, (own, y) in parts.items():
        contents |= {f"{part}/x": ((own - mean) @ axes).astype(np.float32), f"{part}/y": y}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, contents)


# --- runs ---------------------------------------------------------------------------------------------------------------------


def machine(case: Case) -> Profile:
    """Return jobs/machines/cluster2012-*.toml for a network that is smaller: a step and its messages take as long as the paper's.

    GB/s are divided by how much larger its network is, GFLOP/s by how much more work its minibatch is. A Downpour
    replica is four machines: their speed together, four cards. Each of the shards stands for 64 machines, with their cards.
    """
    smaller, each, gigabits = PAPER_SIZE / SIZE, SHARD_MACHINES // SHARDS, case.gigabits
    together, faster, pause = (1, 1.0, 0.5) if case.method in BATCH else (CUT, CUT_SPEEDUP, 0.01)
    tables = {
        # Nobody waits for an evaluation.
        "compute": {
            "rate": 100 * faster * WORK / PAPER_WORK / case.each,
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
        # Times depend on how many portions there are, and on how long they take, alone: each is one example, which takes as long.
        tree["data"]["path"], tree["method"]["portion"], tree["method"]["minibatch"] = str(few(case, folder)), 1, 1
        return tree | {"evaluate": {"epochs": None, "train": 0}, "stop": {"iterations": 1}}
    return tree | {"stop": {"iterations": study.iterations, "accuracy": study.goal}}


def few(case: Case, folder: Path) -> Path:
    """Return a data file with as many examples as a timed pass has portions, made if it is not there."""
    path = folder / f"digits{2 * case.replicas}.h5"
    if not path.exists():
        with h5py.File(folder / "digits.h5") as file:
            contents: dict[str, Any] = {"classes": CLASSES}
            for part, most in (("train", 2 * case.replicas), ("test", 10)):
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
    began = resource.getrusage(resource.RUSAGE_SELF)
    done = dbnet.simulate(configuration(case, study, folder, examples), machine(case), quiet=True)
    if not done.outcome.finished:
        raise SystemExit("Interrupted; the runs that have ended are kept.")
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
        self._study, self._folder, self.examples, self._path = study, folder, examples, folder / "runs.csv"
        self.rows: dict[Case, dict[str, Any]] = {}
        if self._path.exists():
            with self._path.open() as file:
                for row in csv.DictReader(file):
                    values = {name: _read(value) for name, value in row.items()}
                    self.rows[Case(*(values[name] for name in Case._fields))] = values

    def run(self, case: Case) -> dict[str, Any]:
        """Return the row of a case, run now if it was not yet."""
        if case not in self.rows:
            row = measured(case, self._study, self._folder, self.examples)
            first = not self._path.exists()
            with self._path.open("a", newline="") as file:
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


def tuned(results: Results, study: Study, method: str) -> float:
    """Return the rate that is soonest at the goal, with the first seed and 1 Gb/s; where none is, the one that comes closest."""
    best = {
        rate: results.run(Case(method, study.tuned_at, study.gigabits, rate, study.seeds[0])) for rate in dict(study.rates)[method]
    }
    return min(best, key=lambda rate: (best[rate]["seconds"] or np.inf, -best[rate]["accuracy"]))


def cases(results: Results, study: Study) -> Iterator[Case]:
    """Yield all runs, what matters most first."""
    for seed in study.seeds:
        yield warm(seed)
    rates = {method: tuned(results, study, method) for method, _ in study.rates}
    for seed in study.seeds:
        for method, rate in rates.items():
            for replicas in study.replicas:
                yield Case(method, replicas, study.gigabits, rate, seed)
        yield Case("Sandblaster", study.whole, study.gigabits, 0.0, seed)
        if seed == study.seeds[0]:
            yield from timed(results.examples, study, study.passes[:1], study.batch_replicas[:-1])
    yield from timed(results.examples, study, study.passes, study.batch_replicas)


def timed(examples: int, study: Study, passes: Sequence[tuple[float, float]], counts: Sequence[int]) -> Iterator[Case]:
    """Yield the runs that time passes of Sandblaster with so many replicas."""
    for gigabits, longer in passes:
        for replicas in counts:
            each = longer * PAPER_MINIBATCH / MINIBATCH * examples / (2 * replicas)
            yield Case("passes", replicas, gigabits, 0.0, study.seeds[0], each)


# --- words and picture --------------------------------------------------------------------------------------------------------

# Dean et al. 2012, Figure 5, digitised: hours to 16 % by machines. The warmstart, 10.8 hours, is taken off.
PAPER = {
    "fixed rate": {296: 74, 336: 58, 656: 32, 1056: 33},
    "Adagrad": {296: 38, 336: 35, 656: 17, 1056: 16},
    "Sandblaster": {756: 56, 1256: 40, 2256: 27, 5256: 25},
}
PAPER_WARMSTART = 10.8
# Okabe and Ito's colours, which the colour-blind tell apart.
LOOKS = {"fixed rate": ("#D55E00", "s"), "Adagrad": ("#0072B2", "o"), "Sandblaster": ("#009E73", "^")}
NAMES = {"fixed rate": "Downpour, fixed rate", "Adagrad": "Downpour, Adagrad", "Sandblaster": "Sandblaster L-BFGS"}


class Point(NamedTuple):
    """Seconds to the goal of those seeds that reached it, and of how many."""

    replicas: int
    machines: int
    seconds: tuple[float, ...]
    seeds: int

    @property
    def middle(self) -> float:
        """The median; of none, or where half of the seeds did not reach it, infinity."""
        return float(np.median([*self.seconds, *[np.inf] * (self.seeds - len(self.seconds))]))


def points(rows: Sequence[dict[str, Any]], rates: dict[str, float]) -> dict[str, list[Point]]:
    """Return what is drawn of each method."""
    out: dict[str, list[Point]] = {}
    for method, rate in rates.items():
        own = [row for row in rows if row["method"] == method and row["rate"] == rate]
        for n in sorted({row["replicas"] for row in own}):
            found = [row["seconds"] for row in own if row["replicas"] == n]
            reached = tuple(float(one) for one in found if one != "")
            out.setdefault(method, []).append(Point(n, CUT * n + SHARD_MACHINES, reached, len(found)))
    needed = [row["passes"] for row in rows if row["method"] == "Sandblaster" and row["passes"] != ""]
    for n, seconds in pass_seconds(rows, 1.0, 1.0).items():
        out.setdefault("Sandblaster", []).append(Point(n, n + SHARD_MACHINES, tuple(p * seconds for p in needed), len(needed)))
    return out


def pass_seconds(rows: Sequence[dict[str, Any]], gigabits: float, longer: float) -> dict[int, float]:
    """Return the seconds of a timed pass by replicas."""
    own = [row for row in rows if row["method"] == "passes" and row["gigabits"] == gigabits]
    least = {
        n: min(row["each"] for row in rows if row["method"] == "passes" and row["replicas"] == n)
        for n in {r["replicas"] for r in own}
    }
    return {
        row["replicas"]: row["seconds_in_all"] / row["passes_in_all"]
        for row in sorted(own, key=lambda row: row["replicas"])
        if round(row["each"] / least[row["replicas"]]) == longer
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def told(rows: Sequence[dict[str, Any]], rates: dict[str, float], study: Study) -> str:
    """Return the tables of README.md."""
    parts, found = [], points(rows, rates)
    head = [
        "method",
        "replicas",
        "machines",
        f"seconds to {study.goal:.0%}",
        "reached",
        "gradients",
        "gradients a second",
        "staleness",
    ]
    lines = []
    for method, own in found.items():
        for point in own:
            span = f"{point.middle:.0f} ({min(point.seconds):.0f} to {max(point.seconds):.0f})" if point.seconds else "never"
            line = [NAMES[method], str(point.replicas), str(point.machines), span, f"{len(point.seconds)} of {point.seeds}"]
            mine = [
                row
                for row in rows
                if row["method"] == method and row["replicas"] == point.replicas and row["rate"] == rates.get(method)
            ]
            if mine:
                at = [row["gradients"] for row in mine if row["gradients"] != ""]
                speed = np.median([row["gradients_in_all"] / row["seconds_in_all"] for row in mine])
                line += [
                    f"{np.median(at):,.0f}" if at else "-",
                    f"{speed:.0f}",
                    f"{np.median([row['staleness'] for row in mine]):.0f}",
                ]
            lines.append(line + ["-"] * (len(head) - len(line)))
    parts.append(table(head, lines))
    tried = [row for row in rows if row["replicas"] == study.tuned_at and row["seed"] == study.seeds[0] and row["method"] in RULES]
    shown = [[NAMES[r["method"]], f"{r['rate']:g}", str(r["seconds"] or "never"), f"{r['accuracy']:.3f}"] for r in tried]
    parts.append(table(["tried", "rate", f"seconds to {study.goal:.0%}, {study.tuned_at} replicas", "last accuracy"], shown))
    head = ["seconds of a pass", *map(str, study.batch_replicas)]
    lines = []
    for gigabits, longer in study.passes:
        seconds = pass_seconds(rows, gigabits, longer)
        lines.append([curve(gigabits, longer), *(f"{seconds[n]:.1f}" if n in seconds else "not run" for n in study.batch_replicas)])
    parts.append(table(head, lines))
    needed = [f"{row['passes']} (seed {row['seed']})" for row in rows if row["method"] == "Sandblaster"]
    return "\n\n".join([*parts, f"Passes of L-BFGS to {study.goal:.0%}: {', '.join(needed)}."])


def curve(gigabits: float, longer: float) -> str:
    return f"{gigabits:g} Gb/s" + (f", examples {longer:g} times as long" if longer != 1 else "")


def draw(rows: Sequence[dict[str, Any]], rates: dict[str, float], study: Study, path: Path) -> None:
    """Draw the times to the goal, the paper's, and those of passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (ours, theirs, passes) = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for method, own in points(rows, rates).items():
        colour, mark = LOOKS[method]
        some = [point for point in own if point.seconds]
        middle = np.array([np.median(point.seconds) for point in some])
        spread = [middle - [min(p.seconds) for p in some], [max(p.seconds) for p in some] - middle]
        ours.errorbar([p.machines for p in some], middle, spread, color=colour, marker=mark, capsize=3, label=NAMES[method])
        for point in own:
            missed = point.seeds - len(point.seconds)
            if missed:
                ours.plot(
                    point.machines, 0.96, mark, color=colour, mfc="none", ms=9, transform=ours.get_xaxis_transform(), clip_on=False
                )
                words = f"{missed} of {point.seeds}"
                ours.annotate(
                    words, (point.machines, 0.91), xycoords=ours.get_xaxis_transform(), ha="center", fontsize=7, color=colour
                )
        hours = [value - PAPER_WARMSTART for value in PAPER[method].values()]
        theirs.plot(list(PAPER[method]), hours, color=colour, marker=mark, label=NAMES[method])
    ours.set(title="here, 1 Gb/s; hollow: did not get there", ylabel=f"virtual seconds to {study.goal:.0%}")
    theirs.set(title="Dean et al. 2012, Figure 5", ylabel="hours to 16 %")
    for panel in (ours, theirs):
        panel.set(xlabel="machines", xscale="log", yscale="log")
        panel.set_xticks([300, 500, 1000, 2000, 5000], ["300", "500", "1,000", "2,000", "5,000"])
        panel.legend(fontsize=8)
    theirs.set_yticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    ours.set_yticks([20, 50, 100, 200, 500, 1000], ["20", "50", "100", "200", "500", "1,000"])
    for (gigabits, longer), colour, mark in zip(study.passes, ("#009E73", "#CC79A7", "#E69F00"), "^vD", strict=False):
        seconds = pass_seconds(rows, gigabits, longer)
        if not seconds:
            continue
        passes.plot(list(seconds), list(seconds.values()), color=colour, marker=mark, label=curve(gigabits, longer))
    passes.set(title="a pass of Sandblaster", xlabel="replicas", ylabel="virtual seconds", xscale="log", yscale="log")
    passes.set_yticks([10, 20, 50, 100, 200, 500, 1000], ["10", "20", "50", "100", "200", "500", "1,000"])
    passes.set_xticks(study.batch_replicas, [f"{n:,}" for n in study.batch_replicas])
    passes.legend(fontsize=8)
    for panel in (ours, theirs, passes):
        panel.set_xticks([], minor=True)
        panel.set_yticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.suptitle("Time after the warmstart")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


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
    rates = {method: tuned(results, study, method) for method, _ in study.rates}
    rows = list(results.rows.values())
    print(told(rows, rates, study))
    draw(rows, rates, study, options.out / "figure5.png")


def examples_of(data: Path) -> int:
    with h5py.File(data) as file:
        return len(file["train/y"])


if __name__ == "__main__":
    main()
