"""A two-dimensional U-Net of MONAI: prune it, pack it, and segment an image larger than the example.

python examples/monai_unet.py
"""

from __future__ import annotations

import torch
from monai.networks.nets import UNet

import dsprune


def main() -> None:
    torch.manual_seed(0)
    model = UNet(
        spatial_dims=2, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2),
        num_res_units=1, norm="BATCH",
    ).eval()  # fmt: skip
    x = torch.randn(1, 1, 64, 64)
    # In earnest: train, and take the groups from a GroupLearner.
    assignment = {conv.name: torch.arange(conv.out_channels) % 2 for conv in dsprune.prunable_convs(model, x)}
    structure = dsprune.find_structure(model, x, assignment, flops=0.4)
    dsprune.apply_structure(model, structure)
    packed = dsprune.pack(model, x)
    print(dsprune.summary(packed, x))
    image = torch.randn(2, 1, 96, 128)
    with torch.no_grad():
        difference = float((packed(image) - model(image)).abs().max())
    print(f"fused: {packed.fused}; largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
