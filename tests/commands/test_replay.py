"""A recorded run replays to the bit; where one event of the record is another, the replay says so and names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from finished import Finished
from records import recorded, rewrite

from dbnet import open_run
from dbnet.checkpoint.reader import Checkpoint
from dbnet.comm.turns import Turns, take_turns
from dbnet.commands.replay.outcome import Compared
from dbnet.commands.replay.shard import Reading, ReplayedShard
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.run.train import execute
from dbnet.shards.schedule import log, slices
from dbnet.shards.schedule.log import LogEntry, PartOfSchedule

RUNS = {
    "adagrad": ["topology.replicas=3", "evaluate.epochs=0.5"],
    "seldom": [
        "method.n_push=3",
        "method.wire=bfloat16",
        "method.n_fetch=2",
        "rule.schedule=cosine",
        "method.clip_norm=0.3",
        "checkpoint.steps=30",
    ],
    "adam-warmstart": ["rule={kind='adam', rate=0.01}", "method.n_push=2", "warmstart.steps=9", "topology.replicas=3"],
    "momentum": ["rule={kind='momentum', rate=0.02}", "model.dtype=float64", "method.n_fetch=4"],
    "sgd": ["method.kind=sgd", "rule={kind='sgd', rate=0.3}", "topology.replicas=1", "topology.shards=3"],
    "synchronous": ["method.kind=synchronous", "rule={kind='sgd', rate=0.3}", "checkpoint.steps=30"],
    "cut": ["topology.partitions=2", "method.slot=256", "method.n_push=2", "checkpoint.steps=30", "rule.schedule=linear"],
    "cut-synchronous": ["topology.partitions=2", "method={kind='synchronous', slot=256, clip_norm=0.5, wire='bfloat16'}"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_the_same_again(
    name: str, run_file: Path, dbnet: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slices of so small a network are not cut into pieces else.
    monkeypatch.setattr(slices, "SHORTEST", 150 if name in ("adagrad", "cut", "cut-synchronous") else slices.SHORTEST)
    path = recorded(run_file, *RUNS[name])
    run, done = open_run(path), dbnet("replay", path)
    checkpoints = len(list(path.with_suffix(".checkpoints").glob("??????.h5")))
    assert done.code == 0, done.out + done.err
    found = done.out.splitlines()[-1]
    assert found.startswith(f"identical: {len(run.events):,} updates, {len(run.evaluation)} evaluations, "), found
    assert int(found.split()[-2]) >= checkpoints > 0
    assert len(run.events) > 30
    entries = PartOfSchedule(path.with_suffix(".schedule") / "replica-0.0").entries
    orders = [entry.array("<i8")[1:].tolist() for entry in entries if entry.kind == log.ORDER]
    assert orders and all(one != other for one, other in pairwise(orders)), "an order is written down when it has changed"


def test_a_run_that_goes_on_from_a_checkpoint(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    first = execute(run_file, ["stop.epochs=1", "rule={kind='adam', rate=0.01}", "topology.replicas=3"], quiet=True)
    again = ["record.schedule=true", "stop.epochs=2", "rule={kind='adam', rate=0.01}"]
    path = execute(run_file, again, resume=str(first.checkpoint), quiet=True).run_file
    assert dbnet("replay", path).out.splitlines()[-1].startswith("identical: 144 updates")
    # A moment at which no replica has made a push: each is where it was, and all steps count, also those of the third.
    assert dbnet("replay", path, "--until", "0").code == 0
    same, point = Checkpoint(path.with_name("run-2-at-0.checkpoint.h5")), Checkpoint(first.checkpoint)
    made = ["steps", "examples", "pushes"]
    assert same.replicas[made].tolist() == [point.replica(r, 2)[made].tolist() for r in range(2)] and same.steps == point.steps
    # All is moved together; then the checkpoint stays behind.
    Path("out").rename("moved")
    assert dbnet("replay", "moved/run-2.h5").out.splitlines()[-1].startswith("identical: 144 updates")
    Path("moved/run.checkpoints").rename("elsewhere")
    gone = dbnet("replay", "moved/run-2.h5")
    assert gone.code == 2 and "which is not there; put it back, or its folder beside the run file." in gone.err, gone.err
    # Another one has its name.
    shutil.copytree("moved/run-2.checkpoints", "moved/run.checkpoints")
    other = dbnet("replay", "moved/run-2.h5")
    assert other.code == 2 and "has been written anew since" in other.err, other.err


def test_a_slice_is_changed_only_when_all_have_read_it_that_are_to() -> None:
    """One reads version 0, which comes late, and version 1."""
    found: list[tuple[str, float]] = []
    params, versions, piece = np.zeros(4), np.zeros(1, np.int64), slices.SlicePiece(0, 4, 0, 0)
    rule = make("shards.rules", {"kind": "sgd", "rate": 1.0}, "rule")
    parts = (Range(0, 4), rule, params, np.zeros(1, np.int64), lambda: 0.0, None, [piece], versions)
    shard = ReplayedShard(0, [np.array([0, 1])], *parts)

    def changes() -> Turns:
        for t in (1, 2):
            shard.apply(0, np.ones(4), t)
            found.append(("changed", params[0]))
        return
        yield

    def reads() -> Turns:
        for version in (0, 1):
            yield None
            shard.read(0, version, lambda: found.append(("read", params[0])), Reading(1))
        yield None

    take_turns([changes(), reads()])
    assert found == [("read", 0.0), ("changed", -1.0), ("read", -1.0), ("changed", -2.0)]


def test_a_checkpoint_counts_when_all_of_its_parts_do() -> None:
    compared = Compared(True, 2)
    for part, counted in (("000001.0.h5", 0), ("000002.1.h5", 0), ("000001.1.h5", 1)):
        compared.part(part)
        assert compared.words() == f"0 updates, 0 evaluations, {counted} checkpoint{'s' * (not counted)}"


def other_order(entries: list[LogEntry]) -> None:
    at = next(i for i, entry in enumerate(entries) if entry.kind == log.TAKES)
    takes = entries[at].array(log.TAKE).copy()
    k = next(k for k in range(10, len(takes)) if takes["origin"][k] != takes["origin"][k + 1])
    takes[[k, k + 1]] = takes[[k + 1, k]]
    entries[at] = LogEntry(log.TAKES, takes.tobytes())


def other_gradient(entries: list[LogEntry]) -> None:
    at = next(i for i, entry in enumerate(entries) if entry.kind == log.TAKES)
    takes = entries[at].array(log.TAKE).copy()
    takes["check"][20] ^= 1
    entries[at] = LogEntry(log.TAKES, takes.tobytes())


def other_version(entries: list[LogEntry]) -> None:
    fetches = [i for i, entry in enumerate(entries) if entry.kind == log.FETCH]
    versions = entries[fetches[8]].array("<i8").copy()
    versions[0] -= 2
    entries[fetches[8]] = LogEntry(log.FETCH, versions.tobytes())


def other_loss(entries: list[LogEntry], times: float = 1.0) -> None:
    at = next(i for i, entry in enumerate(entries) if entry.kind == log.EVALUATED)
    entries[at] = LogEntry(log.EVALUATED, np.nextafter(times * entries[at].array("<f8"), 9).tobytes())


def other_end(entries: list[LogEntry]) -> None:
    end = entries[-1].value
    entries[-1] = LogEntry(log.END, entries[-1].content.replace(end["digests"]["state.sum"].encode(), b"0" * 64))


def earlier_order(entries: list[LogEntry]) -> None:
    at = next(i for i, entry in enumerate(entries) if entry.kind == log.ORDER and i > 8)
    row = entries[at].array("<i8").copy()
    row[0] -= 1
    entries[at] = LogEntry(log.ORDER, row.tobytes())


def other_clock(entries: list[LogEntry]) -> None:
    end = entries[-1].value
    entries[-1] = LogEntry(log.END, json.dumps({**end, "clock": [end["clock"][0] + 1]}).encode())


def other_checkpoint(entries: list[LogEntry]) -> None:
    at = next(i for i, entry in enumerate(entries) if entry.kind == log.SAVED)
    saved = entries[at].value
    entries[at] = LogEntry(log.SAVED, json.dumps({**saved, "digests": {**saved["digests"], "params": "0" * 64}}).encode())


def other_push(entries: list[LogEntry]) -> None:
    at = [i for i, entry in enumerate(entries) if entry.kind == log.PUSH][5]
    numbers = entries[at].array("<i8").copy()
    numbers[2] += 1
    entries[at] = LogEntry(log.PUSH, numbers.tobytes())


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("shard-1", other_order, "shard 1, slice 0, push 5, replica 1, step 5: it was taken next, but cannot have been pushed"),
        ("shard-0", other_gradient, "shard 0, slice 0, push 10, replica 0, step 10: another gradient was pushed"),
        ("replica-1.0", other_version, "push 8, replica 1, step 8: another gradient"),
        ("replica-1.0", earlier_order, "replica 1: "),
        ("replica-0.0", other_loss, "replica 0: an evaluation gives "),
        ("shard-0", other_end, "the end: 'state.sum' of shard 0"),
        ("shard-0", other_clock, "the end: the clock of shard 0 is [72], recorded was [73]"),
        ("shard-1", other_checkpoint, "checkpoint 000001: 'params' of shard 1 is another"),
        (
            "replica-1.0",
            other_push,
            "push 5 with 1 gradients at step 5 comes where push 5 with 1 at step 6 was recorded",
        ),
    ],
)
def test_another_event_is_found_and_named(
    part: str, change: Callable, named: str, run_file: Path, dbnet: Callable[..., Finished]
) -> None:
    path = recorded(run_file, "evaluate.epochs=0.3")
    rewrite(path.with_suffix(".schedule") / part, lambda entries: None)
    assert dbnet("replay", path).code == 0
    rewrite(path.with_suffix(".schedule") / part, change)
    done = dbnet("replay", path)
    assert done.code == 1 and "identical" not in done.out.splitlines()[-1].split(":")[0]
    assert named in done.out, done.out


def test_another_rule_under_the_same_schedule(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file, "evaluate.epochs=0.5")
    same, other = dbnet("replay", path, "rule.rate=0.1"), dbnet("replay", path, "rule.kind=momentum", "rule.rate=0.01")
    for done in (same, other):
        assert done.code == 0 and "another rule under the same schedule: 144 updates" in done.out, done.out
    pairs = [[line.split()[-4:] for line in done.out.splitlines()[3:]] for done in (same, other)]
    assert all(row[:2] == row[2:] for row in pairs[0])
    assert len(pairs[1]) == 3 and pairs[1][-1][:2] != pairs[1][-1][2:] and pairs[1][0][:2] == pairs[1][0][2:]
    assert dbnet("replay", path, "rule={rate=0.1}").out.splitlines()[1:] == same.out.splitlines()[1:], "the usual kind"
    for word, said in (("method.n_push=3", "only the rule can be another one"), ("rule=3", "rule = 3 is not allowed")):
        refused = dbnet("replay", path, word)
        assert refused.code == 2 and said in refused.err, refused.err


def test_a_record_of_another_machine(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file)
    for part in path.with_suffix(".schedule").iterdir():
        rewrite(part, lambda entries: None, processor="Cray-1")
    near = dbnet("replay", path)
    assert near.code == 0 and "evaluations are equal to 1e-06: 144 updates" in near.out, near.out
    assert "recorded elsewhere: processor (Cray-1, here " in near.err
    rewrite(path.with_suffix(".schedule") / "replica-0.0", other_loss)
    assert dbnet("replay", path).code == 0, "one bit is not to be told from another machine's"
    rewrite(path.with_suffix(".schedule") / "replica-0.0", lambda entries: other_loss(entries, 1.001))
    far = dbnet("replay", path)
    assert far.code == 1 and "evaluations are not equal to 1e-06" in far.out


def test_other_data_are_found(run_file: Path, make_data: Callable[..., Path], dbnet: Callable[..., Finished]) -> None:
    data = make_data()
    layers = [
        "model.layers=[{kind='dense', units=2}]",
        f"data.path={data}",
        "method.minibatch=2",
        "stop.epochs=5",
        "evaluate.train=0",
    ]
    path = recorded(run_file, *layers)
    assert dbnet("replay", path).code == 0
    make_data(train__x=np.arange(24, dtype=np.float32).reshape(8, 3) / 23)
    assert "push 0, replica 0, step 0: another gradient" in dbnet("replay", path).out


def test_a_record_is_bounded_and_the_run_goes_on(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    changes = ["stop.epochs=9", "record.limit=12000"]
    bounded = dbnet("train", run_file, "--record", *changes)
    assert bounded.code == 0
    assert "recorded no further" in bounded.err and "the run goes on" in bounded.err
    path = Path("out/run.h5")
    assert all(part.stat().st_size < 4000 for part in path.with_suffix(".schedule").iterdir())
    done = dbnet("replay", path)
    updates = int(done.out.splitlines()[-1].split()[1].replace(",", ""))
    assert done.code == 0 and "the record ends before the run" in done.out
    assert 0 < updates < len(open_run(path).events)


def test_a_part_that_breaks_off_is_read_up_to_there(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file)
    for part in path.with_suffix(".schedule").glob("shard-*"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    done = dbnet("replay", path)
    assert done.code == 0 and "the record ends before the run did, which was killed" in done.out, done.out


def test_what_cannot_be_replayed_is_refused(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    plain = execute(run_file, ["stop.epochs=1"], quiet=True).run_file
    assert "was not recorded; train with --record" in dbnet("replay", plain).err
    assert not plain.with_suffix(".schedule").exists()
    path = recorded(run_file)
    (path.with_suffix(".schedule") / "shard-1").write_text("something else")
    assert "is no part of a recorded schedule" in dbnet("replay", path).err
    # Copied without one of its parts.
    for part in ("shard-1", "replica-1.0"):
        (path.with_suffix(".schedule") / part).unlink()
        done = dbnet("replay", path)
        assert done.code == 2 and f"No part '{path.with_suffix('.schedule') / part}'" in done.err, done.out + done.err
        before, path = path, recorded(run_file)
    shutil.copy(before.with_suffix(".schedule") / "shard-0", path.with_suffix(".schedule"))
    done = dbnet("replay", path)
    assert done.code == 2 and f"shard-0' is of another run than '{path}'" in done.err, done.out + done.err


def broken_off(share: float, entries: list[LogEntry]) -> None:
    """Keep this share of the slices that were taken, and what came before them."""
    left = int(share * sum(len(entry.array(log.TAKE)) for entry in entries if entry.kind == log.TAKES))
    for i, entry in enumerate(entries):
        if entry.kind == log.TAKES:
            takes = entry.array(log.TAKE)
            if len(takes) >= left:
                entries[i:] = [LogEntry(log.TAKES, takes[:left].tobytes())]
                return
            left -= len(takes)


@pytest.mark.parametrize("cut", [(0.6, 0.99), (0.9, 0.7), (0.7, 0.9)])
def test_shards_whose_parts_end_at_different_times(
    cut: tuple[float, float], run_file: Path, dbnet: Callable[..., Finished]
) -> None:
    """As after a kill: each flushes by its own clock."""
    path = recorded(run_file, "stop.epochs=6")
    for shard, share in enumerate(cut):
        rewrite(path.with_suffix(".schedule") / f"shard-{shard}", partial(broken_off, share))
    done = dbnet("replay", path)
    assert done.code == 0 and "the record ends before the run did" in done.out, done.out
    found = done.out.splitlines()[-1].split()
    assert found[0] == "identical:" and int(found[1]) > 100


def test_a_part_that_is_full_excuses_no_other_order(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file)

    def full(entries: list[LogEntry]) -> None:
        entries[-1] = LogEntry(log.FULL, b"")

    rewrite(path.with_suffix(".schedule") / "replica-1.0", full)
    assert dbnet("replay", path).code == 0
    rewrite(path.with_suffix(".schedule") / "shard-1", other_order)
    done = dbnet("replay", path)
    assert done.code == 1 and "different: shard 1, slice 0, push 5" in done.out, done.out


def test_a_damaged_record_gets_one_sentence(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file)
    part = path.with_suffix(".schedule") / "replica-0.0"

    def shorter(entries: list[LogEntry]) -> None:
        at = next(i for i, entry in enumerate(entries) if entry.kind == log.FETCH)
        entries[at] = LogEntry(log.FETCH, entries[at].content[:-1])

    rewrite(part, shorter)
    done = dbnet("replay", path)
    assert done.code == 2 and f"'{part}' is damaged" in done.err and done.err.count("\n") == 1
    with h5py.File(path, "r+") as file:
        file.attrs["schedule"] = json.dumps({"from": 3})
    done = dbnet("replay", path)
    assert done.code == 2 and "or its schedule is damaged" in done.err and done.err.count("\n") == 1


def test_replicas_of_unequal_threads_are_compared_nearly(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file)
    rewrite(path.with_suffix(".schedule") / "replica-1.0", lambda entries: None, threads=7)
    done = dbnet("replay", path)
    assert done.code == 0 and " and 7 threads" in done.err and "evaluations are equal to 1e-06" in done.out


def test_another_rule_that_leaves_all_numbers(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    done = dbnet("replay", recorded(run_file), "rule.kind=sgd", "rule.rate=1e38")
    assert done.code == 1 and "its numbers were out of bounds" in done.out and "different" not in done.out


def test_recording_changes_no_synchronous_run_whose_gradients_are_refused(run_file: Path, make_data: Callable[..., Path]) -> None:
    """The clock goes on where a whole step is refused, and no slice has changed."""
    x = np.ones((8, 3), np.float32)
    x[3] = 1e25
    changes = [
        f"data.path={make_data('bad.h5', train__x=x)}", "method={kind='synchronous', minibatch=2}", "topology.replicas=1",
        "topology.partitions=2", "topology.shards=1", "stop.epochs=6", "guard.refused=1000", "evaluate.train=0",
        "model.layers=[{kind='dense', units=2}]",
    ]  # fmt: skip
    for recording in ("false", "true"):
        run = open_run(execute(run_file, [*changes, f"record.schedule={recording}", f"run.name=r{recording}"], quiet=True).run_file)
        assert len(run.refused) > 3 and len(run.events) > 10
        assert (run.events.applied - run.events.fetched).tolist() == [0] * len(run.events), recording


def test_a_moment_is_a_checkpoint_to_go_on_from(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    """One replica's run, played up to the end of a step, goes on to the same bits as the run itself."""
    one = ["topology.replicas=1", "topology.shards=2", "rule={kind='adam', rate=0.01}", "method.slot=256", "topology.partitions=2"]
    path = recorded(run_file, *one, "run.name=one")
    made = dbnet("replay", path, "--until", "40")
    assert made.code == 0 and made.out.splitlines()[-1].startswith("identical: 40 updates, "), made.out + made.err
    point = path.with_name("one-at-40.checkpoint.h5")
    assert made.out.endswith(f"; {point}\n") and Checkpoint(point).steps == 10
    assert Checkpoint(point).replicas["pushes"].tolist() == [10]
    whole = execute(run_file, [*one, "stop.epochs=1", "run.name=on"], resume=str(point), quiet=True)
    assert np.array_equal(whole.params, held(path.with_suffix(".checkpoint.h5")))
    again = dbnet("replay", path, "--until", "40")
    assert again.code == 2 and "is there already" in again.err


def test_a_moment_within_a_synchronous_step(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    """Gradients that wait for the others' of their step are in no parameter, so they are made again."""
    one = ["method.kind=synchronous", "topology.replicas=3", "topology.shards=1", "model.dtype=float64"]
    path = recorded(run_file, *one)
    for until, steps in ((10, [3, 3, 3]), (11, [3, 3, 3]), (12, [4, 4, 4])):
        assert dbnet("replay", path, "--until", until).code == 0
        point = path.with_name(f"run-at-{until}.checkpoint.h5")
        assert Checkpoint(point).replicas["steps"].tolist() == steps
    on = execute(
        run_file, [*one, "stop.epochs=1", "run.name=on"], resume=str(path.with_name("run-at-11.checkpoint.h5")), quiet=True
    )
    np.testing.assert_allclose(on.params, held(path.with_suffix(".checkpoint.h5")), rtol=0, atol=1e-12)


def test_moments_by_update_and_by_second(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file, *RUNS["adagrad"])
    run = open_run(path)
    last, end = len(run.events), float(run.events.seconds.max())
    assert dbnet("replay", path, "--until", "31").code == 0
    point = Checkpoint(path.with_name(f"{path.stem}-at-31.checkpoint.h5"))
    assert point.seconds == run.events.seconds.sort_values().iloc[30] < end
    for until, updates in ((str(last), last), ("0.000001s", 0), (f"{end + 1:.3f}s", last)):
        done = dbnet("replay", path, "--until", until)
        assert done.code == 0 and f": {updates:,} update" in done.out.splitlines()[-1], done.out + done.err
    found = held(path.with_name(f"{path.stem}-at-{last}.checkpoint.h5"))
    assert np.array_equal(found, held(path.with_suffix(".checkpoint.h5")))
    # By a clock that was wrong one shard's updates come late: no other can be so far by then.
    with h5py.File(path, "r+") as file:
        rows = file["events"][:]
        rows["seconds"][rows["shard"] == 0] += 1000
        file["events"][...] = rows
    said = dbnet("replay", path, "--until", "30").out
    assert "within updates under way; all shards had the state after 1 of the 30 together." in said, said
    assert said.endswith(f"{path.stem}-at-1.checkpoint.h5\n")
    assert f"has {last:,} updates" in dbnet("replay", path, "--until", str(last + 1)).err
    assert "give a number of updates" in dbnet("replay", path, "--until", "soon").err


@pytest.mark.parametrize("partitions", [1, 2])
def test_one_gradient_again(partitions: int, run_file: Path, dbnet: Callable[..., Finished]) -> None:
    """The gradient of a step, by the rule applied to what a checkpoint holds: one replica, one update further."""
    words = ["topology.replicas=1", f"topology.partitions={partitions}", "rule={kind='sgd', rate=0.5}", "model.dtype=float64"]
    path = recorded(run_file, *words)
    assert dbnet("replay", path, "--gradient", "0", "7", "g.h5").code == 0
    shards = open_run(path).config.topology.shards
    for step in (7, 8):
        assert dbnet("replay", path, "--until", str(step * shards * partitions)).code == 0
    before, after = (held(path.with_name(f"{path.stem}-at-{n * shards * partitions}.checkpoint.h5")) for n in (7, 8))
    with h5py.File("g.h5") as file:
        w, g = (np.concatenate([file[group][name][()].ravel() for name in names(path)]) for group in ("parameters", "gradient"))
    assert np.array_equal(w, before) and np.abs(w - 0.5 * g - after).max() < 1e-15 and np.abs(g).max() > 1e-3
    for wrong, said in (("7", "g.h5' : that file exists"), ("100000", "makes no step 100000")):
        done = dbnet("replay", path, "--gradient", "0", wrong, "g.h5" if wrong == "7" else "h.h5")
        assert done.code == 2 and said.replace("' :", "':") in done.err, done.err
    assert not Path("h.h5").exists()


def held(path: Path) -> np.ndarray:
    """Return the parameters in a checkpoint."""
    with h5py.File(path) as file:
        return file["params"][:]


def names(path: Path) -> list[str]:
    """Return the names of a run's parameters, in the order of the flat vector."""
    return [name for name, *_ in Checkpoint(path.with_suffix(".checkpoint.h5")).layout]
