"""On large shapes the error, in norm, stays within twice that of torch's own convolution in that dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dsp_kernels import GroupLayout, available_backends, permuted_grouped_conv2d

NATIVE = pytest.param(
    "native",
    torch.float32,
    marks=pytest.mark.skipif(available_backends()["native"] is not None, reason="no native core"),
)


@pytest.mark.parametrize(
    ("channels", "size", "kernel"), [(256, 14, 3), (512, 9, 1), (64, 56, 3), (24, 40, 7)]
)
@pytest.mark.parametrize(
    ("backend", "dtype"), [NATIVE, ("reference", torch.float32), ("reference", torch.bfloat16)]
)
def test_error_in_norm(backend: str, dtype: torch.dtype, channels: int, size: int, kernel: int) -> None:
    mask = (torch.rand(3, channels) < 0.5)[torch.randint(3, (channels,))]
    layout = GroupLayout.from_mask(mask)
    x = torch.randn(2, channels, size, size).to(dtype)
    weight = (torch.randn(channels, channels, kernel, kernel) * mask[:, :, None, None]).to(dtype)
    exact = F.conv2d(x.double(), weight.double(), padding=kernel // 2)
    theirs = F.conv2d(x, weight, padding=kernel // 2)
    ours = permuted_grouped_conv2d(
        x, layout.pack(weight), layout, kernel_size=kernel, padding=kernel // 2, backend=backend
    )
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
