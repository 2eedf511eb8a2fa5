"""Torch-Pruning: its importance and schedule with groups, and its own cutting of whole channels.

python examples/with_torch_pruning.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_pruning as tp

import dsprune
from dsprune.interop import torch_pruning_importance, torch_pruning_layers
from dsprune.models import cifar_resnet


def main() -> None:
    torch.manual_seed(0)
    model, x, labels = cifar_resnet(20), torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    # In earnest: groups from a GroupLearner, and training between the steps of the schedule.
    assignment = {conv.name: torch.arange(conv.out_channels) % 2 for conv in dsprune.prunable_convs(model, x)}
    for flops in tp.pruner.algorithms.scheduler.linear_scheduler(0.5, steps=2)[1:]:
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        importance = torch_pruning_importance(model, assignment, tp.importance.GroupTaylorImportance())
        structure = dsprune.find_structure(model, x, assignment, flops=flops, importance=importance)
        dsprune.apply_structure(model, structure)
        print(f"{100 * structure.flops_cut:.1f}% of the FLOPs removed")

    # Packed for training, BatchNorm and additions stay apart, and Torch-Pruning can follow them.
    packed = dsprune.pack(model, x, train=True).network
    pruner = tp.pruner.BasePruner(
        packed, x, importance=tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.25,
        customized_pruners=torch_pruning_layers(), root_module_types=[torch.nn.Conv2d],
        ignored_layers=[packed.classifier],
    )  # fmt: skip
    before = sum(p.numel() for p in packed.parameters())
    pruner.step()
    left = sum(p.numel() for p in packed.parameters())
    print(f"whole channels cut: {before} parameters, then {left}; output {tuple(packed(x).shape)}")


if __name__ == "__main__":
    main()
