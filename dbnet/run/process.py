"""TODO."""

from __future__ import annotations

import socket
from dataclasses import replace

import numpy as np

from dbnet.comm import communicators
from dbnet.comm.channel import Mailboxes
from dbnet.comm.turns import Rounds, take_turns
from dbnet.comm.window import LocalWindow
from dbnet.coordinator.orders import Orders
from dbnet.monitor import runfile
from dbnet.monitor.display import Display
from dbnet.run.outcome import Marker, Outcome, outcome
from dbnet.run.roles import (
    coordinator_layout,
    load_replica,
    make_coordinator,
    make_shard,
    open_record,
    resumed,
    use,
)
from dbnet.run.setup import Setup, stopwatch
from dbnet.shards.local_store import LocalStore

# --- one process --------------------------------------------------------------------------------------------------------------


def train_here(ready: Setup, display: Display, marker: Marker) -> Outcome:
    """All roles in this process, taking turns; replicas are not cut."""
    config, world = ready.config, replace(ready.topology, partitions=1, spares=0)
    threads, cores = communicators.cores_for(None, True)
    parts = [load_replica(ready, r) for r in range(world.replicas)]
    runfile.make_folder(config)
    use(ready.config, threads)
    ready = replace(ready, topology=world)
    clock, rounds = stopwatch(), Rounds(ready.turn)
    flat = np.zeros(ready.model.layout.size, ready.model.dtype)
    boxes = Mailboxes(1 + world.shards)
    shards = [make_shard(ready, s, flat[part.slice], np.zeros(1, np.int64), clock) for s, part in enumerate(ready.ranges)]
    memory = LocalWindow([coordinator_layout(ready)])
    ready, record = open_record(ready, {"mpi": "none, one process", "hosts": [socket.gethostname()]})
    display.say(f"One process, all roles taking turns: {world.words()}; {threads} of {cores} cores for the kernels.")
    pace = make_coordinator(ready, memory, boxes.at(0), record, display, clock, due=rounds)
    roles = [ready.method.coordinate(pace)]
    roles += [ready.method.serve(shard, None, boxes.at(1 + s), rounds) for s, shard in enumerate(shards)]
    for r, replica in enumerate(parts):
        store = LocalStore(flat, shards, r, config.method.n_fetch == 1, config.guard.finite)
        orders = Orders(memory, world, r, rounds, period=0.0)
        roles.append(ready.method.work(replica, resumed(ready, store, replica, r), orders, config))
    try:
        with pace.interrupt:
            marker.running()
            take_turns(roles, rounds)
    finally:
        pace.close()
    return outcome(ready, pace, flat)
