"""Run several commands of the command line one after another on the ranks of one mpirun: several.py LIST.json [FOLDER].

A command is a list of words; {"call": "MODULE.FUNCTION", "with": [...]} has every rank call a function of a module in this folder.
Without FOLDER the first command that fails ends all; with it all are run, and what rank R says of command I goes to FOLDER/I.R.out
and I.R.err, its exit code to I.R.code.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from dbnet.__main__ import main
from dbnet.comm import mpi


def heard(command: list[str], place: Path, number: int) -> None:
    """Run a command with this rank's output and exit code going to files, whoever writes: Python, MPI or a library."""
    rank, kept = mpi.launched_rank(), (os.dup(1), os.dup(2))
    for stream, ending in ((1, "out"), (2, "err")):
        file = os.open(place / f"{number}.{rank}.{ending}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, stream)
        os.close(file)
    try:
        code = main(command)
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    for stream, before in enumerate(kept, 1):
        os.dup2(before, stream)
        os.close(before)
    (place / f"{number}.{rank}.code").write_text(str(code))


if __name__ == "__main__":
    for number, command in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        if isinstance(command, dict):
            module, _, function = command["call"].partition(".")
            getattr(importlib.import_module(module), function)(*command["with"])
        elif len(sys.argv) > 2:
            heard(command, Path(sys.argv[2]), number)
        elif code := main(command):
            sys.exit(code)
