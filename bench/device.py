"""An accelerator's ceilings and the dense baselines on it: copy bandwidth, matrix rate, ResNet-50 and the
definition.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dsprune
from bench.cases import random_structure
from dsprune.io import write_atomically
from dsprune.models import cifar_resnet, resnet50


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int = 20) -> float:
    """Median duration of a call, the device's queue drained around each, after three calls to warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        call()
    samples = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        call()
        wait()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def driver() -> str | None:
    """The driver's version, where the machine tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def ceilings(device: torch.device, elements: int, size: int) -> dict[str, float]:
    """Copy bandwidth in GB/s (bytes read and written) and matrix rates in TFLOP/s."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    out = {"copy_gb_s": 8e-9 * elements / seconds_of(lambda: target.copy_(source), device)}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        rate = 2e-12 * size**3 / seconds_of(lambda a=a: a @ a, device)  # type: ignore[misc]
        out[f"matmul_tflop_s_{str(dtype).removeprefix('torch.')}"] = rate
    return out


def network_times(
    device: torch.device, make: Callable[[], nn.Module], batch: int, size: int, dtype: torch.dtype
) -> dict[str, float]:
    """Milliseconds of a network at 72% cut: dense eager in both formats, and packed on what can run there."""
    model = random_structure(make, (3, size, size), 0.72, 2)
    packed = dsprune.pack(model, torch.randn(1, 3, size, size)).to(device=device, dtype=dtype)
    model = model.to(device=device, dtype=dtype)
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    last = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        out = {"dense_ms": 1e3 * seconds_of(lambda: model(images), device, 5)}
        out["packed_reference_ms"] = 1e3 * seconds_of(lambda: packed(images), device, 5)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        out["dense_channels_last_ms"] = 1e3 * seconds_of(lambda: model(last), device, 5)
    return out


def run(out: Path, device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Measures a device and writes device.json into ``out``."""
    cuda = device.type == "cuda"
    small = (lambda: cifar_resnet(20), 2, 8) if quick else (resnet50, 256, 224)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "driver": driver() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ceilings": ceilings(device, 1 << (20 if quick else 28), 256 if quick else 8192),
        "network_72%": network_times(device, *small, torch.bfloat16),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "device.json", (json.dumps(results, indent=1) + "\n").encode())
    return results
