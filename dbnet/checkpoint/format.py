"""Checkpoints: the whole restartable state as global named arrays, whatever the topology was.

    NAME.checkpoint.h5                         a link to the newest master
    NAME.checkpoints/000007.h5                 the master of generation 7
    NAME.checkpoints/000007.shard-0.h5, ...    its parts, one per shard

A part holds what its shard owns:

    /params, /state.<name>, /vector.<name>     [range] parameters, registers of the rule or of a batch method
    /clock, /range, /about                     [partitions] count of updates; lo, hi; JSON: the checkpoint's id, the part's number

The master makes one file of them and holds what belongs to no shard:

    /params, ...                               [parameters] virtual datasets over the parts
    /clock, /ranges                            [shards, partitions], [shards, 2]
    /replicas                                  per replica (or spare in its place): steps, examples, pushes, epoch, position
    /table.<name>                              small tables that a method adds
    /config, /layout, /data, /method, /chain   JSON, as bytes: configuration; names, offsets, shapes; shape of an example; what a
                                               batch method knows; configurations of the runs that this one came from, oldest first
    /modules                                   JSON, as bytes: of each own module its path, SHA-256 and text
    /parts                                     JSON, as bytes: of each part its number and the SHA-256 of each of its registers
    /about                                     JSON, as bytes: id, name asked for, seconds, steps, time of writing, size, registers,
                                               what the data are multiplied with

The order of examples is a function of (seed, subset, epoch), so a cursor is the state of the generators too. Every dataset is
stored in chunks with a checksum each, and the metadata have HDF5's own, so a flipped byte is found wherever it is; parts that were
written anew or change places are found by what the master says of them. HDF5 takes a
source that it cannot open for one that was never written: the virtual datasets are for other programs, dbnet reads the parts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dbnet.core.config import Config
from dbnet.core.registry import SOURCES
from dbnet.network.parameters.layout import FlatLayout

REPLICA = np.dtype([("steps", "i8"), ("examples", "i8"), ("pushes", "i8"), ("epoch", "i8"), ("position", "i8")])
TEXTS = ("about", "config", "layout", "data", "method", "chain", "modules", "parts")
# Old enough for any program, new enough for checksums of the metadata.
LIBVER = ("v110", "v110")
CHUNK = 1 << 18


def link_of(config: Config) -> Path:
    """Return the path of the link to a run's newest checkpoint."""
    return config.output(".checkpoint.h5")


def folder_of(config: Config) -> Path:
    """Return the folder of a run's checkpoints."""
    return config.output(".checkpoints")


def part_of(master: Path, shard: int) -> Path:
    """Return the path of one shard's part."""
    return master.with_name(f"{master.stem}.shard-{shard}.h5")


def texts(
    config: Config, name: str, layout: FlatLayout, data: dict[str, Any], chain: Sequence[dict], scale: float = 1.0
) -> dict[str, Any]:
    """Return what every checkpoint of a run says of it.

    Parameters
    ----------
    name
        The name that was asked for; that of the outputs may have a number.
    layout
        Names, offsets and shapes of the parameters.
    data
        Shape of an example, number of outputs, number of examples, SHA-256 of the labels.
    chain
        Configurations of the runs that this one came from, oldest first.
    scale
        What the data are multiplied with on their way into the network.
    """
    entries = [(e.name, e.offset, e.shape) for e in layout.entries]
    return {
        "config": json.loads(config.text()), "layout": entries, "data": data, "chain": list(chain),
        "modules": [SOURCES[path] for path in config.model.modules], "name": name, "size": layout.size, "scale": scale,
    }  # fmt: skip


def store(file: h5py.File, name: str, values: np.ndarray | Any) -> None:
    """Write a small array with checksums, or anything else as JSON."""
    if not isinstance(values, np.ndarray):
        values = np.frombuffer(json.dumps(values).encode(), np.uint8)
    create(file, name, values.shape, values.dtype)[...] = values


def create(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """Make a dataset whose chunks have checksums, cut along its first axis."""
    rows = max(1, CHUNK // max(1, dtype.itemsize * int(np.prod(shape[1:]))))
    chunks = (max(1, min(rows, shape[0])), *(max(1, n) for n in shape[1:]))
    return file.create_dataset(name, shape, dtype, maxshape=tuple(max(1, n) for n in shape), chunks=chunks, fletcher32=True)


def text(file: h5py.File, name: str) -> Any:
    """Read what `store` wrote as JSON."""
    return json.loads(file[name][:].tobytes())
