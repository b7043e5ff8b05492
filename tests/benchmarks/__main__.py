"""Everything that vitkit is compared with, as one Markdown table: training steps, evaluations, data paths, the start.

    python -m tests.benchmarks [jepa clip vae triplets evaluation data_path start] [--quick] [--no-compile] [--rounds 5] [--threads 1]

    python -m tests.benchmarks time-to-accuracy [mnist cifar10]

needs `pip install -e '.[bench]'`. In each row vitkit, the peer as its documentation shows it, the same peer tuned by hand and
the ceiling take turns in one process: a machine's better and worse minutes fall on all, and their ratios hardly move. Cells
of peers say how many times as fast vitkit is, the median over rounds with the least and the largest. The ceiling is what
vitkit's step would take if it did its matrix products and convolutions alone, forward and backward, each in its own shape and
dtype; its cells say how much of that rate vitkit reaches. With one thread seconds are the processor's, otherwise the wall's.
"""

import argparse
import datetime
import importlib
import os
import sys
from dataclasses import astuple

import torch

from vitkit.runs import processor

from .timing import Options, Row

SYSTEMS = ("jepa", "clip", "vae", "triplets", "evaluation", "data_path", "start", "recipes")
COLUMNS = (
    "system", "what", "vitkit", "× as documented", "× tuned by hand", "of the ceiling", "wanted", "beside",
)  # fmt: skip


def bf16_unit() -> str:
    checks = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    return next((name for name, check in checks.items() if getattr(torch.cpu, check, bool)()), "no bf16 unit")


def line(row: Row) -> str:
    return "| " + " | ".join(astuple(row)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("systems", nargs="*", metavar="NAME", help=f"of {', '.join(SYSTEMS)}; all where none is given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small batches and two rounds: whether it works, not how fast")
    parser.add_argument("--no-compile", action="store_true", help="peers tuned by hand without torch.compile")
    if sys.argv[1:2] == ["time-to-accuracy"]:
        from .time_to_accuracy import main as time_to_accuracy

        return time_to_accuracy(sys.argv[2:])
    given = parser.parse_args()
    unknown = [name for name in given.systems if name not in SYSTEMS]
    if unknown:
        parser.error(f"no benchmark named {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    torch.set_num_threads(given.threads)
    options = Options(2 if given.quick else given.rounds, given.threads, not given.no_compile, given.quick)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for name in given.systems or SYSTEMS:
        for row in importlib.import_module(f".{name}", __package__).rows(options):
            print(line(row), flush=True)
    tuned = "compiled" if options.compiled else "not compiled"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"\n{datetime.date.today()}, {processor()} with {bf16_unit()}, {os.cpu_count()} cores{load}; torch "
        f"{torch.__version__}, {given.threads} thread(s), {options.rounds} rounds, peers tuned by hand {tuned}, seed 0"
    )


if __name__ == "__main__":
    main()
