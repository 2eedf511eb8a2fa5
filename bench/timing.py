"""Forms of one network timed in turns: processor time and wall-clock time of each call."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

BURST = 0.05  # seconds


@dataclass(frozen=True)
class Times:
    """Milliseconds a call: processor time of the whole process, and wall-clock time; over bursts of calls."""

    cpu_median: float
    cpu_least: float
    wall_median: float
    wall_least: float
    bursts: int

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain types."""
        return asdict(self)


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


def in_turns(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 1.0, least: int = 5
) -> dict[str, Times]:
    """Times each call, in milliseconds.

    Bursts of about 50 ms take turns, so that whatever else the machine does meets all forms. The first call
    of a burst is not counted: each form is measured with the caches as it leaves them itself. ``seconds`` is
    spent on each form, with at least ``least`` bursts. Gradients are off.

    Raises ValueError for no calls, ``seconds`` that are not above 0, or ``least`` below 1.
    """
    if not calls:
        raise ValueError("calls: expected at least one")
    if not seconds > 0:
        raise ValueError(f"seconds: expected more than 0, got {seconds!r}")
    if least < 1:
        raise ValueError(f"least: expected at least 1, got {least!r}")
    with torch.no_grad():
        counts = {}
        for name, call in calls.items():
            once = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                call()
                once = min(once, time.perf_counter() - start)
            counts[name] = max(2, min(500, int(BURST / once)))
        cpu: dict[str, list[float]] = {name: [] for name in calls}
        wall: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds * len(calls)
        turns = 0
        while turns < least or time.perf_counter() < end:
            for name, call in calls.items():
                call()
                began, start = time.process_time(), time.perf_counter()
                for _ in range(counts[name]):
                    call()
                wall[name].append(1e3 * (time.perf_counter() - start) / counts[name])
                cpu[name].append(1e3 * (time.process_time() - began) / counts[name])
            turns += 1
    return {
        name: Times(*(f(values[name]) for values in (cpu, wall) for f in (statistics.median, min)), turns)
        for name in calls
    }
