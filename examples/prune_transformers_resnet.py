"""A ResNet of transformers on real digits: train, learn, prune, finetune, pack, save; load elsewhere, time.

python examples/prune_transformers_resnet.py --out outputs/hf
python examples/prune_transformers_resnet.py --out outputs/hf --load
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification

import dsprune
from dsprune.recipes.data import digits
from dsprune.recipes.timing import best_dense, compare

CONFIG = ResNetConfig(
    num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64], depths=[2, 2, 2], layer_type="basic",
    num_labels=10,
)  # fmt: skip


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model.eval()(images).logits.argmax(1) == labels).float().mean())


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=4, help="of each stage")
    options.add_argument("--flops", type=float, default=0.5, help="fraction of the FLOPs to remove")
    options.add_argument("--load", action="store_true", help="load what an earlier run saved, and time it")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "packed.safetensors"
    data = digits(32)
    test = data.test.images, data.test.labels
    torch.manual_seed(0)
    model = ResNetForImageClassification(CONFIG)

    if args.load:
        packed = dsprune.load(file, model)  # fills the fresh model, and packs it
        print(f"loaded: test accuracy {accuracy(packed, *test):.2f}%")
        for batch in (1, 32):
            times = compare(model.eval(), packed, test[0][:batch], seconds=0.1)
            name, best = best_dense(times)
            print(f"batch {batch}: dense {best:.2f} ms ({name}), packed {times['packed']:.2f} ms")
        return

    def train(name: str, learner: dsprune.GroupLearner | None = None, lr: float = 0.05) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        model.train()
        for _ in range(args.epochs):
            for rows in torch.randperm(len(data.train)).split(64):
                images, labels = data.train.images[rows], data.train.labels[rows]
                if learner is not None:
                    learner.step(lambda x=images, y=labels: F.cross_entropy(model(x).logits, y), optimizer)
                    continue
                optimizer.zero_grad()
                F.cross_entropy(model(images).logits, labels).backward()
                optimizer.step()
        print(f"{name}: test accuracy {accuracy(model, *test):.2f}%")

    train("dense")
    steps = args.epochs * -(-len(data.train) // 64)
    learner = dsprune.GroupLearner(model, data.example, groups=2, strength=0.05, total_steps=steps)
    train("groups learned", learner)
    structure = dsprune.find_structure(model, data.example, learner.assignment(), flops=args.flops)
    dsprune.apply_structure(model, structure)  # masks by torch.nn.utils.prune; training goes on as before
    train("pruned and finetuned", lr=0.02)

    packed = dsprune.pack(model, data.example)
    print(dsprune.summary(packed, data.example))
    dsprune.save(packed, file)
    print(f"{file}: test accuracy {accuracy(packed, *test):.2f}%")


if __name__ == "__main__":
    main()
