"""Hands batch normalisation to the compiled core: float32, contiguous (N, C, H, W), on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import activations
from ..backends import native_module

__all__ = ["backward", "forward", "takes"]


def takes(x: Tensor) -> bool:
    """Whether the core's kernels read ``x`` as it lies."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def _check(status: int) -> None:
    if status != 0:
        raise ValueError(
            f"the native batch normalisation refused its arguments: {native_module().last_error()}"
        )


def _read(name: str, tensor: Tensor | None, shape: torch.Size | tuple[int, ...]) -> Tensor | None:
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.shape != shape:
        raise ValueError(
            f"{name} must be float32 of shape {tuple(shape)} on the cpu for the native backend, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()


def _flags(blank: Tensor | None, channels: int) -> Tensor | None:
    if blank is None:
        return None
    if blank.dtype != torch.uint8 or blank.device.type != "cpu" or blank.shape != (channels,):
        raise ValueError(
            f"blank must be uint8 of shape ({channels},) on the cpu, got {blank.dtype} of shape "
            f"{tuple(blank.shape)} on {blank.device}"
        )
    return blank.contiguous()


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    blank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`dsp_kernels.norm.reference.forward`. ``blank``: (C,), uint8, not 0 where ``x`` is 0
    throughout and need not be read.

    Raises ValueError, naming the argument, for another dtype, device or shape, and with the core's text.
    """
    whole, each = x.shape, (x.shape[1],)
    given = _read("x", x, whole)
    assert given is not None
    weight, bias = _read("weight", weight, each), _read("bias", bias, each)
    residual = _read("residual", residual, whole)
    out = torch.empty(whole, dtype=torch.float32)
    mean, variance = torch.empty(each, dtype=torch.float32), torch.empty(each, dtype=torch.float32)
    _check(
        native_module().batch_norm_forward(
            given.data_ptr(),
            given.numel(),
            whole[0],
            whole[1],
            whole[2] * whole[3],
            _at(weight),
            _at(bias),
            _at(residual),
            _at(_flags(blank, whole[1])),
            eps,
            activations.find(activation).code,
            mean.data_ptr(),
            variance.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return out, mean, variance


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
    with_residual: bool,
    blank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for x, residual (empty without one), weight and bias. That for x is not set in channels
    that are ``blank`` (see :func:`forward`).

    Raises ValueError, naming the argument, for another dtype, device or shape, and with the core's text.
    """
    whole, each = x.shape, (x.shape[1],)
    given, read = _read("grad", grad, whole), _read("x", x, whole)
    of_mean, of_variance = _read("mean", mean, each), _read("variance", variance, each)
    assert given is not None and read is not None and of_mean is not None and of_variance is not None
    y = _read("y", y, whole)
    weight, bias = _read("weight", weight, each), _read("bias", bias, each)
    grad_x = torch.empty(whole, dtype=torch.float32)
    grad_residual = torch.empty(whole if with_residual else (0,), dtype=torch.float32)
    grad_weight, grad_bias = torch.empty(each, dtype=torch.float32), torch.empty(each, dtype=torch.float32)
    _check(
        native_module().batch_norm_backward(
            given.data_ptr(),
            read.data_ptr(),
            _at(y),
            read.numel(),
            whole[0],
            whole[1],
            whole[2] * whole[3],
            _at(weight),
            _at(bias),
            of_mean.data_ptr(),
            of_variance.data_ptr(),
            _at(_flags(blank, whole[1])),
            eps,
            activations.find(activation).code,
            grad_x.data_ptr(),
            grad_residual.data_ptr() if with_residual else 0,
            grad_weight.data_ptr(),
            grad_bias.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return grad_x, grad_residual, grad_weight, grad_bias
