"""`dbnet data`: prepare a data file from a known format. The formats are a family; their fields are the options."""

from __future__ import annotations

import argparse

from dbnet.commands.base import add_force
from dbnet.core.files import refuse_taken
from dbnet.core.registry import family, make
from dbnet.data import file
from dbnet.monitor.inspect import describe


def data_arguments(parser: argparse.ArgumentParser) -> None:
    layout = file.__doc__.split("\n\n", 1)[1].rstrip()
    parser.description = "Prepare a data file (HDF5) from a known format.\n\n" + layout
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="FORMAT")
    for kind, member in sorted(family("data.formats").items()):
        line = member.__doc__.split("\n")[0]
        one = kinds.add_parser(kind, help=line, description=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, field in member.model_fields.items():
            flag = f"--{name.replace('_', '-')}"
            one.add_argument(
                flag, required=field.is_required(), default=field.default, help=field.description, metavar=name.upper()
            )
        one.add_argument("out", metavar="OUT.h5", help="the data file to write")
        add_force(one)


def run_data(options: argparse.Namespace) -> None:
    refuse_taken(options.out, options.force)
    fields = family("data.formats")[options.kind].model_fields
    source = make("data.formats", {"kind": options.kind, **{name: getattr(options, name) for name in fields}}, "data")
    file.write(options.out, source.read(), options.force)
    print(f"{options.out}: {describe(options.out)}")
