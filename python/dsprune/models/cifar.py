"""ResNets for small images: three stages of basic blocks, 16, 32 and 64 channels wide.

Architecture: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2, with
1x1 projection shortcuts where the width changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dsprune.models._checks import positive_int
from dsprune.nn import conv_norm_act

CIFAR_DEPTHS = (20, 32, 44, 56, 110)
_WIDTHS = (16, 32, 64)


class ConvBN(nn.Module):
    """A convolution without bias, then BatchNorm: the stem and the projection shortcuts."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        return conv_norm_act(self.conv, self.bn, x, activation="relu" if relu else None)


class CifarBlock(nn.Module):
    """`relu(shortcut(x) + bn_b(conv_b(relu(bn_a(conv_a(x))))))`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(out_channels)
        self.conv_b = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else ConvBN(in_channels, out_channels, 1, stride)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = conv_norm_act(self.conv_a, self.bn_a, x)
        return conv_norm_act(self.conv_b, self.bn_b, out, self.shortcut(x))


class CifarResNet(nn.Module):
    """See `cifar_resnet`."""

    def __init__(
        self, depth: int, num_classes: int, in_channels: int, widths: tuple[int, int, int] = _WIDTHS
    ) -> None:
        super().__init__()
        self.depth = depth
        self.num_classes = num_classes
        self.in_channels = in_channels
        blocks = (depth - 2) // 6
        self.stem = ConvBN(in_channels, widths[0], 3)
        self.stage1 = self._stage(widths[0], widths[0], blocks, 1)
        self.stage2 = self._stage(widths[0], widths[1], blocks, 2)
        self.stage3 = self._stage(widths[1], widths[2], blocks, 2)
        self.classifier = nn.Linear(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = CifarBlock(in_channels, out_channels, stride)
        return nn.Sequential(first, *(CifarBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x, relu=True)
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.classifier(x.mean(dim=(2, 3)))


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, *, widths: Sequence[int] = _WIDTHS
) -> CifarResNet:
    """A ResNet for small images, randomly initialised from torch's global generator.

    Input: float, (N, in_channels, H, W), any H and W of at least 1 (CIFAR-10: 32 x 32). Output: logits
    (N, num_classes). `widths`: the channels of the three stages.

    Raises ValueError for a depth other than 20, 32, 44, 56 or 110, for counts below 1 and for other than
    three widths, TypeError for arguments that are not integers.
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth: expected one of {list(CIFAR_DEPTHS)}, got {depth!r}")
    if depth not in CIFAR_DEPTHS:
        raise ValueError(f"depth: expected one of {list(CIFAR_DEPTHS)}, got {depth}")
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise TypeError(f"widths: expected three positive ints, got {widths!r}")
    if len(widths) != 3:
        raise ValueError(f"widths: expected three positive ints, got {widths!r}")
    first, second, third = (positive_int("widths", width) for width in widths)
    return CifarResNet(
        depth,
        positive_int("num_classes", num_classes),
        positive_int("in_channels", in_channels),
        (first, second, third),
    )
