"""``python -m bench.steps --out DIR``: a packed network's program, step by step on one thread."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx

import dsprune
from bench.cases import Case, cases
from bench.environment import environment, peak_gflops, pinned
from dsprune.io import write_atomically
from dsprune.run.native import to_program


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    """The rows of one network: of ``rounds`` images the least and the median of each step, in milliseconds of
    the thread's clock; the core's peak is measured between images.

    Raises ValueError where the packed network is no program.
    """
    x = torch.randn(1, *case.input_shape)
    network = dsprune.pack(case.make(), x).network
    assert isinstance(network, fx.GraphModule)
    program, reason = to_program(network, case.input_shape)
    if program is None:
        raise ValueError(f"{case.name} is no program: {reason}")
    with pinned(1):
        runs, peaks = [], []
        for _ in range(rounds):
            runs.append(program.profile())
            peaks.append(peak_gflops(0.02))
    peak = max(peaks)
    rows = []
    for steps in zip(*runs, strict=True):
        times = [1e3 * step["seconds"] for step in steps]
        row = {key: steps[0][key] for key in ("step", "layout", "shape", "macs")}
        row |= {"ms_least": min(times), "ms_median": statistics.median(times)}
        row["share_of_peak"] = 2e-6 * row["macs"] / min(times) / peak
        rows.append(row)
    whole = [1e3 * sum(step["seconds"] for step in steps) for steps in runs]
    return {
        "case": case.name,
        "peak_gflops": peak,
        "load": os.getloadavg(),
        "ms_least": min(whole),
        "ms_median": statistics.median(whole),
        "steps": rows,
    }


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = []
    for case in results["cases"]:
        rows = case["steps"]
        least = sum(row["ms_least"] for row in rows)
        gflops = 2e-6 * sum(row["macs"] for row in rows) / least
        lines += [
            f"{case['case']}: peak of the core {case['peak_gflops']:.0f} GFLOP/s; load of the machine "
            f"{case['load'][0]:.1f}. All steps {least:.2f} ms (sum of the least), an image "
            f"{case['ms_least']:.2f} ms at least, {case['ms_median']:.2f} ms in the median; "
            f"{100 * gflops / case['peak_gflops']:.0f}% of the peak over all.",
            "",
            "| step | layout | result | MMACs | least, ms | median, ms | share of the time | of the peak |",
            "|" + "---|" * 8,
        ]
        for row in rows:
            share = f"{100 * row['share_of_peak']:.0f}%" if row["macs"] else ""
            lines.append(
                f"| {row['step']} | {row['layout']} | {'x'.join(map(str, row['shape']))} "
                f"| {row['macs'] / 1e6:.1f} | {row['ms_least']:.3f} | {row['ms_median']:.3f} "
                f"| {100 * row['ms_least'] / least:.1f}% | {share} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for steps.json and steps.md")
    parser.add_argument("--only", default="resnet50-g2-50%", help="only networks whose name holds this")
    parser.add_argument("--rounds", type=int, default=25, help="images of each network")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(), "rounds": options.rounds, "cases": []}
    for case in cases(None, "all"):
        if options.only in case.name:
            results["cases"].append(run_case(case, options.rounds))
            write_atomically(options.out / "steps.json", (json.dumps(results, indent=1) + "\n").encode())
            write_atomically(options.out / "steps.md", table(results).encode())
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
