"""A recorded run of a batch method replays to the bit; another event in the record is found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RUN_FILE
from finished import Finished
from records import recorded, rewrite

from dbnet import open_run
from dbnet.checkpoint.reader import Checkpoint
from dbnet.run.process import Process
from dbnet.run.train import execute
from dbnet.shards.schedule import log
from dbnet.shards.schedule.log import LogEntry, PartOfSchedule

BATCH = ("method={kind='sandblaster', minibatch=20, portion=100, push_every=2}", "stop={iterations=5}", "topology.replicas=3")
RUNS = {
    "lbfgs": ["checkpoint.seconds=0.01", "model.decay=1e-3"],
    "cut": ["topology.partitions=2", "topology.replicas=2", "method.slot=256", "topology.shards=3"],
    "conjugate": ["method.descent.kind=conjugate_gradient", "model.dtype=float64", "evaluate.epochs=0.5"],
    "owlqn": ["method.descent={kind='owlqn', strength=1e-3, mask='weights'}", "model.decay=0.0", "topology.replicas=1"],
    "multibatch": ["method.descent={kind='multibatch_lbfgs', batch=400, overlap=100, rate=0.5}", "checkpoint.seconds=0.01"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_is_the_same_again(name: str, run_file: Path, dbnet: Callable[..., Finished]) -> None:
    path = recorded(run_file, *BATCH, *RUNS[name])
    run, done = open_run(path), dbnet("replay", path)
    assert done.code == 0, done.out + done.err
    found = done.out.splitlines()[-1]
    assert found.startswith(f"identical: 5 iterations, {len(run.evaluation)} evaluations, "), found
    written = len(list(path.with_suffix(".checkpoints").glob("??????.h5")))
    assert int(found.split()[-2]) >= written > 0 and len(run.iterations) == 5
    if name == "lbfgs":
        assert run.iterations.backups.sum() > 0 and run.iterations.discarded.sum() > 0, "no portion was computed twice"
        for part in ("coordinator", "shard-0", "shard-1"):
            rewrite(path.with_suffix(".schedule") / part, begun_again)
        assert dbnet("replay", path).out.splitlines()[-1].startswith("identical: 5 iterations, ")


def begun_again(entries: list[LogEntry]) -> None:
    """Change a part as if the first pass had been begun twice, each time with a checkpoint: all numbers are one larger."""
    for i, (kind, entry) in enumerate([(entry.kind, entry) for entry in entries]):
        if kind in (log.BEGIN, log.SUM):
            entries[i] = LogEntry(kind, np.add(entry.array("<i8"), (1, 0)).tobytes())
        elif kind in (log.SAVED, log.END) and entry.content:
            entries[i] = LogEntry(kind, log.json.dumps({**entry.value, "clock": [k + 1 for k in entry.value["clock"]]}).encode())
        elif kind == log.PASS:
            entries[i] = LogEntry(kind, log.json.dumps([entry.value[0] + 1, entry.value[1]]).encode())
        elif kind == log.CHECKPOINT:
            entries[i] = LogEntry(kind, log.json.dumps([entry.value[0], entry.value[1] + 1]).encode())
    at = next((i for i, entry in enumerate(entries) if entry.kind == log.CHECKPOINT), None)
    if at is not None:
        entries.insert(at, LogEntry(log.CHECKPOINT, log.json.dumps([entries[at].value[0], 1]).encode()))


def test_a_run_that_goes_on_from_a_moment_of_another(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    """A moment is a checkpoint; what goes on from there comes to the same, and can be recorded, too."""
    words = [*BATCH, "model.dtype=float64"]
    path = recorded(run_file, *words)
    made = dbnet("replay", path, "--until", "3")
    point = path.with_name("run-at-3.checkpoint.h5")
    assert made.code == 0 and made.out.splitlines()[-1].startswith("identical: 3 iterations, "), made.out + made.err
    assert made.out.endswith(f"; {point}\n")
    # Its time, and the bundles that each replica had had accepted by then.
    seconds, entries = open_run(path).iterations.seconds, PartOfSchedule(path.with_suffix(".schedule") / "coordinator").entries
    third = [i for i, entry in enumerate(entries) if entry.kind == log.ITERATION][2]
    bundles = [replica for entry in entries[:third] if entry.kind == log.PASS for replica, *_ in entry.value[1]]
    held = Checkpoint(point)
    assert held.seconds == seconds[2] and held.replicas["pushes"].tolist() == np.bincount(bundles, minlength=3).tolist()
    assert dbnet("replay", path, "--until", f"{seconds[1]:.20f}s").out.splitlines()[-1].startswith("identical: 2 iterations, ")
    more = execute(run_file, [*words, "record.schedule=true"], resume=str(point), quiet=True).run_file
    np.testing.assert_allclose(open_run(more).iterations.loss, open_run(path).iterations.loss[3:], rtol=1e-10)
    assert dbnet("replay", more).out.splitlines()[-1].startswith("identical: 2 iterations, ")
    for until, said in (("9", "there is no such iteration; 'out/run.h5' has 1 to 5"), ("soon", "give a number of iterations")):
        refused = dbnet("replay", path, "--until", until)
        assert refused.code == 2 and said in refused.err


def evaluated_again(entries: list[LogEntry]) -> None:
    score = next(entry for entry in entries if entry.kind == log.EVALUATED)
    entries.remove(score)
    asked = next(entry for entry in entries if entry.kind == log.EVALUATE)
    entries.insert(entries.index(asked) + 1, score)
    at = next(i for i, entry in enumerate(entries) if entry.kind == log.HALT)
    entries[at + 1 : at + 1] = [asked, score]


def test_a_run_that_is_stopped(run_file: Path, dbnet: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal in the middle of a pass, which leaves the iterate; by its accuracy after an iteration."""
    looks = iter(range(10000))
    with monkeypatch.context() as here:
        here.setattr(Process, "asked", lambda world: next(looks) > 60)
        path = recorded(run_file, *BATCH, "stop={iterations=1000}")
    entries = PartOfSchedule(path.with_suffix(".schedule") / "coordinator").entries
    halts = [entry.value for entry in entries if entry.kind == log.HALT]
    run, done = open_run(path), dbnet("replay", path)
    assert run.stopped and len(halts) == 1 and halts[0] > 1, halts
    assert done.code == 0 and done.out.splitlines()[-1].startswith(f"identical: {len(run.iterations)} iteration"), done.out
    # What is left is evaluated once more, as where nobody could before: it is the iterate, which has not been left since.
    rewrite(path.with_suffix(".schedule") / "coordinator", evaluated_again)
    done = dbnet("replay", path)
    assert done.code == 0 and " 2 evaluations, " in done.out.splitlines()[-1], done.out
    path = recorded(run_file, *BATCH, "stop={iterations=1000, accuracy=0.1}", "evaluate.epochs=0.1")
    assert len(open_run(path).iterations) < 20
    assert dbnet("replay", path).out.splitlines()[-1].startswith("identical: ")


def test_a_pass_with_a_refused_bundle(run_file: Path, make_data: Callable[..., Path], dbnet: Callable[..., Finished]) -> None:
    """A sum of gradients is infinite, so the loss of the pass is, whatever the bundles' losses are."""
    x, y = np.full((8, 3), 3e38, np.float32), np.ones(8, int)
    data = [
        f"data.path={make_data('bad.h5', train__x=x, train__y=y)}",
        "model.layers=[{kind='dense', units=2}]",
        "evaluate.train=0",
    ]
    assert dbnet("train", run_file, "--record", *BATCH, "method.minibatch=2", "method.portion=8", *data).code == 2
    run, done = open_run(Path("out/run.h5")), dbnet("replay", "out/run.h5")
    assert len(run.refused) and done.code == 0 and done.out.splitlines()[-1].startswith("identical: "), done.out + done.err


# --- one event is another -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Return the folder of a recorded run."""
    folder = tmp_path_factory.mktemp("once")
    (folder / "run.toml").write_text(RUN_FILE.format(data=digits))
    recorded(folder / "run.toml", f"run.folder={folder}/out", *BATCH, "stop={iterations=3}", "method.slot=512", "evaluate.epochs=1")
    return folder / "out"


def changing(kind: int, number: int, change: Callable[[Any], Any]) -> Callable[[list[LogEntry]], None]:
    """Return what changes an entry, the how-manieth of its kind."""

    def rewritten(entries: list[LogEntry]) -> None:
        at = [i for i, entry in enumerate(entries) if entry.kind == kind][number]
        entry = entries[at]
        array = {log.TAKES: log.TAKE, log.ITERATION: "<f8", log.EVALUATED: "<f8", log.SUM: "<i8"}.get(kind)
        found = change(entry.value if array is None else entry.array(array).copy())
        if found is None:
            del entries[at]
        else:
            entries[at] = LogEntry(kind, found.tobytes() if array else log.json.dumps(found).encode())

    return rewritten


def other_order(takes: np.ndarray) -> np.ndarray:
    k = next(k for k in range(2, len(takes)) if takes["origin"][k] != takes["origin"][k - 1])
    takes[[k - 1, k]] = takes[[k, k - 1]]
    return takes


def other_check(takes: np.ndarray) -> np.ndarray:
    takes["check"][3] ^= 1
    return takes


def other_bundle(what: str) -> Callable[[Any], Any]:
    def change(content: Any) -> Any:
        number, bundles = content
        replica, loss, portions = bundles[1]
        bundles[1] = {
            "replica": [replica + 1, loss, portions],
            "loss": [replica, float(np.nextafter(loss, 9)), portions],
            "portions": [replica, loss, bundles[0][2]],
        }[what]
        return [number, bundles]

    return change


def next_up(column: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(numbers: np.ndarray) -> np.ndarray:
        numbers[column] = np.nextafter(numbers[column], 9)
        return numbers

    return change


def other_digest(name: str) -> Callable[[Any], Any]:
    return lambda value: {**value, "digests": {**value["digests"], name: "0" * 64}}


def other_clock(value: Any) -> Any:
    return {**value, "clock": [1000 + clock for clock in value["clock"]]}


CHANGES = {
    "order": ("shard-1", log.TAKES, 2, other_order, "pass 3, shard 1: the sum of its bundles is another"),
    "gradient": ("shard-0", log.TAKES, 1, other_check, "pass 2, shard 0, slice 0, replica 0, portions 2, 3: another gradient"),
    "fewer": ("shard-0", log.TAKES, 0, lambda takes: takes[:-1], "it was accepted, but has not been taken"),
    "more": ("shard-0", log.TAKES, 0, lambda takes: np.append(takes, takes[-1]), "it has no more accepted bundles in this pass"),
    "unfinished": ("shard-1", log.SUM, 1, lambda _: None, "pass 2, shard 1: it has not recorded that all bundles"),
    "replica": ("coordinator", log.PASS, 1, other_bundle("replica"), "pass 2, shard 0, "),
    "portions": ("coordinator", log.PASS, 1, other_bundle("portions"), "pass 2, portion 0: it is in 2 accepted bundles"),
    "bundle's loss": ("coordinator", log.PASS, 1, other_bundle("loss"), "pass 2, replica "),
    "no pass": ("coordinator", log.PASS, 1, lambda _: None, "the coordinator: a pass comes where an iteration was recorded"),
    "iteration": ("coordinator", log.ITERATION, 1, next_up(1), "iteration 2: its loss is "),
    "step": ("coordinator", log.ITERATION, 2, next_up(3), "iteration 3: its step is "),
    "evaluation": ("coordinator", log.EVALUATED, 1, next_up(0), ": an evaluation gives "),
    "checkpoint": ("shard-1", log.SAVED, 0, other_digest("params"), "checkpoint 000001: 'params' of shard 1"),
    "checkpoint's clock": ("shard-1", log.SAVED, 0, other_clock, "checkpoint 000001: the clock of shard 1 is "),
    "end": ("shard-0", log.END, 0, other_digest("vector.base"), "the end: 'vector.base' of shard 0"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CHANGES)
def test_another_event_is_found_and_named(name: str, once: Path, place: Path, dbnet: Callable[..., Finished]) -> None:
    part, kind, number, change, named = CHANGES[name]
    shutil.copytree(once, place / "out")
    rewrite(place / "out" / "run.schedule" / part, changing(kind, number, change))
    done = dbnet("replay", place / "out" / "run.h5")
    assert done.code == 1 and done.out.splitlines()[-1].startswith("different: ") and named in done.out, done.out + done.err


def test_a_record_that_ends_before_the_run(once: Path, place: Path, dbnet: Callable[..., Finished]) -> None:
    """Of a shard, of the coordinator, or because a part was full."""
    for part, share in (("shard-0", 0.5), ("coordinator", 0.5), ("coordinator", 1)):
        shutil.copytree(once, place / "out", dirs_exist_ok=True)
        path = place / "out" / "run.schedule" / part
        if share == 1:
            rewrite(path, lambda entries: entries.__setitem__(slice(8, None), [LogEntry(log.FULL, b"")]))
        else:
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        done = dbnet("replay", place / "out" / "run.h5")
        said = done.out.splitlines()[-1]
        assert done.code == 0 and said.startswith("identical: ") and "; the record ends before the run did" in said, done.out
        assert not said.startswith("identical: 3 iterations"), said


def test_what_a_batch_method_has_not_is_refused(once: Path, place: Path, dbnet: Callable[..., Finished]) -> None:
    run = once / "run.h5"
    for words, said in (
        (["rule.rate=0.1"], "a batch method goes by no rule"),
        (["--gradient", "0", "1", place / "g.h5"], "a batch method's replicas make no steps"),
    ):
        done = dbnet("replay", run, *words)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err
