"""Simulated time: the same numbers as without it where order cannot matter, the same bytes again, queues as theory has them."""

from __future__ import annotations

import itertools
import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from finished import Finished
from small import small_run

from dbnet.comm.channel import Mailboxes
from dbnet.comm.link import LocalLink, Wires
from dbnet.comm.simulated.clock import VirtualTime
from dbnet.comm.simulated.interconnect import Interconnect, Way
from dbnet.comm.simulated.memory import SimulatedMemory
from dbnet.comm.simulated.messages import SimulatedMailboxes, SimulatedWires
from dbnet.comm.simulated.movers import VirtualMover
from dbnet.comm.simulated.window import SimulatedWindow
from dbnet.comm.topology import Topology
from dbnet.comm.turns import Turns, Wait
from dbnet.comm.window import Field as WindowField
from dbnet.comm.window import WindowLayout
from dbnet.coordinator.coordinator import Coordinator
from dbnet.core.config import RecordTable, build
from dbnet.core.errors import Lost, UserError
from dbnet.core.ranges import Range
from dbnet.core.registry import make
from dbnet.core.toml import written
from dbnet.data.batches import Batches, Cursor
from dbnet.data.file import DataFile, Examples
from dbnet.monitor import runfile
from dbnet.monitor.results import Run
from dbnet.network.cost import Profile, load_profile
from dbnet.network.layers.dense import Dense
from dbnet.network.losses.softmax import Softmax
from dbnet.network.model import Footprint, Model, Piece
from dbnet.network.replica import Clipping, Replica
from dbnet.run import process, roles
from dbnet.run.simulated import replicas
from dbnet.run.simulated.noise import Noise
from dbnet.run.simulated.shards import PacedInbox, PacedReceiver
from dbnet.run.simulated.simulate import Simulated, simulate
from dbnet.run.train import execute
from dbnet.shards.local_store import LocalStore
from dbnet.shards.push import Intake
from dbnet.shards.routes import Rings, routes
from dbnet.shards.server import Server
from dbnet.shards.shard import Shard
from dbnet.shards.store import WindowStore

MACHINES = Path(__file__).resolve().parents[2] / "jobs" / "machines"


def machine(**more: Any) -> Profile:
    """Return a machine whose steps take about a millisecond, and whose messages are neither free nor all that matters."""
    tables: dict[str, Any] = {
        "compute": {"rate": 1.0, "step": 1e-3, "apply": 1.0, "slice": 1e-5},
        "inside": {"latency": 1e-6, "bandwidth": 5.0},
        "between": {"latency": 2e-5, "bandwidth": 0.1},
        "noise": {"kind": "exponential"},
    }
    return Profile.model_validate(tables | more)


@pytest.fixture
def tree(place: Path, make_data: Callable[..., Path]) -> dict[str, Any]:
    """Return a small run."""
    return small_run(make_data())


def played(tree: dict[str, Any], profile: Profile | None = None, **ways: Any) -> Simulated:
    return simulate(tree, profile or machine(), quiet=True, **ways)


@pytest.mark.parametrize("partitions", [1, 2])
@pytest.mark.parametrize(("noise", "wire"), [("none", None), ("exponential", "bfloat16"), ("tail", None)])
def test_one_replica_in_any_schedule_trains_as_alone(tree: dict[str, Any], noise: str, wire: str | None, partitions: int) -> None:
    tree |= {"method": {"kind": "sgd", "minibatch": 2, "slot": 64}, "topology": {"shards": 2, "partitions": partitions}}
    tree["method"]["overlap"] = noise == "tail"
    if wire:
        tree["method"]["wire"], tree["model"]["dtype"] = wire, "float32"
    alone = execute(build(tree), quiet=True)
    done = played(tree, machine(noise={"kind": noise, "share": 0.3})).outcome
    assert done.finished and not done.unsaved
    np.testing.assert_array_equal(done.params, alone.params)


class LateStore(LocalStore):
    """What overlap is by its definition: a fetch takes effect one step later."""

    overlaps = True

    def __init__(self, flat: np.ndarray, *parts: Any) -> None:
        super().__init__(flat.copy(), *parts)
        self._flat, self.overlaps = flat, True
        self._fetched: tuple[np.ndarray, list[int]] | None = None

    @property
    def landing(self) -> bool:
        return self._fetched is not None

    @landing.setter
    def landing(self, value: bool) -> None: ...

    def fetch(self) -> Turns:
        now, first = (self._flat.copy(), [int(shard.clock[0]) for shard in self._shards]), not self.fetched
        self.fetched, self._fetched = True, now
        if first:
            yield from self.arrive()

    def arrive(self) -> Turns:
        if self._fetched is not None:
            self.w[:], self._clocks = self._fetched
            self._fetched = None
        return
        yield


@pytest.mark.parametrize(("n_fetch", "n_push"), [(1, 1), (2, 3)])
def test_data_that_move_beside_a_gradient_take_effect_one_step_later(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, n_fetch: int, n_push: int
) -> None:
    """To the bit, and as stale, where a step is longer than what moves, and a push is applied before the next fetch."""
    tree |= {"topology": {"shards": 2}, "method": {"kind": "downpour", "minibatch": 2, "n_fetch": n_fetch, "n_push": n_push}}
    plain = execute(build(tree), quiet=True)
    monkeypatch.setattr(process, "LocalStore", LateStore)
    late = execute(build(tree), quiet=True)
    tree["method"]["overlap"] = True
    done = played(tree, machine(noise={"kind": "gamma"}, host={"pause": 0.0})).outcome
    np.testing.assert_array_equal(done.params, late.params)
    assert not (done.params == plain.params).all()
    fetched = [Run(one.run_file).events.sort_values(["shard", "push"]).fetched.tolist() for one in (done, late)]
    assert fetched[0] == fetched[1]


def test_data_move_while_a_gradient_is_computed(tree: dict[str, Any]) -> None:
    """0.4 ms to compute, 0.2 to fetch and 0.3 to push: 0.9 ms a step; beside each other 0.5 and a pause, but on one core 0.9."""
    tree |= {"topology": {"shards": 1}, "method": {"kind": "downpour", "minibatch": 2}, "stop": {"steps": 40}}
    compute, found = {"rate": 1e3, "step": 4e-4, "apply": 1e3, "slice": 1e-6}, []
    for overlap, cores in ((False, 0), (True, 0), (True, 1), (True, 4)):
        tree["method"]["overlap"] = overlap
        profile = machine(compute=compute, noise={"kind": "none"}, host={"ranks": 0, "cores": cores, "call": 1e-4, "pause": 1e-4})
        seconds = Run(played(tree, profile, dry=True).outcome.run_file).events.seconds
        found.append(1e3 * seconds.diff()[10:].mean())
    assert found == pytest.approx([0.9, 0.52, 0.9, 0.52], rel=0.1)


@pytest.mark.parametrize(("replicas", "partitions"), [(4, 1), (2, 2)])
def test_synchronous_replicas_are_one_with_their_batches_together(tree: dict[str, Any], replicas: int, partitions: int) -> None:
    tree |= {"stop": {"steps": 9}, "topology": {"shards": 2}, "method": {"kind": "synchronous", "minibatch": 8}}
    one = execute(build(tree), quiet=True)
    tree |= {
        "topology": {"shards": 2, "replicas": replicas, "partitions": partitions},
        "method": {"kind": "synchronous", "minibatch": 8 // replicas, "slot": 64},
    }
    done = played(tree).outcome
    np.testing.assert_allclose(done.params, one.params, rtol=0, atol=1e-12)
    assert (Run(done.run_file).events.eval("applied - fetched") == 0).all()


@pytest.mark.long
def test_a_batch_method_comes_to_the_same(tree: dict[str, Any]) -> None:
    """One replica has one order; three sum in another, to the rounding."""
    tree |= {"method": {"kind": "sandblaster", "minibatch": 2, "portion": 2, "slot": 64}, "stop": {"iterations": 5}}
    tree["evaluate"] = {"epochs": 5}
    one = tree | {"topology": {"shards": 2}}
    np.testing.assert_array_equal(played(one).outcome.params, execute(build(one), quiet=True).params)
    three = played(tree | {"topology": {"shards": 2, "replicas": 3}}).outcome
    np.testing.assert_allclose(Run(three.run_file).iterations.loss, Run(one_of(one)).iterations.loss, rtol=1e-9)


def one_of(tree: dict[str, Any]) -> Path:
    return execute(build(tree), quiet=True).run_file


@pytest.mark.parametrize("partitions", [1, 2])
def test_replicas_read_their_examples_once_and_together(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, partitions: int
) -> None:
    """What is trained on once, since both partitions take all units; what is evaluated once for each of them."""
    counts, read = Counter[str](), DataFile.read

    def counted(self: DataFile, part: str, *which: Any) -> Examples:
        counts[part] += 1
        return read(self, part, *which)

    monkeypatch.setattr(DataFile, "read", counted)
    tree |= {"topology": {"replicas": 4, "partitions": partitions}, "stop": {"steps": 1}}
    assert played(tree, machine()).outcome.finished
    assert counts == {"train": 1 + partitions, "test": partitions}
    counts.clear()
    tree |= {"topology": {"replicas": 4}, "stop": {"iterations": 2}}
    tree["method"] = {"kind": "sandblaster", "portion": 2, "minibatch": 2}
    assert played(tree, machine()).outcome.finished
    assert counts == {"train": 4 + 1, "test": 1}, "four blocks of two examples, whoever works on them"


@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_seed_gives_the_same_bytes(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """Whatever the machine's own clock does meanwhile."""
    found, ticks = [], itertools.count()
    tree["method"]["overlap"] = overlap
    for seed in (1, 1, 2):
        if found:
            for make in (runfile.RunFile.__init__, runfile.begin, roles.open_record):
                monkeypatch.setattr(make, "__defaults__", (lambda: 10.0 * next(ticks),))
        tree["run"]["seed"] = seed
        done = played(tree).outcome
        about = Run(done.run_file).about
        assert about["world"] == "simulated" and about["machine"]["noise"]["kind"] == "exponential"
        found.append(done.run_file.read_bytes())
        for path in Path("out").glob("run.*"):
            path.unlink() if not path.is_dir() else [part.unlink() for part in path.iterdir()] and path.rmdir()
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("kind", "wire"), [("downpour", "float32"), ("downpour", "bfloat16"), ("synchronous", "float32")])
def test_replicas_that_push_at_once_compute_in_one_place(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str, wire: str
) -> None:
    """Memory for one gradient, not for one each; what is pushed is the same, though rings are full while others compute."""
    tree["method"] |= {"kind": kind, "wire": wire}
    tree["topology"] = {"shards": 2, "replicas": 4}
    tree["model"]["dtype"], tree["model"]["layers"][0]["units"], tree["stop"] = "float32", 40, {"steps": 6}
    profile, accrue = machine(compute={"rate": 1.0, "step": 1e-3, "apply": 1.0, "slice": 5e-4}), Replica.accrue
    places: set[int] = set()

    def noted(replica: Replica, w: np.ndarray, g: np.ndarray, *more: Any) -> float:
        places.add(g.ctypes.data)
        return accrue(replica, w, g, *more)

    monkeypatch.setattr(Replica, "accrue", noted)
    one = played(tree, profile).outcome
    assert len(places) == 1
    monkeypatch.setattr(build(tree).method.worker, "accrues", lambda config: True)
    places.clear()
    other = played(tree, profile).outcome
    assert len(places) == 4
    np.testing.assert_array_equal(one.params, other.params)


def test_who_began_last_looks_at_its_own_minibatch() -> None:
    """Though another one, which began before it, has filled the network since."""
    model = Model([Dense(units=2)], Softmax(), (3,), 2, "float64")
    shared, w = replicas.Shared(model, 2, {}, 2), np.zeros(8)
    x = np.random.default_rng(1).standard_normal((2, 5, 3))

    def replica(number: int, meanwhile: Callable[..., object]) -> replicas.PacedReplica:
        # The last minibatch is not full.
        batches = Batches(Examples(x[number], np.zeros(5, np.int64)), 2, 1.0, model.dtype, None)
        batches.seek(Cursor(0, 4))
        pace = SimpleNamespace(compute=meanwhile)
        return replicas.PacedReplica(pace, shared, model, batches, {}, 1, clipping=Clipping())

    quick = replica(1, lambda *_: None)
    slow = replica(0, lambda *_: quick.accrue(w, shared.gradient, 0, 0.0))
    slow.accrue(w, shared.gradient, 0, 0.0)
    np.testing.assert_array_equal(shared.networks[0].x.T, x[0, [4, 4]])
    slow.examine(w)
    quick.examine(w)
    assert slow.trouble is None
    assert quick.trouble.cause_value == np.abs(x[1, 4]).max()
    np.testing.assert_array_equal(shared.networks[0].x.T, x[1, [4, 4]])


@pytest.mark.parametrize("kind", ["downpour", "cards", "overlap", "overlap-cards", "synchronous", "sandblaster"])
def test_who_rests_wakes_at_the_look_that_finds_something(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where idle ranks play every look all times are the same, to the bit: full rings, others' gradients, portions, verdicts."""
    tree |= {"method": {"kind": kind, "minibatch": 2, "slot": 64, "slots": 2}, "topology": {"shards": 2, "replicas": 3}}
    if "cards" in kind:
        # What travels is more than packets, to and from shards that have just served.
        tree["model"]["layers"][0]["units"], tree["method"] = 2000, {"kind": "downpour", "minibatch": 2, "slot": 8192}
    if "overlap" in kind:
        tree["method"] |= {"kind": "downpour", "overlap": True}
    if kind == "sandblaster":
        tree |= {"stop": {"iterations": 2}, "evaluate": {"epochs": 5}, "method": {**tree["method"], "portion": 2}}
    profile, found = machine(compute={"rate": 1.0, "step": 1e-2, "apply": 1.0, "slice": 2e-2}), {}
    if kind == "cards":
        # Shards change while a replica looks at one after the other.
        profile, tree["topology"] = machine(host={"call": 2e-3}), {"shards": 4, "replicas": 4}
    if kind == "overlap-cards":
        # Of a rank and of what moves its data answers come in through one card.
        profile, tree["topology"], tree["stop"] = machine(), {"shards": 2, "replicas": 2}, {"steps": 6}
        tree["method"]["n_push"] = 2
    for rests in (False, True):
        monkeypatch.setattr(VirtualTime, "rests", rests)
        done = played(tree, profile, dry="cards" in kind)
        found[rests] = done.outcome.run_file.read_bytes(), done.events
        for path in Path("out").glob("run.*"):
            path.unlink() if not path.is_dir() else [part.unlink() for part in path.iterdir()] and path.rmdir()
    assert found[True][0] == found[False][0]
    assert found[True][1] < (1.0 if kind == "overlap-cards" else 0.95) * found[False][1], "somebody has rested"


@pytest.mark.parametrize(
    ("partitions", "wire", "cores", "overlap"),
    [(1, "bfloat16", 0, False), (2, "bfloat16", 0, True), (2, "float32", 2, False), (1, "float32", 2, True)],
)
def test_a_dry_run_is_as_long_and_as_stale(tree: dict[str, Any], partitions: int, wire: str, cores: int, overlap: bool) -> None:
    """What moves and when does not depend on the numbers."""
    tree["topology"] = {"shards": 2, "replicas": 3, "partitions": partitions}
    tree["model"]["dtype"], tree["method"]["wire"] = "float32", wire
    tree["method"] |= {"clip_norm": 0.1, "overlap": overlap}
    # Of which there are eight.
    tree["evaluate"]["train"] = 100_000
    profile = machine(**({"host": {"ranks": 0, "cores": cores, "switch": 1e-5}} if cores else {}))
    wet, dry = played(tree, profile), played(tree, profile, dry=True)
    assert not dry.outcome.run_file.with_suffix(".checkpoint.h5").is_symlink() and dry.outcome.params is None
    one, two = Run(wet.outcome.run_file).events, Run(dry.outcome.run_file).events
    assert len(one) and (one == two).all(axis=None) and len(set(one.eval("applied - fetched"))) > 2


def test_a_dry_run_of_tied_weights_is_as_long(tree: dict[str, Any], make_data: Callable[..., Path]) -> None:
    """The partitions of a replica sum the gradients of what they share; a slow network between them shows that they do."""
    x = np.random.default_rng(1).random((8, 6, 6, 1))
    tree["data"]["path"] = str(make_data("images.h5", train__x=x, test__x=x[:4]))
    tree["model"]["layers"] = [{"kind": "conv", "maps": 9, "field": 5}, {"kind": "dense", "units": 2}]
    tree["topology"] = {"shards": 1, "replicas": 1, "partitions": 2}
    profile = machine(between={"latency": 1e-4, "bandwidth": 1e-3})
    wet, dry = (Run(played(tree, profile, dry=dry).outcome.run_file).events for dry in (False, True))
    assert len(wet) and (wet == dry).all(axis=None)


def test_a_partition_that_shares_its_core_computes_between_its_messages() -> None:
    """Of 1, 2 and 3 s a pass, each layer's before its values leave; down, its inputs' before, its parameters' while they travel."""
    took: list[float] = []
    link = replicas.PacedLink(Wires(1), 0, SimpleNamespace(compute=took.append), [1.0, 2.0, 3.0])
    values = np.ones(1)

    def crosses(tag: int) -> None:
        both = [link.sender(values, 0, tag), link.receiver(np.zeros(1), 0, tag)]
        link.start(both)
        took.append(0.0)
        link.wait(both)

    link.begin(17.0)
    crosses(2), crosses(4)
    link.gather(values, np.zeros((1, 1)))
    crosses(5), crosses(3)
    link.compute()
    assert took == pytest.approx([1.0, 0.0, 2.0, 0.0, 3.0, 3.0, 0.0, 3.0, 2.0, 0.0, 2.0, 1.0])
    # An evaluation says itself how long it takes.
    link.gather(values, np.zeros((1, 1)))
    assert len(took) == 12


def test_steps_and_evaluations_take_as_long_as_the_machine_is_slow() -> None:
    """A step of 1 s, a quarter more with one of its own, and half a second a minibatch: three times, and steps what is drawn."""
    took: list[float] = []
    drawn = SimpleNamespace(step=lambda entity, event: {(7, 0): 1.0, (7, 5): 2.0}[entity, event])
    pace = replicas.Pace(SimpleNamespace(compute=took.append), drawn, 7, 3.0, 1.0, 0.5, 0.25)
    pace.compute(0), pace.compute(5), pace.compute(5, local=True), pace.evaluate()
    assert took == [3.0, 6.0, 7.5, 1.5]


@pytest.mark.parametrize(
    ("kind", "partitions", "dry"),
    [("downpour", 1, False), ("downpour", 2, False), ("downpour", 2, True), ("sandblaster", 1, False)],
)
def test_each_step_has_a_draw_of_its_own(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str, partitions: int, dry: bool
) -> None:
    drawn: dict[int, list[int]] = {}
    monkeypatch.setattr(Noise, "step", lambda noise, entity, event: [1.0, drawn.setdefault(entity, []).append(event)][0])
    tree |= {"topology": {"replicas": 2, "partitions": partitions}, "method": {"kind": kind, "minibatch": 2}}
    if kind == "sandblaster":
        tree |= {"method": {**tree["method"], "portion": 4}, "stop": {"iterations": 2}}
    assert played(tree, machine(), dry=dry).outcome.finished
    assert len(drawn) == 2 * partitions and all(steps == list(range(len(steps))) for steps in drawn.values())


def test_commands_of_a_batch_method_take_their_time() -> None:
    """As a slice of all that the shard holds: a second and 1000 bytes at 2000 a second, when there was one."""
    took: list[float] = []
    busy = iter([True, False, True])
    receiver = SimpleNamespace(params=np.zeros(125), advance=lambda channel: next(busy))
    profile = machine(compute={"rate": 1.0, "apply": 2e-6, "slice": 1.0})
    paced = PacedReceiver(receiver, SimpleNamespace(compute=took.append), profile)
    assert [paced.advance(None) for _ in range(3)] == [True, False, True] and took == pytest.approx([1.5, 1.5])


def test_ranks_share_the_cores_of_their_host(tree: dict[str, Any]) -> None:
    """Two replicas on one core take twice as long a step each; with a core for each rank nothing changes, to the bit."""
    tree |= {"topology": {"shards": 2, "replicas": 2}, "stop": {"steps": 40}}
    found = {}
    for cores in (0, 1, 5):
        done = played(tree, machine(noise={"kind": "none"}, host={"ranks": 0, "cores": cores}), dry=True)
        found[cores] = done.seconds, Run(done.outcome.run_file).events
    assert found[5][0] == found[0][0] and found[5][1].equals(found[0][1])
    assert found[1][0] == pytest.approx(2 * found[0][0], rel=0.05)


@pytest.mark.long
def test_another_replica_changes_nobody_elses_draws(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[tuple[int, int, int], float] = {}
    compute, number = replicas.Pace.compute, 0

    def noted(pace: replicas.Pace, step: int, local: bool) -> None:
        taken[number, pace.entity, step] = pace.speed * pace.noise.step(pace.entity, step)
        compute(pace, step, local)

    monkeypatch.setattr(replicas.Pace, "compute", noted)
    profile = machine(speed={"slow": 0.5, "factor": 3.0})
    for number in (2, 3):
        tree |= {"topology": {"replicas": number}, "stop": {"steps": 70}}
        played(tree, profile)
    few, many = ({key[1:]: value for key, value in taken.items() if key[0] == n} for n in (2, 3))
    assert len(few) == 140 and few == {key: many[key] for key in few} and len(set(few.values())) == 140


class Field:
    """One shard and many origins, each of which pushes at moments of its own, whatever becomes of its pushes."""

    SIZE = 125  # float64 values of a push: 1000 bytes

    def __init__(self, origins: int, service: float, pause: float) -> None:
        world, whole = Topology(1, origins), [Piece(Range(0, self.SIZE), 0)]
        footprint = Footprint(whole, whole, self.SIZE)
        rings = Rings([Range(0, self.SIZE)], [list(range(origins))], np.dtype("f8"), 8 * self.SIZE, 64)
        self.time = VirtualTime(pause, 1e-9, 1e9)
        way = Way(1e-6, 1e15)
        self.wire = Interconnect(self.time, range(world.size), way, way)
        layouts = [WindowLayout([]), WindowLayout(rings.fields(0, world)), *[WindowLayout([])] * origins]
        memory = SimulatedMemory(layouts)
        local = memory.local[1]
        shard = Shard(
            Range(0, self.SIZE), make("shards.rules", {"kind": "sgd"}, "rule"), local["params"], local["clock"], self.time
        )
        ways, windows = routes(footprint.pushed, rings.ranges), [SimulatedWindow(memory, self.wire, r) for r in range(world.size)]
        inbox = PacedInbox(
            self.time, machine(compute={"rate": 1.0, "apply": 1e-6 / service}), memory.counted[1], windows[1],
            [Intake(shard) for _ in range(origins)], world, list(range(origins)), ways * origins,
        )  # fmt: skip
        self.boxes, self.came, self.left = Mailboxes(2), [], []
        taking = inbox.intakes[0].take
        for intake in inbox.intakes:
            intake.take = partial(self._taken, taking)
        saver = type("Nothing", (), {"advance": lambda self: False, "close": lambda self: None, "begin": None, "busy": False})()
        self.server = Server(shard, inbox, self.boxes.at(1), saver, self.time, RecordTable())
        self.stores = [WindowStore(windows[2 + r], world, (r, 0), footprint, rings, clock=self.time) for r in range(origins)]

    def _taken(self, take: Callable[..., bool], *push: Any) -> bool:
        self.left.append(self.time.now)
        return take(*push)

    def origin(self, store: WindowStore, moments: np.ndarray) -> Turns:
        store.accrued(first=True)
        for moment in moments:
            self.time.elapse(max(0.0, moment - self.time.now))
            self.came.append(self.time.now)
            yield from store.push(1, 0)

    def end(self, moment: float) -> Turns:
        self.time.elapse(moment)
        self.boxes.at(0).send(1, "end")
        self.time.notify(1, 0)
        yield None

    def play(self, moments: list[np.ndarray]) -> float:
        """Return the mean time from a push to the end of its service."""
        players = {2 + r: self.origin(*pair) for r, pair in enumerate(zip(self.stores, moments, strict=True))}
        last = max(m[-1] for m in moments if len(m)) + 1e3
        self.time.play({0: self.end(last), 1: self.server.run(), **players}, {1: 1e9})
        assert len(self.came) == len(self.left)
        return float(np.mean(self.left) - np.mean(self.came))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_pushes_queue_at_a_shard_as_theory_has_it(load: float) -> None:
    """Random arrivals, one server, equal services (M/D/1): a push is served after s + load s / 2 (1 - load) in the mean."""
    origins, pushes, service = 8, 6000, 1.0
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(service / load, pushes))
    owner = rng.integers(0, origins, pushes)
    field = Field(origins, service, 0.0)
    mean = field.play([arrivals[owner == r] for r in range(origins)])
    # For these very arrivals: each waits for what is left of those before (Lindley).
    begun = np.maximum.accumulate(arrivals - service * np.arange(pushes)) + service * np.arange(pushes)
    assert mean == pytest.approx(float((begun - arrivals).mean()) + service, rel=1e-3)
    assert mean == pytest.approx(service + load * service / (2 * (1 - load)), rel=0.05)
    assert field.server.busy == pytest.approx(service * pushes, rel=1e-3)


def test_cards_of_hosts_are_shared() -> None:
    """Two long transfers out of one host take the time of both, the packet between them its own; within a host nobody waits."""
    time, found = VirtualTime(), {}
    wire = Interconnect(time, [0, 0, 1, 2], Way(0.0, 1e6), Way(0.25, 1e6))

    def role() -> Iterator[None]:
        for name, source, target, size in [("a", 0, 2, 10**6), ("b", 1, 3, 10**6), ("c", 0, 2, 1000), ("d", 0, 1, 10**6)]:
            wire.send(source, target, size, partial(lambda name: found.update({name: time.now}), name))
        time.elapse(5.0)
        yield None

    time.play({0: role()}, {})
    assert found == pytest.approx({"a": 1.25, "b": 2.25, "c": 0.251, "d": 1.0})


def test_a_shard_that_stands_for_several_has_their_cards(tree: dict[str, Any]) -> None:
    """Two hosts send to one, and it to both: with four cards there each is as fast as its own."""
    time, found = VirtualTime(), {}
    wire = Interconnect(time, range(3), Way(0.0, 1e6), Way(0.25, 1e6), cards={2: 4})

    def role() -> Iterator[None]:
        for name, source, target in [("a", 0, 2), ("b", 1, 2), ("c", 0, 2), ("d", 2, 0), ("e", 2, 1)]:
            wire.send(source, target, 10**6, partial(lambda name: found.update({name: time.now}), name))
        time.elapse(5.0)
        yield None

    time.play({0: role()}, {})
    assert found == pytest.approx({"a": 1.25, "b": 1.25, "c": 2.25, "d": 1.25, "e": 1.5})
    tree |= {"topology": {"shards": 1, "replicas": 4}, "method": {"minibatch": 2}}
    tree["model"]["layers"][0]["units"] = 600
    way = {"latency": 2e-5, "bandwidth": 0.01}
    fast, slow = (played(tree, machine(between=way, host={"shard_cards": n}), dry=True).seconds for n in (100, 1))
    assert fast < 0.7 * slow


@pytest.mark.parametrize("rests", [False, True])
def test_bytes_between_hosts_are_counted(monkeypatch: pytest.MonkeyPatch, rests: bool) -> None:
    """What says what is wanted, what comes back, messages with their envelopes; within a host operations alone."""
    monkeypatch.setattr(VirtualTime, "rests", rests)
    time, found = VirtualTime(), []
    wire = Interconnect(time, [0, 1, 0, 2], Way(0.0, 1e3), Way(0.0, 1e3))
    memory = SimulatedMemory([WindowLayout([WindowField("value", "float64", (1000,))])] * 4)
    boxes, wires = SimulatedMailboxes(2, wire), SimulatedWires([0, 1], wire)

    def role(rank: int) -> Turns:
        window = SimulatedWindow(memory, wire, rank)
        for target, puts, size in ((2 - rank % 2 * 2, True, 1), (1, False, 1000), (1, True, 1000), (1, False, 1)):
            for _ in range(2 if size == 1 else 1):
                (window.put if puts else window.get)(target, "value", np.zeros(size))
            window.flush(target)
        found.append((wire.operations, wire.sent))
        if rank == 0:
            begun = time.now
            wire.send(0, 2, 10**6, lambda: None)
            wires.send(0, 1, "tag", np.zeros(10))
            boxes.at(0).send(1, "events", [np.zeros(100), 3, "word"])
            found.append(wire.sent)
            while boxes.at(1).receive() is None:
                time.elapse(1e-3)
            found.append(time.now - begun)
        yield None

    for rank in (0, 3):
        time.play({rank: role(rank)}, {})
    once = 2 * (32 + 32 + 8000) + (32 + 32 + 16)
    assert found[0] == (6, once) and found[1] == once + 80 + 128 + 128 + 800
    assert found[2] == pytest.approx(1.056, abs=2e-3)
    # Of one that is alone on its host.
    assert found[3][1] - found[1] == once + (32 + 32 + 16)


@pytest.mark.parametrize("words", [1, 2])
def test_what_is_put_lands_at_its_time_though_its_origin_goes_on(words: int) -> None:
    """One puts 7, which lands at 1.0 and is known to at 2.0; another, on the target's host, reads at 0.9 and at 1.1."""
    time, found = VirtualTime(), []
    wire = Interconnect(time, [0, 1, 0], Way(0.0, 1e15), Way(1.0, 1e15))
    memory = SimulatedMemory([WindowLayout([WindowField("value", "int64", (words,))]), WindowLayout([]), WindowLayout([])])

    def putting() -> Turns:
        window, values = SimulatedWindow(memory, wire, 1), np.full(words, 7)
        window.put(0, "value", values)
        window.flush(0)
        # It goes on at once, and what it does now to what it has put changes nothing.
        found.append((time.now, memory.local[0]["value"].tolist()))
        values[:] = 8
        time.sync()
        found.append((time.now, memory.local[0]["value"].tolist()))
        yield None

    def getting() -> Turns:
        window, out = SimulatedWindow(memory, wire, 2), np.zeros(words, np.int64)
        for moment in (0.9, 1.1):
            time.elapse(moment - time.now)
            window.get(0, "value", out)
            window.flush(0)
            found.append((time.now, out.tolist()))
        yield None

    time.play({1: putting(), 2: getting()}, {})
    assert [values for _, values in found] == [[0] * words, [0] * words, [7] * words, [7] * words]
    assert [moment for moment, _ in found] == pytest.approx([2.0, 0.9, 1.1, 2.0])


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize(
    ("pauses", "puts", "found"),
    [((1.5,), None, 0), ((1.0, 0.5), None, 0), ((9.0,), 0.25, 0), ((1.25,), None, 7), ((9.0,), 0.0, 0), ((1.0,), None, 7)],
)
def test_a_look_sees_what_stands_there_at_its_moment(
    monkeypatch: pytest.MonkeyPatch, rests: bool, pauses: tuple[float, ...], puts: float | None, found: int
) -> None:
    """At 1.25 s, though all of its answers are here a second later; at one time those of lower ranks come first.

    Its target writes 7, with others' turns in between or without, or another rank puts 8 there, 1.25 s after it begins.
    """
    monkeypatch.setattr(VirtualTime, "rests", rests)
    time, seen = VirtualTime(), np.full((2, 1), -1)
    wire = Interconnect(time, [0, 1, 2, 3], Way(0.0, inf), Way(0.25, inf), overhead=1.0)
    memory = SimulatedMemory([WindowLayout([WindowField("value", "int64", (1,))])] * 2 + [WindowLayout([])] * 2)
    windows = [SimulatedWindow(memory, wire, rank) for rank in range(4)]

    def target() -> Turns:
        for pause in pauses:
            time.elapse(pause)
        memory.local[0]["value"][0] = 7
        yield None

    def looking() -> Turns:
        for rank in range(2):
            windows[2].get(rank, "value", seen[rank])
        windows[2].flush(0)
        yield None

    def putting() -> Turns:
        time.elapse(puts)
        windows[3].put(0, "value", np.full(1, 8))
        windows[3].flush(0)
        yield None

    time.play({0: target(), 2: looking()} | ({} if puts is None else {3: putting()}), {})
    assert seen.tolist() == [[found], [0]]


@pytest.mark.parametrize(
    ("overhead", "speed", "before", "changes"), [(0.2, 320.0, 1.3, 1.2), (0.2, 320.0, 0.0, 1.2), (0.0, inf, 0.0, 0.7)]
)
def test_who_rests_makes_the_first_look_that_ends_when_it_must(
    monkeypatch: pytest.MonkeyPatch, overhead: float, speed: float, before: float, changes: float
) -> None:
    """At two far ranks, one after the other, for a second or two, as if all looks were played, to the bit.

    It must end when one of them does, or so long before. One of the ranks changes what it holds meanwhile, when it has been read.
    """

    def played(rests: bool, until: float, changes: float = inf) -> tuple[list[tuple[float, int]], int]:
        monkeypatch.setattr(VirtualTime, "rests", rests)
        time, seen = VirtualTime(late=1e-4), []
        wire = Interconnect(time, [0, 1, 2], Way(0.0, inf), Way(0.25, speed), overhead=overhead)
        memory = SimulatedMemory([WindowLayout([WindowField("value", "int64", (1,))])] * 3)
        window, values = SimulatedWindow(memory, wire, 2), np.zeros((2, 1), np.int64)

        def looking() -> Turns:
            while not seen or seen[-1][0] < until:
                if seen:
                    yield Wait("a word", until)
                for rank in range(2):
                    window.get(rank, "value", values[rank])
                    window.flush(rank)
                seen.append((time.now, int(values[0, 0])))

        def changing() -> Turns:
            time.elapse(changes)
            memory.local[0]["value"][0] = 7
            yield None

        time.play({2: looking()} | ({0: changing()} if changes < inf else {}), {})
        return seen, wire.operations

    end = played(False, 40.0)[0][12][0]
    every, operations = played(False, end - before, end - changes)
    found, fewer = played(True, end - before, end - changes)
    assert found[-1] == every[-1] == (end, 0) and fewer < operations / 4


@pytest.mark.parametrize(
    ("moment", "puts", "sleeps"), [(1.6, False, 0.0), (0.0, False, 20.0), (9.0, False, 0.0), (9.0, False, 20.0), (9.0, True, 0.0)]
)
def test_who_rests_finds_what_changes(monkeypatch: pytest.MonkeyPatch, moment: float, puts: bool, sleeps: float) -> None:
    """Just when it would if all looks were played, at two ranks one after the other: also while the second answers.

    The first rank changes it, and may sleep then, or the second one puts it there together with what nobody looks at.
    """

    began: list[float] = []

    def looked(rests: bool, moment: float) -> tuple[float, int]:
        monkeypatch.setattr(VirtualTime, "rests", rests)
        time, value, found = VirtualTime(), np.zeros(1, np.int64), []
        wire = Interconnect(time, [0, 1, 2], Way(0.0, inf), Way(0.25, inf))
        memory = SimulatedMemory([WindowLayout([WindowField(name, "int64", (1,)) for name in ("value", "other")])] * 3)
        windows = [SimulatedWindow(memory, wire, rank) for rank in range(3)]

        def looking() -> Turns:
            while not value[0] and time.now < 40.0:
                began.append(time.now)
                for rank, out in enumerate((value, np.zeros(1, np.int64))):
                    windows[2].get(rank, "value", out)
                    windows[2].flush(rank)
                yield Wait("a word", 40.0)
            found.append(time.now)

        def changing() -> Turns:
            time.elapse(moment)
            if puts:
                windows[1].put(0, "value", np.full(1, 7)), windows[1].put(0, "other", np.full(1, 7))
                windows[1].flush(0)
            else:
                memory.local[0]["value"][0] = 7
            if sleeps:
                time.elapse(sleeps)
            yield None

        time.play({2: looking(), int(puts): changing()}, {})
        return found[0], wire.operations

    if not moment:
        # Just when a look reads it.
        looked(False, 50.0)
        moment = began[8] + 0.25
    (end, all_of), (found, fewer) = looked(False, moment), looked(True, moment)
    assert found == end < moment + 2.5 and fewer <= all_of


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize(("cards", "last"), [(1, 2.612), (2, 2.512)])
def test_answers_come_in_in_the_order_of_their_first_bytes(
    monkeypatch: pytest.MonkeyPatch, rests: bool, cards: int, last: float
) -> None:
    """Each lasts a second; the one that was asked for first waits until its sender has served another rank, up to 1.25 s.

    So it is there at 1.5 s, when the other one, since 0.6, has a tenth of a second to go, which with two cards it does beside it.
    """
    monkeypatch.setattr(VirtualTime, "rests", rests)
    time, found = VirtualTime(), []
    wire = Interconnect(time, [0, 1, 2, 3], Way(0.0, inf), Way(0.25, 8e3), cards={2: cards})
    memory = SimulatedMemory([WindowLayout([WindowField("value", "float64", (1000,))])] * 2 + [WindowLayout([])] * 2)

    def getting(rank: int, pause: float, *targets: int) -> Turns:
        window = SimulatedWindow(memory, wire, rank)
        time.elapse(pause)
        for target in targets:
            window.get(target, "value", np.zeros(1000))
        window.flush(0)
        found.append(time.now)
        yield None

    time.play({2: getting(2, 0.1, 0, 1), 3: getting(3, 0.0, 0)}, {})
    assert found == pytest.approx([1.508, last])


def test_what_moves_data_looks_as_a_thread_does() -> None:
    """After 20 us and what a pause is longer, and a turn; who waits for it looks after 0.1 ms and pauses that double."""
    time, looks, seen = VirtualTime(pause=1e-3, turn=1e-5, late=5e-5), [], []
    mover = VirtualMover(time, 9, "replica 0")

    def transfer(until: float) -> Turns:
        yield None
        while time.now < until:
            looks.append(time.now)
            yield Wait("replica 0 waits for shard 0 to make room in its ring")

    def role() -> Turns:
        first, second = mover.start(transfer(0.0)), mover.start(transfer(1.05e-3))
        assert not mover.here and not first.done.is_set()
        time.ahead(1e-4)
        assert first.done.is_set() and not second.done.is_set()
        for wait in second.wait("its last push to leave"):
            seen.append(time.now)
            yield wait
        seen.append(time.now)
        mover.stop()

    time.play({3: role()}, {})
    assert np.diff(looks) == pytest.approx(7e-5) and len(looks) == 13 and looks[0] == pytest.approx(1.6e-4)
    assert seen == pytest.approx([2.0e-4, 3.7e-4, 5.6e-4, 7.9e-4, 1.07e-3])


def test_partitions_meet() -> None:
    """Three partitions on hosts of their own: sums and gathered values are whole, and nobody leaves before the last has come."""
    time, found = VirtualTime(), []
    wires = SimulatedWires([0, 1, 2], Interconnect(time, [0, 1, 2], Way(0.0, 1.0), Way(0.5, 1e9)))

    def role(rank: int) -> Turns:
        link, everyone, total, shared = LocalLink(wires, rank), np.zeros((3, 2)), np.zeros(2), np.full(1, float(rank + 7))
        time.elapse(float(rank))
        link.gather(np.full(2, rank), everyone)
        link.total(np.full(2, rank + 1.0), total)
        link.share(shared)
        found.append((everyone[:, 0].tolist(), total.tolist(), shared.tolist()))
        link.meet()
        found.append(time.now)
        yield None

    time.play({rank: role(rank) for rank in range(3)}, {})
    assert found[:3] == [([0, 1, 2], [6, 6], [7])] * 3 and min(found[3:]) >= 3.5


def test_what_is_short_overtakes_nothing_on_its_way() -> None:
    """As under MPI: of one rank's values with one tag, and of its messages, the first comes first, be it long."""
    time, found = VirtualTime(), []
    wire = Interconnect(time, [0, 1], Way(0.0, 1.0), Way(0.5, 1e3))
    wires, boxes = SimulatedWires([0, 1], wire), SimulatedMailboxes(2, wire)

    def sending() -> Turns:
        for size in (1000, 10, 200, 1):
            wires.send(0, 1, "share", np.zeros(size))
        for size in (1000, 10):
            boxes.at(0).send(1, "events", np.zeros(size))
        yield None

    def receiving() -> Turns:
        found.extend(wires.take(0, 1, "share", "values").size for _ in range(4))
        time.elapse(100.0)
        while (message := boxes.at(1).receive()) is not None:
            found.append(message.content.size)
        yield None

    time.play({0: sending(), 1: receiving()}, {})
    assert found == [1000, 10, 200, 1, 1000, 10]


def test_noise_is_of_mean_one() -> None:
    for kind in ("gamma", "exponential"):
        noise = Noise(machine(noise={"kind": kind, "variation": 0.6}), 5)
        drawn = np.array([noise.step(7, i) for i in range(20000)])
        assert drawn.mean() == pytest.approx(1.0, abs=0.03)
        assert drawn.std() == pytest.approx({"gamma": 0.6, "exponential": 1.0}[kind], rel=0.05)
        assert noise.step(7, 3) == drawn[3]
    speeds = [Noise(machine(speed={"slow": 0.3, "factor": 2.0}), 5).speed(replica) for replica in range(1000)]
    assert set(speeds) == {1.0, 2.0} and speeds.count(2.0) == pytest.approx(300, abs=50), "of each machine by itself"
    both = Noise(machine(speed={"slow": 1.0, "factor": 2.0, "cycle": [1.0, 3.0]}), 5)
    assert [both.speed(replica) for replica in range(3)] == [2.0, 6.0, 2.0]


def test_what_waits_in_vain_says_for_what(tree: dict[str, Any]) -> None:
    """A machine too slow for the deadline."""
    tree |= {"method": {"kind": "synchronous", "minibatch": 2}, "run": tree["run"] | {"deadline": 0.2}}
    with pytest.raises(Lost, match=r"waited 0.2 virtual seconds in vain: .*the others' gradients.* run.deadline"):
        played(tree, machine(speed={"cycle": [1.0, 1e5]}))


@pytest.mark.parametrize(
    ("change", "ways", "words"),
    [
        ({"record": {"schedule": True}}, {}, "record.schedule=false"),
        ({"run": {"folder": "out", "threads": 2}}, {}, "run.threads=1"),
        ({"method": {"kind": "synchronous"}}, {"dry": True}, "leave --dry out"),
        ({"stop": {"accuracy": 0.9, "epochs": 1}}, {"dry": True}, "no accuracy to go by"),
    ],
)
def test_what_is_not_simulated_is_refused(tree: dict[str, Any], change: dict, ways: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        played(tree | change, **ways)
    assert not Path("out").exists()


@pytest.mark.parametrize("path", sorted(MACHINES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_machine_that_comes_with_dbnet(path: Path, dbnet: Callable[..., Finished], run_file: Path) -> None:
    done = dbnet("simulate", run_file, "--machine", path, "stop.steps=3", "stop.epochs=", "topology.spares=1", "--dry")
    assert done.code == 0 and "virtual s in" in done.out
    spared = "dbnet: Nobody dies on this machine, since its file has no table 'faults': topology.spares is left out.\n"
    assert done.err == ("" if path.stem == "dying" else spared)
    assert json.loads(json.dumps(Run("out/run.h5").about["machine"]))["about"]


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run gets a signal, as from Ctrl-C, at the coordinator's twentieth turn."""
    tick, turns = Coordinator.tick, itertools.count(1)

    def counted(coordinator: Coordinator) -> bool:
        if next(turns) == 20:
            signal.raise_signal(signal.SIGINT)
        return tick(coordinator)

    # Started in the background, this process ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(Coordinator, "tick", counted)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("dry", "code", "words"), [
    ((), 85, "dbnet: Stopped by a signal; begin from the checkpoint with run.start=out/run.checkpoint.h5.\n"),
    (("--dry",), 130, "dbnet: Stopped by a signal.\n"),
])  # fmt: skip
def test_a_run_that_is_stopped_says_so(
    ctrl_c: None, dbnet: Callable[..., Finished], run_file: Path, dry: tuple[str, ...], code: int, words: str
) -> None:
    done = dbnet("simulate", run_file, "--machine", MACHINES / "present.toml", "stop.epochs=1000", *dry)
    assert (done.code, done.err) == (code, words)
    assert Run("out/run.h5").stopped and Path("out/run.checkpoint.h5").exists() == (not dry)


def test_whoever_simulates_is_told_of_the_signal(ctrl_c: None, tree: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        played(tree | {"stop": {"epochs": 1000}})


def test_nothing_is_predicted_of_what_was_stopped(ctrl_c: None, dbnet: Callable[..., Finished], run_file: Path) -> None:
    done = dbnet("plan", run_file, "--machine", MACHINES / "present.toml", "stop.epochs=1000")
    assert done.code == 130 and "Predicted by" not in done.out


def test_a_run_whose_parameters_are_out_of_bounds_is_stopped(dbnet: Callable[..., Finished], run_file: Path) -> None:
    done = dbnet("simulate", run_file, "--machine", MACHINES / "present.toml", "rule={kind='sgd', rate=1e30}")
    assert done.code == 2 and done.err.count("\n") == 1 and "lower rule.rate (1e+30)" in done.err
    assert "Checkpoint" not in done.out and not Path("out/run.checkpoint.h5").exists()


def test_a_wrong_machine_gets_one_sentence(dbnet: Callable[..., Finished], run_file: Path) -> None:
    text = (MACHINES / "present.toml").read_text()
    for right, wrong, words in (
        ("apply =", "aply =", "'compute.apply' is missing; add it to the machine file 'machine.toml'"),
        ("slice =", "slic =", "Unknown key 'compute.slic' (did you mean 'slice'?)"),
    ):
        Path("machine.toml").write_text(text.replace(right, wrong))
        done = dbnet("simulate", run_file, "--machine", "machine.toml")
        assert done.code == 2 and words in done.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        # Ranks would come back to their cores for ever, or clocks stand still.
        ({"host": {"switch": 1e-3}}, "slice = 0.004 is too short for switch = 0.001"),
        ({"host": {"slice": 1e-300}}, "host.slice = 1e-300 is not allowed: it must be at least 1e-05"),
        ({"host": {"turn": 1e-300}}, "it must be at least 1e-09"),
        ({"host": {"look": 1e-300}}, "it must be at least 1e-09"),
        ({"host": {"cores": True}}, "host.cores = true is not allowed: it must be a whole number"),
        ({"compute": {"rates": {"dense": -5}}}, "compute.rates.dense = -5 is not allowed: it must be greater than 0"),
        (
            {"compute": {"rates": {"densee": 5}}},
            "there is no kind 'densee' in network.layers (did you mean 'dense'?); known here: ",
        ),
        ({"compute": {"rules": {"sgd": 0}}}, "compute.rules.sgd = 0 is not allowed: it must be greater than 0"),
        ({"compute": {"rules": {"sgdd": 1}}}, "there is no kind 'sgdd' in shards.rules (did you mean 'sgd'?); known here: "),
        ({"compute": {"apply": "7"}}, "compute.apply = '7' is not allowed: it must be a number"),
        ({"speed": {"cycle": [1, 0]}}, "speed.cycle.1 = 0 is not allowed: it must be greater than 0"),
    ],
)
def test_a_machine_that_nobody_can_have_is_refused(place: Path, table: dict[str, Any], words: str) -> None:
    tree = machine().model_dump(exclude_none=True)
    for name, values in table.items():
        tree[name] |= values
    Path("machine.toml").write_text("\n".join(f"{name} = {written(values)}" for name, values in tree.items()))
    with pytest.raises(UserError, match=re.escape(words)):
        load_profile("machine.toml")
