"""Timing a dense network against its packed form: interleaved in one run, medians, after a warm-up."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn

from dsprune.clock import medians
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
    return medians(forms, seconds=seconds, device=images.device)


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
