"""``python -m bench --out DIR``: benchmarks as JSON, a table and a plot."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import layers, networks
from bench.environment import keep_freed_memory


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--suite", choices=("authors", "cifar", "imagenet", "all"), default="all")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder with the authors' ResNet-20 networks as state dicts"
    )
    parser.add_argument(
        "--authors", type=Path, help="a clone of irishev/DSP, whose own programs are timed too"
    )
    parser.add_argument("--layers", action="store_true", help="single layers in place of whole networks")
    parser.add_argument("--only", default="", help="only networks whose name holds this")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each form in each cell")
    parser.add_argument(
        "--rounds", type=int, default=3, help="how often each cell is measured: the median counts (networks)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--no-inductor", action="store_true", help="leave out Inductor, which compiles for minutes"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--quick", action="store_true", help="0.1 s a cell, no Inductor, no memory")
    options = parser.parse_args()
    for name in ("checkpoints", "authors"):
        folder = getattr(options, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name}: {folder} is no folder")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    keep_freed_memory()
    if options.layers:
        measured = layers.run(
            options.out,
            suite=options.suite,
            checkpoints=options.checkpoints,
            seconds=0.02 if options.quick else options.seconds,
            threads=tuple(options.threads),
            only=options.only,
        )
        print(layers.table(measured))
        return 0
    results = networks.run(
        options.out,
        only=options.only,
        suite=options.suite,
        checkpoints=options.checkpoints,
        authors=options.authors,
        seconds=0.1 if options.quick else options.seconds,
        rounds=1 if options.quick else options.rounds,
        threads=tuple(options.threads),
        inductor=not (options.no_inductor or options.quick),
        memory=not (options.no_memory or options.quick),
    )
    print(networks.table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
