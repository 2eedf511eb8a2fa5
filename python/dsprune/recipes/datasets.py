"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsprune.recipes import folders
from dsprune.recipes.data import ImageData, digits

DATASETS = ("digits", "cifar10", "fashion-mnist", "imagenet")
_IN_MEMORY = {"cifar10": ("CIFAR-10", 32), "fashion-mnist": ("Fashion-MNIST", 28)}


def load_data(name: str, size: int | None = None, folder: Path | None = None, **options: Any) -> ImageData:
    """The data set called `name`; `size` is the side of its images (None: its default).

    `folder` is where a data set that is not built in is; `options` are those of its function in `folders`.
    Raises ValueError for an unknown name, and where something is wrong with the folder.
    """
    if name not in DATASETS:
        raise ValueError(f"data: expected one of {list(DATASETS)}, got {name!r}")
    if name == "digits":
        return digits() if size is None else digits(size)
    if folder is None:
        raise ValueError(f"data: {name} needs the folder that it is in")
    if name in _IN_MEMORY:
        title, own = _IN_MEMORY[name]
        if size not in (None, own):
            raise ValueError(f"size: {title} has images of {own} pixels, got {size}")
        options.pop("workers", None)
        read: Callable[..., ImageData] = folders.cifar10 if name == "cifar10" else folders.fashion_mnist
        return read(folder, **options)
    return folders.imagenet(folder, size=size or 224, **options)
