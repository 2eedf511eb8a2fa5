"""Learn, prune, finetune and pack a network on several processes; killed at any moment, it goes on.

    torchrun --nproc-per-node 2 examples/ddp_learn.py --out outputs/ddp

Real digits (scikit-learn's), ResNet-20, gloo on the CPU; with NCCL and a model on the GPU the same lines do.
Run the same command again after an interruption: it ends with the same bits.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dsprune
from dsprune.recipes.data import digits


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=60, help="of learning, and of finetuning")
    options.add_argument("--batch", type=int, default=32, help="of each process")
    options.add_argument("--save-every", type=int, default=10)
    args = options.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    data = digits(8)
    args.out.mkdir(parents=True, exist_ok=True)

    # The same in all processes; each then takes its own part of every batch.
    order = torch.Generator().manual_seed(1)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(len(data.train), (processes * args.batch,), generator=order)
        mine = index[rank::processes]
        return data.train.images[mine], data.train.labels[mine]

    def train(stage: str, model: nn.Module, learn: bool) -> dsprune.GroupLearner | None:
        wrapped = DistributedDataParallel(model.train())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        parts = {"model": wrapped, "optimizer": optimizer, "schedule": schedule, "order": order}
        learner = None
        if learn:
            learner = dsprune.GroupLearner(
                wrapped, data.example, groups=2, strength=0.05, total_steps=args.steps
            )
            parts["learner"] = learner
        checkpoint, first = args.out / f"{stage}.safetensors", 0
        if checkpoint.exists():
            first = dsprune.load_training(checkpoint, parts)["step"]
        for step in range(first, args.steps):
            images, labels = batch()

            def loss_of(x: torch.Tensor = images, y: torch.Tensor = labels) -> torch.Tensor:
                return F.cross_entropy(wrapped(x), y)

            if learner is not None:
                loss = learner.step(loss_of, optimizer)
            else:
                optimizer.zero_grad()
                loss = loss_of()
                loss.backward()
                optimizer.step()
            schedule.step()
            if rank == 0:
                print(f"{stage} {step + 1}: loss {loss.item():.3f}", flush=True)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                dsprune.save_training(checkpoint, parts, {"step": step + 1})
        return learner

    torch.manual_seed(0)
    model = dsprune.models.cifar_resnet(20, in_channels=1)
    learner = train("learn", model, learn=True)
    assert learner is not None
    structure = dsprune.find_structure(model, data.example, learner.assignment(), flops=0.5)
    dsprune.apply_structure(model, structure)
    train("finetune", model, learn=False)
    if rank == 0:
        packed = dsprune.pack(model.eval(), data.example)
        dsprune.save(packed, args.out / "packed.safetensors")
        with torch.no_grad():
            right = (packed(data.validation.images).argmax(1) == data.validation.labels).float().mean()
        print(f"validation accuracy {100 * right.item():.1f}%, packed network: {args.out}/packed.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
