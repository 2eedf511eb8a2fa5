"""The project's one clock: calls timed in turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Times", "check_seconds", "freed_memory_kept", "in_turns", "interleaved", "medians", "synchronise"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds a call, of each burst of calls.

    ``wall``: wall-clock time; ``cpu``: processor time of the whole process; ``thread``: of the calling
    thread.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    thread: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of wall-clock time."""
        return statistics.median(self.wall)

    def to_json(self) -> dict[str, Any]:
        """Medians and minima, as a dictionary of plain types."""
        return {
            "cpu_median": statistics.median(self.cpu),
            "cpu_least": min(self.cpu),
            "wall_median": self.median,
            "wall_least": min(self.wall),
            "bursts": len(self.wall),
        }


def check_seconds(seconds: float) -> None:
    """Raises ValueError for a duration that is not above 0 and finite."""
    if isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected more than 0 and less than infinity, got {seconds!r}")


def synchronise(device: torch.device) -> None:
    """Waits for what a GPU has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def freed_memory_kept(size: int = 1 << 28) -> Iterator[None]:
    """Has the C library keep what is freed in the block, up to about ``size`` bytes, for later allocations.

    Whether glibc gives the end of its heap back to the system after each call, and fetches it again (zeroed,
    page by page) in the next one, hangs on where in the heap some other object happens to lie; a dense
    network on a CPU takes up to half as long again where it does. Here free memory is put below a block that
    stays. Nothing is changed for good, and on other systems nothing is done.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    part = 1 << 16  # below the size from which on glibc asks the system for each block
    blocks = [library.malloc(part) for _ in range(size // part)]
    last = library.malloc(part)
    for block in blocks:
        library.free(block)
    try:
        yield
    finally:
        library.free(last)


CPU = torch.device("cpu")


def in_turns(
    calls: Mapping[str, Call],
    *,
    seconds: float = 0.5,
    least: int = 5,
    most: int | None = None,
    burst: float = 0.02,
    device: torch.device = CPU,
) -> dict[str, Times]:
    """Times each call.

    Bursts of at least ``burst`` seconds, of one call at least, take turns. The first call of a burst is not
    counted where there are more: each form is measured with the caches as it leaves them itself. Gradients
    are off (not inference mode: a compiled form was traced so, and all are to run alike), each call is first
    made three times, and on a CPU freed memory is kept for the next call (``freed_memory_kept``).

    Args:
        calls: functions without arguments by name; what they return is dropped.
        seconds: spent on each call, about.
        least, most: bursts of each call; None: as many as there is time for.
        device: where they run; on a GPU each burst is waited for.

    Raises:
        ValueError: no calls, ``seconds`` or ``burst`` not above 0, ``least`` below 1. What a call raises.
    """
    check_seconds(seconds)
    if not calls:
        raise ValueError("calls: expected at least one")
    if isinstance(least, bool) or not isinstance(least, int) or least < 1:
        raise ValueError(f"least: expected an integer of at least 1, got {least!r}")
    clocks = (time.perf_counter, time.process_time, time.thread_time)

    def timed(call: Call, count: int) -> list[float]:
        synchronise(device)
        starts = [clock() for clock in clocks]
        for _ in range(count):
            call()
        synchronise(device)
        return [1e3 * (clock() - start) / count for clock, start in zip(clocks, starts, strict=True)]

    with torch.no_grad(), freed_memory_kept() if device.type == "cpu" else nullcontext():
        counts = []
        for call in calls.values():
            once = max(1e-4, min(max(timed(call, 1)) for _ in range(3)))
            counts.append(max(1, min(1000, math.ceil(1e3 * burst / once))))
        samples: list[list[list[float]]] = [[] for _ in calls]
        end = time.perf_counter() + seconds * len(calls)
        turns = 0
        while turns < least or (time.perf_counter() < end and (most is None or turns < most)):
            for kept, call, count in zip(samples, calls.values(), counts, strict=True):
                if count > 1:
                    call()
                kept.append(timed(call, count))
            turns += 1
    return {
        name: Times(*map(tuple, zip(*kept, strict=True))) for name, kept in zip(calls, samples, strict=True)
    }


def medians(
    calls: Mapping[str, Call], *, seconds: float = 0.5, device: torch.device = CPU
) -> dict[str, float]:
    """The median wall-clock time of each call, in milliseconds; see ``in_turns``, whose errors it raises."""
    return {name: times.median for name, times in in_turns(calls, seconds=seconds, device=device).items()}


def interleaved(
    calls: Sequence[Call], device: torch.device, *, seconds: float = 0.2, least: int = 9
) -> list[float]:
    """The duration of each call, in milliseconds, measured in turns: for comparing forms with one another.

    As ``in_turns``, in bursts of at least 2 ms. A form's duration is the lower quintile of its bursts: where
    other processes take the processor away, most bursts are lengthened, and a median says how busy the
    machine was. With one thread on a CPU the clock is the thread's own processor time, for the same reason;
    else it is wall-clock time.

    Args:
        calls: functions without arguments, at least one; what they return is dropped.
        device: where they run: ``torch.device("cpu")`` or a CUDA device.
        seconds: spent on each call, about, unless ``least`` asks for more. More than 0.
        least: bursts of each call, at least 1.

    Returns:
        Milliseconds per call, in the order of ``calls``.

    Raises:
        TypeError, ValueError: an argument that is not of this form. What a call raises.
    """
    calls = list(calls)
    if not calls or not all(callable(call) for call in calls):
        raise TypeError(f"calls: expected functions without arguments, at least one, got {calls!r}")
    if not isinstance(device, torch.device):
        raise TypeError(f"device: expected a torch.device, got {device!r}")
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    named = {str(number): call for number, call in enumerate(calls)}
    most = max(least, 200) if isinstance(least, int) else None
    times = in_turns(named, seconds=seconds, least=least, most=most, burst=0.002, device=device)
    taken = [found.thread if alone else found.wall for found in times.values()]
    return [sorted(bursts)[len(bursts) // 5] for bursts in taken]
