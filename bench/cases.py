"""The pruned networks that are measured: the authors' own, and random structures that nothing was tuned
for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dsprune import apply_structure, find_structure, prunable_convs
from dsprune.graph import clean_copy
from dsprune.models import cifar_resnet, resnet18, resnet50


@dataclass(frozen=True)
class Case:
    """A pruned dense network (zeros in its weights), made when it is needed."""

    name: str
    make: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]
    batches: tuple[int, ...]
    images_trained: int = 0  # batch of the training-step benchmark; 0: none


def random_structure(
    make: Callable[[], nn.Module], shape: tuple[int, int, int], cut: float, groups: int
) -> nn.Module:
    """A network with random filter groups and random channel importances, cut by ``cut`` of the FLOPs of its
    prunable convolutions, as the paper counts.
    """
    torch.manual_seed(0)
    model = make().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape)
    assignment = {}
    with torch.no_grad():
        for info in prunable_convs(model, x):
            assigned = torch.randint(groups, (info.out_channels,), generator=generator)
            assignment[info.name] = assigned
            # Each group likes other channels: what is left overlaps and is uneven, as learned groups are.
            liking = torch.rand(groups, info.in_channels, generator=generator) ** 2
            model.get_parameter(f"{info.name}.weight").mul_(liking[assigned][:, :, None, None])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2, generator=generator)  # type: ignore[union-attr, operator]
                module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr, operator]
    apply_structure(model, find_structure(model, x, assignment, flops=cut, count="prunable"))
    return clean_copy(model).eval()


def authors_network(folder: Path, groups: int) -> nn.Module:
    model = cifar_resnet(20)
    model.load_state_dict(load_file(folder / f"resnet20_g{groups}.safetensors"))
    return model.eval()


def cases(checkpoints: Path | None, suite: str) -> Iterator[Case]:
    """The cases of a suite: "authors", "cifar" (the authors' too), "imagenet" or "all".

    The authors' networks are there where ``checkpoints`` names their folder.
    """
    cifar, imagenet = (3, 32, 32), (3, 224, 224)
    if suite in ("authors", "cifar", "all") and checkpoints is not None:
        for groups in (4, 3, 2):
            yield Case(
                f"authors-resnet20-g{groups}",
                lambda groups=groups: authors_network(checkpoints, groups),  # type: ignore[misc]
                cifar,
                (1, 32, 128),
                128,
            )
    if suite in ("cifar", "all"):
        for depth in (20, 56):
            for cut in (0.5, 0.7, 0.9):
                for groups in (2, 4):
                    yield Case(
                        f"random-resnet{depth}-g{groups}-{round(100 * cut)}%",
                        lambda d=depth, c=cut, g=groups: random_structure(
                            lambda: cifar_resnet(d), cifar, c, g
                        ),  # type: ignore[misc]
                        cifar,
                        (1, 32, 128),
                    )
    if suite in ("imagenet", "all"):
        for name, maker in (("resnet18", resnet18), ("resnet50", resnet50)):
            for cut in (0.5, 0.7, 0.9):
                yield Case(
                    f"random-{name}-g2-{round(100 * cut)}%",
                    lambda m=maker, c=cut: random_structure(m, imagenet, c, 2),  # type: ignore[misc]
                    imagenet,
                    (1, 8),
                )
