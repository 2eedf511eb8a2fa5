"""Data sets as tensors in memory: training, validation and test images.

The validation images choose (the best finetuning cycle, hyperparameters); the test images are only ever
evaluated on. The split is stratified by class and depends on `split_seed` alone, so that runs with
different training seeds share one test set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
import torch.nn.functional as F

CPU = torch.device("cpu")
_TEST_SHARE, _VALIDATION_SHARE = 0.2, 0.1


class Part(Protocol):
    """Images of one purpose: training, validation or test. `labels`: (N,), int64."""

    @property
    def labels(self) -> torch.Tensor: ...

    def __len__(self) -> int: ...

    def batches(self, batch: int, device: torch.device) -> Iterator[torch.Tensor]:
        """All images in order, standardised, float32 (n, C, H, W), nothing random."""

    def epoch(
        self, batch: int, shift: int, generator: torch.Generator, skip: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch of shuffled, augmented training batches, without the first `skip` of them. All that is
        random comes from `generator`, whose state after the first batch does not depend on `skip`.
        """


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), float32, standardised by the training images; labels (N,), int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch: int, device: torch.device) -> Iterator[torch.Tensor]:
        """See `Part`."""
        return (images.to(device) for images in self.images.split(batch))

    def epoch(
        self, batch: int, shift: int, generator: torch.Generator, skip: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `Part`."""
        for images, labels in islice(batches(self, batch, shift, generator), skip, None):
            yield images.to(device), labels.to(device)


@dataclass(frozen=True)
class ImageData:
    """One data set. `shift`: the augmentation's largest translation, in pixels. Batches go to `device`."""

    name: str
    classes: int
    channels: int
    size: int
    shift: int
    train: Part
    validation: Part
    test: Part
    device: torch.device = CPU

    @property
    def example(self) -> torch.Tensor:
        """One zero image (1, C, H, W), for tracing and counting."""
        return torch.zeros(1, self.channels, self.size, self.size, device=self.device)


def stratified_split(
    labels: torch.Tensor, shares: tuple[float, ...], seed: int, *, least: int = 0
) -> list[torch.Tensor]:
    """Disjoint, sorted index sets: one for each share (rounded class by class, to `least` of a class at
    least), and last what remains."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[torch.Tensor]] = [[] for _ in range(len(shares) + 1)]
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        start = 0
        for part, share in zip(parts, shares, strict=False):
            count = max(least, round(share * len(members)))
            part.append(members[start : start + count])
            start += count
        parts[-1].append(members[start:])
    return [torch.cat(part).sort().values for part in parts]


def digits(size: int = 16, split_seed: int = 0) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey images, upsampled (bilinear) to `size` x `size`.

    Needs scikit-learn (no download). Raises ValueError for a size below 8.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"size: expected an int of at least 8, got {size!r}")
    if size < 8:
        raise ValueError(f"size: expected an int of at least 8, got {size}")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    test, validation, train = stratified_split(labels, (_TEST_SHARE, _VALIDATION_SHARE), split_seed)
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / std

    def part(index: torch.Tensor) -> Split:
        return Split(images[index].contiguous(), labels[index].contiguous())

    return ImageData("digits", 10, 1, size, max(1, size // 8), part(train), part(validation), part(test))


def shifted(images: torch.Tensor, pixels: int, generator: torch.Generator) -> torch.Tensor:
    """Each image (N, C, H, W) moved by its own random offset of up to `pixels`; edges repeat outwards."""
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    offset = torch.randint(0, 2 * pixels + 1, (2, count), generator=generator)
    padded = F.pad(images, (pixels,) * 4, mode="replicate")
    rows = offset[0][:, None] + torch.arange(height)
    columns = offset[1][:, None] + torch.arange(width)
    index = torch.arange(count)[:, None, None]
    # Advanced indices around a slice put the channels last: the result is channels_last in memory.
    return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(
    split: Split, batch: int, shift: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of shuffled, shifted training batches (in channels_last).

    The last, smaller batch is kept unless it has a single image, which BatchNorm cannot train on.
    """
    order = torch.randperm(len(split), generator=generator)
    images = shifted(split.images[order], shift, generator)
    labels = split.labels[order]
    for start in range(0, len(split), batch):
        x, y = images[start : start + batch], labels[start : start + batch]
        if len(y) > 1:
            yield x.contiguous(memory_format=torch.channels_last), y


def batch_count(images: int, batch: int) -> int:
    """How many batches `batches` yields for that many images."""
    full, rest = divmod(images, batch)
    return (full if batch > 1 else 0) + (1 if rest > 1 else 0)
