"""Operators as steps of a program: for the rows of ``operators``.

Each function takes the program and the operator's arguments, values of the program in the place of tensors
that are computed from the image, and adds steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.program import Program, Value

__all__ = ["SIZE", "Refused"]


class Refused(Exception):
    """No steps do that: it runs in torch. The text says what is refused, without the operator's name."""


class _Size:
    """A size that the graph reads, in the place of the number; whoever computes with it is refused."""

    def __repr__(self) -> str:
        return "a size of the input"


SIZE = _Size()


def value(given: Any) -> Value:
    """What a step reads first, where that is computed from the image; numbers, sizes, weights are not."""
    if not isinstance(given, Value):
        what = repr(given) if isinstance(given, (int, float, _Size)) else f"a {type(given).__name__}"
        raise Refused(f"on {what}")
    return given


def activation(named: Callable[..., str | None]) -> Callable[..., Value]:
    """The step of an activation whose name ``named`` finds from the arguments after the first."""

    def step(program: Program, x: Any, *args: Any, **kwargs: Any) -> Value:
        name = named(*args, **kwargs)
        if name is None:
            raise Refused(f"with {args}")
        return program.activation(value(x), name)

    return step


def identity(program: Program, x: Any, **kwargs: Any) -> Value:
    return value(x)


def size(program: Program, x: Any, dim: int) -> _Size:
    return SIZE


def add(program: Program, a: Any, b: Any, *, alpha: Any = 1) -> Value:
    if not isinstance(value(a), Value) or not isinstance(b, Value):
        raise Refused("with a number or a constant")
    if alpha != 1:
        raise Refused(f"with alpha={alpha}")
    if a.flat != b.flat:
        raise Refused("of a vector and an image")
    return program.add(a, b)


def max_pool(program: Program, x: Any, *args: Any, **kwargs: Any) -> Value:
    return program.max_pool(value(x), *args, **kwargs)


def avg_pool(
    program: Program,
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    if divisor_override is not None:
        raise Refused("with a divisor of its own")
    return program.avg_pool(value(x), kernel_size, stride or None, padding, ceil_mode, count_include_pad)


def adaptive_avg_pool(program: Program, x: Any, output_size: Any) -> Value:
    return program.adaptive_avg_pool(value(x), output_size)


def mean(program: Program, x: Any, dim: Any, keepdim: bool = False, **kwargs: Any) -> Value:
    dims = {d % 4 for d in ([dim] if isinstance(dim, int) else dim or ())}
    if value(x).flat or kwargs or dims != {2, 3}:
        raise Refused("over something else than planes")
    pooled = program.adaptive_avg_pool(x, 1)
    return pooled if keepdim else program.flatten(pooled)


def flatten(program: Program, x: Any, start: int = 0, end: int = -1) -> Value:
    if (start, end) != (1, -1):
        raise Refused(f"from {start} to {end}")
    return program.flatten(value(x))


def cat(program: Program, values: Sequence[Any], dim: int = 0) -> Value:
    values = [value(v) for v in values]
    if dim != 1 or any(v.flat for v in values):
        raise Refused("of something else than channels of images")
    return program.concat(values)


def batch_norm(
    program: Program,
    x: Any,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Value:
    if value(x).flat:
        raise Refused("of vectors")
    scale = torch.rsqrt(var.double() + eps) * (1.0 if weight is None else weight.double())
    shift = -mean.double() * scale + (0.0 if bias is None else bias.double())
    return program.affine(x, scale.float(), shift.float())
