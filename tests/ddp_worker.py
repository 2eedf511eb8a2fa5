"""What tests/test_distributed.py runs in each process: learn, prune, finetune masked and packed, in float64;
where Accelerate is installed, learning by it too.

    torchrun --nproc-per-node 2 tests/ddp_worker.py FOLDER

Each process takes its share of every batch; with one process, called as a function, the joined batch.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader, TensorDataset

import dsprune

STEPS, PARTS, CLASSES = 4, 2, 4


class SyncNorm(nn.BatchNorm2d):
    """BatchNorm over the batches of all processes, on any device (torch's SyncBatchNorm needs a GPU)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        count = x.numel() // x.shape[1]
        if dist.is_initialized():
            sums, count = all_reduce(sums), count * dist.get_world_size()
        mean, square = sums[0] / count, sums[1] / count
        variance = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


class Net(nn.Module):
    """A stem and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), SyncNorm(8)
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), SyncNorm(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), SyncNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(x + self.second_norm(self.second(y)))
        return self.head(x.mean((2, 3)))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def run(rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """Everything, as process `rank`; the numbers that must not depend on the number of processes."""
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(STEPS, PARTS, 8, 3, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (STEPS, PARTS, 8), generator=generator)
    out: dict[str, Tensor] = {}

    def keep(stage: str, tensors: dict[str, Tensor]) -> None:
        out.update({f"{stage}.{name}": value.detach().clone() for name, value in tensors.items()})

    def wrap(model: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(model) if processes > 1 else model

    def closure(model: nn.Module, step: int, part: int) -> Callable[[], Tensor]:
        mine = slice(rank, None, processes)
        return lambda: F.cross_entropy(model(images[step, part, mine]), labels[step, part, mine])

    def finetune(stage: str, model: nn.Module) -> None:
        wrapped, optimizer = wrap(model.train()), sgd(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            closure(wrapped, step, 0)().backward()
            optimizer.step()
        keep(stage, {**model.state_dict(), "logits": model.eval()(images[0, 0])})

    for order, make, scaled in (("exact", sgd, False), ("first", adam, True)):
        # The processes may begin with different weights: DistributedDataParallel sends those of the first.
        torch.manual_seed(rank)
        model = Net()
        wrapped, optimizer = wrap(model), make(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
        learner = dsprune.GroupLearner(
            wrapped, images[0, 0], groups=2, strength=0.2, total_steps=STEPS, order=order
        )
        for step in range(STEPS):
            learner.step([closure(wrapped, step, part) for part in range(PARTS)], optimizer, scaler=scaler)
        keep(order, model.state_dict())
        keep(f"{order}.logits", dict(learner.logits))
        keep(f"{order}.gradient", {name: logits.grad for name, logits in learner.logits.items()})
        structure = dsprune.find_structure(model, images[0, 0], learner.assignment(), flops=0.3)
        keep(f"{order}.structure", {name: layout.mask() for name, layout in structure.items()})

    masked = dsprune.apply_structure(copy.deepcopy(model), structure)
    packed = dsprune.pack(masked, images[0, 0], train=True)
    finetune("masked", masked)
    finetune("packed", packed)
    return out


def accelerated(rank: int, processes: int, folder: Path) -> dict[str, Tensor]:
    """Four steps with Accelerate, whose loader gives each process its part of every batch; then the last two
    again from a checkpoint after the second. Called as a function, without Accelerate: the joined batch.
    """
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4 * STEPS, 3, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (4 * STEPS,), generator=generator)
    torch.manual_seed(rank)
    model: Any = Net()
    optimizer: Any = sgd(model)
    loader: Any = DataLoader(TensorDataset(images, labels), batch_size=4)
    settings: dict[str, Any] = {"groups": 2, "strength": 0.2, "total_steps": STEPS}

    def state(learner: dsprune.GroupLearner, model: nn.Module) -> dict[str, Tensor]:
        kept = {**model.state_dict(), **{f"logits.{name}": value for name, value in learner.logits.items()}}
        return {f"accelerate.{name}": value.detach().clone() for name, value in kept.items()}

    if processes == 1:
        learner = dsprune.GroupLearner(model, images[:1], **settings)
        for x, y in loader:
            learner.step(lambda x=x, y=y: F.cross_entropy(model(x), y), optimizer)
        return state(learner, model)

    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from dsprune.integrations.accelerate import AcceleratedGroupLearner

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    learner = AcceleratedGroupLearner(accelerator, model, images[:1], **settings)
    for step, (x, y) in enumerate(loader):
        assert len(x) == 4 // processes
        if step == 2:
            accelerator.save_state(str(folder / "accelerate"))
        learner.step(lambda x=x, y=y: F.cross_entropy(model(x), y), optimizer)
    first = state(learner, accelerator.unwrap_model(model))
    accelerator.load_state(str(folder / "accelerate"))
    assert learner.steps == 2
    for x, y in accelerator.skip_first_batches(loader, 2):
        learner.step(lambda x=x, y=y: F.cross_entropy(model(x), y), optimizer)
    second = state(learner, accelerator.unwrap_model(model))
    assert all(torch.equal(value, second[name]) for name, value in first.items()), "resumed"
    return first


def refuse(rank: int) -> str:
    """What a learner says whose processes do not agree."""
    model = nn.parallel.DistributedDataParallel(Net())
    learner = dsprune.GroupLearner(
        model, torch.randn(2, 3, 8, 8), groups=2, strength=0.1, total_steps=3, seed=rank
    )
    try:
        learner.step(lambda: model(torch.randn(2, 3, 8, 8)).sum(), sgd(model))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    found = run(rank, processes)
    if importlib.util.find_spec("accelerate") is not None:
        found.update(accelerated(rank, processes, folder))
    save_file({n: v.contiguous() for n, v in found.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.txt").write_text(refuse(rank))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
