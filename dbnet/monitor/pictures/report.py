"""A report of runs as one page of HTML that needs nothing else: pictures are inlined as SVG, there is no script and no network.

What ran where, how it was set and what differs, what came out, pictures, how each replica did, what to look at (`advice`).
"""

from __future__ import annotations

import datetime
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dbnet.comm.topology import Topology
from dbnet.core.config import Config, described
from dbnet.core.files import writing
from dbnet.core.registry import Family
from dbnet.core.version import __version__
from dbnet.monitor.display import recent
from dbnet.monitor.inspect import busy_words, stale_lines
from dbnet.monitor.many.differences import differences, groups, settings, short, together
from dbnet.monitor.many.frames import Runs, scored, summary
from dbnet.monitor.pictures.figure import compose, errors, saved, usual
from dbnet.monitor.results import Run, lateness
from dbnet.monitor.tables import PROGRESS

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:76rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.3rem 0}
h2{font-size:1.15rem;margin:2rem 0 .6rem;border-bottom:1px solid #d5dae0}
h3{font-size:1rem;margin:1rem 0 .3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
th,td{padding:.25rem .7rem .25rem 0;text-align:left;vertical-align:top}
th{color:#57606a;font-weight:600}td.n,th.n{text-align:right;padding-left:.7rem}
tr+tr td{border-top:1px solid #eaedf0}
.pictures{display:grid;
grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:.8rem}
.pictures svg{width:100%;height:auto;display:block}ul.advice{padding-left:1.1rem}ul.advice li{margin:.35rem 0}
pre{overflow-x:auto;background:#f5f7f9;padding:.7rem;font-size:.82rem}code{font-size:.9em;overflow-wrap:anywhere}summary{cursor:pointer}.dim{color:#57606a}
"""
# Names of classes that are listed.
_CLASSES = 40
# A replica is slow, a wait long, a shard busy or behind, a loss risen beyond these.
_SLOW, _WAITED, _BUSY, _BEHIND, _RISEN = 2.0, 0.2, 0.7, 2.0, 1.3


def report(paths: Sequence[Path], out: str | Path, against: str | None = None) -> None:
    """Write the report of these runs.

    Parameters
    ----------
    paths
        Run files.
    out
        The page to write.
    against
        What the curves are drawn against; default: seconds, of runs in one process epochs.

    Raises
    ------
    UserError
        A run file cannot be read, or the page not written.
    """
    runs = [Run(path) for path in paths]
    table = Runs(paths)
    name = table.names[0] if len(runs) == 1 else f"{len(runs)} runs"
    known = all(len(run.evaluation) for run in runs)
    against = against or ("epochs" if known and any(run.here for run in runs) else "seconds")
    parts = [_advice(table.names, runs), _results(table), _pictures(runs, against), _replicas(table.names, runs)]
    parts += [_settings(table, runs), _where(table.names, runs)]
    now = datetime.datetime.now(datetime.UTC).isoformat(" ", timespec="minutes")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{escape(name)}</h1><p class="dim">dbnet {__version__}, written {now[:16]} UTC</p>{"".join(parts)}</body></html>\n'
    )
    with writing(Path(out)) as part:
        part.write_text(page, encoding="utf-8")


def advice(run: Run) -> list[str]:
    """Return what is to be looked at in a run, each with what may be done about it, in sentences."""
    return [*_end(run), *_speeds(run), *_shards(run), *_late(run), *_losses(run)]


def _end(run: Run) -> list[str]:
    out = []
    if run.ended == "broken off":
        out.append(
            "The run broke off: it was killed, or gave up. 'dbnet train RUN.toml --resume auto' goes on from its newest checkpoint."
        )
    for row in run.lost.itertuples():
        out.append(
            f"Replica {row.replica} was lost at {row.seconds:.1f} s; {row.applied} of its {row.steps} gradients were applied. "
            "With topology.spares = 1 another one takes such a place."
        )
    if len(run.refused):
        pushes = run.refused.drop_duplicates(["replica", "push"])
        first = pushes.iloc[0]
        out.append(
            f"{len(pushes)} pushes held NaN or Inf and were refused, first replica {first.replica}'s at its step {first.step}: "
            "look for a bad example, or lower rule.rate."
        )
    return out


def _speeds(run: Run) -> list[str]:
    """Return what is to be said of slow replicas and of waiting."""
    out = []
    rows = run.progress.to_records(index=False).astype(PROGRESS)
    speeds = recent(rows, float("inf"))
    for one in speeds:
        others = sorted(other.rate for other in speeds if other is not one)
        usual = others[len(others) // 2] if others else 0.0
        if one.rate > 0 and usual > _SLOW * one.rate:
            out.append(
                f"Replica {one.replica} was {usual / one.rate:.1f} times slower than the others ({one.rate:,.0f} against "
                f"{usual:,.0f} examples per second): look at its host and at how many ranks share its cores."
            )
    waits = [one.waited for one in speeds if one.waited == one.waited]
    if waits and (mean := sum(waits) / len(waits)) > _WAITED and run.config.method.kind == "downpour":
        out.append(
            f"Replicas waited {100 * mean:.0f} % of their time for shards: take more shards, or fewer messages (method.n_push and "
            "method.n_fetch, or method.overlap = true)."
        )
    return out


def _shards(run: Run) -> list[str]:
    """Return what is to be said of shards that hardly keep up."""
    busy = run.occupancy
    found = [shard for shard, share in enumerate(busy) if share > _BUSY]
    if not found:
        return []
    most, others = max(found, key=lambda shard: busy[shard]), len(found) - 1
    more = f", and {others} more above {100 * _BUSY:.0f} %" if others else ""
    return [
        f"Shard {most} is the bottleneck: {100 * busy[most]:.0f} % busy{more}. Take more shards (topology.shards), or fewer pushes "
        "(method.n_push)."
    ]


def _late(run: Run) -> list[str]:
    """Return what is to be said of staleness."""
    counts, out, method = run.staleness.to_numpy().T, [], run.config.method
    total, replicas = lateness(counts.sum(axis=0)), run.config.topology.replicas
    slots = getattr(method, "slots", 0) or 8
    if replicas > 1 and total.updates and total.mean > 0.8 * replicas * slots:
        out.append(
            f"Staleness is {total.mean:.0f} on average with {replicas} replicas: the rings are full ({slots} slots each). "
            "Take more shards, or fewer slots (method.slots)."
        )
    means = [(lateness(row).mean, shard) for shard, row in enumerate(counts) if row.sum()]
    if len(means) > 1:
        (most, shard), rest = max(means), sorted(mean for mean, _ in means)[:-1]
        usual = rest[len(rest) // 2]
        if most > _BEHIND * usual + 1:
            out.append(f"Shard {shard} is behind the others: staleness {most:.1f} against {usual:.1f}; look at its host.")
    return out


def _losses(run: Run) -> list[str]:
    losses = run.evaluation.loss.dropna()
    if len(losses) > 2 and losses.iloc[-1] > _RISEN * losses.min() and losses.idxmin() != losses.index[0]:
        best = run.evaluation.loc[losses.idxmin()]
        return [
            f"The {run.part} loss was least at epoch {best.epochs:.1f} ({losses.min():.4f}) and rose to {losses.iloc[-1]:.4f}: "
            "stop earlier (stop.epochs), or add model.decay or dropout."
        ]
    if len(losses) > 2 and losses.idxmin() == losses.index[0]:
        return [f"The {run.part} loss never fell below that of the first evaluation: lower rule.rate, or look at the data."]
    return []


def changed(config: Config) -> dict[str, Any]:
    """Return the keys whose values are not the defaults; of a member of another kind all that are not its class's defaults."""
    tree, out = json.loads(config.text()), {}
    for key, value in settings(config).items():
        *tables, last = key.split(".")
        model = described(tree, tables)
        field = None if model is None else model.model_fields.get(last)
        # What is within a list that is an option has no default of its own.
        mark = Family.of(described(tree, tables[:-1]), tables[-1]) if last == "kind" else None
        if mark is not None and mark.default == value:
            continue
        known = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
        if value is not None and (field is None or value != known):
            out[key] = value
    return out


def _cells(rows: Iterable[Sequence[Any]], head: Sequence[str], numbers: Iterable[int] = ()) -> str:
    """Return a table; `numbers` are the columns that are set to the right."""
    right = set(numbers)
    mark = [' class="n"' if i in right else "" for i in range(len(head))]
    lines = ["<tr>" + "".join(f"<th{m}>{escape(cell)}</th>" for m, cell in zip(mark, head, strict=True)) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td{m}>{escape(str(c))}</td>" for m, c in zip(mark, row, strict=True)) + "</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if value == value else "-"


def _advice(names: Sequence[str], runs: Sequence[Run]) -> str:
    said = [(f"{name}: " if len(runs) > 1 else "") + text for name, run in zip(names, runs, strict=True) for text in advice(run)]
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return "<h2>What to look at</h2>" + (f'<ul class="advice">{items}</ul>' if said else "<p>Nothing stands out.</p>")


def _results(table: Runs) -> str:
    """Return the results of each run, and of runs that repeat one another mean and spread."""
    name, part = short(table.keys), " or ".join(sorted({run.part for run in table.few}))
    columns = {**scored(table), "loss": ".4g", "seconds": ",.1f", "epochs": ",.1f", "staleness": ".2f"}
    words = {"accuracy": f"{part} accuracy", "loss": f"{part} loss"}
    titles = [words.get(key, key.replace("_", " ")) for key in columns]
    head = ["run", *(name[key] for key in table.keys), *titles, "ended"]
    rows = [
        (row["run"], *(values.get(key, "") for key in table.keys), *(_number(row[key], form) for key, form in columns.items()),
         row["ended"])
        for row, values in zip(table.table.to_dict("records"), table.varied, strict=True)
    ]  # fmt: skip
    first, judged = 1 + len(table.keys), next(iter(columns))
    out = "<h2>Results</h2>" + _cells(rows, head, range(first, first + len(columns)))
    found = groups([Run(path, ["evaluation"]) for path in table.paths])
    if any(len(group.runs) > 1 or group.copies for group in found):
        rows = []
        for group in found:
            last = [summary(run)[judged] for run in group.runs]
            mean = sum(last) / len(last)
            spread = (sum((x - mean) ** 2 for x in last) / (len(last) - 1)) ** 0.5 if len(last) > 1 else float("nan")
            numbers = (_number(value, columns[judged]) for value in (mean, spread, min(last), max(last)))
            rows.append((group.label, len(last), group.seeds, *numbers))
        head = ["runs that differ in the seed alone", "runs", "seeds", f"{titles[0]}, mean", "standard deviation", "least", "most"]
        out += "<h3>Repetitions</h3>" + _cells(rows, head, range(1, 7))
        if copies := sum(group.copies for group in found):
            out += f"<p>{copies} of the runs came out as another one of the same seed, to the bit: they count once.</p>"
    return out + _classes(table)


def _classes(table: Runs) -> str:
    """Return the names of the classes, and how to see how each run does with them, which no run file holds."""
    known = [run for run in table.few if run.accuracy == run.accuracy]
    if not known:
        return ""
    names = list(dict.fromkeys(name for run in known for name in run.about.get("class_names", [])))
    some = ", ".join(names[:_CLASSES]) + (f", ... ({len(names)})" if len(names) > _CLASSES else "")
    point = known[0].path.with_name(known[0].path.name.removesuffix(".h5") + ".checkpoint.h5")
    command = shlex.join(["dbnet", "evaluate", str(point), "--part", known[0].part, "--by-class"])
    said = f"<p>Classes: {escape(some)}.</p>" if some else ""
    return f"<h3>Class by class</h3>{said}<p><code>{escape(command)}</code> prints the accuracy of each class.</p>"


def _pictures(runs: Sequence[Run], against: str) -> str:
    """Return the pictures that have something to show, each an SVG of its own, so that they fit any width."""
    names = [*([] if "accuracy" not in usual(runs) else ["accuracy"]), "loss", *errors(runs), "throughput", "waiting"]
    names += ["gradient", "passes"] if any(len(run.iterations) for run in runs) else []
    names += ["staleness", "lateness"] if any(len(run.staleness) > 1 for run in runs) else []
    if all(not run.progress.waited.any() for run in runs):
        names.remove("waiting")
    shown, out = groups(runs), []
    for name in names:
        file = io.BytesIO()
        saved(compose(shown, [name], against, titled=False), file, "svg")
        tag, rest = file.getvalue().decode().partition("<svg")[2].split(">", 1)
        # As wide as the page has room, not as a printed one.
        sizeless = re.sub(r'\s(width|height)="[^"]*"', "", tag)
        out.append(f"<svg{sizeless}>{rest}")
    turns = any(run.here for run in runs)
    note = "<p>Roles that took turns in one process: seconds and rates are not those of ranks side by side.</p>" if turns else ""
    return f'<h2>Pictures</h2>{note}<div class="pictures">{"".join(f"<div>{svg}</div>" for svg in out)}</div>'


def _replicas(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Return how fast each replica was, how long it waited, and how stale the updates were."""
    out = ["<h2>Replicas and shards</h2>"]
    for name, run in zip(names, runs, strict=True):
        last = run.progress.groupby("replica").last()
        rows = [
            (one.replica, f"{last.steps[one.replica]:,}", _number(one.rate, ",.0f"), _number(100 * one.waited, ".1f"),
             f"{last.bytes_pushed[one.replica] / 2**20:,.1f}", f"{last.bytes_fetched[one.replica] / 2**20:,.1f}")
            for one in recent(run.progress.to_records(index=False).astype(PROGRESS), float("inf"))
        ]  # fmt: skip
        head = ["replica", "steps", "examples per second", "waited [%]", "pushed [MiB]", "fetched [MiB]"]
        late = "\n".join(line.removeprefix("  ") for line in stale_lines(run.staleness.to_numpy().T))
        words = _cells(rows, head, range(1, 6)) + f"<p>{busy_words(run)}</p>" + f"<pre>{escape(late)}</pre>"
        out.append(words if len(runs) == 1 else f"<details><summary>{escape(name)}</summary>{words}</details>")
    return "".join(out)


def _settings(table: Runs, runs: Sequence[Run]) -> str:
    """Return what differs from the defaults, and the whole configuration."""
    out = ["<h2>Settings</h2>"]
    if len(runs) > 1:
        differ = differences([run.config for run in runs])
        keys = together(differ)
        rows = [(key, *(values.get(key, "") for values in differ)) for key in keys]
        out.append("<h3>What differs between the runs</h3>" + _cells(rows, ["key", *table.names]))
    own = [changed(run.config) for run in runs]
    same = {key: value for key, value in own[0].items() if all(values.get(key) == value for values in own)}
    title = "Not the defaults" + (", in all runs" if len(runs) > 1 else "")
    out.append(f"<h3>{title}</h3>" + _cells(same.items(), ["key", "value"]))
    for name, run in zip(table.names, runs, strict=True):
        text = escape(json.dumps(json.loads(run.config.text()), indent=1))
        out.append(f"<details><summary>All settings of {escape(name)}</summary><pre>{text}</pre></details>")
    return "".join(out)


def _where(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Return what ran where."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        about = run.about
        hosts = ", ".join(f"{host} ({n})" for host, n in Counter(about.get("hosts", [])).items())
        versions = ", ".join(f"{what} {version}" for what, version in about.get("versions", {}).items())
        ranks = Topology.of(run.config.topology).words()
        rows.append((name, about.get("started", ""), ranks, hosts, about.get("mpi", ""), about.get("revision", ""), versions))
    head = ["run", "started", "roles", "hosts (ranks)", "MPI", "revision", "versions"]
    return "<h2>What ran where</h2>" + _cells(rows, head)
