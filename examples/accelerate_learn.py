"""Group learning in a loop written with Accelerate, then packing.

    accelerate launch examples/accelerate_learn.py --out outputs/accelerate

Needs `pip install 'dsp-kernels[accelerate]'`. Real digits (scikit-learn's), ResNet-20.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import dsprune
from dsprune.integrations.accelerate import AcceleratedGroupLearner
from dsprune.recipes.data import digits


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--epochs", type=int, default=3, help="of learning, and of finetuning")
    options.add_argument("--cpu", action="store_true")
    args = options.parse_args()
    torch.manual_seed(0)
    data = digits(8)
    accelerator = Accelerator(cpu=args.cpu, mixed_precision="bf16")
    loader = DataLoader(TensorDataset(data.train.images, data.train.labels), batch_size=64, shuffle=True)
    model = dsprune.models.cifar_resnet(20, in_channels=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    example = data.example.to(accelerator.device)

    learner = AcceleratedGroupLearner(
        accelerator, model, example, groups=2, strength=0.05, total_steps=args.epochs * len(loader)
    )
    for epoch in range(args.epochs):
        for images, labels in loader:
            loss = learner.step(lambda x=images, y=labels: F.cross_entropy(model(x), y), optimizer)
            schedule.step()
        accelerator.print(f"learn, epoch {epoch + 1}: loss {loss.item():.3f}")
        accelerator.save_state(str(args.out / "state"))  # the learner is in it

    # A new network with the learned weights, masked, goes through prepare again.
    plain = dsprune.models.cifar_resnet(20, in_channels=1)
    plain.load_state_dict(accelerator.unwrap_model(model).state_dict())
    structure = dsprune.find_structure(plain, data.example, learner.assignment(), flops=0.5)
    dsprune.apply_structure(plain, structure)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    model, optimizer = accelerator.prepare(plain.train(), optimizer)
    for epoch in range(args.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"finetune, epoch {epoch + 1}: loss {loss.item():.3f}")

    if accelerator.is_main_process:
        packed = dsprune.pack(accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu(), data.example)
        dsprune.save(packed, args.out / "packed.safetensors")
        with torch.no_grad():
            right = (packed(data.validation.images).argmax(1) == data.validation.labels).float().mean()
        print(f"validation accuracy {100 * right.item():.1f}%, packed network: {args.out}/packed.safetensors")


if __name__ == "__main__":
    main()
