"""`dbnet bench`: run benchmarks, print their figures as a table, store them. One thread, unless a row says otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from dbnet.commands.bench.base import Row
from dbnet.core import jit
from dbnet.core.errors import UserError, nearest
from dbnet.core.registry import family, make
from dbnet.monitor import tables


def run(parts: Sequence[str], out: Path, repeat: int, ranks: int | None = None) -> None:
    """Measure the named parts (none: all), print the figures and store them in an HDF5 file."""
    known = family("commands.bench")
    for part in parts:
        if part not in known:
            raise UserError(f"'{part}' is not a part of the benchmark{nearest(part, known)}; parts are {', '.join(sorted(known))}.")
    if repeat < 1:
        raise UserError(f"--repeat {repeat} measures nothing; give 1 or more.")
    threadpool_limits(limits=1, user_api="blas")
    jit.set_threads(1)
    jit.warm("float32")
    rows: list[Row] = []
    for name in parts or sorted(known):
        print(f"{name}: {known[name].__doc__.splitlines()[0]}", flush=True)
        asked = {"ranks": ranks} if ranks is not None and "ranks" in known[name].model_fields else {}
        made = make("commands.bench", {"kind": name, **asked}, "bench").rows(repeat)
        for row in made:
            print(line(row), flush=True)
        rows += made
    tables.write(out, "bench", [row._asdict() for row in rows])
    print(f"Figures stored in {out}")


def line(row: Row) -> str:
    """Return one figure as text."""
    verdict = "" if not row.bar else ("ok" if holds(row) else "MISSED")
    compared = "" if row.other != row.other else f"{row.against:<20} {row.other:>9.4g}   ratio {row.ratio:6.3f}"
    return f"  {row.name:<52} {row.value:>9.4g} {row.unit:<8} {compared:<50} {row.bar:<8} {verdict:<6}  spread {row.spread:.2f}"


def holds(row: Row) -> bool:
    """Return whether a figure keeps to its bar."""
    sign, bound = row.bar.split()
    return row.ratio <= float(bound) if sign == "<=" else row.ratio >= float(bound)


def bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help="any of apply, layers, many_replicas, overhead, partitions, predict, record, run, simulate, space, start, step, wire "
        "(default: all)",
    )
    parser.add_argument("--out", default="bench.h5", metavar="OUT.h5", help="where the figures are stored (default: bench.h5)")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="repetitions of each measurement (default: 7)")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks that start and end at once in the part start (default: 8)")


def run_bench(options: argparse.Namespace) -> None:
    run(options.parts, Path(options.out), options.repeat, options.ranks)
