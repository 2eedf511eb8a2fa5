"""The definition: batch normalisation over (batch, height, width), then the residual, then the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import activations

__all__ = ["backward", "forward"]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    variance, mean = torch.var_mean(x.to(dtype), dim=(0, 2, 3), correction=0)
    return mean, variance


def _rows(values: Tensor) -> Tensor:
    return values[None, :, None, None]


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((x - mean) / sqrt(variance + eps) * weight + bias + residual)``, and each channel's statistics.

    ``x``, ``residual``: (N, C, H, W), N H W at least 1. ``weight``, ``bias``: (C,). ``activation``: "none" or
    "relu". The variance is the biased one. Source: Ioffe and Szegedy, "Batch Normalization" (ICML 2015).
    """
    mean, variance = _statistics(x)
    out = (x.to(mean.dtype) - _rows(mean)) * _rows(torch.rsqrt(variance + eps))
    if weight is not None:
        out = out * _rows(weight)
    if bias is not None:
        out = out + _rows(bias)
    if residual is not None:
        out = out + residual
    out = activations.find(activation).apply(out)
    return out.to(x.dtype), mean, variance


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of sum(grad * out) for x, residual, weight and bias; differentiable once more.

    ``y`` is the forward's output, which says where the activation let the gradient through; None without one.
    """
    mean, variance = _statistics(x)
    inverse = torch.rsqrt(variance + eps)
    g = activations.find(activation).gradient(grad.to(mean.dtype), None if y is None else y.detach())
    normal = (x.to(mean.dtype) - _rows(mean)) * _rows(inverse)
    of_bias = g.sum((0, 2, 3))
    of_weight = (g * normal).sum((0, 2, 3))
    count = x.numel() // x.shape[1]
    scale = inverse if weight is None else inverse * weight
    of_x = _rows(scale) * (g - _rows(of_bias / count) - normal * _rows(of_weight / count))
    return of_x.to(x.dtype), g.to(x.dtype), of_weight, of_bias
