"""Batch normalisation with residual and activation as an operator of ``torch.ops.dsp_kernels``.

It is there for packed networks in training on a CPU, where torch's own, on contiguous images, takes longer
than the packed convolutions. Elsewhere the definition runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._library import NAMESPACE, define, library, register_derivatives, transforming
from . import native, reference

__all__ = ["batch_norm_act"]

FORWARD = "batch_norm_act"
BACKWARD = "batch_norm_act_backward"

define(
    f"{FORWARD}(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str activation) "
    "-> (Tensor, Tensor, Tensor)"
)
define(
    f"{BACKWARD}(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor variance, float eps, str activation, bool residual) -> (Tensor, Tensor, Tensor, Tensor)"
)

_forward_op = torch.ops.dsp_kernels.batch_norm_act.default
_backward_op = torch.ops.dsp_kernels.batch_norm_act_backward.default


def _native(x: Tensor) -> bool:
    return native.takes(x) and backends.choose(None, x.device.type, x.dtype) == "native"


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    room = native if _native(x) else reference
    return room.forward(x, weight, bias, residual, eps, activation)


def _backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    activation: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _native(x):
        seen = y if residual and activation != "none" else None
        return native.backward(grad, x, seen, weight, bias, mean, variance, eps, activation, residual)
    of_x, of_residual, of_weight, of_bias = reference.backward(grad, x, y, weight, eps, activation)
    return of_x, of_residual if residual else x.new_empty(0), of_weight, of_bias


for _key in ("CPU", "CUDA"):
    library.impl(FORWARD, _forward, _key)
    library.impl(BACKWARD, _backward, _key)


def _statistics_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake(f"{NAMESPACE}::{FORWARD}", lib=library)
def _forward_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _statistics_like(x), _statistics_like(x)


@torch.library.register_fake(f"{NAMESPACE}::{BACKWARD}", lib=library)
def _backward_fake(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual = torch.empty_like(x) if rest[-1] else x.new_empty(0)
    return torch.empty_like(x), residual, _statistics_like(x), _statistics_like(x)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, eps, activation = inputs
    y, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    # Without an activation the output is the caller's, who may write into it.
    ctx.save_for_backward(x, None if activation == "none" else y, weight, bias, mean, variance)
    ctx.rest = (eps, activation, residual is not None)


def _gradient(ctx: Any, grad: Tensor, *_: object) -> tuple[Any, ...]:
    x, y, weight, bias, mean, variance = ctx.saved_tensors
    eps, activation, residual = ctx.rest
    if torch.is_grad_enabled() or transforming():  # a second derivative is wanted: by the definition
        of_x, of_residual, of_weight, of_bias = reference.backward(grad, x, y, weight, eps, activation)
    else:
        of_x, of_residual, of_weight, of_bias = _backward_op(
            grad, x, y, weight, bias, mean, variance, eps, activation, residual
        )
    return (
        of_x,
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
        of_residual if residual else None,
        None,
        None,
    )


def _definition(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, variance = reference.forward(*args)
    return out, mean.detach(), variance.detach()


register_derivatives(FORWARD, _definition, _gradient, _context)


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((x - mean) / sqrt(variance + eps) * weight + bias + residual)`` by the batch's own statistics.

    ``x``: (N, C, H, W), floating point, at least two values a channel. ``weight``, ``bias``: (C,) or None (1
    and 0). ``residual``: the shape of ``x`` or None. ``activation``: None or "relu". On the CPU in contiguous
    float32 one native kernel runs, a channel at a time; elsewhere the definition.

    Returns the result, in the shape and dtype of ``x``, and mean and biased variance of each channel (C,),
    float32 or wider, which carry no gradient. Differentiable twice in the others. Source: Ioffe and Szegedy,
    "Batch Normalization" (ICML 2015).

    Raises TypeError or ValueError, naming the argument, for another shape or dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] < 1 or x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(
            f"x must be (batch, channels, height, width) with at least two values a channel, got shape "
            f"{tuple(x.shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (x.shape[1],):
            raise ValueError(f"{name} must have shape ({x.shape[1]},), got {tuple(value.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}")
    return _forward_op(x, weight, bias, residual, float(eps), activation or "none")
