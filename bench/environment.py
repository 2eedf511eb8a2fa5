"""What a measurement depends on."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch

import dsp_kernels
from dsp_kernels.backends import native_module


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    backends = dsp_kernels.available_backends()
    return {
        "cpu": model,
        "cores": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "backends": backends,
        "isa": native_module().cpu_isa() if backends["native"] is None else None,
    }


def peak_gflops(seconds: float = 0.5) -> float:
    """What one core can do in float32, in GFLOP/s: multiply-adds on registers, the best of many."""
    native = native_module()
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        flops = native.fma_rounds(100_000)
        best = max(best, 1e-9 * flops / (time.perf_counter() - start))
    return best
