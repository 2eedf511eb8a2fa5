"""Sizes and memory formats that every implementation, and the fake one, must agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import output_size

__all__ = ["Pair", "empty_output", "is_channels_last", "output_size"]

Pair = Sequence[int]


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
