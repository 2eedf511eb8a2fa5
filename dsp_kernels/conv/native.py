"""Hands tensors to the compiled core: float32, NCHW, on the CPU. Outputs are allocated here, filled there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import activations
from ..backends import native_module
from .shapes import Pair, is_channels_last, output_size

__all__ = ["forward", "grad_input", "grad_weight"]

_PARAMETERS = 2  # DSP_ACT_PARAMETERS of dsp.h


def _check(status: int) -> None:
    if status != 0:
        raise ValueError(f"the native convolution refused its arguments: {native_module().last_error()}")


def _float_on_cpu(name: str, x: Tensor) -> Tensor:
    """``x`` as contiguous NCHW, refusing what the core would misread."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(
            f"{name} must be float32 on the cpu for the native backend, got {x.dtype} on {x.device}"
        )
    return x.contiguous()


def _plan_on_cpu(plan: Tensor) -> Tensor:
    if plan.dtype != torch.int32 or plan.device.type != "cpu" or plan.dim() != 1:
        raise ValueError(f"plan must be a 1-D int32 tensor on the cpu, got {plan.dtype} on {plan.device}")
    return plan.contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """See :func:`dsp_kernels.conv.reference.forward`. Raises ValueError with the core's text."""
    act = activations.find(activation)
    channels_last = is_channels_last(x)
    batch, _, height, width = x.shape
    size = output_size(x.shape, kernel, stride, padding, dilation)
    shape = (batch, out_channels, *size)
    x = _float_on_cpu("x", x)
    weight = _float_on_cpu("weight", weight)
    plan = _plan_on_cpu(plan)
    bias_at = residual_at = 0
    if bias is not None:
        bias = _float_on_cpu("bias", bias)
        if bias.numel() != out_channels:
            raise ValueError(f"bias must have {out_channels} elements, got {bias.numel()}")
        bias_at = bias.data_ptr()
    if residual is not None:
        if residual.shape != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
        residual = _float_on_cpu("residual", residual)
        residual_at = residual.data_ptr()
    out = torch.empty(shape, dtype=torch.float32)
    if out.numel() > 0:
        status = native_module().conv2d_forward(
            x.data_ptr(),
            x.numel(),
            weight.data_ptr(),
            weight.numel(),
            plan.data_ptr(),
            plan.numel(),
            bias_at,
            residual_at,
            out.data_ptr(),
            out.numel(),
            batch,
            height,
            width,
            *kernel,
            *stride,
            *padding,
            *dilation,
            act.code,
            *act.floats(_PARAMETERS),
            torch.get_num_threads(),
        )
        _check(status)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def grad_input(
    grad: Tensor,
    weight: Tensor,
    plan: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """See :func:`dsp_kernels.conv.reference.grad_input`. Raises ValueError with the core's text."""
    channels_last = is_channels_last(grad)
    grad = _float_on_cpu("grad", grad)
    weight = _float_on_cpu("weight", weight)
    plan = _plan_on_cpu(plan)
    out = torch.empty(tuple(input_size), dtype=torch.float32)
    if out.numel() > 0:
        batch, _, height, width = input_size
        status = native_module().conv2d_grad_input(
            grad.data_ptr(),
            grad.numel(),
            weight.data_ptr(),
            weight.numel(),
            plan.data_ptr(),
            plan.numel(),
            out.data_ptr(),
            out.numel(),
            batch,
            height,
            width,
            *kernel,
            *stride,
            *padding,
            *dilation,
            torch.get_num_threads(),
        )
        _check(status)
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def grad_weight(
    grad: Tensor,
    x: Tensor,
    plan: Tensor,
    weight_numel: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """See :func:`dsp_kernels.conv.reference.grad_weight`. Raises ValueError with the core's text."""
    grad = _float_on_cpu("grad", grad)
    x = _float_on_cpu("x", x)
    plan = _plan_on_cpu(plan)
    out = torch.empty(weight_numel, dtype=torch.float32)
    if grad.numel() == 0 or x.numel() == 0:
        return out.zero_()
    batch, _, height, width = x.shape
    status = native_module().conv2d_grad_weight(
        grad.data_ptr(),
        grad.numel(),
        x.data_ptr(),
        x.numel(),
        plan.data_ptr(),
        plan.numel(),
        out.data_ptr(),
        weight_numel,
        batch,
        height,
        width,
        *kernel,
        *stride,
        *padding,
        *dilation,
        torch.get_num_threads(),
    )
    _check(status)
    return out
