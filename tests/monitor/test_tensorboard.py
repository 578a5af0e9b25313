"""Event files for TensorBoard: whole records, what the run file says, times of the run."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finished import ROOT, Finished
from tensorboardX.proto.event_pb2 import Event

import dbnet as package
from dbnet.monitor import tensorboard
from dbnet.monitor.results import Run


def castagnoli(data: bytes) -> int:
    """Return the masked CRC-32C (RFC 3720; masked as in TensorFlow's record format)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def events(path: str) -> list[Any]:
    """Return what is in a file, each event with both of its checksums right."""
    return list(records(Path(path).read_bytes()))


def records(data: bytes) -> Iterator[Any]:
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == castagnoli(data[:8])
        content, data = data[12 : 12 + size], data[12 + size :]
        assert struct.unpack("<I", data[:4])[0] == castagnoli(content)
        data = data[4:]
        yield Event.FromString(content)


def scalars(path: str, tag: str) -> list[tuple[float, int, float]]:
    """Return (time, step, value) of a curve."""
    return [
        (event.wall_time, event.step, value.simple_value)
        for event in events(path)
        for value in event.summary.value
        if value.tag == tag
    ]


def check(run: Run, path: str, began: float) -> None:
    """Compare what is in both files."""
    for name in ("loss", "accuracy", "train_loss", "train_accuracy"):
        found = np.array(scalars(path, name.replace("_", "/") if name.startswith("train") else f"test/{name}"))
        wanted = run.evaluation[["seconds", "steps", name]].dropna().to_numpy()
        np.testing.assert_allclose(
            found - [found[0, 0] if began else 0, 0, 0], wanted - [wanted[0, 0] if began else 0, 0, 0], rtol=1e-6, atol=1e-6
        )
        assert found[0, 0] >= began
    for replica, rows in run.progress.groupby("replica"):
        found = scalars(path, f"throughput/replica {replica}")
        assert [step for _, step, _ in found] == list(rows.steps)
    for shard in run.staleness.columns:
        (shown,) = (value.histo for event in events(path) for value in event.summary.value if value.tag == f"staleness/{shard}")
        counts = run.staleness[shard]
        assert shown.num == counts.sum() == sum(shown.bucket) and shown.sum == counts @ counts.index
        assert len(shown.bucket) == len(shown.bucket_limit)


def test_it_says_what_the_run_file_does(run_file: Path, place: Path, dbnet: Callable[..., Finished]) -> None:
    before = time.time()
    done = package.train(run_file, ["record.tensorboard=true", "evaluate.epochs=0.5"], quiet=True)
    path = str(place / "out/run.tensorboard/events.out.tfevents.0.dbnet")
    assert events(path)[0].file_version == "brain.Event:2"
    check(package.open_run(done.run_file), path, before)
    # A batch method has iterations; virtual seconds are what they are, and repeat to the byte.
    words = ["--machine", ROOT / "jobs/machines/present.toml", "--quiet", "stop.epochs=", "record.tensorboard=true", "run.name=v"]
    for method in (["stop.steps=40", "method.slots=2"], ["method.kind=sandblaster", "stop.iterations=2", "run.name=b"]):
        assert dbnet("simulate", run_file, *words, *method).code == 0
    assert dbnet("simulate", run_file, *words, "stop.steps=40", "method.slots=2").code == 0
    first, again, batch = (str(place / f"out/{name}.tensorboard/events.out.tfevents.0.dbnet") for name in ("v", "v-2", "b"))
    check(package.open_run("out/v.h5"), first, 0.0)
    iterations = package.open_run("out/b.h5").iterations
    assert [step for _, step, _ in scalars(batch, "iteration/loss")] == list(iterations.iteration) == [1, 2]
    assert Path(first).read_bytes() == Path(again).read_bytes()


def test_without_the_package_or_room(
    run_file: Path, dbnet: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write = tensorboard.EventFiles._write

    def writes(self: tensorboard.EventFiles, event: Any) -> None:
        write(self, event)
        if event.step:
            self._crc = full

    monkeypatch.setattr(tensorboard.EventFiles, "_write", writes)
    done = dbnet("train", run_file, "--quiet", "record.tensorboard=true", "run.name=full")
    assert done.code == 0 and done.err.count("ends here (No space left on device); the run goes on.") == 1
    assert len(events(str(Path("out/full.tensorboard/events.out.tfevents.0.dbnet").resolve()))) > 1
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "tensorboardX")
    done = dbnet("train", run_file, "record.tensorboard=true", "run.name=none")
    assert (
        done.code == 2
        and "install it with jobs/install --extra see, or pip install tensorboardX" in done.err
        and not Path("out/none.h5").exists()
    )
