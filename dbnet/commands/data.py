"""TODO."""

from __future__ import annotations

import argparse
from typing import Any

from dbnet.commands.base import _command
from dbnet.core.files import refuse_taken

# --- data ---------------------------------------------------------------------------------------------------------------------


def _data(commands: Any) -> None:
    from dbnet.core.registry import family
    from dbnet.data import file

    layout = file.__doc__.split("\n\n", 1)[1].rstrip()
    made = commands.add_parser(
        "data", help="prepare a data file", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prepare a data file (HDF5) from a known format.\n\n" + layout,
    )  # fmt: skip
    kinds = made.add_subparsers(dest="kind", required=True, metavar="FORMAT")
    for kind, member in sorted(family("data.formats").items()):
        one = _command(kinds, kind, data, member.__doc__.split("\n")[0])
        for name, field in member.model_fields.items():
            flag = f"--{name.replace('_', '-')}"
            one.add_argument(
                flag, required=field.is_required(), default=field.default, help=field.description, metavar=name.upper()
            )
        one.add_argument("out", metavar="OUT.h5", help="the data file to write")
        one.add_argument("--force", action="store_true", help="replace a file that is there")


def data(options: argparse.Namespace) -> None:
    from dbnet.core.registry import family, make
    from dbnet.data.file import write
    from dbnet.monitor.inspect import describe

    refuse_taken(options.out, options.force)
    fields = family("data.formats")[options.kind].model_fields
    source = make("data.formats", {"kind": options.kind, **{name: getattr(options, name) for name in fields}}, "data")
    write(options.out, source.read(), options.force)
    print(f"{options.out}: {describe(options.out)}")
