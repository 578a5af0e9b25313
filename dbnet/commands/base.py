"""TODO."""

from __future__ import annotations

import argparse
from typing import Any


def _command(commands: Any, name: str, function: Any, help_text: str, description: str = "") -> argparse.ArgumentParser:
    made = commands.add_parser(
        name, help=help_text, description=description or help_text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.set_defaults(run=function)
    return made


def _run_file(made: argparse.ArgumentParser) -> None:
    made.add_argument("run_file", metavar="RUN.toml", help="the run file; examples are in jobs/")
    made.add_argument(
        "overrides", nargs="*", default=[], metavar="table.key=value",
        help="changes, for example topology.replicas=4; 'table.key=' takes a key out of the run file",
    )  # fmt: skip
