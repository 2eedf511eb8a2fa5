"""How a kernel lies over an image: kernel, stride, padding and dilation, and the sizes that follow from them.

Pairs are (vertical, horizontal), in pixels.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Geometry", "output_size", "pair"]


def pair(name: str, value: object, least: int, *, expand: bool = False) -> tuple[int, int]:
    """An int or two ints, each at least ``least``, as a tuple; with ``expand`` also a sequence of one.

    Raises TypeError for what is no integer (a bool is none), ValueError for another number of them or a
    smaller one, naming the argument ``name``.
    """
    given: Any = value
    if type(value) is tuple and len(value) == 2:
        first, second = value
    elif isinstance(value, int):
        first = second = value
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if len(value) != 2 and not (expand and len(value) == 1):
            raise ValueError(f"{name} must be an int or two ints of at least {least}, got {value!r}")
        first, second = value[0], value[-1]
    else:
        first = second = given
    if type(first) is not int or type(second) is not int:
        if isinstance(first, bool) or isinstance(second, bool):
            raise TypeError(f"{name} must be an int or two ints of at least {least}, got {value!r}")
        try:
            first, second = operator.index(first), operator.index(second)
        except TypeError:
            raise TypeError(f"{name} must be an int or two ints of at least {least}, got {value!r}") from None
    if first < least or second < least:
        raise ValueError(f"{name} must be an int or two ints of at least {least}, got {value!r}")
    return first, second


def output_size(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
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


@dataclass(frozen=True)
class Geometry:
    """``pads``: what is put around the image, ((top, bottom), (left, right))."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    dilation: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Geometry:
        """From the arguments of ``nn.Conv2d``: ints, pairs, sequences of one; ``padding`` may be "same" (the
        output is as large as the input; stride 1; the odd pixel goes to the bottom and the right, as in
        torch) or "valid".

        Raises TypeError or ValueError, naming the argument, for anything else.
        """
        kernel = pair("kernel_size", kernel_size, 1, expand=True)
        steps = pair("stride", stride, 1, expand=True)
        spread = pair("dilation", dilation, 1, expand=True)
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise ValueError(f"padding must be ints, 'same' or 'valid', got {padding!r}")
            if padding == "same" and steps != (1, 1):
                raise ValueError(f"padding 'same' needs stride 1, got stride {steps}")
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
            pads = ((total[0] // 2, total[0] - total[0] // 2), (total[1] // 2, total[1] - total[1] // 2))
        else:
            vertical, horizontal = pair("padding", padding, 0, expand=True)
            pads = ((vertical, vertical), (horizontal, horizontal))
        return cls(kernel, steps, pads, spread)

    @property
    def padding(self) -> tuple[int, int] | None:
        """The same on both sides of the image; None where the sides differ."""
        (top, bottom), (left, right) = self.pads
        return (top, left) if top == bottom and left == right else None

    @property
    def taps(self) -> int:
        """How many weights a kernel of one channel has."""
        return self.kernel[0] * self.kernel[1]

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """The smallest image, of at least one pixel, that gives an output of this size."""
        sizes = [
            max(1, (out - 1) * s + d * (k - 1) + 1 - sum(p))
            for out, s, d, k, p in zip(
                (height, width), self.stride, self.dilation, self.kernel, self.pads, strict=True
            )
        ]
        return sizes[0], sizes[1]
