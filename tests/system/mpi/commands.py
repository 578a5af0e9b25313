"""Run several commands of the command line one after another on the ranks of one mpirun: commands.py LIST.json."""

import json
import sys
from pathlib import Path

from dbnet.__main__ import main

for command in json.loads(Path(sys.argv[1]).read_text()):
    code = main(command)
    if code:
        sys.exit(code)
