"""Kernel, stride, padding, dilation: the sizes are those of torch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from dsp_kernels.geometry import Geometry, output_size, pair


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (4, 4), (5, 2)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_same_padding_is_torchs(kernel: tuple[int, int], dilation: int | tuple[int, int]) -> None:
    geometry = Geometry.of(kernel, padding="same", dilation=dilation)
    x, w = torch.randn(1, 1, 7, 9, dtype=torch.float64), torch.randn(1, 1, *kernel, dtype=torch.float64)
    (top, bottom), (left, right) = geometry.pads
    padded = F.pad(x, (left, right, top, bottom))
    expected = F.conv2d(x, w, padding="same", dilation=dilation)
    torch.testing.assert_close(F.conv2d(padded, w, dilation=geometry.dilation), expected)
    assert geometry.padding == ((top, left) if (top, left) == (bottom, right) else None)
    assert geometry.taps == w.numel()


def test_sizes_are_torchs() -> None:
    for kernel, stride, padding, dilation in itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 4), (1, 2)):
        geometry = Geometry.of(kernel, stride, padding, dilation)
        assert geometry == Geometry.of([kernel], (stride,), [padding, padding], dilation)
        assert geometry.padding == (padding, padding)
        for size in range(1, 12):
            x = torch.empty(1, 1, size, size + 1, device="meta")
            how = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation)
            try:
                made = F.conv2d(x, x.new_empty(1, 1, kernel, kernel), None, stride, padding, dilation).shape
            except RuntimeError:
                with pytest.raises(ValueError, match=f"x of {size}x{size + 1} pixels is too small"):
                    output_size(x.shape, *how)
                continue
            assert output_size(x.shape, *how) == made[2:]
            least = geometry.input_size(*made[2:])
            assert output_size((1, 1, *least), *how) == made[2:]
            if least[0] > 1:
                assert (least[0] - 1 + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 < made[2]


def test_pairs() -> None:
    assert (
        pair("stride", 2, 1) == pair("stride", [2, 2], 1) == pair("stride", torch.Size((2, 2)), 1) == (2, 2)
    )
    assert pair("stride", [3], 1, expand=True) == (3, 3)
    for wrong in ((1, 2, 3), (), [3], 0, (1, 0), -1):
        with pytest.raises(ValueError, match="stride must be an int or two ints of at least 1, got"):
            pair("stride", wrong, 1)
    for odd in (True, (1, True), 1.0, "2", None, [1, 2.5]):
        with pytest.raises(TypeError, match="stride must be an int or two ints of at least 1, got"):
            pair("stride", odd, 1)
    with pytest.raises(ValueError, match="padding must be ints, 'same' or 'valid', got 'full'"):
        Geometry.of(3, padding="full")
    with pytest.raises(ValueError, match="padding 'same' needs stride 1, got stride"):
        Geometry.of(3, 2, "same")
