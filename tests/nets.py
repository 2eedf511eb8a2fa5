"""Small networks that pruning tools stumble over, and random structured zeros for any network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def structured_zeros(
    model: nn.Module, seed: int = 0, groups: int = 3, keep: float = 0.5, dead: float = 0.1
) -> nn.Module:
    """Random uneven groups in every plain convolution: each reads its own random channels; some filters
    die.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels > 3:
                o, i = module.weight.shape[:2]
                assigned = torch.randint(groups, (o,), generator=generator)
                mask = torch.rand(groups, i, generator=generator) < keep
                mask[torch.arange(groups), torch.randint(i, (groups,), generator=generator)] = True
                alive = torch.rand(o, generator=generator) >= dead
                module.weight *= (mask[assigned] & alive[:, None])[:, :, None, None]
    return model


def random_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """BatchNorm statistics and affine parameters away from their trivial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 2.0),
                ):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


def conv_bn(i: int, o: int, k: int = 3, **kwargs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kwargs), nn.BatchNorm2d(o))


class Plain(nn.Module):
    """conv, BN, ReLU, conv with bias, ReLU6, strided conv, linear."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.a = conv_bn(3, width)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, width, 3, stride=2, bias=False)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.b(F.relu(self.a(x))))
        return self.head(F.relu(self.c(x), inplace=True).mean((2, 3)))


class Residual(nn.Module):
    """Basic blocks with identity and projection, additions written in place and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.a1, self.a2 = conv_bn(8, 8), conv_bn(8, 8)
        self.b1, self.b2 = conv_bn(8, 16, stride=2), conv_bn(16, 16)
        self.project = conv_bn(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.a2(F.relu(self.a1(x)))
        y += x
        x = F.relu_(y)
        x = F.relu(self.project(x) + self.b2(F.relu(self.b1(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Zoo(nn.Module):
    """A depthwise, a dilated, a biased, a shared, an even-grouped and a transposed convolution, a
    concatenation, a channel shuffle, a squeeze-excite branch, a max pool, and room for dead filters whose
    BatchNorm bias is not zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(12)
        self.point = conv_bn(12, 16, 1)
        self.dilated = nn.Sequential(nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.BatchNorm2d(16))
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.shared_bn = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(16)])
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.unpadded = conv_bn(16, 12, 1)
        self.squeeze = nn.Conv2d(28, 8, 1)
        self.excite = nn.Conv2d(8, 28, 1)
        self.mix = nn.Conv2d(28, 12, (3, 5), padding=(1, 2), bias=True)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.last = conv_bn(10, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu6(self.depthwise_bn(self.depthwise(x)))
        x = F.relu(self.dilated(F.relu(self.point(x))))
        x = F.relu(self.shared_bn[0](self.shared(x)))
        x = F.relu(self.shared_bn[1](self.shared(x)))
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = F.hardswish(self.grouped(x))
        z = torch.sigmoid(self.unpadded(y))
        x = torch.cat([y, z], 1)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        x = F.max_pool2d(x * gate, 2)
        x = F.silu(self.mix(x))
        x = F.relu(self.last(self.up(x)))
        return self.head(x.mean((2, 3)))


class DeadButBiased(nn.Module):
    """Filters that are all zero, with BatchNorm biases that are not: read by an unpadded and by a padded
    convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.a = conv_bn(8, 8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.b = conv_bn(8, 8)
        self.padded = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)
        random_norms(self)
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer[0].weight[2:5] = 0
                layer[1].bias[2:5] = torch.tensor([0.7, 0.4, -0.6])
                layer[1].running_mean[2:5] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.pointwise(F.relu(self.a(x))))
        x = F.relu(self.padded(F.relu(self.b(x))))
        return self.head(x.mean((2, 3)))


class SizeBranch(nn.Module):
    """A branch on the image size: an exported graph is only right for one side of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if x.shape[2] % 2 == 0:
            y = y * 2
        return self.b(y).mean((2, 3))


class Untraceable(nn.Module):
    """Control flow on data: torch.export refuses it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.a(x))
        if float(y.sum()) > 1e9:
            y = y * 2
        return self.b(y)
