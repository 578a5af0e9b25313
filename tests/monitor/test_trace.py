"""A traced run read back with Perfetto's own protobufs: spans nest, flows lead from push to apply, counters are the run file's."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import Finished
from hypothesis import given
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace as Packets
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TracePacket, TrackEvent

from dbnet.comm.communicators import compare_clocks
from dbnet.comm.turns import IDLE, Turns, Wait
from dbnet.core.errors import UserError
from dbnet.monitor.results import Run
from dbnet.monitor.trace import attach, lane, perfetto, servers
from dbnet.monitor.trace.lane import HEAD, SPAN, Lane, LaneFile
from dbnet.monitor.trace.timeline import TraceView, nest, shares
from dbnet.run.simulated.simulate import simulate
from dbnet.run.train import execute

HOST = {"rank": 0, "name": "replica 0", "track": "replica", "host": "here", "offset": 0, "error": 0}
MACHINE = Path(__file__).resolve().parents[2] / "jobs" / "machines" / "stragglers.toml"


class Span:
    """A span as a viewer has it."""

    def __init__(self, name: str, packet: TracePacket, notes: dict[str, int]) -> None:
        self.name, self.begin, self.end, self.notes = name, packet.timestamp, -1, notes
        self.flows, self.ends = list(packet.track_event.flow_ids), list(packet.track_event.terminating_flow_ids)
        self.inner: list[str] = []


class Viewed:
    """A timeline as a viewer has it: tracks by (rank, track), spans that nest, counters, the ends of flows."""

    def __init__(self, path: Path) -> None:
        packets = Packets.FromString(path.read_bytes()).packet
        data = packets[0].interned_data
        names, notes = ({entry.iid: entry.name for entry in table} for table in (data.event_names, data.debug_annotation_names))
        tracks, ranks = {}, {}
        self.spans: dict[tuple[str, str], list[Span]] = defaultdict(list)
        self.counters: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        open_: dict[int, list[Span]] = defaultdict(list)
        for packet in packets[1:]:
            event, about = packet.track_event, packet.track_descriptor
            if packet.HasField("track_descriptor"):
                ranks[about.uuid] = about.process.process_name
                if about.parent_uuid:
                    tracks[about.uuid] = ranks[about.parent_uuid], about.name
                continue
            track = tracks[event.track_uuid]
            if event.type == TrackEvent.TYPE_COUNTER:
                self.counters[track].append((packet.timestamp, event.counter_value))
            elif event.type == TrackEvent.TYPE_SLICE_BEGIN:
                told = {notes[note.name_iid]: note.int_value for note in event.debug_annotations}
                span = Span(names[event.name_iid], packet, told)
                self.spans[track].append(span)
                for around in open_[event.track_uuid]:
                    around.inner.append(span.name)
                open_[event.track_uuid].append(span)
            else:
                span = open_[event.track_uuid].pop()
                span.end = packet.timestamp
                assert span.end >= span.begin
        assert not any(open_.values())

    def named(self, name: str) -> Iterator[Span]:
        return (span for spans in self.spans.values() for span in spans if span.name == name)


def traced(run_file: Path, *changes: str) -> tuple[Run, Viewed]:
    """Train in this process; return the run and its timeline."""
    path = execute(run_file, ["record={trace=true, steps=1}", "stop.epochs=1", *changes], quiet=True).run_file
    timeline, out = TraceView(path.with_suffix(".trace")), path.with_suffix(".pb")
    timeline.write(out, force=True)
    return Run(path), Viewed(out)


def test_shares_are_a_hundred_percent() -> None:
    third = np.full(3, 1 / 3)
    assert sorted(shares(third[:2], np.zeros(2), 1.0)) == [33.3, 33.3, 33.4]
    assert sum(shares(third, np.zeros(3), 1.0)) == pytest.approx(100)
    assert shares(np.array([0.25]), np.zeros(1), 2.0) == [12.5, 87.5]
    # What is guessed has no more room than the others leave; what is known and too long is the whole.
    assert shares(np.array([0.5, 0]), np.array([0, 0.75]), 1.0) == [50, 50, 0]
    assert shares(np.array([1.5, 0.5]), np.zeros(2), 1.0) == [75, 25, 0]


@pytest.mark.parametrize("shape", [[], ["topology.partitions=2", "method.slot=512", "method.slots=2", "method.n_push=2"]])
def test_a_timeline_says_what_the_run_file_says(shape: list[str], run_file: Path) -> None:
    run, viewed = traced(run_file, *shape)
    events = run.events
    # Each update is a flow from the push to its application, and a value of the counter.
    begins = {flow: span for span in viewed.named("push") for flow in span.flows}
    ends = {flow: span for span in viewed.named("apply") for flow in span.ends}
    assert set(begins) == set(ends) and len(ends) == len(events) > 100
    for flow, span in ends.items():
        assert span.notes["push"] == begins[flow].notes["push"] and span.end >= begins[flow].begin
    for shard, mine in events.groupby("shard"):
        found = viewed.counters[f"shard {shard}", "staleness"]
        assert [value for _, value in found] == (mine.applied - mine.fetched).tolist()
        spans = [span for span in viewed.spans[f"shard {shard}", "shard"] if span.ends]
        for name in ("replica", "partition", "push"):
            assert [span.notes[name] for span in spans] == mine[name].tolist()
    # A gradient holds the layers in their order.
    layers = ["forward 0.dense", "forward 1.dense", "loss", "loss gradient", "backward 1.dense", "backward 0.dense"]
    gradients = list(viewed.named("gradient"))
    assert len(gradients) == 72 * (1 + bool(shape))
    assert all(
        [name for name in span.inner if "up" not in name and "down" not in name] == layers for span in gradients if not shape
    )
    assert {span.name for track in viewed.spans for span in viewed.spans[track]} >= {
        "evaluate",
        "evaluation",
        "checkpoint",
    }
    if shape:
        assert gradients[5].inner[:4] == ["forward 0.dense", "send up 1.dense", "receive up 1.dense", "forward 1.dense"]
        fill = [value for _, value in viewed.counters["shard 0", "slices in rings"]]
        assert min(fill) == 0 and 1 <= max(fill) <= 8
        waits = {span.name for spans in viewed.spans.values() for span in spans if "to make room in its ring" in span.name}
        assert "replica 0 partition 0 waits for shard 0 to make room in its ring" in waits


def test_of_a_small_network_some_steps_are_left_out(run_file: Path) -> None:
    """Everybody leaves out the same ones, so each push that is there has its application; a fetch and a push count as all alike."""
    changes = ["record.steps=7", "method.n_push=2", "method.n_fetch=3", "run.name=seldom"]
    _, viewed = traced(run_file, *changes)
    for replica in ("replica 0", "replica 1"):
        found = {name: [s for s in viewed.spans[replica, "replica"] if s.name == name] for name in ("gradient", "fetch", "push")}
        assert [span.notes["step"] for span in found["gradient"]] == list(range(0, 36, 7))
        # Steps 0, 2, ... 34 push, and what is left in the end; 12 of them fetch.
        assert [span.notes["push"] for span in found["push"]] == list(range(0, 19, 3)) and len(found["fetch"]) == 6
    flows = [flow for span in viewed.named("push") for flow in span.flows]
    assert len(flows) == 2 * 2 * 7 and sorted(flows) == sorted(flow for span in viewed.named("apply") for flow in span.ends)
    path = execute(run_file, ["record.trace=true", "stop.steps=3"], quiet=True).run_file
    assert TraceView(path.with_suffix(".trace")).clocks.startswith("One step in ")


def test_a_traced_run_is_the_same_run(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; and of a run that is not traced nothing is touched."""
    run, _ = traced(run_file, "run.name=traced", "method.kind=sandblaster", "stop={iterations=3}")
    for module, name in ((attach, "worker"), (attach, "timed"), (servers, "server"), (servers, "coordinator"), (servers, "direct")):
        monkeypatch.delattr(module, name)
    plain = Run(execute(run_file, ["method.kind=sandblaster", "stop={iterations=3}"], quiet=True).run_file)
    assert plain.iterations.loss.tolist() == run.iterations.loss.tolist() and len(run.iterations) == 3
    assert not plain.path.with_suffix(".trace").exists()


def test_virtual_seconds(run_file: Path) -> None:
    """The steps that two replicas make at a time lie beside each other, and last what the machine says."""
    changes = ["record.trace=true", "stop.steps=9", "method.overlap=true"]
    done = simulate(run_file, MACHINE, changes, quiet=True)
    timeline = TraceView(done.outcome.run_file.with_suffix(".trace"))
    out = done.outcome.run_file.with_suffix(".pb")
    timeline.write(out, force=False)
    viewed = Viewed(out)
    mine, other = ([s for s in viewed.spans[f"replica {r}", "replica"] if s.name == "gradient"] for r in (0, 1))
    assert len(mine) == len(other) == 9
    assert sum(a.begin < b.end and b.begin < a.end for a in mine for b in other) >= 5
    assert all(span.end > span.begin for name in ("gradient", "fetch", "push", "apply") for span in viewed.named(name))
    assert mine[-1].end / 1e9 <= done.seconds
    # What moves data has a lane of its own.
    moved = [span for span in viewed.spans["replica 0", "transfers"] if span.name in ("fetch", "push")]
    assert [span.name for span in moved].count("push") == 9 and len(moved) == 9 + 8
    assert any(step.begin < span.end < step.end for span in moved for step in mine)


def test_the_command(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    assert dbnet("train", run_file, "--trace", "record.steps=1", "stop.steps=5", "--quiet").code == 0
    done = dbnet("trace", "out/run.h5", "--out", "trace.pb")
    assert done.code == 0 and done.out.endswith("20 flows from push to apply. One clock.\ntrace.pb\n"), done
    assert [line.split()[:2] for line in done.out.splitlines()[1:-2]][1:] == [
        ["shard", "0"],
        ["shard", "1"],
        ["replica", "0"],
        ["replica", "1"],
    ]
    assert len(list(Viewed(Path("trace.pb")).named("gradient"))) == 10
    again = dbnet("trace", "out/run.h5", "--out", "trace.pb")
    assert again.code == 2 and "--force" in again.err
    Path("out/run.trace/00003-replica").write_text("something else\n")
    assert "'out/run.trace/00003-replica' is no lane of a trace" in dbnet("trace", "out/run.h5").err
    assert dbnet("train", run_file, "run.name=plain", "stop.steps=5", "--quiet").code == 0
    none = dbnet("trace", "out/plain.h5")
    assert (
        none.code == 2
        and none.err == "dbnet: There is no trace 'out/plain.trace'; train with --trace, or with record.trace = true.\n"
    )


# --- lanes --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ticks() -> Callable[[], int]:
    return itertools.count().__next__


@pytest.mark.parametrize("spans", [7, 5000])
def test_the_newest_are_kept(spans: int, place: Path, ticks: Callable[[], int]) -> None:
    out = Lane(place / "lane", HOST, spans, ticks, print)
    name = out.name("step", "compute")
    for i in range(2 * spans + 3):
        out.add(name, i, i + 1, i)
    for _ in range(2):  # as it is left by who was killed, and closed
        read = LaneFile(place / "lane")
        assert read.spans["number"].tolist() == list(range(spans + 3, 2 * spans + 3))
        out.close()
    out.add(name, 1, 2)
    assert (place / "lane").stat().st_size == HEAD + spans * SPAN.itemsize


@pytest.mark.parametrize("known", [True, False])
def test_a_lane_grows_with_what_it_holds(
    known: bool, place: Path, ticks: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its blocks also where a disk cannot reserve any: a hole in it would kill its rank when that is full."""
    if not known:
        monkeypatch.setattr("dbnet.core.files._ALLOCATE", None)
    out = Lane(place / "lane", HOST, 1 << 20, ticks, print)
    name = out.name("step", "compute")
    for i in range(4000):
        if i in (0, 3999):
            assert HEAD + i * SPAN.itemsize < out._end <= (place / "lane").stat().st_blocks * 512 < 1 << 20
        out.add(name, i, i, i)
    out.close()
    assert (place / "lane").stat().st_size == HEAD + 4000 * SPAN.itemsize
    assert len(LaneFile(place / "lane").spans) == 4000


def test_on_a_full_disk_fewer_are_kept(place: Path, ticks: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    out = Lane(place / "lane", HOST, 1 << 20, ticks, said.append)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lane, "give_blocks", full)
    for i in range(10000):
        out.add(1, i, i, i)
    kept = LaneFile(place / "lane").spans["number"].tolist()
    assert said == [f"'{place}/lane' keeps no more than the newest {len(kept):,} spans: No space left on device."]
    assert kept == list(range(10000 - len(kept), 10000)) and len(kept) > 1000
    with pytest.raises(UserError, match="every rank must reach"):
        Lane(place / "other", HOST, 9, ticks, print)


def test_whoever_is_killed_leaves_what_had_ended(place: Path, ticks: Callable[[], int]) -> None:
    child = os.fork()
    if not child:
        out = Lane(place / "lane", HOST, 100, ticks, print)
        out.add(out.name("step", "compute"), 1, 2, 3)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    read = LaneFile(place / "lane")
    assert read.spans[["begin", "end", "number"]].tolist() == [(1, 2, 3)] and read.names[int(read.spans["name"][0])][0] == "step"


def test_a_wait_is_one_span_however_often_it_looks(place: Path) -> None:
    """So is a rest, but for one of less than 0.1 ms."""
    ticks = itertools.count(0, 50_000).__next__
    out = Lane(place / "lane", HOST, 100, ticks, print)

    def role() -> Turns[str]:
        yield IDLE
        yield IDLE
        yield None
        yield IDLE
        yield None
        yield Wait("it waits for a")
        yield Wait("it waits for a")
        yield Wait("it waits for b")
        out.add(out.name("work", "compute"), ticks(), ticks())
        yield Wait("it waits for b")
        return "over"

    turns, yielded = out.watch(role()), 0
    while True:
        try:
            next(turns)
            yielded += 1
        except StopIteration as end:
            assert end.value == "over" and yielded == 9
            break
    read = LaneFile(place / "lane")
    # Times: each resumption of a wait is a tick, and so is its beginning.
    told = [(read.names[span["name"]][0], int(span["begin"]) // 50_000, int(span["end"]) // 50_000) for span in read.spans]
    assert told == [
        ("idle", 0, 2), ("it waits for a", 5, 7), ("it waits for b", 8, 9), ("work", 10, 11), ("it waits for b", 12, 13),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=12))
def test_any_spans_become_brackets(pairs: list[tuple[int, int]]) -> None:
    spans = np.zeros(len(pairs), SPAN)
    spans["begin"] = [begin for begin, _ in pairs]
    spans["end"] = [begin + size for begin, size in pairs]
    spans = spans[np.argsort(spans["end"], kind="stable")]
    nested, around, time = nest(spans), [], 0
    for i in nested.order:
        at = spans["begin"][i] if i >= 0 else nested.ends[~i]
        assert at >= time
        time = at
        if i >= 0:
            around.append(i)
        else:
            assert around.pop() == ~i
    assert not around and sorted(i for i in nested.order if i >= 0) == list(range(len(spans)))
    assert (nested.alone >= 0).all()
    assert nested.alone.sum() == len({t for s, e in zip(spans["begin"], nested.ends, strict=True) for t in range(s, e)})


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(0, 2**31))
def test_padded_numbers_are_read_as_they_are(values: list[int], value: int) -> None:
    made = perfetto.events(perfetto.COUNTER, np.array(values), 2**35 - 1, value=np.full(len(values), value))
    read = Packets.FromString(made.tobytes()).packet
    assert [packet.timestamp for packet in read] == values
    assert {(packet.track_event.track_uuid, packet.track_event.counter_value) for packet in read} == {(2**35 - 1, value)}


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=16, max_size=16), st.integers(-(10**15), 10**15))
def test_clocks_are_compared_within_the_bound(ways: list[tuple[int, int]], offset: int) -> None:
    """However long an answer takes there and back."""
    time, trips = 0, iter(ways)

    def ask() -> int:
        nonlocal time
        there, back = next(trips)
        time += there
        answer = time + offset
        time += back
        return answer

    found, error = compare_clocks(ask, lambda: time)
    assert abs(found - offset) <= error <= 1 + min(there + back for there, back in ways) / 2 + 1
