"""Crashes: who died of a defect's signal, like a segmentation fault, as jobs/survive has written it down.

A replica that was killed is a misfortune, which a run survives; one that crashed shows a defect, which must not look like success.
The wrapper of a rank writes a file with the rank's number into the folder DBNET_CRASHES, which jobs/launch makes.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from dbnet.comm.topology import Topology


class Crashes:
    """What was written down; without a folder nobody ever crashes.

    Parameters
    ----------
    folder
        Where: a file per rank, with the signal's number and name.
    world
        Who the ranks are.
    """

    def __init__(self, folder: str | Path | None, world: Topology) -> None:
        self._folder, self._world = None if folder is None else Path(folder), world

    @classmethod
    def of_launch(cls, world: Topology) -> Crashes:
        """Return those of the run that jobs/launch has started, if it did."""
        return cls(os.environ.get("DBNET_CRASHES"), world)

    def signals(self) -> dict[int, str]:
        """Return what each rank that has crashed died of, like 'signal 6, abort'."""
        if self._folder is None:
            return {}
        files = {int(path.name): path.read_text() for path in self._folder.glob("[0-9]*") if path.name.isdigit()}
        return {rank: "signal {}, {}".format(*files[rank].strip().split(" ", 1)) for rank in sorted(files)}

    def repeated(self) -> str:
        """Return the signal that two ranks died of; nothing where none did."""
        return next((name for name, many in Counter(self.signals().values()).items() if many > 1), "")

    def summary(self) -> str:
        """Return who has crashed, a line each; nothing where nobody has."""
        lines = []
        for rank, name in self.signals().items():
            who = self._world.name(rank)
            lines.append(f"{who[0].upper()}{who[1:]} crashed ({name}): that is a defect, not a kill; exit code 1.")
        return "\n".join(lines)
