"""A packed convolution with the batch normalisation behind it as one operator of ``torch.ops.dsp_kernels``.

For packed networks in training on a CPU: half the operators of a step, and filters that are dead, whose
output is 0, cost the normalisation neither a pass over it nor a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._library import NAMESPACE, define, library, register_derivatives, transforming
from ..conv import native as conv_native
from ..conv import op as conv
from ..conv.shapes import Pair, empty_output, output_size
from ..geometry import pair
from . import native, reference

__all__ = ["conv2d_batch_norm_act"]

FORWARD = "conv2d_batch_norm_act"
BACKWARD = "conv2d_batch_norm_act_backward"

_LAYER = "Tensor weight, Tensor plan, Tensor? norm_weight, Tensor? norm_bias, Tensor? blank"
_HOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, float eps, str activation"

define(
    f"{FORWARD}(Tensor x, {_LAYER}, Tensor? residual, SymInt out_channels, {_HOW}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
define(
    f"{BACKWARD}(Tensor grad, Tensor x, {_LAYER}, Tensor inner, Tensor? y, Tensor mean, Tensor variance, "
    f"{_HOW}, bool residual, bool of_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_forward_op = torch.ops.dsp_kernels.conv2d_batch_norm_act.default
_backward_op = torch.ops.dsp_kernels.conv2d_batch_norm_act_backward.default


def _native(x: Tensor) -> bool:
    return native.takes(x) and backends.choose(None, x.device.type, x.dtype) == "native"


def _convolve(
    x: Tensor, weight: Tensor, plan: Tensor, out_channels: int, geometry: tuple[Pair, ...]
) -> Tensor:
    backend = backends.choose(None, x.device.type, x.dtype)
    return conv.forward_op(x, weight, plan, None, None, out_channels, *geometry, "none", backend)


def _forward(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    blank: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry = (kernel_size, stride, padding, dilation)
    if not _native(x):
        inner = _convolve(x, weight, plan, out_channels, geometry)
        return (inner, *reference.forward(inner, norm_weight, norm_bias, residual, eps, activation))
    inner = conv_native.forward(x, weight, plan, None, None, out_channels, *geometry, "none")
    return (inner, *native.forward(inner, norm_weight, norm_bias, residual, eps, activation, blank))


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    blank: Tensor | None,
    inner: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    eps: float,
    activation: str,
    residual: bool,
    of_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    geometry = (kernel_size, stride, padding, dilation)
    if _native(x):
        room: Any = conv_native
        seen = y if residual and activation != "none" else None
        of_inner, of_residual, of_norm_weight, of_norm_bias = native.backward(
            grad, inner, seen, norm_weight, norm_bias, mean, variance, eps, activation, residual, blank
        )
    else:
        room = conv.room(backends.choose(None, x.device.type, x.dtype))
        of_inner, of_residual, of_norm_weight, of_norm_bias = reference.backward(
            grad, inner, y, norm_weight, eps, activation
        )
        of_residual = of_residual if residual else x.new_empty(0)
    of_weight = room.grad_weight(of_inner, x, plan, weight.numel(), *geometry)
    given = room.grad_input(of_inner, weight, plan, x.shape, *geometry) if of_x else x.new_empty(0)
    return given, of_weight, of_norm_weight, of_norm_bias, of_residual


for _key in ("CPU", "CUDA"):
    library.impl(FORWARD, _forward, _key)
    library.impl(BACKWARD, _backward, _key)


def _statistics(x: Tensor, channels: int) -> Tensor:
    return x.new_empty(channels, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake(f"{NAMESPACE}::{FORWARD}", lib=library)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    blank: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (x.shape[0], out_channels, *output_size(x.shape, kernel_size, stride, padding, dilation))
    inner = empty_output(x, shape)
    return inner, torch.empty_like(inner), _statistics(x, out_channels), _statistics(x, out_channels)


@torch.library.register_fake(f"{NAMESPACE}::{BACKWARD}", lib=library)
def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    residual, of_x = rest[-2:]
    inner = rest[4]
    return (
        empty_output(grad, x.shape) if of_x else x.new_empty(0),
        torch.empty_like(weight),
        _statistics(x, inner.shape[1]),
        _statistics(x, inner.shape[1]),
        torch.empty_like(inner) if residual else x.new_empty(0),
    )


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, plan, norm_weight, norm_bias, blank, residual, _, *how = inputs
    inner, y, mean, variance = output
    ctx.mark_non_differentiable(inner, mean, variance)
    # Without an activation the output is the caller's, who may write into it.
    kept = None if how[-1] == "none" else y
    ctx.save_for_backward(x, weight, plan, norm_weight, norm_bias, blank, inner, kept, mean, variance)
    ctx.how, ctx.residual = how, residual is not None


def _gradient(ctx: Any, _inner: Tensor, grad: Tensor, *_: object) -> tuple[Any, ...]:
    x, weight, plan, norm_weight, norm_bias, blank, inner, y, mean, variance = ctx.saved_tensors
    *geometry, eps, activation = ctx.how
    # A second derivative is wanted: by the definition, from the convolution on.
    if torch.is_grad_enabled() or transforming():
        inner = _convolve(x, weight, plan, inner.shape[1], tuple(geometry))
        of_inner, of_residual, of_norm_weight, of_norm_bias = reference.backward(
            grad, inner, y, norm_weight, eps, activation
        )
        backend = backends.choose(None, x.device.type, x.dtype)
        of_x = conv.grad_input_op(of_inner, weight, plan, x.shape, *geometry, backend)
        of_weight = conv.grad_weight_op(of_inner, x, plan, weight.numel(), *geometry, backend)
    else:
        of_x, of_weight, of_norm_weight, of_norm_bias, of_residual = _backward_op(
            grad,
            x,
            weight,
            plan,
            norm_weight,
            norm_bias,
            blank,
            inner,
            y,
            mean,
            variance,
            *geometry,
            eps,
            activation,
            ctx.residual,
            ctx.needs_input_grad[0],
        )
    return (
        of_x if ctx.needs_input_grad[0] else None,
        of_weight,
        None,
        None if norm_weight is None else of_norm_weight.to(norm_weight.dtype),
        None if norm_bias is None else of_norm_bias.to(norm_bias.dtype),
        None,
        of_residual if ctx.residual else None,
        *[None] * 7,
    )


def _definition(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, plan, norm_weight, norm_bias, _, residual, out_channels = args[:8]
    kernel_size, stride, padding, dilation, eps, activation = args[8:]
    inner = conv.reference.forward(
        x, weight, plan, None, None, out_channels, kernel_size, stride, padding, dilation, "none"
    )
    out, mean, variance = reference.forward(inner, norm_weight, norm_bias, residual, eps, activation)
    return inner.detach(), out, mean.detach(), variance.detach()


register_derivatives(FORWARD, _definition, _gradient, _context)


def conv2d_batch_norm_act(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    blank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``batch_norm_act(conv2d_from_plan(x, weight, plan), norm_weight, norm_bias, residual)`` at once.

    ``x``: (N, C, H, W), floating point. ``weight``, ``plan``, ``out_channels``, ``kernel_size``, ``stride``,
    ``padding``, ``dilation``: as for :func:`dsp_kernels.conv.op.conv2d_from_plan`. ``norm_weight``,
    ``norm_bias``: (out_channels,), float32 or the dtype of ``x``, or None (1 and 0). ``residual``: the
    output's shape, the dtype of ``x``, or None. ``eps``: what is added to the variance, at least 0.
    ``activation``: None or "relu". ``blank``: (out_channels,), uint8, not 0 for filters that no group of the
    plan has: a hint that saves time. All on the device of ``x``, but for the plan, which may be on the CPU.

    Returns the result (N, out_channels, H', W') in the dtype of ``x``, and mean and biased variance of the
    convolution's channels (out_channels,), float32 or wider, which carry no gradient. Differentiable twice.
    Sources: see :func:`dsp_kernels.permuted_grouped_conv2d` and :func:`dsp_kernels.norm.batch_norm_act`.

    Raises TypeError or ValueError, naming the argument, what was given and what is accepted, for another
    type, shape, dtype or device, sizes below their least, fewer than two values a channel, an ``eps`` that is
    negative or not finite, and where the plan does not belong to ``weight``, ``x`` or ``out_channels``.
    """
    for name, value in (("x", x), ("weight", weight), ("plan", plan)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    rest = {"norm_weight": norm_weight, "norm_bias": norm_bias, "blank": blank, "residual": residual}
    for name, given in rest.items():
        if given is not None and not isinstance(given, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(given).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must be 4-D (batch, channels, height, width), got shape {tuple(x.shape)}")
    if weight.dim() != 1 or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be 1-D of the dtype of x, {x.dtype}, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    if plan.dtype != torch.int32 or plan.dim() != 1:
        raise ValueError(f"plan must be a 1-D int32 tensor, got {plan.dtype} of shape {tuple(plan.shape)}")
    for name, given in ({"weight": weight} | rest).items():  # the plan may stay on the CPU
        if given is not None and given.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {given.device}")
    if isinstance(out_channels, bool) or not isinstance(out_channels, int | torch.SymInt):
        raise TypeError(f"out_channels must be an int of at least 1, got {out_channels!r}")
    if out_channels < 1:
        raise ValueError(f"out_channels must be an int of at least 1, got {out_channels}")
    geometry = (
        pair("kernel_size", kernel_size, 1),
        pair("stride", stride, 1),
        pair("padding", padding, 0),
        pair("dilation", dilation, 1),
    )
    shape = (x.shape[0], out_channels, *output_size(x.shape, *geometry))
    if shape[0] * shape[2] * shape[3] < 2:
        raise ValueError(
            f"x must give at least two values a channel, got shape {tuple(x.shape)} and an output of {shape}"
        )
    for name in ("norm_weight", "norm_bias", "blank"):
        given = rest[name]
        if given is not None and given.shape != (out_channels,):
            raise ValueError(f"{name} must have shape ({out_channels},), got {tuple(given.shape)}")
    for name in ("norm_weight", "norm_bias"):
        given = rest[name]
        if given is not None and given.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must be float32 or of the dtype of x, {x.dtype}, got {given.dtype}")
    if blank is not None and blank.dtype != torch.uint8:
        raise TypeError(f"blank must be uint8, got {blank.dtype}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype of x, {x.dtype}, got {residual.dtype}")
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    _, out, mean, variance = _forward_op(
        x,
        weight,
        plan,
        norm_weight,
        norm_bias,
        blank,
        residual,
        out_channels,
        *geometry,
        float(eps),
        activation or "none",
    )
    return out, mean, variance
