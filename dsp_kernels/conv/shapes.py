"""Sizes and memory formats that every implementation, and the fake one, must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pair = Sequence[int]


def output_size(
    shape: Sequence[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[int, int]:
    """(height, width) of the convolution of a (batch, channels, height, width) input.

    Raises ValueError where there would be no output pixel.
    """
    height = (shape[2] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    width = (shape[3] + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    if height < 1 or width < 1:
        raise ValueError(
            f"x of {shape[2]}x{shape[3]} pixels is too small for kernel_size={tuple(kernel)}, "
            f"padding={tuple(padding)}, dilation={tuple(dilation)}: the output would be {height}x{width}"
        )
    return height, width


def is_channels_last(x: Tensor) -> bool:
    """Whether torch's convolutions would answer in channels_last, by its strides; ties go to contiguous."""
    stride = x.stride()
    if stride[1] != 1:
        return False
    _, channels, height, width = x.shape
    if stride[3] < channels or stride[2] < stride[3] * width or stride[0] < stride[2] * height:
        return False
    # One channel of one pixel has these strides in both formats.
    return not (channels == 1 and height == 1 and width == 1)


def empty_output(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialised tensor of ``shape`` in the dtype, device and memory format of ``like``."""
    return torch.empty(
        tuple(shape),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if is_channels_last(like) else torch.contiguous_format,
    )
