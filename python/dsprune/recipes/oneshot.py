"""A trained network and a few hundred images to a packed one, without training."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dsprune
from dsprune.recipes.data import ImageData, Part
from dsprune.recipes.datasets import load_data
from dsprune.recipes.folders import DataError

BATCH = 64


@dataclass(frozen=True)
class Inputs:
    """Images (N, C, H, W), float32, as the network takes them, with no labels."""

    images: torch.Tensor


def read_inputs(path: Path) -> Inputs:
    """The images of a .npy file, (N, C, H, W), any real type; DataError, naming the file."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{path}: not a readable .npy file ({error})") from None
    if not isinstance(found, np.ndarray) or found.ndim != 4 or 0 in found.shape:
        raise DataError(f"{path}: expected images (N, C, H, W), got shape {getattr(found, 'shape', None)}")
    if found.dtype.kind not in "fiu":
        raise DataError(f"{path}: expected numbers, got {found.dtype}")
    images = torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32).copy())
    if not bool(images.isfinite().all()):
        raise DataError(f"{path}: expected finite numbers")
    return Inputs(images)


def read_data(text: str, size: int | None = None) -> ImageData | Inputs:
    """What ``--data`` names: ``digits``, ``SET:DIR`` (such as ``fashion-mnist:DIR``), or a .npy file."""
    name, colon, folder = text.partition(":")
    if name == "digits" and not colon:
        return load_data("digits", size)
    if text.endswith(".npy"):
        return read_inputs(Path(text))
    if not colon or not folder:
        raise ValueError(f"data: expected digits, SET:DIR or a FILE.npy, got {text!r}")
    return load_data(name, size, Path(folder))


def chosen(part: Part, count: int, seed: int) -> list[torch.Tensor]:
    """At most ``count`` images of a part, drawn by the seed, in batches; nothing is augmented."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.zeros(len(part), dtype=torch.bool)
    wanted[torch.randperm(len(part), generator=generator)[:count]] = True
    start, drawn = 0, []
    for images in part.batches(BATCH, torch.device("cpu")):
        mine = wanted[start : start + len(images)]
        start += len(images)
        if bool(mine.any()):
            drawn.append(images[mine])
    return list(torch.cat(drawn).split(BATCH))


@dataclass(frozen=True)
class OneShot:
    """What ``one_shot`` made. ``cut``: the masked network before the reconstruction."""

    masked: nn.Module
    cut: nn.Module
    structure: dsprune.Structure


def one_shot(
    model: nn.Module,
    example: torch.Tensor,
    batches: list[torch.Tensor],
    *,
    groups: int = 2,
    importance: str = "activation",
    reconstruct: bool = True,
    seed: int = 0,
    **target: Any,
) -> OneShot:
    """Groups, prunes and reconstructs a copy of a trained network; ``target`` goes to ``find_structure``.

    ``batches``: inputs to calibrate on. Raises as ``group_filters``, ``find_structure`` and ``reconstruct``
    do.
    """
    assignment = dsprune.group_filters(model, example, groups, batches, seed=seed)
    more: dict[str, Any] = {} if importance == "magnitude" else {"batches": batches}
    structure = dsprune.find_structure(model, example, assignment, importance=importance, **target, **more)
    masked = dsprune.apply_structure(copy.deepcopy(model), structure).eval()
    cut = copy.deepcopy(masked)
    if reconstruct:
        dsprune.reconstruct(masked, structure, batches)
    return OneShot(masked, cut, structure)


@torch.no_grad()
def agreement(model: nn.Module, dense: nn.Module, batches: list[torch.Tensor]) -> tuple[float, float]:
    """Percent of the images with the same largest output as the dense network's, and the relative error of
    the outputs, |y - dense| / |dense|."""
    same, total, error, size = 0, 0, 0.0, 0.0
    for images in batches:
        ours, theirs = model.eval()(images).flatten(1), dense.eval()(images).flatten(1)
        same += int((ours.argmax(1) == theirs.argmax(1)).sum())
        total += len(images)
        error += float((ours - theirs).double().square().sum())
        size += float(theirs.double().square().sum())
    return 100 * same / total, (error / size) ** 0.5 if size else 0.0
