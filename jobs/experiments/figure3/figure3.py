"""Figure 3 of Dean et al. (NIPS 2012) by the cost model: speed-up of one model over the machines that it is cut over.

    python jobs/experiments/figure3/figure3.py

prints the tables of README.md and draws figure3.png beside it. Free constants of cluster2012.toml are fitted to one curve of
curves.csv and tested on the others, for each choice of that one. Nothing is allocated: networks are shapes.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from dbnet.commands.plan.step import replica_step
from dbnet.core.registry import make
from dbnet.network.cost import Profile, load_profile
from dbnet.network.model import Model
from dbnet.network.partition import Cut

HERE = Path(__file__).parent
# The paper does not say; a smaller one makes a message's fixed costs weigh more, which are fitted.
MINIBATCH = 100
# Where, and between which bounds: GB/s, seconds, standard deviation over mean.
FREE = {("between", "bandwidth"): (0.005, 10.0), ("host", "call"): (1e-6, 0.1), ("noise", "variation"): (0.03, 2.0)}
# The speech curve falls from 2.23 at 8 machines to 0.95 at 16; what comes before that is fitted by itself, too.
BREAK = 8
Constants = tuple[float, ...]
Curve = list[tuple[int, float]]


# --- networks -----------------------------------------------------------------------------------------------------------------


def model_of(layers: Sequence[dict[str, Any]], shape: tuple[int, ...], loss: str) -> Model:
    """Return a network of these layers whose last one gives the outputs."""
    made = [make("network.layers", dict(entry), "layer") for entry in layers]
    output = shape
    for layer in made:
        output = layer.output_shape(output)
    return Model(made, make("network.losses", {"kind": loss}, "loss"), shape, int(np.prod(output)), "float32")


def speech() -> Model:
    """The paper's section 5: 11 frames x 40 energies -> 4 x 2560 sigmoid -> 8192 softmax, fully connected."""
    hidden = [{"kind": "dense", "units": 2560, "activation": "sigmoid"}] * 4
    return model_of([*hidden, {"kind": "dense", "units": 8192}], (440,), "softmax")


def images(maps: int, channels: int = 3, padded: bool = True) -> Model:
    """The paper's section 5: three stages of filters of 10 x 10, pooling, contrast normalisation, on 100 x 100 pixels.

    Pooling and normalisation over 5 x 5 and strides of 1 are Le et al.'s (ICML 2012); what is not known stands in README.md.
    """
    filters = {"kind": "local", "maps": maps, "field": 10}
    pool = {"kind": "pool", "over": "l2", "field": 5, "stride": 1, "padding": 2 if padded else 0}
    return model_of([filters, pool, {"kind": "norm", "radius": 2}] * 3, (100, 100, channels), "logistic")


NETWORKS = {"speech42M": speech, "images80M": lambda: images(8), "images330M": lambda: images(16), "images1_7B": lambda: images(36)}
NAMES = {"speech42M": "speech 42 M", "images80M": "images 80 M", "images330M": "images 330 M", "images1_7B": "images 1.7 B"}


# --- prediction and fit -------------------------------------------------------------------------------------------------------


def read_curves(path: Path, most: int) -> dict[str, Curve]:
    """Return (machines, speed-up) of every network's markers up to so many machines."""
    curves: dict[str, Curve] = {}
    with path.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            if int(row["machines"]) <= most:
                curves.setdefault(row["model"], []).append((int(row["machines"]), float(row["speedup"])))
    return curves


def with_constants(profile: Profile, constants: Constants) -> Profile:
    """Return the machine with other values of what is free."""
    tables = profile.model_dump()
    for (table, key), value in zip(FREE, constants, strict=True):
        tables[table][key] = value
    return Profile.model_validate(tables)


@cache
def cut_of(model: Model, machines: int) -> Cut:
    """Return the cut with the smallest predicted time as the machine file stands: fitting moves no border."""
    return Cut(model, machines, MINIBATCH, load_profile(HERE / "cluster2012.toml").machine(machines))


def speedups(model: Model, machines: Sequence[int], profile: Profile) -> np.ndarray:
    """Return the predicted speed-ups on so many machines, against one."""
    times = [replica_step(profile, cut_of(model, n)).total for n in (1, *machines)]
    return times[0] / np.array(times[1:])


def errors(model: Model, curve: Curve, profile: Profile) -> np.ndarray:
    """Return the logarithm of predicted over measured at every marker but that of one machine."""
    machines, measured = zip(*(point for point in curve if point[0] > 1), strict=True)
    return np.log(speedups(model, machines, profile) / np.array(measured))


def fit(model: Model, curve: Curve, profile: Profile) -> Constants:
    """Return the free constants with the least squares of `errors`."""
    low, high = np.log(list(FREE.values())).T

    def off(x: np.ndarray) -> np.ndarray:
        return errors(model, curve, with_constants(profile, tuple(np.exp(x))))

    starts = np.log([[0.125, 1e-5, 0.1], [0.1, 1e-4, 0.6], [0.3, 1e-3, 0.3]])
    found = [least_squares(off, start, bounds=(low, high), diff_step=1e-3) for start in starts]
    return tuple(float(value) for value in np.exp(min(found, key=lambda one: one.cost).x))


def typical(off: np.ndarray) -> float:
    """Return the root mean square of `errors` as a factor."""
    return float(np.exp(np.sqrt(np.mean(off**2))))


# --- words and picture --------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def told(models: Mapping[str, Model], curves: Mapping[str, Curve], machines: Mapping[str, Profile]) -> str:
    """Return all tables: constants and typical errors by what was fitted, then every curve point by point."""
    head = ["fitted on", "Gb/s", "us a message", "variation", *(NAMES[name] for name in curves), "largest speech speed-up"]
    rows, parts = [], []
    for label, profile in machines.items():
        free = [getattr(getattr(profile, table), key) for table, key in FREE]
        shown = [f"{8 * free[0]:.2f}", f"{1e6 * free[1]:.0f}", f"{free[2]:.2f}"]
        off = [f"{typical(errors(models[name], curve, profile)):.2f}" for name, curve in curves.items()]
        counts = [n for n, _ in curves["speech42M"]]
        best = speedups(models["speech42M"], counts, profile)
        rows.append([label, *shown, *off, f"{best.max():.2f} at {counts[int(best.argmax())]}"])
    parts.append(table(head, rows))
    for name, curve in curves.items():
        counts, measured = zip(*curve, strict=True)
        rows = [["measured", *(f"{value:.2f}" for value in measured)]]
        for label, profile in machines.items():
            predicted = speedups(models[name], counts, profile)
            rows.append([label, *(f"{value:.2f}" for value in predicted)])
        size = models[name].layout.size / 1e6
        parts.append(table([f"{NAMES[name]} (here {size:,.1f} M)", *map(str, counts)], rows))
    return "\n\n".join(parts)


def draw(models: Mapping[str, Model], curves: Mapping[str, Curve], machines: Mapping[str, Profile], path: Path) -> None:
    """Draw measured and predicted speed-ups, a panel a network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(13, 3.9), sharey=True, layout="constrained")
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        counts, measured = zip(*curve, strict=True)
        for i, (label, profile) in enumerate(machines.items()):
            own = label == NAMES[name]
            look = {"color": "0.5", "linestyle": ":"} if i == 0 else {"color": f"C{i - 1}", "linewidth": 2.5 if own else 1.2}
            panel.plot(counts, speedups(models[name], counts, profile), label=f"fitted on {label}" if i else label, **look)
        panel.plot(counts, measured, "ko", label="Dean et al. 2012")
        panel.set(title=NAMES[name], xlabel="machines", xscale="log", yscale="log")
        panel.set_xticks([1, 2, 4, 8, 16, 36, 64, 128], ["1", "2", "4", "8", "16", "36", "64", "128"])
        panel.set_xticks([], minor=True)
        panel.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        panel.set_yticks([], minor=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("speed-up of a step")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Figure 3 of Dean et al. 2012 by the cost model.")
    parser.add_argument(
        "--most", type=int, default=128, metavar="N", help="leave out markers of more machines (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, default=HERE / "figure3.png", help="where it is drawn (default: beside this file)")
    options = parser.parse_args(words)
    curves = read_curves(HERE / "curves.csv", options.most)
    models = {name: NETWORKS[name]() for name in curves}
    profile = load_profile(HERE / "cluster2012.toml")
    machines = {"as assumed": profile}
    for name, curve in curves.items():
        machines[NAMES[name]] = with_constants(profile, fit(models[name], curve, profile))
    before = [point for point in curves["speech42M"] if point[0] <= BREAK]
    machines[f"speech 42 M to {BREAK}"] = with_constants(profile, fit(models["speech42M"], before, profile))
    print(told(models, curves, machines))
    draw(models, curves, machines, options.picture)


if __name__ == "__main__":
    main()
