"""One example is read as NaN, which no check of the file can see; a checkpoint is damaged; disks block; called by `several.py`."""

from __future__ import annotations

import threading
from pathlib import Path

import h5py
import numpy as np

from dbnet.checkpoint.format import part_of
from dbnet.checkpoint.parts import PartFile
from dbnet.comm import mpi
from dbnet.data.batches import Batches
from dbnet.data.portions import Reader


def spoil(example: int) -> None:
    """Spoil one example of all that is trained from now on."""

    def spoil_kind(kind: type) -> None:
        right = kind.next

        def spoiled(self: object, x: np.ndarray) -> int:
            count = right(self, x)
            # A partition may have no input of its own.
            x[:1, [j for j in range(count) if self.example(j) == example]] = np.nan
            return count

        kind.next = spoiled

    spoil_kind(Batches)
    spoil_kind(Reader)


def hurt(link: str, shard: int, name: str) -> None:
    """Flip one bit of a dataset in a shard's part of the checkpoint behind a link."""
    from mpi4py import MPI

    if mpi.launched_rank() == 0:
        path = part_of(Path(link).resolve(), shard)
        with h5py.File(path) as file:
            at = file[name].id.get_chunk_info(0).byte_offset
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
    MPI.COMM_WORLD.Barrier()


def block() -> None:
    """Let the disk take nothing from a shard that would wait for it itself."""
    right = PartFile.write

    def write(part: PartFile, *what: object) -> None:
        if threading.current_thread() is threading.main_thread():
            raise OSError("the shard itself waits for the disk")
        right(part, *what)

    PartFile.write = write
