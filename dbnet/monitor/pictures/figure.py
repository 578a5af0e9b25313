"""Panels side by side in one file: a picture of a run, or of several that are compared."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dbnet.core.errors import UserError, nearest
from dbnet.core.files import writing
from dbnet.monitor.many.differences import Group, groups
from dbnet.monitor.pictures.against import AXES
from dbnet.monitor.pictures.panels import PANELS, fill, panel, plain
from dbnet.monitor.results import Run

FORMATS = ("png", "svg", "pdf")
_COLUMNS = 3
# Curves that the legend names.
_NAMED = 40
# Fixed, so that the same run gives the same file.
_STYLE = {"svg.hashsalt": "dbnet", "svg.fonttype": "none", "pdf.fonttype": 42, "font.size": 9, "axes.titlesize": 10}


def usual(runs: Iterable[Run]) -> list[str]:
    """Return what is drawn unless something else is asked for: a batch method has no staleness, values have no accuracy."""
    runs = list(runs)
    scores = [run.evaluation[["accuracy", "train_accuracy", "loss"]] for run in runs]
    values = any(score.loss.notna().any() for score in scores) and not any(
        score.accuracy.notna().any() or score.train_accuracy.notna().any() for score in scores
    )
    # The last one of its errors says most beside the loss: squared's first is its multiple.
    judged = errors(runs)[-1:] if values else ["accuracy"]
    return ["loss", *judged, "gradient" if all(len(run.iterations) for run in runs) else "staleness"]


def errors(runs: Iterable[Run]) -> list[str]:
    """Return what the losses of these runs say besides of vectors, columns of `evaluation`."""
    return list(dict.fromkeys(name for run in runs for name in run.errors))


def chosen(what: Sequence[str], runs: Iterable[Run]) -> list[str]:
    """Return the names of panels; UserError where there is no such panel."""
    known = [*PANELS, *errors(runs)]
    for name in what:
        if name not in known:
            raise UserError(f"There is no picture '{name}'{nearest(name, known)}; there are {', '.join(known)}.")
    return list(dict.fromkeys(what))


def form(path: str | Path) -> str:
    """Return the format that a picture's name asks for; UserError where it is none of the three."""
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in FORMATS:
        raise UserError(f"The picture's name '{path}' must end in .png, .svg or .pdf.")
    return ending


def draw(
    runs: Run | Sequence[Run],
    path: str | Path,
    what: Sequence[str] = (),
    against: str = "seconds",
    each: bool = False,
) -> None:
    """Write a picture of one run, or of several.

    Of one run all parts are shown: replicas, shards, test and training set. Of several the main curve of each; those that differ in
    nothing but the seed are one curve, their mean, within a band from the least to the largest.

    Parameters
    ----------
    path
        Ends in .png, .svg or .pdf.
    what
        Names of panels; default: loss, accuracy, and staleness or for batch methods the gradient.
    against
        seconds, steps, epochs, gradients or iterations.
    each
        Every run gets a curve of its own.

    Raises
    ------
    UserError
        Unknown panel or axis, `what` is in none of the runs, or the file cannot be written.
    """
    runs, ending = [runs] if isinstance(runs, Run) else list(runs), form(path)
    names = chosen(what, runs) or usual(runs)
    # What cannot be drawn is said before anything is written.
    for name in what:
        if not any(panel(name).curves(run) for run in runs):
            which = f"'{runs[0].path}' has" if len(runs) == 1 else "None of these runs has"
            raise UserError(f"{which} no {name} to draw: {panel(name).empty}; leave it out of --what.")
    made = compose(groups(runs, each), names, against)
    with writing(Path(path)) as part:
        saved(made, part, ending)


def saved(figure: Any, file: Any, ending: str) -> None:
    """Write a figure to a path or an open file; the same figure gives the same bytes."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        kept = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending)
        figure.savefig(file, format=ending, dpi=130, metadata=kept)


def compose(shown: Sequence[Group], names: Sequence[str], against: str, titled: bool = True) -> Any:
    """Return a figure with a panel for each of `names`; `titled`: of a single run with its name."""
    # Without pyplot, whose backend belongs to the notebook that calls this.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if against not in AXES:
        raise UserError(f"Nothing is drawn against '{against}'{nearest(against, list(AXES))}; give {', '.join(AXES)}.")
    columns = min(_COLUMNS, len(names))
    lines = -(-len(names) // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(0.4 + 4.1 * columns, 3.9 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, name in zip(panels, names, strict=False):
            fill(axes, panel(name), shown, against)
        for axes in panels[len(names) :]:
            axes.remove()
        _legends(figure, panels[: len(names)], shown, titled)
    return figure


def _legends(figure: Any, panels: Sequence[Any], shown: Sequence[Group], titled: bool) -> None:
    """Put legends below the curves: one for all panels where several runs are compared, else one for each panel."""
    if len(shown) > 1 or len(shown[0].runs) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        if len(labels) > _NAMED:
            handles, labels = handles[:_NAMED], [*labels[: _NAMED - 1], f"and {len(labels) - _NAMED + 1} more"]
        # A letter takes about 0.08 inches, line and gap 0.9; a line of the legend is 0.2 high.
        fit = max(1, min(len(labels), int(figure.get_figwidth() / (0.9 + 0.08 * max(map(len, labels), default=1)))))
        figure.set_figheight(figure.get_figheight() + 0.2 * (-(-len(labels) // fit) - 1))
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=fit, handlelength=3.5)
        return
    if titled:
        figure.suptitle(plain(shown[0].label), fontsize=11)
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            drop = -0.24 if "\n" in axes.get_xlabel() else -0.17
            axes.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, drop), frameon=False, fontsize=8, ncols=2)


def drawn(run_file: Path, picture: Path) -> str:
    """Draw a run; return the picture's path, or that there is none."""
    try:
        draw(Run(run_file), picture)
    except Exception as error:
        # The run is over and whole: no picture may make it a failed one.
        said = error if isinstance(error, UserError) else f"The picture cannot be drawn ({type(error).__name__}: {error})."
        print(f"dbnet: {' '.join(str(said).split())}", file=sys.stderr)
        return "could not be drawn"
    return str(picture)
