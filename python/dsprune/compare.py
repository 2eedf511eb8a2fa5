"""Whether two networks' outputs are the same up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .inputs import own_tensors, tensors_of

__all__ = ["TOLERANCE", "differs", "no_worse"]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FLIPPED = 1000  # one in so many integers may differ: the larger of two nearly equal scores
WORSE = 8  # times the dense network's own rounding error


def _numbers(value: torch.Tensor) -> torch.Tensor:
    value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
    return value.detach().double()


def differs(
    expected: torch.Tensor, given: torch.Tensor, tolerance: float | None = None, *, finite_inputs: bool = True
) -> str | None:
    """How ``given`` differs from ``expected`` by more than rounding; None where it does not.

    Floating-point and complex values may differ by ``tolerance`` (None: that of the dtype in ``TOLERANCE``)
    times the largest finite value of ``expected``, whatever that is. What is not finite in ``expected`` must
    be the same in ``given`` where the inputs were finite and the dtype is no half precision (whose sums
    overflow at places of their own). Of integers and booleans one in ``FLIPPED`` may be another.
    """
    if expected.shape != given.shape:
        return f"output shapes differ: {tuple(given.shape)} for {tuple(expected.shape)}"
    if expected.dtype != given.dtype:
        return f"output dtypes differ: {given.dtype} for {expected.dtype}"
    if expected.numel() == 0:
        return None
    if not (expected.is_floating_point() or expected.is_complex()):
        count = int((expected != given).sum())
        if count > expected.numel() // FLIPPED:
            return f"{count} of {expected.numel()} integers differ"
        return None
    e, g = _numbers(expected), _numbers(given)
    finite = e.isfinite()
    strict = finite_inputs and expected.dtype not in (torch.float16, torch.bfloat16)
    if strict and not bool(((e == g) | (e.isnan() & g.isnan()))[~finite].all()):
        return "outputs differ where the dense network's are not finite"
    if not finite.any():
        return None
    if tolerance is None:
        tolerance = TOLERANCE.get(expected.real.dtype if expected.is_complex() else expected.dtype, 1e-4)
    bound = tolerance * float(e[finite].abs().max())
    difference = float((e - g)[finite].abs().max())
    if not difference <= bound:
        return f"outputs differ by {difference:.3g}, where {bound:.3g} is accepted"
    return None


def no_worse(
    dense: nn.Module,
    args: Sequence[object],
    expected: Sequence[torch.Tensor],
    given: Sequence[torch.Tensor],
) -> bool:
    """Whether ``given`` is about as near to what ``dense`` computes in float64 as its own outputs
    ``expected`` are: outputs that are small because large ones cancel may differ by more than their scale.

    False where the network cannot run in float64.
    """

    def wide(value: torch.Tensor) -> torch.Tensor:
        return value.double() if value.is_floating_point() else value

    try:
        network = copy.deepcopy(dense).double()
        exact = tensors_of(network(*tree_map_only(torch.Tensor, wide, own_tensors(tuple(args)))))
    except Exception:  # whatever a network does that knows one dtype alone
        return False
    if [v.shape for v in exact] != [v.shape for v in expected]:
        return False
    for truth, own, other in zip(exact, expected, given, strict=True):
        if truth.numel() == 0:
            continue
        if not (truth.is_floating_point() or truth.is_complex()):
            wrong = [float((v != truth).sum()) for v in (other, own)]
        else:
            t = _numbers(truth)
            finite = t.isfinite()
            if not finite.any():
                continue
            wrong = [float((_numbers(v) - t)[finite].abs().max()) for v in (other, own)]
        if not wrong[0] <= WORSE * wrong[1]:
            return False
    return True
