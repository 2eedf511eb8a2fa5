"""Timing a dense network against its packed form: interleaved in one run, medians, after a warm-up."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

from dsprune.recipes.runtimes import runtime_forms

Call = Callable[[], torch.Tensor]
PACKED_FORMS = ("packed", "channel pruning")


def dense_forms(
    model: nn.Module, images: torch.Tensor, *, inductor: bool = False, file: bytes | None = None
) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to run a dense network that packed networks are measured against, each ready to call.

    `model` is in eval mode; `images`: float32 (N, C, H, W). Eager, eager on channels_last images, frozen
    TorchScript, on a CPU the runtimes that are installed (OpenVINO, ONNX Runtime, on torch's number of
    threads), and with `inductor` torch.compile with freezing (which compiles for a minute or so).
    A form that fails to build is left out, Inductor with a warning that says why. `file` is the model as
    `runtimes.onnx_file` gives it, where it is at hand.
    """
    import copy

    forms: dict[str, Call] = {"eager": lambda: model(images)}
    last = images.contiguous(memory_format=torch.channels_last)
    model_last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    forms["channels_last"] = lambda: model_last(last)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            frozen = torch.jit.freeze(torch.jit.trace(copy.deepcopy(model), images))
            frozen(images)
        forms["TorchScript"] = lambda: frozen(images)
    except RuntimeError:
        pass
    if not images.is_cuda:
        forms.update(runtime_forms(model, images, file=file)[0])
    if inductor:
        import torch._inductor.config as config

        try:
            with config.patch(freezing=True), torch.no_grad():
                compiled = torch.compile(copy.deepcopy(model))
                compiled(images)
            forms["Inductor"] = lambda: compiled(images)
        except Exception as error:  # no compiler, or one of the many things that stop it
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"Inductor is not timed: {text}", stacklevel=2)
    return forms


def check_seconds(seconds: float) -> None:
    """Raises ValueError for a duration that is not above 0 and finite."""
    if isinstance(seconds, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected more than 0 and less than infinity, got {seconds!r}")


def interleaved_medians(
    calls: Mapping[str, Call], *, seconds: float = 0.5, warmup: int = 3
) -> dict[str, float]:
    """The median duration of each call, in milliseconds.

    The calls take turns, so that whatever else the machine does meets all of them. A turn is a burst of about
    20 ms (one call at least), of which the first call is not counted where there are more: each form is
    measured with the caches as it leaves them itself, not as the others do. `seconds` is the time spent on
    each, with at least five turns.

    Raises ValueError for `seconds` that are not above 0.
    """
    check_seconds(seconds)
    # no_grad, not inference_mode: a compiled form was traced so, and all are to run alike.
    with torch.no_grad():
        bursts: dict[str, int] = {}
        for name, call in calls.items():
            for _ in range(warmup):
                start = time.perf_counter()
                call()
                bursts[name] = max(1, min(200, int(0.02 / (time.perf_counter() - start))))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        end = time.perf_counter() + seconds * len(calls)
        turns = 0
        while turns < 5 or time.perf_counter() < end:
            for name, call in calls.items():
                for i in range(bursts[name]):
                    start = time.perf_counter()
                    call()
                    if i > 0 or bursts[name] == 1:
                        samples[name].append(time.perf_counter() - start)
            turns += 1
    return {name: 1e3 * statistics.median(times) for name, times in samples.items()}


def compare(
    dense: nn.Module,
    packed: nn.Module,
    images: torch.Tensor,
    *,
    seconds: float = 0.5,
    inductor: bool = False,
    channel_pruned: nn.Module | None = None,
) -> dict[str, float]:
    """Medians in milliseconds of every dense form and of "packed", measured in one run on `images`.

    `channel_pruned`: a packed network with one group a layer, to stand beside it as "channel pruning".

    Raises ValueError for `seconds` that are not above 0.
    """
    dense.eval()
    packed.eval()
    forms = dense_forms(dense, images, inductor=inductor)
    forms["packed"] = lambda: packed(images)
    if channel_pruned is not None:
        other = channel_pruned.eval()
        forms["channel pruning"] = lambda: other(images)
    if images.is_cuda:
        forms = {name: _waited(call) for name, call in forms.items()}
    return interleaved_medians(forms, seconds=seconds)


def _waited(call: Call) -> Call:
    def run() -> torch.Tensor:
        out = call()
        torch.cuda.synchronize()
        return out

    return run


def best_dense(times: Mapping[str, float]) -> tuple[str, float]:
    """The name and the milliseconds of the fastest dense form in what `compare` returned."""
    name = min((name for name in times if name not in PACKED_FORMS), key=lambda name: times[name])
    return name, times[name]


def random_images(batch: int, channels: int, size: int) -> torch.Tensor:
    """Standard normal images (batch, channels, size, size), float32, always the same.

    Raises ValueError for a batch below 1.
    """
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, size, size, generator=generator)
