"""ResNet-18 and ResNet-50 for 224 x 224 images, with torchvision's state dict names and shapes.

Architecture: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1; the stride
of a bottleneck sits in its 3x3 convolution, as in the published weights.
"""

from __future__ import annotations

import torch
from torch import nn

from dsprune.models._checks import positive_int
from dsprune.nn import conv_norm_act


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(in_channels, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = conv_norm_act(self.conv1, self.bn1, x)
        return conv_norm_act(self.conv2, self.bn2, out, identity)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and a shortcut; four times as wide outside."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = conv_norm_act(self.conv1, self.bn1, x)
        out = conv_norm_act(self.conv2, self.bn2, out)
        return conv_norm_act(self.conv3, self.bn3, out, identity)


class ResNet(nn.Module):
    """See `resnet18` and `resnet50`."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self._width = 64
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(block, 64, blocks[0], 1)
        self.layer2 = self._stage(block, 128, blocks[1], 2)
        self.layer3 = self._stage(block, 256, blocks[2], 2)
        self.layer4 = self._stage(block, 512, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self._width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(
        self, block: type[BasicBlock] | type[Bottleneck], width: int, count: int, stride: int
    ) -> nn.Sequential:
        layers: list[nn.Module] = []
        for i in range(count):
            layers.append(block(self._width, width, stride if i == 0 else 1))
            self._width = width * block.expansion
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(conv_norm_act(self.conv1, self.bn1, x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-18, randomly initialised from torch's global generator.

    Input: float, (N, in_channels, H, W); ImageNet: 224 x 224. Output: logits (N, num_classes).
    Raises TypeError for arguments that are not integers, ValueError for counts below 1.
    """
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        positive_int("num_classes", num_classes),
        positive_int("in_channels", in_channels),
    )


def resnet50(num_classes: int = 1000, in_channels: int = 3) -> ResNet:
    """ResNet-50, randomly initialised from torch's global generator.

    Input: float, (N, in_channels, H, W); ImageNet: 224 x 224. Output: logits (N, num_classes).
    Raises TypeError for arguments that are not integers, ValueError for counts below 1.
    """
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        positive_int("num_classes", num_classes),
        positive_int("in_channels", in_channels),
    )
