"""The definition of the permuted grouped convolution, in plain PyTorch: gather, convolve, scatter, group by
group, out of place: torch's own derivatives and transforms go through it.

With F_g the filters and C_g the channels of group g, w the packed weight, * the cross-correlation of
``conv2d``:

    out[n, f] = act(bias[f] + residual[n, f] + sum over c in C_g of x[n, c] * w[f, c])     for f in F_g
    out[n, f] = act(bias[f] + residual[n, f])                                              for dead f

Half precision is computed in float32 and rounded once. On CUDA float32 means float32, not TF32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor

from .. import activations
from .._library import transforming
from ..layout import PlanHeader, read_header
from .shapes import Pair, empty_output, is_channels_last, output_size

__all__ = ["forward", "grad_input", "grad_weight"]


def _exact(x: Tensor) -> AbstractContextManager[object]:
    """No autocast, no TF32: the arguments' dtypes and precision. From cuDNN, only what is deterministic."""
    kind = x.device.type
    if kind == "cpu" and not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(torch.autocast(kind, enabled=False))
    if kind == "cuda":
        enabled = torch.backends.cudnn.enabled
        stack.enter_context(torch.backends.cudnn.flags(enabled=enabled, deterministic=True, allow_tf32=False))
    return stack


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _live_groups(
    header: PlanHeader, plan: Tensor, kernel: Pair
) -> Iterator[tuple[Tensor, Tensor, slice, tuple[int, ...]]]:
    """Of each group with filters: its channels, its filters, its part of the weight, that part's shape."""
    taps = kernel[0] * kernel[1]
    for g in header.groups:
        if g.n_filters == 0:
            continue
        channels = plan[g.channel_offset : g.channel_offset + g.n_channels]
        filters = plan[g.filter_offset : g.filter_offset + g.n_filters]
        start = g.weight_offset * taps
        yield (
            channels,
            filters.long(),
            slice(start, start + g.n_filters * g.n_channels * taps),
            (g.n_filters, g.n_channels, *kernel),
        )


def _stored(total: Tensor, like: Tensor) -> Tensor:
    """``total`` in the dtype and memory format of ``like``."""
    if not transforming():
        return empty_output(like, total.shape).copy_(total)
    format = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return total.to(like.dtype).contiguous(memory_format=format)


def _header(
    plan: Tensor, kernel: Pair, *, channels: int | None, filters: int | None, weight_numel: int
) -> PlanHeader:
    header = read_header(plan)
    if channels is not None and channels != header.in_channels:
        raise ValueError(f"x has {channels} channels, the layout has in_channels={header.in_channels}")
    if filters is not None and filters != header.out_channels:
        raise ValueError(
            f"the output has {filters} channels, the layout has out_channels={header.out_channels}"
        )
    expected = header.pairs * kernel[0] * kernel[1]
    if weight_numel != expected:
        raise ValueError(
            f"weight must have {expected} elements ({header.pairs} pairs, kernel {kernel[0]}x{kernel[1]}), "
            f"got {weight_numel}"
        )
    return header


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
    """act(conv(x, weight) + bias + residual), (batch, out_channels, h, w) in the memory format of ``x``.

    Raises ValueError, naming the argument, where shapes do not fit the plan or one another.
    """
    header = _header(plan, kernel, channels=x.shape[1], filters=out_channels, weight_numel=weight.numel())
    size = output_size(x.shape, kernel, stride, padding, dilation)
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias.shape)}")
    if residual is not None and residual.shape != (x.shape[0], out_channels, *size):
        raise ValueError(
            f"residual must have the output's shape {(x.shape[0], out_channels, *size)}, "
            f"got {tuple(residual.shape)}"
        )
    shape = (x.shape[0], out_channels, *size)
    if 0 in shape:
        return empty_output(x, shape)
    dtype = _compute_dtype(x.dtype)
    plan = plan.to(x.device)
    with _exact(x):
        owners, parts = [], []
        for channels, filters, part, kernels in _live_groups(header, plan, kernel):
            taken = x.index_select(1, channels).to(dtype)
            w = weight[part].view(kernels).to(dtype)
            owners.append(filters)
            parts.append(torch.conv2d(taken, w, None, stride, padding, dilation))
        total = x.new_zeros((x.shape[0], out_channels - sum(map(len, owners)), *size), dtype=dtype)
        if parts:
            live = torch.cat(owners)
            alive = torch.zeros(out_channels, dtype=torch.bool, device=x.device).index_fill(0, live, True)
            # Filters in the order of the parts, then the dead ones: back into the order of the output.
            order = torch.cat([live, (~alive).nonzero().flatten()]).argsort()
            total = torch.cat([*parts, total], 1).index_select(1, order)
        if bias is not None:
            total = total + bias.to(dtype)[:, None, None]
        if residual is not None:
            total = total + residual.to(dtype)
        return _stored(activations.find(activation).apply(total), x)


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
    """The gradient of sum(grad * conv(x, weight)) for x: shape ``input_size``, ``grad``'s format.

    Raises ValueError, naming the argument, where shapes do not fit the plan or one another.
    """
    header = _header(plan, kernel, channels=input_size[1], filters=grad.shape[1], weight_numel=weight.numel())
    dtype = _compute_dtype(grad.dtype)
    total = grad.new_zeros(tuple(input_size), dtype=dtype)
    if total.numel() == 0 or grad.numel() == 0:
        return _stored(total, grad)
    plan = plan.to(grad.device)
    with _exact(grad):
        for channels, filters, part, shape in _live_groups(header, plan, kernel):
            given = grad.index_select(1, filters).to(dtype)
            w = weight[part].view(shape).to(dtype)
            like = given.new_empty(1).expand(input_size[0], shape[1], input_size[2], input_size[3])
            mine, _, _ = torch.ops.aten.convolution_backward(
                given, like, w, None, stride, padding, dilation, False, (0, 0), 1, (True, False, False)
            )
            total = total.index_add(1, channels, mine)
        return _stored(total, grad)


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
    """The gradient of sum(grad * conv(x, w)) for the packed w, 1-D of ``weight_numel`` elements.

    Raises ValueError, naming the argument, where shapes do not fit the plan or one another.
    """
    header = _header(plan, kernel, channels=x.shape[1], filters=grad.shape[1], weight_numel=weight_numel)
    if grad.numel() == 0 or x.numel() == 0 or weight_numel == 0:
        return x.new_zeros(weight_numel)
    dtype = _compute_dtype(grad.dtype)
    plan = plan.to(grad.device)
    with _exact(grad):
        parts = []
        for channels, filters, _, shape in _live_groups(header, plan, kernel):
            given = grad.index_select(1, filters).to(dtype)
            taken = x.index_select(1, channels).to(dtype)
            like = given.new_empty(1).expand(shape)
            _, mine, _ = torch.ops.aten.convolution_backward(
                given, taken, like, None, stride, padding, dilation, False, (0, 0), 1, (False, True, False)
            )
            parts.append(mine.reshape(-1))
        return torch.cat(parts).to(x.dtype)  # groups lie in their order
