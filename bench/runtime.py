"""``python -m bench.runtime --out DIR``: start-up, memory and latency beside ONNX Runtime and OpenVINO.

Each form in processes of its own without torch, one thread, batch 1: the packed network from a program file,
the dense network (before pruning) from ONNX. Beside them the C example as a whole process. ``--python`` names
an interpreter that has the other runtimes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dsprune
from bench.environment import ROOT, environment
from dsp_kernels import config, runtime
from dsprune.io import write_atomically

CUT = 0.7  # of the multiply-adds, in two random groups a layer
ROUNDS = 7  # processes of each form; the medians are written
FORMS = ("packed", "onnxruntime", "openvino")
NETWORKS = {
    "ResNet-20": (lambda: dsprune.models.cifar_resnet(20), (3, 32, 32)),
    "ResNet-18": (dsprune.models.resnet18, (3, 224, 224)),
}


def pruned(model: nn.Module, x: torch.Tensor) -> dsprune.PackedNetwork:
    generator = torch.Generator().manual_seed(0)
    groups = {
        conv.name: torch.randint(2, (conv.out_channels,), generator=generator)
        for conv in dsprune.prunable_convs(model, x)
    }
    dsprune.apply_structure(model, dsprune.find_structure(model, x, groups, flops=CUT))
    return dsprune.pack(model, x)


def child(python: str, form: str, file: Path, given: Path, seconds: float) -> dict[str, Any] | str:
    command = [python, str(ROOT / "bench" / "runtime_child.py"), form, str(file), str(given), str(seconds)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def in_c(folder: Path, file: Path, given: Path) -> dict[str, Any]:
    """The C example as a whole process, from start to end: milliseconds, and the most that it held."""
    program, images = folder / "classify", folder / "x.f32"
    np.load(given).tofile(images)
    source = ROOT / "examples" / "c" / "classify.c"
    subprocess.run(["cc", "-O2", source, *config.cflags(), *config.libs(), "-o", program], check=True)
    command, taken = [program, file, images], []
    for _ in range(3 * ROUNDS):
        begin = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        taken.append(1e3 * (time.perf_counter() - begin))
    # Its results go to a pipe that nobody reads yet, so that it waits, done, to be looked at.
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen([*command, pipe], stdout=subprocess.DEVNULL) as process:
        time.sleep(2)
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        pipe.read_bytes()
    return {"process_ms": statistics.median(taken), "least_process_ms": min(taken), "held_bytes": held}


def measure(name: str, python: str, seconds: float) -> dict[str, Any]:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(1, *shape)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        dense, program, given = folder / "dense.onnx", folder / "net.dsp", folder / "x.npy"
        np.save(given, x.numpy())
        dsprune.export_onnx(dsprune.pack(model, x), x, dense)
        packed = pruned(model, x)
        dsprune.export_program(packed, program, shape)
        with torch.no_grad():
            wanted = packed(x).numpy().ravel()
        rows: dict[str, Any] = {}
        rounds: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
        for _ in range(ROUNDS):  # in turns
            for form in FORMS:
                file = program if form == "packed" else dense
                row = child(python, form, file, given, seconds)
                if isinstance(row, str):
                    rows[form] = {"failed": row}
                    continue
                output = np.array(row.pop("output"), np.float32)
                if form == "packed" and not np.array_equal(output, wanted):
                    raise RuntimeError("the runtime's output is not the packed network's")
                rounds[form].append(row)
        for form, found in rounds.items():
            if found:
                rows[form] = {key: statistics.median(row[key] for row in found) for key in found[0]}
        rows["packed"]["memory"] = runtime.load(program).memory()
        rows["packed"]["file_bytes"] = program.stat().st_size
        rows["packed in C"] = in_c(folder, program, given)
    return rows


def library() -> dict[str, int]:
    folder = config.cmake_folder().parent.parent
    return {name: (folder / name).stat().st_size for name in ("libdsp.so", "libdsp.a")}


def table(results: dict[str, Any]) -> str:
    env = results["environment"]
    lines = [
        "# The runtime without torch",
        "",
        f"`python -m bench.runtime`, {env['cpu']}, {env['date']}, commit {env['commit']}. {results['load']} "
        f"One thread, batch 1; medians of {ROUNDS} processes each, in turns; a call in CPU time, all else by "
        "the clock. *Held*: resident memory over an interpreter with NumPy, for C that of the whole process. "
        f"The packed networks are cut by {CUT:.0%} in two random groups a layer, the others are dense.",
        "",
        f"libdsp.so, stripped: {results['library']['libdsp.so'] / 1e6:.2f} MB; "
        f"libdsp.a: {results['library']['libdsp.a'] / 1e6:.2f} MB.",
        "",
        "| network | form | import ms | load ms | first call ms | call ms | least ms | held MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, rows in results["networks"].items():
        for form, row in rows.items():
            if "failed" in row:
                lines.append(f"| {name} | {form} | {row['failed']} |||||| ")
                continue
            keys = ("import_ms", "load_ms", "first_ms", "call_ms", "least_ms")
            cells = [f"{row[key]:.2f}" if key in row else "" for key in keys]
            if form == "packed in C":
                cells[1] = f"whole process {row['process_ms']:.1f}, least {row['least_process_ms']:.1f}"
            lines.append(f"| {name} | {form} | {' | '.join(cells)} | {row['held_bytes'] / 1e6:.1f} |")
        memory = rows["packed"]["memory"]
        lines.append(
            f"| {name} | *weights, arena, file* | | {memory['weight_bytes'] / 1e6:.1f}, "
            f"{memory['arena_bytes'] / 1e6:.1f}, {rows['packed']['file_bytes'] / 1e6:.1f} MB | | | | |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.runtime", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--python", default=sys.executable, help="has NumPy and the other runtimes")
    parser.add_argument("--only", default="", help="networks whose names have this in them")
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls in each process")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {
        "environment": environment(),
        "load": f"Load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores.",
        "library": library(),
        "networks": {},
    }
    for name in NETWORKS:
        if given.only in name:
            results["networks"][name] = measure(name, given.python, given.seconds)
            write_atomically(given.out / "runtime.json", (json.dumps(results, indent=1) + "\n").encode())
            write_atomically(given.out / "runtime.md", table(results).encode())
    print(table(results))


if __name__ == "__main__":
    main()
