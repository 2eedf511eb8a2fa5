"""Prunes a network to a share of its own time on this machine, in place of a share of its FLOPs.

python examples/latency_target.py --latency 0.5
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import dsprune
from dsprune.models import cifar_resnet


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--latency", type=float, default=0.5, help="of the dense network's time")
    options.add_argument("--against", choices=("eager", "packed"), default="packed")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--cache", type=Path, help="where layers' times are kept [the user's cache folder]")
    args = options.parse_args()

    # In earnest: a trained network, and groups from a GroupLearner.
    torch.manual_seed(0)
    model, x = cifar_resnet(20).eval(), torch.randn(args.batch, 3, 16, 16)
    assignment = {conv.name: torch.arange(conv.out_channels) % 2 for conv in dsprune.prunable_convs(model, x)}
    structure = dsprune.find_structure(
        model, x, assignment, latency=args.latency, against=args.against, cache=args.cache or True
    )
    dsprune.apply_structure(model, structure)  # finetune here
    print(dsprune.summary(dsprune.pack(model, x), x, structure=structure))


if __name__ == "__main__":
    main()
