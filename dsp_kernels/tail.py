"""The end of a classifier as operators: pooling and a linear layer in the arithmetic of programs.

A program (:mod:`dsp_kernels.program`) sums in an order of its own, so torch's pooling and matrix product give
other last bits. These two are programs of one step: a network exported operator by operator then gives the
bits of the network run as one program. float32 on the CPU, native backend.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from ._library import NAMESPACE, define, library, register_derivatives
from ._written import listen, storage_of
from .program import Program

__all__ = ["adaptive_avg_pool", "linear"]

define("program_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
define("program_adaptive_avg_pool(Tensor x, int[2] output_size) -> Tensor")

_ops = torch.ops.dsp_kernels
linear = _ops.program_linear.default
adaptive_avg_pool = _ops.program_adaptive_avg_pool.default

# A program holds a copy of its weights: one is kept for as long as the weight lives and does not change.
_linears: Any = WeakTensorKeyDictionary()


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _check(name: str, value: Tensor, dim: int) -> None:
    if value.dtype != torch.float32 or value.dim() != dim:
        raise ValueError(
            f"{name} must be float32 of {dim} dimensions, got {value.dtype} {tuple(value.shape)}"
        )


def _linear_program(weight: Tensor, bias: Tensor | None) -> Program:
    key = (_version(weight), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), _version(bias))
    known = _linears.get(weight)
    if known is None or known[0] != key or weight.is_inference():
        program = Program((weight.shape[1], 1, 1))
        made = program.build(program.linear(program.flatten(program.input), weight, bias))
        known = (key, made, [storage_of(tensor) for tensor in (weight, bias) if tensor is not None])
        if not weight.is_inference():  # such a one has no version: a change would go unseen
            _linears[weight] = known
    return known[1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, in), (out, in), (out,) to (N, out)."""
    _check("x", x, 2)
    return _linear_program(weight, bias)(x[:, :, None, None])


@functools.lru_cache(64)
def _pool_program(shape: tuple[int, ...], output_size: tuple[int, ...]) -> Program:
    program = Program(shape)
    return program.build(program.adaptive_avg_pool(program.input, output_size))


def _pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """(N, C, H, W) to (N, C, *output_size)."""
    _check("x", x, 4)
    return _pool_program(tuple(x.shape[1:]), tuple(output_size))(x)


def _written(storages: set[int]) -> None:
    for weight, known in list(_linears.items()):
        if not storages.isdisjoint(known[2]):
            _linears.pop(weight, None)


listen(_written)

# At the end of the process modules go away in any order, and programs want theirs.
atexit.register(_pool_program.cache_clear)
atexit.register(_linears.clear)

library.impl("program_linear", _linear, "CPU")
library.impl("program_adaptive_avg_pool", _pool, "CPU")


@torch.library.register_fake(f"{NAMESPACE}::program_linear", lib=library)
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::program_adaptive_avg_pool", lib=library)
def _pool_fake(x: Tensor, output_size: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], *output_size)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    return grad @ weight, grad.t() @ x, grad.sum(0) if ctx.needs_input_grad[2] else None


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _pool_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    return torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), x), None


register_derivatives("program_linear", F.linear, _linear_backward, _linear_context)
register_derivatives("program_adaptive_avg_pool", F.adaptive_avg_pool2d, _pool_backward, _pool_context)


@register_flop_formula(_ops.program_linear)
def _linear_flops(
    x_shape: Sequence[int], weight_shape: Sequence[int], *args: object, **kwargs: object
) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]
