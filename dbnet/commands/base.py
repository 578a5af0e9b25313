"""Arguments that several commands take."""

from __future__ import annotations

import argparse


def add_run_file(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add a run file and changes of it."""
    often = {"nargs": "?"} if optional else {}
    parser.add_argument("run_file", metavar="RUN.toml", help="the run file; examples are in jobs/", **often)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="table.key=value",
        help="changes, for example topology.replicas=4; 'table.key=' takes a key out of the run file",
    )  # fmt: skip


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add --force."""
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
