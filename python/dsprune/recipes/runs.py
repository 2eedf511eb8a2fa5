"""A run folder: one network on one data set, from its training to its packed file, stage by stage.

    run.json               what is run: network, data, seed, settings of each stage
    checkpoints/           of a training stage that has not ended, from which it can go on
    dense.safetensors      the trained dense network
    learned.safetensors    the network after group learning, and the group of each filter
    pruned.safetensors     the network with its prune masks
    finetuned.safetensors  the same, finetuned
    packed.safetensors     the packed network (dsprune.save)
    report.json  *.png     figures and pictures

Each stage reads what the one before it wrote. A stage's files are complete or absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from dsprune import models
from dsprune.checkpoint import (
    CheckpointError,
    read_checkpoint,
    read_json,
    write_checkpoint,
    write_json,
)
from dsprune.recipes import training
from dsprune.recipes.data import ImageData
from dsprune.recipes.datasets import DATASETS, load_data

ARCHITECTURES = ("cifar_resnet", "resnet18", "resnet50")
STAGES = ("dense", "learned", "pruned", "finetuned", "packed")
_FORMAT = 1


@dataclass(frozen=True)
class Config:
    """What one run folder holds; stored as its run.json.

    `threads` belongs to it because sums are split between threads: another number gives other last bits.
    `folder` is where the data are, for data sets that are not built in; `limit` the number of images to take
    of each part (0: all).
    """

    arch: str = "cifar_resnet"
    depth: int = 20
    data: str = "digits"
    size: int = 16
    seed: int = 0
    threads: int = 1
    folder: str = ""
    limit: int = 0
    device: str = "cpu"
    pretrain: training.Pretrain = field(default_factory=training.Pretrain)
    learn: training.Learn = field(default_factory=training.Learn)
    prune: training.Prune = field(default_factory=training.Prune)
    finetune: training.Finetune = field(default_factory=training.Finetune)

    def __post_init__(self) -> None:
        training.check_types(self)
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"arch: expected one of {list(ARCHITECTURES)}, got {self.arch!r}")
        if self.arch == "cifar_resnet" and self.depth not in models.CIFAR_DEPTHS:
            raise ValueError(f"depth: expected one of {list(models.CIFAR_DEPTHS)}, got {self.depth!r}")
        if self.data not in DATASETS:
            raise ValueError(f"data: expected one of {list(DATASETS)}, got {self.data!r}")
        if not 8 <= self.size <= 512:
            raise ValueError(f"size: expected 8 to 512 pixels, got {self.size!r}")
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"threads: expected 1 to 1024, got {self.threads!r}")
        if not self.limit >= 0:
            raise ValueError(f"limit: expected at least 0, got {self.limit!r}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device: expected 'cpu' or 'cuda', got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: torch sees no CUDA device here")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed: expected 0 to 2**40 - 1, got {self.seed!r}")

    @property
    def title(self) -> str:
        """The network's name for people."""
        return f"ResNet-{self.depth if self.arch == 'cifar_resnet' else self.arch[6:]}"

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON; `from_json` is the inverse."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: Path) -> Config:
        """The settings in `content`; CheckpointError, naming `source`, where they are not ours."""
        if type(content.get("format")) is not int or content["format"] != _FORMAT:
            raise CheckpointError(f"{source}: run format {content.get('format')!r}, expected {_FORMAT}")
        values = {key: value for key, value in content.items() if key != "format"}
        kinds = {
            "pretrain": training.Pretrain,
            "learn": training.Learn,
            "prune": training.Prune,
            "finetune": training.Finetune,
        }
        try:
            for given, kind in ((values, cls), *((values[name], kind) for name, kind in kinds.items())):
                lacking = {entry.name for entry in dataclasses.fields(kind)} - given.keys()
                if lacking:  # a default would be another run's
                    raise ValueError(f"it lacks {sorted(lacking)[0]!r}")
            stages = {name: kind(**values.pop(name)) for name, kind in kinds.items()}
            return cls(**values, **stages)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{source}: not a run of this version ({error})") from None


def build_network(arch: str, depth: int, classes: int, channels: int) -> nn.Module:
    """A fresh network of a built-in architecture, initialised from torch's global generator.

    Raises ValueError for an unknown architecture, depth, or number of classes or channels.
    """
    if arch == "cifar_resnet":
        return models.cifar_resnet(depth, num_classes=classes, in_channels=channels)
    if arch == "resnet18":
        return models.resnet18(num_classes=classes, in_channels=channels)
    if arch == "resnet50":
        return models.resnet50(num_classes=classes, in_channels=channels)
    raise ValueError(f"arch: expected one of {list(ARCHITECTURES)}, got {arch!r}")


def hold_masks(model: nn.Module, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Load a state dict into `model`, first putting prune masks wherever the state has them.

    Raises CheckpointError, naming `source`, where the state does not fit the network; nothing is changed then
    if it is the masks that do not.
    """
    own = dict(model.named_modules())
    masks = {n.removesuffix(".weight_mask"): v for n, v in state.items() if n.endswith(".weight_mask")}
    for name, mask in masks.items():
        module = own.get(name)
        weight = getattr(module, "weight", None)
        if module is None or weight is None or weight.shape != mask.shape:
            raise CheckpointError(f"{source}: does not fit the network: mask of {name!r}")
    for name, mask in masks.items():
        torch_prune.custom_from_mask(own[name], "weight", mask)
    training.load_weights(model, state, source)


@dataclass
class Run:
    """A run folder and its settings. `workers`: processes that read images, 0: this one."""

    path: Path
    config: Config
    workers: int = 0

    @classmethod
    def create(cls, path: Path, config: Config) -> Run:
        """Start a folder afresh: files of an earlier run in it are removed, others are left alone.

        Raises ValueError where `path` is a file.
        """
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: is not a folder")
        run = cls(path, config)
        (path / "run.json").unlink(missing_ok=True)  # else a run cut off here would go on by the old settings
        run.forget("dense")
        write_json(path / "run.json", config.to_json())
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """The run in an existing folder; CheckpointError where there is none."""
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such run folder")
        if not (path / "run.json").exists():
            raise CheckpointError(f"{path}: not a run folder (it has no run.json)")
        return cls(path, Config.from_json(read_json(path / "run.json"), path / "run.json"))

    def reconfigure(self, **changes: Any) -> None:
        """Change settings, in run.json too."""
        self.config = dataclasses.replace(self.config, **changes)
        write_json(self.path / "run.json", self.config.to_json())

    def file(self, stage: str) -> Path:
        """Where the result of a stage is."""
        return self.path / f"{stage}.safetensors"

    def checkpoint(self, stage: str) -> Path:
        """Where the checkpoint of a training stage is."""
        return self.path / "checkpoints" / f"{stage}.safetensors"

    def has(self, stage: str) -> bool:
        """Whether a stage has been finished."""
        return self.file(stage).exists()

    def forget(self, stage: str, *, checkpoints: bool = True) -> None:
        """Remove the results of `stage` and of all later ones, which no longer follow from it."""
        trained = {"dense": "pretrain", "learned": "learn", "finetuned": "finetune"}
        for later in STAGES[STAGES.index(stage) :]:
            self.file(later).unlink(missing_ok=True)
            if later in trained and (checkpoints or later != stage):
                self.checkpoint(trained[later]).unlink(missing_ok=True)
        for name in ("report.json", "report.md", "report.png", "curves.png", "structure.png"):
            (self.path / name).unlink(missing_ok=True)

    def latest(self) -> str:
        """The last stage that has been finished; CheckpointError where none has."""
        for stage in reversed(STAGES):
            if self.has(stage):
                return stage
        raise CheckpointError(f"{self.path}: this run has not finished any stage yet")

    def need(self, stage: str, command: str) -> None:
        """CheckpointError, saying which command makes it, unless a stage has been finished."""
        if not self.has(stage):
            raise CheckpointError(f"{self.path}: has no {stage} network yet; run 'dsprune {command}' first")

    def data(self) -> ImageData:
        """The data set of this run."""
        if self.config.data == "digits":
            return load_data(self.config.data, self.config.size)
        return load_data(
            self.config.data,
            self.config.size,
            Path(self.config.folder),
            limit=self.config.limit,
            device=torch.device(self.config.device),
            workers=self.workers,
        )

    def network(self, data: ImageData) -> nn.Module:
        """A fresh dense network of this run's architecture, initialised by this run's seed.

        Raises ValueError as `build_network` does.
        """
        torch.manual_seed(self.config.seed)
        network = build_network(self.config.arch, self.config.depth, data.classes, data.channels)
        return network.to(data.device)

    def write(self, stage: str, model: nn.Module, **meta: Any) -> None:
        """Store a stage's network and a JSON object."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        assignment = meta.pop("assignment", None) or {}
        tensors.update({f"assignment.{name}": value for name, value in assignment.items()})
        write_checkpoint(self.file(stage), tensors, {"stage": stage, **meta})

    def read(self, stage: str, data: ImageData) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]:
        """A stage's network in eval mode, masks on, its assignment and its JSON object.

        Raises CheckpointError where the stage's file is missing, damaged, or of another network.
        """
        tensors, meta = read_checkpoint(self.file(stage))
        model = self.network(data)
        hold_masks(model, training.part_of(tensors, "model."), self.file(stage))
        return model.eval(), training.part_of(tensors, "assignment."), meta

    def packed(self, data: ImageData) -> nn.Module:
        """The packed network, in eval mode."""
        import dsprune

        return dsprune.load(self.file("packed"), self.network(data)).eval()
