"""Event files for TensorBoard beside the run file (`record.tensorboard`): NAME.tensorboard/events.out.tfevents.0.dbnet.

    test/loss, test/accuracy, train/loss, train/accuracy    at the steps of all replicas together; or validation/loss, ...,
                                                            of vectors also what the loss says besides, like test/R2
    loss, throughput, waited / replica R                    at the steps of that replica
    iteration/loss, gradient_norm, step, passes             of a batch method, at its iterations
    staleness, staleness/shard S                            the mean so far; at the end how many updates had which

Times are those of the run; virtual seconds count from 1970. Events are tensorboardX's messages, each framed as a record: its
length, that one's CRC, itself, its CRC.
"""

from __future__ import annotations

import importlib.util
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dbnet.core.config import Config, warn
from dbnet.core.errors import UserError
from dbnet.core.files import why
from dbnet.monitor.tables import ITERATIONS

ENDING = ".tensorboard"


def require(config: Config) -> None:
    """Raise UserError where a run wants event files and the package that they need is not installed."""
    if config.record.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "record.tensorboard needs the package tensorboardX; "
            "install it with jobs/install --extra see, or pip install tensorboardX."
        )


class EventFiles:
    """The writer; a disk that fails ends it with a warning, and the run goes on.

    Parameters
    ----------
    folder
        Where to; it is made.
    virtual
        Whether seconds are virtual ones, and have no date.
    part
        What is evaluated, `evaluate.part`.
    """

    def __init__(self, folder: Path, virtual: bool, part: str) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import HistogramProto, Summary
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary, self._histogram, self._crc = Event, Summary, HistogramProto, masked_crc32c
        self._began, self._part = 0.0 if virtual else None, part
        self._last, self._steps = (0.0, 0), dict[int, int]()
        folder.mkdir()
        self._file: Any = open(folder / "events.out.tfevents.0.dbnet", "wb")  # noqa: SIM115
        self._write(Event(wall_time=0.0 if virtual else time.time(), file_version="brain.Event:2"))

    def progress(self, rows: np.ndarray, staleness: float) -> None:
        """Write a report of the replicas, and the mean staleness so far."""
        for row in rows:
            names = ("loss", "throughput", "waited")
            self._scalars(row["seconds"], row["steps"], {f"{name}/replica {row['replica']}": row[name] for name in names})
            self._steps[int(row["replica"])] = int(row["steps"])
        self._scalars(rows["seconds"].max(), sum(self._steps.values()), {"staleness": staleness})

    def evaluation(self, row: Mapping[str, float]) -> None:
        """Write an evaluation, a row of that table."""
        names = [name for name in row if name not in ("seconds", "replica", "steps", "epochs")]
        tags = {f"train/{name[6:]}" if name.startswith("train_") else f"{self._part}/{name}": row[name] for name in names}
        self._scalars(row["seconds"], row["steps"], tags)

    def iteration(self, *values: float) -> None:
        """Write an iteration of a batch method, a row of that table."""
        row = dict(zip(ITERATIONS.names, values, strict=True))
        names = ("loss", "gradient_norm", "step", "passes")
        self._scalars(row["seconds"], row["iteration"], {f"iteration/{name}": row[name] for name in names})

    def close(self, staleness: np.ndarray) -> None:
        """Write how many updates of each shard had which staleness [shards, bins], and end."""
        seconds, step = self._last
        for shard, counts in enumerate(staleness):
            late = np.flatnonzero(counts)
            if late.size:
                n = counts[late]
                told = {"min": late[0], "max": late[-1], "num": n.sum(), "sum": late @ n, "sum_squares": late**2 @ n}
                limits, every = np.arange(late[0], late[-1] + 1) + 0.5, counts[late[0] : late[-1] + 1]
                shown = self._histogram(**{name: float(value) for name, value in told.items()}, bucket_limit=limits, bucket=every)
                self._add(seconds, step, [self._summary.Value(tag=f"staleness/shard {shard}", histo=shown)])
        if self._file is not None:
            self._file.close()
            self._file = None

    def _scalars(self, seconds: float, step: float, values: Mapping[str, float]) -> None:
        told = {name: float(value) for name, value in values.items() if value == value}
        self._add(seconds, step, [self._summary.Value(tag=name, simple_value=value) for name, value in told.items()])

    def _add(self, seconds: float, step: float, values: list[Any]) -> None:
        if self._began is None:
            self._began = time.time() - float(seconds)
        self._last = (float(seconds), int(step))
        if values:
            self._write(self._event(wall_time=self._began + seconds, step=int(step), summary=self._summary(value=values)))

    def _write(self, event: Any) -> None:
        if self._file is None:
            return
        data = event.SerializeToString(deterministic=True)
        length = struct.pack("<Q", len(data))
        try:
            self._file.write(length + struct.pack("<I", self._crc(length)) + data + struct.pack("<I", self._crc(data)))
            # Whoever looks at it while the run goes on sees whole events.
            self._file.flush()
        except OSError as error:
            warn(f"The event file '{self._file.name}' ends here ({why(error)}); the run goes on.")
            self._file = None
