"""Comparisons of vitkit with other libraries, as one Markdown table: training steps, evaluations, data paths, start of the program.

    python -m tests.benchmarks [jepa clip vae triplets evaluation data_path start] [--quick] [--no-compile] [--rounds 5] [--threads 1]

    python -m tests.benchmarks time-to-accuracy [mnist cifar10 cifar100]
    python -m tests.benchmarks attention-cost
    python -m tests.benchmarks architectures [cifar10 cifar100] [--seconds 1800]
    python -m tests.benchmarks ssl [--seconds 3600] [--finetune 0.01 0.1 1]

It needs `pip install -e '.[bench]'`. In each row vitkit, the peer as its documentation shows it, the same peer tuned by hand and the
ceiling take turns in one process, so that a slow minute of the machine affects all of them and hardly changes their ratios. A cell of
a peer tells how many times as fast vitkit is: the median over rounds, with the smallest and the largest round. The ceiling is the time
of a step that does only its matrix products and convolutions, forward and backward, each in its own shape and dtype. Its cell tells
which share of that rate vitkit reaches. With one thread times are processor time; with more threads they are wall time.
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

SYSTEMS = ("jepa", "clip", "vae", "triplets", "evaluation", "data_path", "start", "recipes", "zoo")
OWN_TABLES = ("time-to-accuracy", "attention-cost", "architectures", "ssl")
"""Benchmarks with flags and a table of their own."""
COLUMNS = (
    "system", "row", "vitkit", "× as documented", "× tuned by hand", "% of ceiling", "target", "compared with",
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
    parser.add_argument("systems", nargs="*", metavar="NAME", help=f"{', '.join(SYSTEMS)}  [default: all]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small batches and two rounds: a test that the benchmarks run")
    parser.add_argument("--no-compile", action="store_true", help="peers tuned by hand without torch.compile")
    if sys.argv[1:2] in ([name] for name in OWN_TABLES):
        module = importlib.import_module("." + sys.argv[1].replace("-", "_"), __package__)
        return module.main(sys.argv[2:])
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
