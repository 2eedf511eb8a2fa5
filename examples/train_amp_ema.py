"""Group learning and finetuning with autocast, a gradient scaler, accumulation and averaged weights.

    python examples/train_amp_ema.py --out outputs/amp [--form packed]

Real digits (scikit-learn's), ResNet-20. Interrupted, it goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import dsprune
from dsprune.recipes.data import digits

PARTS = 2  # micro-batches in a step


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=60, help="of learning, and of finetuning")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--form", choices=["masked", "packed"], default="masked", help="of finetuning")
    options.add_argument("--compile", action="store_true")
    args = options.parse_args()
    data = digits(8)
    order = torch.Generator().manual_seed(1)

    def micro_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
        index = torch.randint(len(data.train), (args.batch,), generator=order)
        return [(data.train.images[part], data.train.labels[part]) for part in index.chunk(PARTS)]

    def train(stage: str, model: nn.Module, learn: bool) -> tuple[dsprune.GroupLearner | None, nn.Module]:
        called = torch.compile(model) if args.compile else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        scaler = torch.amp.GradScaler("cpu")  # on a GPU: "cuda", and float16 below
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        parts = {
            "model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler,
            "average": average, "order": order,
        }  # fmt: skip
        learner = None
        if learn:
            learner = dsprune.GroupLearner(
                model, data.example, groups=2, strength=0.05, total_steps=args.steps
            )
            parts["learner"] = learner
        checkpoint, first = args.out / f"{stage}.safetensors", 0
        if checkpoint.exists():
            first = dsprune.load_training(checkpoint, parts)["step"]

        def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(called(x), y)

        def clip() -> None:
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)

        for step in range(first, args.steps):
            batches = micro_batches()
            if learner is not None:
                closures = [lambda x=x, y=y: loss_of(x, y) for x, y in batches]
                loss = learner.step(closures, optimizer, scaler=scaler, grad_hook=clip)
            else:
                optimizer.zero_grad()
                loss = torch.zeros(())
                for x, y in batches:
                    part = loss_of(x, y) / PARTS
                    scaler.scale(part).backward()
                    loss += part.detach()
                scaler.unscale_(optimizer)
                clip()
                scaler.step(optimizer)
                scaler.update()
            schedule.step()
            average.update_parameters(model)
            if (step + 1) % 20 == 0 or step + 1 == args.steps:
                print(f"{stage} {step + 1}: loss {loss.item():.3f}", flush=True)
                dsprune.save_training(checkpoint, parts, {"step": step + 1})
        return learner, average.module

    torch.manual_seed(0)
    model = dsprune.models.cifar_resnet(20, in_channels=1)
    learner, _ = train("learn", model, learn=True)
    assert learner is not None
    structure = dsprune.find_structure(model, data.example, learner.assignment(), flops=0.5)
    dsprune.apply_structure(model, structure)
    if args.form == "packed":
        model = dsprune.pack(model, data.example, train=True)
    _, averaged = train("finetune", model, learn=False)
    update_bn([data.train.images], averaged)  # BatchNorm's statistics of the averaged weights
    if args.form == "packed":
        averaged = dsprune.unpack(averaged, dsprune.models.cifar_resnet(20, in_channels=1))
    packed = dsprune.pack(averaged.eval(), data.example)
    dsprune.save(packed, args.out / "packed.safetensors")
    with torch.no_grad():
        right = (packed(data.validation.images).argmax(1) == data.validation.labels).float().mean()
    print(f"validation accuracy {100 * right.item():.1f}%, packed network: {args.out}/packed.safetensors")


if __name__ == "__main__":
    main()
