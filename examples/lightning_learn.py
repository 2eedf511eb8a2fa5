"""Group learning in Lightning's Trainer, then finetuning by masks in the same Trainer's way, then packing.

    python examples/lightning_learn.py --out outputs/lightning

Needs `pip install 'dsp-kernels[lightning]'`. Real digits (scikit-learn's), ResNet-20.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import dsprune
from dsprune.integrations.lightning import GroupLearning
from dsprune.recipes.data import digits


class Classifier(pl.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--steps", type=int, default=60, help="of learning, and of finetuning")
    args = options.parse_args()
    pl.seed_everything(0)
    data = digits(8)
    loader = DataLoader(TensorDataset(data.train.images, data.train.labels), batch_size=64, shuffle=True)
    module = Classifier(dsprune.models.cifar_resnet(20, in_channels=1))

    def trainer(*callbacks: pl.Callback) -> pl.Trainer:
        return pl.Trainer(
            max_steps=args.steps, accelerator="auto", devices=1, callbacks=list(callbacks), logger=False,
            default_root_dir=args.out, gradient_clip_val=5.0, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    groups = GroupLearning("model", example_input=data.example, groups=2, strength=0.05)
    trainer(groups).fit(module, loader)
    module.cpu()
    structure = dsprune.find_structure(module.model, data.example, groups.learner.assignment(), flops=0.5)
    dsprune.apply_structure(module.model, structure)
    trainer().fit(module, loader)  # masks hold the zeros
    packed = dsprune.pack(module.cpu().model.eval(), data.example)
    args.out.mkdir(parents=True, exist_ok=True)
    dsprune.save(packed, args.out / "packed.safetensors")
    with torch.no_grad():
        right = (packed(data.validation.images).argmax(1) == data.validation.labels).float().mean()
    print(f"validation accuracy {100 * right.item():.1f}%, packed network: {args.out}/packed.safetensors")


if __name__ == "__main__":
    main()
