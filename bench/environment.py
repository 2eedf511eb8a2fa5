"""What a measurement depends on."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import dsp_kernels
from dsp_kernels.backends import native_module

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str | None:
    """The commit that is measured, with "-dirty" where tracked files differ from it: what DSP_COMMIT says,
    for machines without git, else what git says; None where neither does.
    """
    if named := os.environ.get("DSP_COMMIT"):
        return named
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed, in place of giving it back and fetching it again (zeroed, page by page)
    for the next allocation, which can cost more than the kernels that are timed. For every form alike: what
    is compared is computation. False where the C library has no such setting.
    """
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(mallopt(mmap_max, 0))


def environment() -> dict[str, Any]:
    """The machine, the versions, the commit and the time of day."""
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
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
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


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """The process on its first ``cores`` processors for the block, where the system lets one choose."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:cores]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
