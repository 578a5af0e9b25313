"""Arguments that several commands take."""

from __future__ import annotations

import argparse


def add_configuration(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Add a configuration and changes of it."""
    often = {"nargs": "?"} if optional else {}
    parser.add_argument("configuration", metavar="RUN.toml", help="the configuration; examples are in jobs/", **often)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="table.key=value",
        help="changes, for example topology.replicas=4; 'table.key=' takes a key out of the configuration",
    )  # fmt: skip


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add --force."""
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
