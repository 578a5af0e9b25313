"""`dbnet data`: prepare a data file from a known format. The formats are a family; their fields are the options."""

from __future__ import annotations

import argparse
import sys
from typing import Literal, get_args, get_origin

from dbnet.commands.base import add_force
from dbnet.core.errors import UserError
from dbnet.core.files import refuse_taken
from dbnet.core.registry import family, make
from dbnet.data import file
from dbnet.data.preparation import HOW, held_out, normalized
from dbnet.monitor.inspect import describe


def data_arguments(parser: argparse.ArgumentParser) -> None:
    layout = file.__doc__.split("\n\n", 1)[1].rstrip()
    parser.description = (
        "Prepare a data file (HDF5) from a known format.\n\n"
        "  dbnet data images PHOTOS photos.h5 --size 32 --test 0.2 --normalize map\n"
        "  dbnet data npz mine.npz mine.h5 --validation 0.1\n\n" + layout
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="FORMAT")
    for kind, member in sorted(family("data.formats").items()):
        line = member.__doc__.split("\n")[0]
        about = f"{line}\n\n{sys.modules[member.__module__].__doc__}"
        one = kinds.add_parser(kind, help=line, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, field in member.model_fields.items():
            extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
            if extra.get("positional"):
                one.add_argument(name, metavar=name.upper(), help=field.description)
                continue
            allowed = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
            one.add_argument(
                f"--{name.replace('_', '-')}", required=field.is_required(), default=field.default, help=field.description,
                metavar="|".join(allowed) or name.upper(),
            )  # fmt: skip
        one.add_argument("out", metavar="OUT.h5", help="the data file to write")
        _preparation(one, with_test="test" not in member.model_fields and "test_images" not in member.model_fields)
        add_force(one)


def _preparation(parser: argparse.ArgumentParser, with_test: bool) -> None:
    """Add what is done to the examples of any format."""
    group = parser.add_argument_group("before it is written")
    if with_test:
        group.add_argument("--test", metavar="SHARE", help="hold out this share of the training set as the test set, like 0.2")
    group.add_argument(
        "--validation", metavar="SHARE",
        help="hold out this share of the training set as /validation, for evaluate.part = \"validation\"",
    )  # fmt: skip
    group.add_argument("--holdout-seed", metavar="SEED", default="1", help="which examples are held out (default: 1)")
    group.add_argument(
        "--normalize", metavar="HOW", default="no", choices=HOW,
        help="give every unit, or every map (colour channel), mean 0 and spread 1 on the training set: unit, map, no (default). "
        "The numbers are stored in the file, and raw data are brought to the same before they are predicted",
    )  # fmt: skip


def run_data(options: argparse.Namespace) -> None:
    refuse_taken(options.out, options.force)
    member = family("data.formats")[options.kind]
    source = make("data.formats", {"kind": options.kind, **{name: getattr(options, name) for name in member.model_fields}}, "data")
    seed = whole(options.holdout_seed, "--holdout-seed")
    parts = [part for part in ("test", "validation") if part in vars(options) and part not in member.model_fields]
    shares = {part: share(getattr(options, part), part) for part in parts}
    # Of the whole training set, not of what the other one has left.
    given = [part for part in shares if shares[part] is not None]
    if sum(shares[part] for part in given) >= 1:
        raise UserError(f"--{' and --'.join(given)} together leave nothing to train on.")
    contents, left = source.read(), 1.0
    for part in given:
        contents = held_out(contents, part, shares[part] / left, seed)
        left -= shares[part]
    file.write(options.out, normalized(contents, options.normalize), options.force)
    print(f"{options.out}: {describe(options.out)}")


def share(text: str | None, part: str) -> float | None:
    """Return the number between 0 and 1 that an option gives; UserError where it gives none."""
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = -1.0
    if value is not None and not 0 < value < 1:
        raise UserError(f"--{part} {text} is not a share of the training set; give a number between 0 and 1, like 0.1.")
    return value


def whole(text: str, option: str) -> int:
    """Return the whole number that an option gives; UserError where it gives none."""
    if not text.isdecimal():
        raise UserError(f"{option} {text} is not a whole number.")
    return int(text)
