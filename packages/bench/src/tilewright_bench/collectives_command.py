"""bench-collectives: measure the collectives of the ranks that torchrun starts."""

import argparse
from pathlib import Path

from tilewright_bench import collectives, plots
from tilewright_bench.saved import SavedRunError
from tilewright_dist import init_from_environment

CPU_MEGABYTES = 16.0
"""Largest message on CPUs, unless asked: a GiB through loopback takes seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of bench-collectives."""
    parser.add_argument("--device", choices=("cuda", "cpu"), help="[cuda where there is one]")
    parser.add_argument("--min-mb", type=float, default=2**-10, help="smallest [1 KiB]")
    parser.add_argument("--max-mb", type=float, help=f"largest [1024, on CPUs {CPU_MEGABYTES:.0f}]")
    names = collectives.COLLECTIVES
    parser.add_argument("--collectives", nargs="+", choices=names, default=names)
    dtypes = tuple(collectives.DTYPES)
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--csv", type=Path, help="write the table here as well")
    parser.add_argument("--svg", type=Path, help="draw bus bandwidth over size here")


def run(options: argparse.Namespace) -> int:
    """Measure on every rank, say it on the first.

    Raises:
        SavedRunError: Without torchrun, or no size between the limits.
    """
    with init_from_environment(options.device) as environment:
        if environment.process_group is None:
            raise SavedRunError(
                "collectives need several processes: "
                "torchrun --nproc-per-node 2 -m tilewright_bench collectives"
            )
        limit = options.max_mb or (1024.0 if environment.device.type == "cuda" else CPU_MEGABYTES)
        sizes = [s for s in collectives.SIZES if options.min_mb <= s / 2**20 <= limit]
        if not sizes:
            raise SavedRunError(f"no size between {options.min_mb} and {limit} MiB; 1 KiB to 1 GiB")
        measured = collectives.measure(
            environment.process_group,
            environment.device,
            names=options.collectives,
            sizes=sizes,
            dtypes=options.dtypes,
        )
        if environment.is_main:
            print(collectives.table(measured))
            if options.csv is not None:
                collectives.write_csv(measured, options.csv)
            if options.svg is not None:
                plots.draw(collectives.curves(measured), options.svg)
    return 0
