"""Padding computed from the image size: the tracer gives up where that becomes long, the network packs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsprune
from dsprune.graph import trace


def by_ceiling(size: int, kernel: int, stride: int) -> int:
    """As TensorFlow, in the words of timm."""
    return max((-(size // -stride) - 1) * stride + kernel - size, 0)


def by_remainder(size: int, kernel: int, stride: int) -> int:
    return max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)


def to_a_multiple(size: int, kernel: int, stride: int) -> int:
    """What windows of attention want, and a convolution's border."""
    return (4 - size % 4) % 4 + kernel - 1


class Same(nn.Conv2d):
    calls = 0

    def __init__(self, inputs: int, stride: int, padding: Callable[[int, int, int], int]) -> None:
        super().__init__(inputs, 4, 3, stride)
        self.padding_of = padding

    def forward(self, x: Tensor) -> Tensor:
        Same.calls += 1
        h, w = (self.padding_of(size, 3, self.stride[0]) for size in x.shape[2:])
        return F.conv2d(
            F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2]), self.weight, self.bias, self.stride
        )


def network(depth: int, padding: Callable[[int, int, int], int]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [Same(3, 2, padding)]
    for i in range(depth):
        layers += [nn.ReLU(), Same(4, 2 if i % 2 == 0 and i < 8 else 1, padding)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("padding", [by_ceiling, by_remainder, to_a_multiple])
def test_such_networks_pack_and_run_at_other_sizes(padding: Callable[[int, int, int], int]) -> None:
    model = network(4, padding)
    with torch.no_grad():
        model[2].weight[:2, [0, 3]] = 0
    packed = dsprune.pack(model, torch.randn(1, 3, 37, 40))
    assert packed.fused
    for shape in ((2, 3, 37, 40), (1, 3, 41, 30)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_work_grows_with_the_layers_and_no_faster() -> None:
    """The attempt with free image sizes ends after a few layers, however many follow."""
    calls = []
    for depth in (8, 16):
        model = network(depth, by_ceiling)
        Same.calls = 0
        limits = trace(model, torch.randn(1, 3, 64, 64)).limits
        assert limits.ranges[0] is not None and limits.ranges[0][2:] == ((64, 64), (64, 64))
        calls.append(Same.calls - (depth + 1))
    assert calls[0] == calls[1] <= 6


def test_plain_networks_keep_their_sizes_free() -> None:
    deep = nn.Sequential(*[nn.Conv2d(3, 3, 3, 2, 1) for _ in range(6)])
    up = nn.Sequential(
        *[nn.Conv2d(3, 3, 4, 2, 1) for _ in range(4)], *[nn.Upsample(scale_factor=2) for _ in range(4)]
    )
    for model in (deep, up):
        limits = trace(model.eval(), torch.randn(1, 3, 256, 256)).limits
        assert limits.ranges[0] is not None and all(most is None for _, most in limits.ranges[0][2:])
