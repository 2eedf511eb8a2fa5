"""``python -m bench.exports --out DIR``: packed networks in ONNX Runtime, beside dense ones."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch

import dsprune
from bench.cases import cases
from bench.environment import environment, keep_freed_memory
from dsprune.export import FORMS
from dsprune.io import write_atomically
from dsprune.recipes.latency import interleaved_medians


def session(data: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(
    out: Path, *, checkpoints: Path | None, suite: str, only: str, seconds: float, threads: list[int]
) -> dict[str, Any]:
    """Writes exports.json into ``out`` after each network; a row a network, batch and number of threads."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": environment(), "seconds_a_cell": seconds, "rows": []}
    warnings.simplefilter("ignore")
    for case in cases(checkpoints, suite):
        if only not in case.name:
            continue
        model, example = case.make(), torch.randn(1, *case.input_shape)
        packed = dsprune.pack(model, example)
        dense = dsprune.pack(_without_zeros(model), example)
        files = {}
        for name, network, form in (("dense", dense, "dense"), *((f, packed, f) for f in FORMS)):
            label = f"onnx {name}" if network is dense else f"onnx packed, {name}"
            path = dsprune.export_onnx(network, example, out / "case.onnx", form=form, check=True)
            files[label] = path.read_bytes()
            path.unlink()
        for count in threads:
            torch.set_num_threads(count)
            for batch in case.batches:
                images = torch.randn(batch, *case.input_shape)
                calls: dict[str, Any] = {"packed": lambda packed=packed, images=images: packed(images)}
                for label, data in files.items():
                    runtime = session(data, count)
                    feed = {runtime.get_inputs()[0].name: images.numpy()}
                    calls[label] = lambda runtime=runtime, feed=feed: runtime.run(None, feed)
                times = interleaved_medians(calls, seconds=seconds)
                results["rows"].append(
                    {"case": case.name, "batch": batch, "threads": count, "times_ms": times}
                )
        write_atomically(out / "exports.json", (json.dumps(results, indent=1) + "\n").encode())
    return results


def _without_zeros(model: torch.nn.Module) -> torch.nn.Module:
    """The network as it was before pruning, as far as time is concerned."""
    dense = dsprune.graph.clean_copy(model)
    with torch.no_grad():
        for module in dense.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.add_(1e-3 * torch.randn_like(module.weight))
            elif isinstance(module, torch.nn.BatchNorm2d) and module.affine:
                module.weight.add_(1e-3)
    return dense


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = list(results["rows"][0]["times_ms"]) if results["rows"] else []
    lines = [
        "| network | batch | threads | " + " | ".join(f"{name}, ms" for name in names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in results["rows"]:
        cells = " | ".join(f"{row['times_ms'][name]:.3f}" for name in names)
        lines.append(f"| {row['case']} | {row['batch']} | {row['threads']} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exports", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--suite", choices=("authors", "cifar", "imagenet", "all"), default="authors")
    parser.add_argument("--checkpoints", type=Path, help="folder with the authors' ResNet-20 networks")
    parser.add_argument("--only", default="", help="only networks whose name holds this")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each form in each cell")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    keep_freed_memory()
    print(table(run(**vars(options))))


if __name__ == "__main__":
    main()
