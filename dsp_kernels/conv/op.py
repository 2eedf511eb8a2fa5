"""The permuted grouped convolution as operators of ``torch.ops.dsp_kernels``: schemas, fakes, autograd,
FLOPs.

Forward, gradient for the input and gradient for the weight are bilinear and form a closed set: the gradients
of each are calls of the other two, so any order of differentiation stays inside it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import activations
from .._library import NAMESPACE, define, library, register_derivatives, transforming
from ..backends import choose, fuses, implementation
from ..geometry import pair
from ..layout import GroupLayout
from . import reference
from .shapes import Pair, empty_output, output_size

__all__ = [
    "conv2d_from_plan",
    "forward_op",
    "grad_input_op",
    "grad_weight_op",
    "permuted_grouped_conv2d",
    "room",
]

FORWARD = "permuted_grouped_conv2d"
GRAD_INPUT = "permuted_grouped_conv2d_grad_input"
GRAD_WEIGHT = "permuted_grouped_conv2d_grad_weight"

_GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

define(
    f"{FORWARD}(Tensor x, Tensor weight, Tensor plan, Tensor? bias, Tensor? residual, SymInt out_channels, "
    f"{_GEOMETRY}, str activation, str backend) -> Tensor"
)
define(
    f"{GRAD_INPUT}(Tensor grad, Tensor weight, Tensor plan, SymInt[] input_size, {_GEOMETRY}, "
    "str backend) -> Tensor"
)
define(
    f"{GRAD_WEIGHT}(Tensor grad, Tensor x, Tensor plan, SymInt weight_numel, {_GEOMETRY}, "
    "str backend) -> Tensor"
)

_ops = torch.ops.dsp_kernels
forward_op = _ops.permuted_grouped_conv2d.default
grad_input_op = _ops.permuted_grouped_conv2d_grad_input.default
grad_weight_op = _ops.permuted_grouped_conv2d_grad_weight.default


room = functools.partial(implementation, "conv")


def _forward(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
    backend: str,
) -> Tensor:
    return room(backend).forward(
        x, weight, plan, bias, residual, out_channels, kernel_size, stride, padding, dilation, activation
    )


def _grad_input(
    grad: Tensor,
    weight: Tensor,
    plan: Tensor,
    input_size: Sequence[int],
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    backend: str,
) -> Tensor:
    return room(backend).grad_input(grad, weight, plan, input_size, kernel_size, stride, padding, dilation)


def _grad_weight(
    grad: Tensor,
    x: Tensor,
    plan: Tensor,
    weight_numel: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    backend: str,
) -> Tensor:
    return room(backend).grad_weight(grad, x, plan, weight_numel, kernel_size, stride, padding, dilation)


for _key in ("CPU", "CUDA"):
    library.impl(FORWARD, _forward, _key)
    library.impl(GRAD_INPUT, _grad_input, _key)
    library.impl(GRAD_WEIGHT, _grad_weight, _key)


@torch.library.register_fake(f"{NAMESPACE}::{FORWARD}", lib=library)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
    backend: str,
) -> Tensor:
    return empty_output(
        x, (x.shape[0], out_channels, *output_size(x.shape, kernel_size, stride, padding, dilation))
    )


@torch.library.register_fake(f"{NAMESPACE}::{GRAD_INPUT}", lib=library)
def _grad_input_fake(
    grad: Tensor, weight: Tensor, plan: Tensor, input_size: Sequence[int], *_: object
) -> Tensor:
    return empty_output(grad, input_size)


@torch.library.register_fake(f"{NAMESPACE}::{GRAD_WEIGHT}", lib=library)
def _grad_weight_fake(grad: Tensor, x: Tensor, plan: Tensor, weight_numel: int, *_: object) -> Tensor:
    return x.new_empty(weight_numel)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, plan, _, _, _, kernel_size, stride, padding, dilation, activation, backend = inputs
    act = activations.find(activation)
    if act.keeps == "input":
        raise ValueError(f"activation {activation!r} of a convolution in training must stand behind it")
    # Without an activation the output is the caller's, who may write into it.
    ctx.save_for_backward(x, weight, plan, output if act.keeps == "output" else None)
    ctx.geometry = (kernel_size, stride, padding, dilation)
    ctx.activation = activation
    ctx.backend = backend


def _forward_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, plan, output = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad = activations.find(ctx.activation).gradient(grad, output)
    grad_x = grad_w = grad_b = grad_r = None
    if needs[0]:
        grad_x = grad_input_op(grad, weight, plan, x.shape, *ctx.geometry, ctx.backend)
    if needs[1]:
        grad_w = grad_weight_op(grad, x, plan, weight.numel(), *ctx.geometry, ctx.backend)
    if needs[3]:
        grad_b = grad.sum((0, 2, 3))
    if needs[4]:
        grad_r = grad
    return grad_x, grad_w, None, grad_b, grad_r, None, None, None, None, None, None, None


def _grad_input_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, plan, _, kernel_size, stride, padding, dilation, backend = inputs
    ctx.save_for_backward(grad, weight, plan)
    ctx.geometry = (kernel_size, stride, padding, dilation)
    ctx.backend = backend


def _grad_input_backward(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    grad, weight, plan = ctx.saved_tensors
    of_grad = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad = forward_op(
            direction, weight, plan, None, None, grad.shape[1], *ctx.geometry, "none", ctx.backend
        )
    if ctx.needs_input_grad[1]:
        of_weight = grad_weight_op(grad, direction, plan, weight.numel(), *ctx.geometry, ctx.backend)
    return of_grad, of_weight, None, None, None, None, None, None, None


def _grad_weight_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, plan, _, kernel_size, stride, padding, dilation, backend = inputs
    ctx.save_for_backward(grad, x, plan)
    ctx.geometry = (kernel_size, stride, padding, dilation)
    ctx.backend = backend


def _grad_weight_backward(ctx: Any, direction: Tensor) -> tuple[Any, ...]:
    grad, x, plan = ctx.saved_tensors
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = forward_op(
            x, direction, plan, None, None, grad.shape[1], *ctx.geometry, "none", ctx.backend
        )
    if ctx.needs_input_grad[1]:
        of_x = grad_input_op(grad, direction, plan, x.shape, *ctx.geometry, ctx.backend)
    return of_grad, of_x, None, None, None, None, None, None, None


def _forward_definition(*args: Any) -> Tensor:
    return reference.forward(*args[:-1])  # the rest is the backend


def _grad_input_definition(*args: Any) -> Tensor:
    return reference.grad_input(*args[:-1])


def _grad_weight_definition(*args: Any) -> Tensor:
    return reference.grad_weight(*args[:-1])


register_derivatives(FORWARD, _forward_definition, _forward_backward, _forward_context)
register_derivatives(GRAD_INPUT, _grad_input_definition, _grad_input_backward, _grad_input_context)
register_derivatives(GRAD_WEIGHT, _grad_weight_definition, _grad_weight_backward, _grad_weight_context)


# Every packed weight meets every output pixel once, in each of the three: 2 FLOPs for a multiply and an add.
@register_flop_formula(_ops.permuted_grouped_conv2d)
def _forward_flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    batch, _, height, width = out_shape
    return 2 * weight_shape[0] * batch * height * width


@register_flop_formula(_ops.permuted_grouped_conv2d_grad_input)
def _grad_input_flops(
    grad_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    batch, _, height, width = grad_shape
    return 2 * weight_shape[0] * batch * height * width


@register_flop_formula(_ops.permuted_grouped_conv2d_grad_weight)
def _grad_weight_flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    plan_shape: Sequence[int],
    weight_numel: int,
    *args: object,
    out_shape: object = None,
    **kwargs: object,
) -> int:
    batch, _, height, width = grad_shape
    return 2 * weight_numel * batch * height * width


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def _check_same(name: str, value: Tensor, x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast itself does it: floating point is cast, float64 is left alone."""
    if x.is_floating_point() and x.dtype != torch.float64:
        return x.to(dtype)
    return x


def conv2d_from_plan(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`permuted_grouped_conv2d` for modules that keep the layout as a plan tensor.

    ``x``: (batch, channels, height, width), float16, bfloat16, float32 or float64. ``weight``:
    ``layout.pack(dense)``, 1-D. ``plan``: ``layout.plan()`` (or a clone of it), int32, 1-D, on the CPU or on
    the device of ``x``; ``out_channels``: that of the layout. ``bias``: (out_channels,) or None.
    ``residual``: the output's shape, or None. ``kernel_size``, ``stride``, ``padding``, ``dilation``: an int
    or (vertical, horizontal), in pixels. ``activation``: None or a name of ``dsp_kernels.activations``.
    ``backend``: one of :func:`dsp_kernels.available_backends`, or None (choose).

    Returns (batch, out_channels, h, w) in the dtype and memory format of ``x``; the formula, dead filters,
    derivatives and autocast as in :func:`permuted_grouped_conv2d`.

    Raises TypeError or ValueError, naming the argument, what was given and what is accepted, as
    :func:`permuted_grouped_conv2d` does. What depends on the plan's content (channels of ``x``, length of
    ``weight``, ``out_channels``) is checked by the backend, the rest before anything runs.

    Source: Park et al., "Dynamic Structure Pruning" (AAAI 2023): what is left of a layer where each group of
    filters has lost input channels of its own.
    """
    _check_tensor("x", x)
    _check_tensor("weight", weight)
    _check_tensor("plan", plan)
    if bias is not None:
        _check_tensor("bias", bias)
    if residual is not None:
        _check_tensor("residual", residual)
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x = _autocast(x, dtype)
        weight = _autocast(weight, dtype)
        if bias is not None:
            bias = _autocast(bias, dtype)
        if residual is not None:
            residual = _autocast(residual, dtype)
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"x must be 4-D (batch, channels, height, width), got shape {tuple(x.shape)}")
    if weight.dim() != 1:
        raise ValueError(
            f"weight must be the 1-D packed weight of layout.pack(), got shape {tuple(weight.shape)}"
        )
    _check_same("weight", weight, x)
    if plan.dtype != torch.int32 or plan.dim() != 1:
        raise ValueError(f"plan must be a 1-D int32 tensor, got {plan.dtype} of shape {tuple(plan.shape)}")
    kernel = pair("kernel_size", kernel_size, 1)
    steps = pair("stride", stride, 1)
    pads = pair("padding", padding, 0)
    spread = pair("dilation", dilation, 1)
    act = activations.find(activation)
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    size = output_size(x.shape, kernel, steps, pads, spread)
    if bias is not None:
        _check_same("bias", bias, x)
        if bias.dim() != 1 or bias.shape[0] != out_channels:
            raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias.shape)}")
    if residual is not None:
        _check_same("residual", residual, x)
        shape = (x.shape[0], out_channels, *size)
        if tuple(residual.shape) != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
    if weight.requires_grad and not torch.is_grad_enabled() and not transforming():
        # So that backends know that they may keep what they prepare: operators do not see the mode.
        weight = weight.detach()
    chosen = choose(backend, device_type, x.dtype)
    # One whose derivative needs what it was given stands behind the convolution in training, and one that a
    # backend does not have always.
    behind = (act.keeps == "input" and torch.is_grad_enabled()) or not fuses(chosen, act.name)
    out = forward_op(
        x,
        weight,
        plan,
        bias,
        residual,
        out_channels,
        kernel,
        steps,
        pads,
        spread,
        "none" if behind else str(act),
        chosen,
    )
    return act.apply(out) if behind else out


def permuted_grouped_conv2d(
    x: Tensor,
    weight: Tensor,
    layout: GroupLayout,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    residual: Tensor | None = None,
    activation: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation(conv(x, weight) + bias + residual)``, each group of filters reading its own channels.

    ``x``: (batch, layout.in_channels, height, width), float16, bfloat16, float32 or float64; any batch, also
    0. ``weight``: ``layout.pack(dense)``, 1-D of ``layout.weight_numel(kernel_size)`` elements. ``bias``:
    (layout.out_channels,). ``residual``: the output's shape. All of the dtype and device of ``x``.
    ``kernel_size``, ``stride``, ``padding``, ``dilation``: an int or (vertical, horizontal), in pixels.
    ``activation``: None or a name of ``dsp_kernels.activations``. ``backend``: None (choose), "reference",
    "native", "triton" or "cuda".

    Returns (batch, layout.out_channels, h, w) with h = (height + 2 padding - dilation (kernel - 1) - 1) //
    stride + 1, in the dtype and memory format of ``x``. A dead filter gives activation(bias + residual).
    Differentiable to any order in x, weight, bias and residual. Under autocast the tensors are cast to
    ``torch.get_autocast_dtype``.

    Raises TypeError or ValueError, naming the argument, what was given and what is accepted, for another
    dtype, device or shape, sizes below their least, an output without pixels, an unknown activation or
    backend, and a backend that cannot run here.
    """
    if not isinstance(layout, GroupLayout):
        raise TypeError(f"layout must be a GroupLayout, got {type(layout).__name__}")
    _check_tensor("x", x)
    _check_tensor("weight", weight)
    if x.dim() == 4 and x.shape[1] != layout.in_channels:
        raise ValueError(
            f"x must have {layout.in_channels} channels (layout.in_channels), got shape {tuple(x.shape)}"
        )
    kernel = pair("kernel_size", kernel_size, 1)
    expected = layout.pairs * kernel[0] * kernel[1]
    if weight.dim() == 1 and weight.shape[0] != expected:
        raise ValueError(
            f"weight must have {expected} elements ({layout.pairs} pairs, kernel {kernel[0]}x{kernel[1]}), "
            f"got {weight.shape[0]}"
        )
    return conv2d_from_plan(
        x,
        weight,
        layout.plan(),
        bias,
        residual,
        out_channels=layout.out_channels,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        backend=backend,
    )
