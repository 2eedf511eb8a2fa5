"""Peak memory of inference, each form in a process of its own: ``python -m bench.memory CASE FORM BATCH
THREADS``.

Counted is what the process holds at most while it runs the network, over what it held before the network was
made (Linux: VmHWM after a reset, less VmRSS). Both forms have dropped the network that they were made from.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

import dsprune
from bench.cases import cases
from dsprune.models import cifar_resnet


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(name: str, form: str, batch: int, threads: int, checkpoints: str | None) -> int:
    """Bytes that inference holds at most."""
    torch.set_num_threads(threads)
    case = next(c for c in cases(Path(checkpoints) if checkpoints else None, "all") if c.name == name)
    warnings.simplefilter("ignore")
    # Imports and one-time allocations of both ways of making a network come before the count.
    tiny = cifar_resnet(20).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        dsprune.pack(tiny, x)(x)
        torch.jit.freeze(torch.jit.trace(tiny, x))(x)
    del tiny, x
    settle()
    before = status("VmRSS")
    model = case.make()
    example = torch.randn(batch, *case.input_shape)
    with torch.no_grad():
        if form == "packed":
            network = dsprune.pack(model, example[:1])
        else:
            network = torch.jit.freeze(torch.jit.trace(model, example))
        del model
        network(example)
        network(example)
        settle()
        Path("/proc/self/clear_refs").write_text("5")
        for _ in range(5):
            network(example)
    return status("VmHWM") - before


def in_process(name: str, form: str, batch: int, threads: int, checkpoints: Path | None) -> int | None:
    """``measure`` in a fresh process; None where the machine does not tell."""
    command = [
        sys.executable,
        "-m",
        "bench.memory",
        name,
        form,
        str(batch),
        str(threads),
        str(checkpoints or ""),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parent.parent)
    if done.returncode != 0:
        return None
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    case_name, form_name, n, t, folder = sys.argv[1:6]
    print(json.dumps(measure(case_name, form_name, int(n), int(t), folder or None)))
