"""A run's lanes as one file for Perfetto's viewer: spans, flows from each push to its application, counters; and a table of times.

Clocks: the lanes of one host share a clock. That of another host was compared with the coordinator's when the run began, and what
was found stands in the lane; whatever the clocks drift apart after that is in the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dbnet.core.errors import UserError
from dbnet.core.files import writing
from dbnet.monitor.trace import perfetto
from dbnet.monitor.trace.lane import LaneFile

CATEGORIES = ("compute", "exchange", "fetch", "push", "apply", "evaluate", "checkpoint", "wait", "idle", "coordinate")
# What the number of a span of a category is, and what else is told of an update.
_NUMBERS = {"compute": "step", "push": "push", "apply": "push"}
_NOTES = {1: "step", 2: "push", 3: "staleness", 4: "replica", 5: "partition"}
_NOTE = {text: number for number, text in _NOTES.items()}
# Tracks of a rank: the rank itself, then its lanes and counters.
_TRACKS, _COUNTERS = 64, 32


class Nest(NamedTuple):
    """The spans of a lane as brackets.

    Attributes
    ----------
    order
        Spans in the order of what happens: i for a beginning, ~i for an end.
    ends, alone
        When each ends, at the latest with the one around it; how long it lasts without those within it, ns.
    """

    order: list[int]
    ends: np.ndarray
    alone: np.ndarray


def nest(spans: np.ndarray) -> Nest:
    """Return the order of beginnings and ends of a lane's spans."""
    begins, ends = spans["begin"].tolist(), spans["end"].tolist()
    alone = [0] * len(begins)
    order: list[int] = []
    around: list[int] = []
    # Of two that begin together the longer one is outside; of two alike the one that was written later.
    for i in np.lexsort((-np.arange(len(spans)), -spans["end"], spans["begin"])).tolist():
        while around and ends[around[-1]] <= begins[i]:
            order.append(~around.pop())
        if around:
            ends[i] = min(ends[i], ends[around[-1]])
            alone[around[-1]] -= ends[i] - begins[i]
        alone[i] += ends[i] - begins[i]
        order.append(i)
        around.append(i)
    order += [~i for i in reversed(around)]
    return Nest(order, np.array(ends, np.int64), np.array(alone, np.int64))


class TraceView:
    """A trace to show.

    Parameters
    ----------
    folder
        The lanes of a run.

    Attributes
    ----------
    lanes
        By rank, then by track.
    begin, end
        From the first span to the last, ns.
    seconds
        Of each rank, and of a thread of its own that moves data, by category: what is traced whole [0], and what is taken to be
        like the spans that there are [1]; without what lies within.
    flows, backward
        Pushes whose application is there; those that seem to be applied before they were sent.
    """

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        if not paths:
            raise UserError(f"There is no trace '{folder}'; train with --trace, or with record.trace = true.")
        self.lanes = [LaneFile(path) for path in paths]
        spans = [lane.spans for lane in self.lanes if len(lane.spans)]
        self.begin = min((int(some["begin"].min()) for some in spans), default=0)
        self.end = max((int(some["end"].max()) for some in spans), default=0)
        self.seconds: dict[str, np.ndarray] = {}
        self.flows = self.backward = 0
        texts = sorted({name for lane in self.lanes for name, _ in lane.names.values()})
        self._names = {text: number for number, text in enumerate(texts, start=1)}
        self._pushes = self._find("push", "origin")
        self._applies = self._find("apply", "shard")

    def _find(self, category: str, who: str) -> dict[int, np.ndarray]:
        """Return the pushes, or the whole ones that were applied, of each origin or shard, by number."""
        out = {}
        for lane in self.lanes:
            if who in lane.about and (mine := lane.spans[_of(lane, category)]).size:
                mine = mine[mine["staleness"] >= 0] if category == "apply" else mine
                out[lane.about[who]] = np.sort(mine, order=["origin", "number"])
        return out

    @property
    def clocks(self) -> str:
        """What was left out, and how the clocks were aligned; after `write` also whether the flows bear it out."""
        error = max(lane.about["error"] for lane in self.lanes)
        said = f"Clocks of the hosts aligned at the start, to {error / 1e3:.0f} us." if error else "One clock."
        if (steps := self.lanes[0].about["sampling"][0]) > 1:
            said = f"One step in {steps}. {said}"
        return said + f" {self.backward:,} flows seem to go back in time: the clocks drifted." * (self.backward > 0)

    @property
    def spans(self) -> int:
        return sum(len(lane.spans) for lane in self.lanes)

    def write(self, path: Path, force: bool) -> None:
        """Write the file for the viewer."""
        with writing(path, force) as part, open(part, "wb") as file:
            categories = dict(enumerate(CATEGORIES, start=1))
            file.write(perfetto.names({number: text for text, number in self._names.items()}, categories, _NOTES))
            for rank, lanes in self._by_rank().items():
                first = (rank + 1) * _TRACKS
                file.write(perfetto.process(first, rank + 1, lanes[0].about["name"]))
                for number, lane in enumerate(lanes, start=first + 1):
                    file.write(perfetto.track(number, first, lane.about["track"]))
                    file.writelines(self._spans(lane, number))
                    if "shard" in lane.about:
                        file.writelines(self._counters(lane, first))

    def _by_rank(self) -> dict[int, list[LaneFile]]:
        out: dict[int, list[LaneFile]] = {}
        for lane in self.lanes:
            out.setdefault(lane.about["rank"], []).append(lane)
        return out

    # --- spans and flows ------------------------------------------------------------------------------------------------------

    def _spans(self, lane: LaneFile, track: int) -> Iterator[bytes]:
        """Yield the events of a lane in their order."""
        nested, spans = nest(lane.spans), lane.spans
        self._account(lane, nested)
        ends = _rows(perfetto.events(perfetto.END, nested.ends - self.begin, track))
        begins: list[bytes] = [b""] * len(spans)
        categories = _categories(lane)
        for category in np.unique(categories).tolist():
            of = np.flatnonzero(categories == category)
            for chosen, options in self._kinds(lane, of, CATEGORIES[category - 1]):
                mine = spans[chosen]
                names = np.array([self._names[lane.names[n][0]] for n in lane.names])
                numbers = names[np.searchsorted(list(lane.names), mine["name"])]
                which = np.full(len(mine), category)
                made = perfetto.events(perfetto.BEGIN, mine["begin"] - self.begin, track, numbers, which, **options)
                for i, row in zip(chosen.tolist(), _rows(made), strict=True):
                    begins[i] = row
        yield from (begins[i] if i >= 0 else ends[~i] for i in nested.order)

    def _account(self, lane: LaneFile, nested: Nest) -> None:
        categories, (steps, fetches, pushes) = _categories(lane), lane.about["sampling"]
        sampled = {"compute": steps, "exchange": steps, "fetch": fetches, "push": pushes, "apply": pushes}
        times = np.array([0, *(sampled.get(category, 1) for category in CATEGORIES)])[categories]
        # What a batch method asks of a shard is never left out.
        times[lane.spans["number"] < 0] = np.where(categories == 1 + CATEGORIES.index("apply"), 1, times)[lane.spans["number"] < 0]
        # What was under way at the coordinator took nobody's time.
        if not lane.about.get("beside"):
            name = lane.about["name"] + (", transfers" if lane.about["track"] == "transfers" else "")
            spent = [
                np.bincount(categories, nested.alone * times * of, len(CATEGORIES) + 1)[1:] / 1e9 for of in (times == 1, times > 1)
            ]
            self.seconds[name] = np.array(spent)

    def _kinds(self, lane: LaneFile, of: np.ndarray, category: str) -> Iterator[tuple[np.ndarray, dict]]:
        """Yield spans of a category that are told alike, and what is told of them."""
        spans = lane.spans
        numbered = spans["number"][of] >= 0
        yield of[~numbered], {}
        of = of[numbered]
        notes = [(_NOTE[_NUMBERS.get(category, "step")], spans["number"][of])]
        if category == "push":
            yield from self._pushed(lane, of)
        elif category == "apply":
            yield from self._applied(lane, of)
        else:
            yield of, {"notes": notes}

    def _pushed(self, lane: LaneFile, of: np.ndarray) -> Iterator[tuple[np.ndarray, dict]]:
        origin, numbers = lane.about["origin"], lane.spans["number"][of]
        found = {}
        for shard, applied in self._applies.items():
            mine = applied[applied["origin"] == origin]
            there = np.isin(numbers, mine["number"])
            if there.any():
                found[shard] = there
                at = np.searchsorted(mine["number"], numbers[there])
                self.flows += int(there.sum())
                self.backward += int((mine["end"][at] < lane.spans["begin"][of][there]).sum())
        shards = list(found)
        masks = np.array([found[shard] for shard in shards], bool).reshape(len(shards), len(of))
        for mask in np.unique(masks, axis=1).T:
            chosen = np.flatnonzero((masks == mask[:, None]).all(axis=0))
            flows = [_flow(shard, origin, numbers[chosen]) for shard, there in zip(shards, mask, strict=True) if there]
            yield of[chosen], {"notes": [(_NOTE["push"], numbers[chosen])], "flows": flows}

    def _applied(self, lane: LaneFile, of: np.ndarray) -> Iterator[tuple[np.ndarray, dict]]:
        mine = lane.spans[of]
        whole = mine["staleness"] >= 0
        sent = np.zeros(len(of), bool)
        for origin in np.unique(mine["origin"]).tolist():
            if origin in self._pushes:
                sent |= (mine["origin"] == origin) & np.isin(mine["number"], self._pushes[origin]["number"])
        for chosen in (~whole, whole & sent, whole & ~sent):
            some = mine[chosen]
            partitions = lane.about["partitions"]
            notes = [
                (_NOTE["push"], some["number"]),
                (_NOTE["replica"], some["origin"] // partitions),
                (_NOTE["partition"], some["origin"] % partitions),
            ]
            if not len(some):
                continue
            if some["staleness"][0] >= 0:
                notes.append((_NOTE["staleness"], some["staleness"]))
            linked = sent[chosen][0] and some["staleness"][0] >= 0
            ends = [_flow(lane.about["shard"], some["origin"].astype(np.int64), some["number"])] if linked else []
            yield of[chosen], {"notes": notes, "ends": ends}

    # --- counters -------------------------------------------------------------------------------------------------------------

    def _counters(self, lane: LaneFile, first: int) -> Iterator[bytes]:
        """Yield a shard's counters: the staleness of each update, and the slices in its rings as far as it has looked."""
        spans = lane.spans[_of(lane, "apply")]
        whole = spans[spans["staleness"] >= 0]
        yield perfetto.track(first + _COUNTERS, first, "staleness", "updates")
        times = whole["end"] - self.begin
        yield perfetto.events(perfetto.COUNTER, times, first + _COUNTERS, value=whole["staleness"]).tobytes()
        looked = spans[spans["waiting"] >= 0]
        if len(looked):
            yield perfetto.track(first + _COUNTERS + 1, first, "slices in rings", "slices")
            times, values = _fill(looked)
            yield perfetto.events(perfetto.COUNTER, times - self.begin, first + _COUNTERS + 1, value=values).tobytes()


def _fill(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return times and the slices in all rings: of each ring what was there when a slice was last taken from it."""
    known: dict[int, int] = {}
    total, values = 0, []
    for origin, waiting in zip(spans["origin"].tolist(), spans["waiting"].tolist(), strict=True):
        total += waiting - known.get(origin, 0)
        values += [total, total - 1]
        known[origin] = waiting - 1
        total -= 1
    return np.stack([spans["begin"], spans["end"]], axis=1).ravel(), np.array(values, np.int64)


def _rows(made: np.ndarray) -> list[bytes]:
    blob, size = made.tobytes(), made.shape[1]
    return [blob[at : at + size] for at in range(0, len(blob), size)]


def _flow(shard: int, origin: np.ndarray | int, numbers: np.ndarray) -> np.ndarray:
    """Return the number of the flow of each push of an origin to a shard; nought is none."""
    wide = np.asarray(origin, np.uint64) << np.uint64(48)
    return wide + (np.uint64(shard) << np.uint64(34)) + numbers.astype(np.uint64) + np.uint64(1)


def _categories(lane: LaneFile) -> np.ndarray:
    """Return the numbers of the categories of a lane's spans, from 1."""
    numbers = np.zeros(max(lane.names) + 1, np.int64)
    for number, (_, category) in lane.names.items():
        numbers[number] = 1 + CATEGORIES.index(category)
    return numbers[lane.spans["name"]]


def _of(lane: LaneFile, category: str) -> np.ndarray:
    """Return which spans of a lane are of a category and have a number."""
    return (_categories(lane) == 1 + CATEGORIES.index(category)) & (lane.spans["number"] >= 0)


def table(timeline: TraceView) -> Iterable[str]:
    """Return lines that say what each rank spent its time on, in percent of the trace's length."""
    whole = max(1, timeline.end - timeline.begin) / 1e9
    shown = [i for i in range(len(CATEGORIES)) if any(mine[:, i].any() for mine in timeline.seconds.values())]
    yield f"{'of ' + format(whole, '.3g') + ' s, %':<28}" + "".join(
        f"{word:>11}" for word in (*(CATEGORIES[i] for i in shown), "other")
    )
    for name, mine in timeline.seconds.items():
        yield f"{name:<28}" + "".join(f"{share:>11.1f}" for share in shares(*mine[:, shown], whole))


def shares(known: np.ndarray, guessed: np.ndarray, whole: float) -> list[float]:
    """Return what parts are of the `whole` in percent, rounded so that they and the rest, which is the last, are 100.0.

    Parts of time that were `guessed` from a few spans can be no more than the others leave.
    """
    spent = known + guessed * min(1.0, max(0.0, whole - known.sum()) / max(guessed.sum(), 1e-12))
    tenths = 1000 * np.append(spent, max(0.0, whole - spent.sum())) / max(whole, spent.sum())
    out = np.floor(tenths)
    out[np.argsort(out - tenths, kind="stable")[: round(1000 - out.sum())]] += 1
    return (out / 10).tolist()
