"""An accelerator's ceilings: copy bandwidth of memory and of the second-level cache, matrix rates."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch


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
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[
            0
        ]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _copies(count: int, elements: int, device: torch.device) -> Callable[[], Any]:
    """A call that copies ``elements`` float32 ``count`` times: on a GPU under a graph, so that the host's
    launches are not what is timed.
    """
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(count):
            target.copy_(source)

    if device.type != "cuda":
        return copy
    copy()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copy()
    return graph.replay


def cache_bandwidth(device: torch.device, elements: int, count: int = 50) -> float | None:
    """Copy bandwidth in GB/s (bytes read and written) where both tensors stay in the second-level cache: from
    the difference between ``2 * elements`` and ``elements``, so that what a launch costs drops out. None
    where the difference is lost in the noise.
    """
    small, large = (seconds_of(_copies(count, n, device), device) / count for n in (elements, 2 * elements))
    return 8e-9 * elements / (large - small) if large > 1.05 * small else None


def ceilings(device: torch.device, elements: int, size: int) -> dict[str, Any]:
    """Copy bandwidths in GB/s (bytes read and written) of memory and of the second-level cache, and matrix
    rates in TFLOP/s.
    """
    out: dict[str, Any] = {}
    out["copy_gb_s"] = 8e-9 * elements / seconds_of(_copies(1, elements, device), device)
    # A tensor of an eighth of the cache, and one of a quarter: with what is written, half of it at most.
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 1 << 20
    out["cache_copy_gb_s"] = cache_bandwidth(device, cache // 8 // 4)
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        rate = 2e-12 * size**3 / seconds_of(lambda a=a: a @ a, device)  # type: ignore[misc]
        out[f"matmul_tflop_s_{str(dtype).removeprefix('torch.')}"] = rate
    return out
