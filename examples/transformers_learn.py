"""Group learning of a ResNet of transformers in its Trainer, then finetuning by masks, then packing.

    python examples/transformers_learn.py --out outputs/transformers

Needs `pip install 'dsp-kernels[transformers]'`. Real digits (scikit-learn's); the network starts untrained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import dsprune
from dsprune.integrations.transformers import GroupLearning
from dsprune.recipes.data import digits


class Digits(Dataset):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=60, help="of learning, and of finetuning")
    args = options.parse_args()
    torch.manual_seed(0)
    data = digits(16)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[2, 2],
        layer_type="basic",
        num_labels=10,
    )
    model = ResNetForImageClassification(config)

    def trainer(stage: str) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(args.out / stage), max_steps=args.steps, per_device_train_batch_size=64,
            learning_rate=2e-3, lr_scheduler_type="cosine", save_steps=args.steps, report_to=[],
            logging_steps=max(1, args.steps // 3), disable_tqdm=True,
        )  # fmt: skip
        return Trainer(
            model=model, args=arguments, train_dataset=Digits(data.train.images, data.train.labels)
        )

    learning = trainer("learn")
    groups = GroupLearning(learning, data.example, groups=2, strength=0.05)
    learning.train()
    model.cpu()
    structure = dsprune.find_structure(model, data.example, groups.learner.assignment(), flops=0.5)
    dsprune.apply_structure(model, structure)
    trainer("finetune").train()  # masks hold the zeros
    packed = dsprune.pack(model.cpu().eval(), data.example)
    dsprune.save(packed, args.out / "packed.safetensors")
    print(dsprune.summary(packed, data.example))
    with torch.no_grad():
        logits = packed(data.validation.images).logits
    right = (logits.argmax(1) == data.validation.labels).float().mean()
    print(f"validation accuracy {100 * right.item():.1f}%, packed network: {args.out}/packed.safetensors")


if __name__ == "__main__":
    main()
