"""Networks that others pruned: with torch.nn.utils.prune, with masks as plain tensors, and a layer alone.

python examples/torch_prune_masks.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

import dsprune
from dsp_kernels import GroupLayout, permuted_grouped_conv2d
from dsprune.models import cifar_resnet


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 32, 32)

    # Whole input channels by their norm, with torch's own pruning: one group a layer.
    model = cifar_resnet(20).eval()
    for conv in dsprune.prunable_convs(model, x):
        prune.ln_structured(model.get_submodule(conv.name), "weight", amount=0.5, n=2, dim=1)
    packed = dsprune.pack(model, x)
    print(dsprune.summary(packed, x))
    print(f"torch.nn.utils.prune: largest difference {largest_difference(packed(x), model(x)):.1e}")

    # Masks as plain tensors, whoever made them: filters with equal rows become a group.
    model = cifar_resnet(20).eval()
    for conv in dsprune.prunable_convs(model, x):
        mask = torch.rand(2, conv.in_channels) < 0.5
        mask[:, 0] = True
        rows = mask[torch.arange(conv.out_channels) % 2]  # bool (filters, channels)
        model.get_submodule(conv.name).weight *= rows[:, :, None, None]
    packed = dsprune.pack(model, x)
    print(f"plain masks: largest difference {largest_difference(packed(x), model(x)):.1e}")

    # One layer, without a network.
    conv = nn.Conv2d(16, 8, 3, padding=1)
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:3, ::2], mask[3:, 5:14] = True, True
    conv.weight *= mask[:, :, None, None]
    layout = GroupLayout.from_mask(mask)
    image = torch.randn(2, 16, 24, 24)
    y = permuted_grouped_conv2d(image, layout.pack(conv.weight), layout, conv.bias, kernel_size=3, padding=1)
    print(f"one layer: largest difference {largest_difference(y, conv(image)):.1e}")


if __name__ == "__main__":
    main()
