"""Hands all layers to the compiled core in one call: float32 or float64, on the CPU."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import native_module
from .arguments import check_layers

__all__ = [
    "Operation",
    "group_lasso",
    "group_lasso_backward",
    "group_lasso_hessian",
    "is_plain",
    "run",
]

_ELEMENTS = {torch.float32: 0, torch.float64: 1}


class Operation(enum.IntEnum):
    """What one call computes; see ``csrc/dsp.h``."""

    PENALTY = 0
    BACKWARD = 1
    HESSIAN = 2
    SHRINK = 3
    PROXIMAL = 4
    STEP_GRADIENT = 5


def _tap_major(weight: Tensor) -> bool:
    return weight.ndim == 4 and not weight.is_contiguous()


def is_plain(weight: Tensor) -> bool:
    """Whether the core reads the tensor as it lies: contiguous, or channels last."""
    if weight.dtype not in _ELEMENTS or weight.device.type != "cpu":
        return False
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """``tensor`` with the dtype and memory order of a plain ``weight``, copied where it must be."""
    tensor = tensor.to(weight.dtype)
    if _tap_major(weight):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def run(
    operation: Operation,
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    *,
    scales: Sequence[float],
    amounts: Sequence[float],
    directions: Sequence[Tensor] | None = None,
    log_directions: Sequence[Tensor] | None = None,
    weight_outs: Sequence[Tensor] | None = None,
    log_outs: Sequence[Tensor] | None = None,
    keeps: Sequence[Tensor] | None = None,
    penalties: bool = False,
) -> Tensor | None:
    """One call of the core on plain weights (:func:`is_plain`); returns the penalties (L,) in float64 if
    asked.

    Outputs are plain tensors of their weight's memory order, or matrices whose rows are contiguous.

    Raises ValueError with the core's text where it refuses its arguments.
    """
    check_layers(weights, logs, scales, None, directions, log_directions)
    dtype, groups = weights[0].dtype, logs[0].shape[0]
    words, numbers = array("q"), array("d")
    alive: list[Tensor] = []  # copies that must outlive the call
    for index, weight in enumerate(weights):
        if not is_plain(weight) or weight.dtype != dtype or logs[index].shape[0] != groups:
            raise ValueError(
                f"weights[{index}]: expected a plain CPU tensor of {dtype} with {groups} groups, got "
                f"{weight.dtype} on {weight.device} with {logs[index].shape[0]} groups"
            )
        log = _rows(logs[index])
        alive.append(log)
        direction_at = keep_at = out_at = log_out_at = log_out_stride = towards_at = towards_stride = 0
        if directions is not None:
            direction = _like(directions[index], weight)
            alive.append(direction)
            direction_at = direction.data_ptr()
        if log_directions is not None:
            towards = _rows(log_directions[index])
            alive.append(towards)
            towards_at, towards_stride = towards.data_ptr(), _stride(towards)
        if weight_outs is not None:
            out_at = weight_outs[index].data_ptr()
        if keeps is not None:
            keep_at = keeps[index].data_ptr()
        if log_outs is not None:
            log_out_at, log_out_stride = log_outs[index].data_ptr(), _stride(log_outs[index])
        filters, channels = weight.shape[:2]
        numel = weight.numel()
        words.extend((weight.data_ptr(), direction_at, out_at, keep_at, numel, filters, channels))
        words.extend((numel // (filters * channels), int(_tap_major(weight)), log.data_ptr(), _stride(log)))
        words.extend((towards_at, towards_stride, log_out_at, log_out_stride))
        numbers.extend((scales[index], amounts[index]))
    result = torch.empty(len(weights), dtype=torch.float64) if penalties else None
    module = native_module()
    status = module.lasso(
        int(operation),
        _ELEMENTS[dtype],
        words.buffer_info()[0],
        len(words),
        numbers.buffer_info()[0],
        len(numbers),
        groups,
        0 if result is None else result.data_ptr(),
        torch.get_num_threads(),
    )
    if status != 0:
        raise ValueError(f"the native group penalty refused its arguments: {module.last_error()}")
    return result


def _stride(matrix: Tensor) -> int:
    # A single row may carry any stride.
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def _plain(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight if is_plain(weight) else weight.contiguous() for weight in weights]


def _by_groups(logs: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the layers by their number of groups: one call takes layers of one number."""
    found: dict[int, list[int]] = {}
    for index, log in enumerate(logs):
        found.setdefault(log.shape[0], []).append(index)
    return list(found.values())


def group_lasso(weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.group_lasso`.

    Raises as that does, and ValueError with the core's text where it refuses its arguments.
    """
    check_layers(weights, logs, scales)
    plain = _plain(weights)
    out = torch.empty(len(plain), dtype=logs[0].dtype)
    for picked in _by_groups(logs):
        part = run(
            Operation.PENALTY,
            [plain[i] for i in picked],
            [logs[i] for i in picked],
            scales=[scales[i] for i in picked],
            amounts=[0.0] * len(picked),
            penalties=True,
        )
        assert part is not None
        out[picked] = part.to(out.dtype)
    return out


def group_lasso_backward(
    grad: Tensor, weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_backward`.

    Raises as that does, and ValueError with the core's text where it refuses its arguments.
    """
    check_layers(weights, logs, scales, grad)
    plain = _plain(weights)
    weight_outs = [torch.empty_like(weight) for weight in plain]
    log_outs = [torch.empty(log.shape, dtype=log.dtype) for log in logs]
    amounts = [g * scale for g, scale in zip(grad.tolist(), scales, strict=True)]
    for picked in _by_groups(logs):
        run(
            Operation.BACKWARD,
            [plain[i] for i in picked],
            [logs[i] for i in picked],
            scales=[scales[i] for i in picked],
            amounts=[amounts[i] for i in picked],
            weight_outs=[weight_outs[i] for i in picked],
            log_outs=[log_outs[i] for i in picked],
        )
    return weight_outs + log_outs


def group_lasso_hessian(
    grad: Tensor,
    weight_directions: Sequence[Tensor],
    log_directions: Sequence[Tensor],
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_hessian`.

    Raises as that does, and ValueError with the core's text where it refuses its arguments.
    """
    check_layers(weights, logs, scales, grad, weight_directions, log_directions)
    plain = _plain(weights)
    weight_outs = [torch.empty_like(weight) for weight in plain]
    log_outs = [torch.empty(log.shape, dtype=log.dtype) for log in logs]
    for_grad = torch.empty(len(plain), dtype=grad.dtype)
    amounts = [g * scale for g, scale in zip(grad.tolist(), scales, strict=True)]
    for picked in _by_groups(logs):
        part = run(
            Operation.HESSIAN,
            [plain[i] for i in picked],
            [logs[i] for i in picked],
            scales=[scales[i] for i in picked],
            amounts=[amounts[i] for i in picked],
            directions=[weight_directions[i] for i in picked],
            log_directions=[log_directions[i] for i in picked],
            weight_outs=[weight_outs[i] for i in picked],
            log_outs=[log_outs[i] for i in picked],
            penalties=True,
        )
        assert part is not None
        for_grad[picked] = part.to(grad.dtype)
    return [for_grad, *weight_outs, *log_outs]
