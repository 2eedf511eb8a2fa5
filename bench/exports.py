"""``python -m bench.exports --out DIR``: packed networks in ONNX Runtime, beside dense ones."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dsprune
from bench.baselines import without_zeros
from bench.cases import Case, cases
from bench.environment import environment, keep_freed_memory
from dsprune.clock import medians
from dsprune.export import FORMS
from dsprune.io import write_atomically
from dsprune.recipes.runtimes import onnxruntime_session

TOLERANCE = 1e-4

PACKED, DENSE = "packed", "onnx dense"
LABELS = {form: f"onnx packed, {form}" for form in FORMS}


def run(
    out: Path, *, checkpoints: Path | None, suite: str, only: str, seconds: float, threads: list[int]
) -> dict[str, Any]:
    """Writes exports.json and exports.md into ``out`` after each network; a row a network, number of threads
    and batch. A file that does not give the packed network's outputs within 1e-4 is an error.
    """
    import onnxruntime

    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "environment": {**environment(), "onnxruntime": onnxruntime.__version__},
        "seconds_a_cell": seconds,
        "rows": [],
    }
    warnings.simplefilter("ignore")
    for case in cases(checkpoints, suite):
        if only in case.name:
            print(case.name, file=sys.stderr, flush=True)
            results["rows"] += run_case(case, threads, seconds)
            write_atomically(out / "exports.json", (json.dumps(results, indent=1) + "\n").encode())
            write_atomically(out / "exports.md", table(results).encode())
    return results


def run_case(case: Case, threads: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """One network: packed, its ONNX files in both forms, and that of the network before pruning."""
    model, example = case.make(), torch.randn(1, *case.input_shape)
    packed, dense = dsprune.pack(model, example), dsprune.pack(without_zeros(model), example)
    networks = {DENSE: (dense, "dense"), **{LABELS[form]: (packed, form) for form in FORMS}}
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, (network, form) in networks.items():
            path = dsprune.export_onnx(network, example, Path(folder) / "case.onnx", form=form, check=True)
            files[label] = path.read_bytes()
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        sessions = {label: onnxruntime_session(data, count) for label, data in files.items()}
        for batch in case.batches:
            images = torch.randn(batch, *case.input_shape)
            calls: dict[str, Any] = {PACKED: lambda images=images: packed(images)}
            differences = {}
            for label, runtime in sessions.items():
                feed = {runtime.get_inputs()[0].name: images.numpy()}
                calls[label] = lambda runtime=runtime, feed=feed: runtime.run(None, feed)
                with torch.no_grad():
                    expected = networks[label][0](images)
                difference = (torch.from_numpy(calls[label]()[0]) - expected).abs().max()
                differences[label] = float(difference / max(1.0, float(expected.abs().max())))
                if not differences[label] <= TOLERANCE:
                    raise RuntimeError(f"{case.name}: {label} differs by {differences[label]:.1e}")
            times = medians(calls, seconds=seconds)
            best = min(LABELS.values(), key=lambda label: times[label])
            rows.append(
                {
                    "case": case.name,
                    "batch": batch,
                    "threads": count,
                    "times_ms": times,
                    "best_form": best,
                    "speed_up_onnx": times[DENSE] / times[best],
                    "packed_over_onnx_dense": times[DENSE] / times[PACKED],
                    "differences": differences,
                    "bytes": {label: len(data) for label, data in files.items()},
                }
            )
    return rows


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = [DENSE, *LABELS.values(), PACKED]
    lines = [
        f"| network | batch | threads | {' | '.join(f'{name}, ms' for name in names)} "
        "| onnx: dense over the better packed form | onnx dense over packed |",
        "|---|---|---|" + "---|" * (len(names) + 2),
    ]
    for row in results["rows"]:
        cells = " | ".join(f"{row['times_ms'][name]:.3f}" for name in names)
        lines.append(
            f"| {row['case']} | {row['batch']} | {row['threads']} | {cells} | {row['speed_up_onnx']:.2f}x "
            f"| {row['packed_over_onnx_dense']:.2f}x |"
        )
    where = results["environment"]
    lines += [
        "",
        f"ONNX Runtime {where['onnxruntime']}. *onnx dense*: the network before pruning, BatchNorm folded; "
        "*onnx packed*: the files of `dsprune.export_onnx`; *packed*: the network itself. Medians, the forms "
        f"taking turns, {results['seconds_a_cell']:g} s a form. {where['cpu']}, torch {where['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exports", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for exports.json and exports.md")
    parser.add_argument("--suite", choices=("authors", "cifar", "imagenet", "all"), default="authors")
    parser.add_argument("--checkpoints", type=Path, help="folder with the authors' ResNet-20 networks")
    parser.add_argument("--only", default="", help="only networks whose name holds this")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each form in each cell")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    if options.checkpoints is not None and not options.checkpoints.is_dir():
        parser.error(f"--checkpoints: {options.checkpoints} is no folder")
    if options.suite == "authors" and options.checkpoints is None:
        parser.error("--suite authors needs --checkpoints, the folder of these networks")
    keep_freed_memory()
    results = run(**vars(options))
    if not results["rows"]:
        parser.error(f"--only: no network of the suite has {options.only!r} in its name")
    print(table(results))


if __name__ == "__main__":
    main()
