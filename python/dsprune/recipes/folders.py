"""Data sets in folders: CIFAR-10 and Fashion-MNIST as their authors publish them, and ImageNet as a tree of
class folders.

All are read in their own formats, with nothing converted or downloaded. Whatever is wrong with a folder is
said before any training begins.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dsprune.files import regular_file
from dsprune.recipes.data import CPU, ImageData, stratified_split

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_VALIDATION = 0.1
FASHION_VALIDATION = 0.1
IMAGENET_VALIDATION = 0.04
MOST_BATCH = 1 << 28  # bytes of a CIFAR-10 batch
MOST_PIXELS = 1 << 24  # of an image: the largest of ImageNet has 16.6 million
PIXELS_PER_BYTE = 8 * 1032  # of a file: deflate's limit, at a bit a pixel
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class DataError(ValueError):
    """A folder that does not hold the data set; the text says what is wrong and what is expected."""


def _standardised(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> torch.Tensor:
    """uint8 (N, C, H, W) to float32, standardised channel by channel."""
    values = images.to(device).float().div_(255)
    shape = (1, -1, 1, 1)
    return values.sub_(torch.tensor(mean, device=device).view(shape)).div_(
        torch.tensor(std, device=device).view(shape)
    )


def _chunks(order: torch.Tensor, batch: int) -> list[torch.Tensor]:
    """Batches of indices; a last one with a single image, which BatchNorm cannot train on, is left out."""
    return [part for part in order.split(batch) if len(part) > 1]


def _validated(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Disjoint indices for training and validation, the latter with at least one image of each class."""
    counts = labels.bincount()
    least = int(counts[counts > 0].min())
    if least < 2:
        raise DataError("a class with a single training image leaves none to validate on")
    validation, train = stratified_split(labels, (share,), seed, least=1)
    return train, validation


def _check_whole(name: str, value: Any, least: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name}: expected an int of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _limited(labels: torch.Tensor, limit: int) -> torch.Tensor:
    """About `limit` indices, the classes in their proportions (0: all)."""
    if limit == 0 or limit >= len(labels):
        return torch.arange(len(labels))
    classes = len(labels.unique())
    if limit < classes:
        raise DataError(f"limit: expected at least {classes}, one image of each class, got {limit}")
    return stratified_split(labels, (limit / len(labels),), 0)[0]


# ---- small images in memory ----


@dataclass(frozen=True)
class ByteSplit:
    """Images (N, C, H, W), uint8, standardised by `mean` and `std` (C each) when they are used; labels (N,),
    int64."""

    images: torch.Tensor
    labels: torch.Tensor
    mean: Sequence[float] = CIFAR_MEAN
    std: Sequence[float] = CIFAR_STD

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch: int, device: torch.device) -> Iterator[torch.Tensor]:
        """See `data.Part`."""
        return (_standardised(part, self.mean, self.std, device) for part in self.images.split(batch))

    def epoch(
        self, batch: int, shift: int, generator: torch.Generator, skip: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `data.Part`. Each image is flipped or not, and cropped from one padded with `shift` black
        pixels."""
        order = torch.randperm(len(self), generator=generator)
        offsets = torch.randint(0, 2 * shift + 1, (2, len(self)), generator=generator)
        flips = torch.rand(len(self), generator=generator) < 0.5
        size = self.images.shape[-1]
        along = torch.arange(size)
        for index in _chunks(order, batch)[skip:]:
            padded = torch.nn.functional.pad(self.images[index], (shift,) * 4)
            rows = offsets[0, index][:, None] + along
            forward = torch.where(flips[index][:, None], size - 1 - along, along)
            columns = offsets[1, index][:, None] + forward
            which = torch.arange(len(index))[:, None, None]
            # Advanced indices around a slice put the channels last.
            images = padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            labels = self.labels[index].to(device)
            yield (
                _standardised(images, self.mean, self.std, device).contiguous(
                    memory_format=torch.channels_last
                ),
                labels,
            )


# ---- CIFAR-10 ----


class _ArrayOfBytes:
    """Stands in for a NumPy array while a file is read: takes its state, and runs nothing of NumPy."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if not isinstance(kind, _Kind) or kind.name not in ("u1", "uint8") or fortran:
            raise pickle.UnpicklingError("an array that is not of bytes, row by row")
        if isinstance(content, str):
            content = content.encode("latin1")
        if not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array without contents")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise pickle.UnpicklingError("an array whose shape is none")
        self.array = np.frombuffer(content, np.uint8).reshape(shape)


class _Kind:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else str(name)

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> _ArrayOfBytes:
    return _ArrayOfBytes()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"encoding {encoding!r}")
    return text.encode("latin1")


class _BatchUnpickler(pickle._Unpickler):
    """Reads dictionaries of plain values and arrays of bytes; anything else a file names is refused, so that
    reading it runs nothing that it brought along. In Python: the one in C takes memory for whatever sizes and
    numbers a file states."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {("_codecs", "encode"): _encode}
        for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            known[core, "_reconstruct"] = _reconstruct
        known["numpy", "ndarray"] = _ArrayOfBytes
        known["numpy", "dtype"] = _Kind
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for an object of another file")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it asks for an extension")


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


def _read_python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        data = regular_file(path, MOST_BATCH).read_bytes()
        content = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; CIFAR-10 has data_batch_1 to 5 and test_batch") from None
    except Exception as error:  # a damaged pickle fails in any way
        raise DataError(f"{path}: not a CIFAR-10 batch ({error or type(error).__name__})") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a CIFAR-10 batch (a {type(content).__name__}, no dictionary)")
    values = {_text(key): value for key, value in content.items()}
    if "fine_labels" in values:
        raise DataError(f"{path}: this is CIFAR-100, expected CIFAR-10")
    if not {"data", "labels"} <= values.keys():
        raise DataError(
            f"{path}: not a CIFAR-10 batch (it has {sorted(map(str, values))}, no data and labels)"
        )
    data, labels = values["data"], values["labels"]
    if not isinstance(data, _ArrayOfBytes) or not hasattr(data, "array"):
        raise DataError(f"{path}: not a CIFAR-10 batch (its data are no array)")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise DataError(f"{path}: expected labels 0 to 9, a list of integers")
    return data.array, np.array(labels, dtype=np.int64)


def _read_binary_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = np.frombuffer(regular_file(path, MOST_BATCH).read_bytes(), np.uint8)
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: not a CIFAR-10 batch ({error})") from None
        raise DataError(
            f"{path}: no such file; CIFAR-10 has data_batch_1.bin to 5 and test_batch.bin"
        ) from None
    if content.size == 0 or content.size % 3073:
        raise DataError(f"{path}: {content.size} bytes, expected a multiple of 3,073 (a label, an image)")
    rows = content.reshape(-1, 3073)
    return rows[:, 1:], rows[:, 0].astype(np.int64)


def _cifar_folder(folder: Path) -> tuple[Path, bool]:
    """The folder with the batches, and whether they are in the binary format."""
    if not folder.exists():
        raise DataError(f"{folder}: no such folder")
    if not folder.is_dir():
        hint = "; unpack it first" if ".tar" in folder.name or folder.suffix == ".tgz" else ""
        raise DataError(f"{folder}: is not a folder{hint}")
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        for ending, binary in (("", False), (".bin", True)):
            if (place / f"data_batch_1{ending}").exists() or (place / f"test_batch{ending}").exists():
                return place, binary
    if list(folder.glob("cifar-10*.tar.gz")):
        raise DataError(f"{folder}: holds the archive of CIFAR-10; unpack it first")
    if (folder / "cifar-100-python").exists() or (folder / "train").is_file():
        raise DataError(f"{folder}: this looks like CIFAR-100, expected CIFAR-10")
    raise DataError(
        f"{folder}: no CIFAR-10 in it; expected cifar-10-batches-py with data_batch_1 to 5 and test_batch"
    )


def cifar10(folder: Path, *, limit: int = 0, split_seed: int = 0, device: torch.device = CPU) -> ImageData:
    """CIFAR-10 from the folder of its python version (or its binary version).

    A tenth of the training images, stratified by class, validates; the test batch is the test set. The files
    are pickles of plain values: they are read by an unpickler that knows nothing else. `limit`: images to
    take of each part. Raises DataError, naming the file.
    """
    _check_whole("limit", limit, 0)
    place, binary = _cifar_folder(Path(folder))
    ending, read = (".bin", _read_binary_batch) if binary else ("", _read_python_batch)

    def part(names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = [], []
        for name in names:
            path = place / f"{name}{ending}"
            data, classes = read(path)
            if data.ndim != 2 or data.shape[1] != 3072:
                raise DataError(f"{path}: images of shape {data.shape[1:]}, expected 3,072 bytes each")
            if len(data) != len(classes):
                raise DataError(f"{path}: {len(data)} images and {len(classes)} labels")
            if len(classes) == 0 or classes.min() < 0 or classes.max() > 9:
                raise DataError(f"{path}: expected labels 0 to 9")
            images.append(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()))
            labels.append(torch.from_numpy(classes))
        return torch.cat(images), torch.cat(labels)

    images, labels = part([f"data_batch_{i}" for i in range(1, 6)])
    test_images, test_labels = part(["test_batch"])

    def chosen(index: torch.Tensor) -> ByteSplit:
        index = index[_limited(labels[index], limit)]
        return ByteSplit(images[index].contiguous(), labels[index].contiguous())

    train, validation = _validated(labels, CIFAR_VALIDATION, split_seed)
    keep = _limited(test_labels, limit)
    test = ByteSplit(test_images[keep], test_labels[keep])
    return ImageData("cifar10", 10, 3, 32, 4, chosen(train), chosen(validation), test, device)


# ---- Fashion-MNIST ----


def _read_idx(path: Path, most: int, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes in a gzipped IDX file, uint8 (N, *shape) with N of 1 to `most`.

    The sizes in its header are checked before anything is allocated for them.
    """
    kind = "labels" if not shape else " x ".join(map(str, shape)) + " images"
    try:
        with gzip.open(path) as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] != 1 + len(shape):
                raise DataError(
                    f"{path}: not an IDX file of {kind} (it begins with {head.hex() or 'nothing'})"
                )
            sizes = file.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise DataError(f"{path}: ends within its header")
            count, *found = struct.unpack(f">{head[3]}I", sizes)
            if tuple(found) != shape or not 1 <= count <= most:
                given = " x ".join(map(str, (count, *found)))
                raise DataError(f"{path}: sizes {given}, expected 1 to {most} {kind}")
            content = file.read(count * math.prod(shape))
            more = file.read(1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable gzip file ({error})") from None
    if len(content) < count * math.prod(shape) or more:
        raise DataError(
            f"{path}: {'more' if more else 'fewer'} bytes than the {count} {kind} that its header announces"
        )
    return np.frombuffer(content, np.uint8).reshape(count, *shape)


def fashion_mnist(
    folder: Path, *, limit: int = 0, split_seed: int = 0, device: torch.device = CPU
) -> ImageData:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747) from the folder of its four gzipped IDX files.

    A tenth of the training images, stratified by class, validates; `t10k` is the test set. `limit`: images to
    take of each part. Raises DataError, naming the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")

    def part(name: str, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        paths = [folder / f"{name}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        images, labels = _read_idx(paths[0], most, (28, 28)), _read_idx(paths[1], most, ())
        if len(images) != len(labels):
            raise DataError(f"{paths[1]}: {len(labels)} labels for {len(images)} images")
        if labels.max() > 9:
            raise DataError(f"{paths[1]}: expected labels 0 to 9, got {labels.max()}")
        return torch.from_numpy(images[:, None].copy()), torch.from_numpy(labels.astype(np.int64))

    images, labels = part("train", 60_000)
    test_images, test_labels = part("t10k", 10_000)

    def chosen(images: torch.Tensor, labels: torch.Tensor) -> ByteSplit:
        index = _limited(labels, limit)
        return ByteSplit(images[index].contiguous(), labels[index].contiguous(), FASHION_MEAN, FASHION_STD)

    train, validation = _validated(labels, FASHION_VALIDATION, split_seed)
    return ImageData(
        "fashion-mnist", 10, 1, 28, 2, chosen(images[train], labels[train]),
        chosen(images[validation], labels[validation]), chosen(test_images, test_labels), device,
    )  # fmt: skip


# ---- ImageNet ----


def _decoded(path: Path) -> Any:
    """The image in a file, as RGB; DataError, naming the file, where it is none."""
    from PIL import Image

    try:
        size = regular_file(path).stat().st_size
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
            if pixels > min(MOST_PIXELS, PIXELS_PER_BYTE * size):
                raise ValueError(f"{image.width} x {image.height} pixels in {size} bytes")
            return image.convert("RGB")
    except Exception as error:  # a damaged image fails in any way
        text = str(error).removeprefix(f"{path}: ") or type(error).__name__
        raise DataError(f"{path}: not a readable image ({text})") from None


def _bytes_of(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _random_crop(image: Any, size: int, chance: random.Random) -> Any:
    """A random part, 8% to all of the area and 3:4 to 4:3 in shape, scaled to `size`, flipped half the time
    (the augmentation of Szegedy et al., "Going Deeper with Convolutions", CVPR 2015)."""
    from PIL import Image

    width, height = image.size
    box = None
    for _ in range(10):
        area = width * height * chance.uniform(0.08, 1)
        ratio = math.exp(chance.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = chance.randint(0, width - w), chance.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    if box is None:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
        box = (left, top, left + w, top + h)
    part = image.crop(box).resize((size, size), Image.Resampling.BILINEAR)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if chance.random() < 0.5 else part


def _centre_crop(image: Any, size: int) -> Any:
    """The shorter side scaled to 256/224 of `size`, then the middle."""
    from PIL import Image

    width, height = image.size
    short = round(size * 256 / 224)
    scale = short / min(width, height)
    width, height = max(short, round(width * scale)), max(short, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


class _Files(Dataset):
    """Images (3, size, size), uint8, by (position, seed); a seed below 0 is the middle, nothing random."""

    def __init__(self, paths: Sequence[str], labels: torch.Tensor, size: int) -> None:
        self.paths, self.labels, self.size = paths, labels, size

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        index, seed = key
        image = _decoded(Path(self.paths[index]))
        if seed < 0:
            image = _centre_crop(image, self.size)
        else:
            image = _random_crop(image, self.size, random.Random(seed))
        return _bytes_of(image), self.labels[index]


@dataclass(frozen=True)
class FolderSplit:
    """Images in files, decoded when they are used, by `workers` processes (0: this one)."""

    paths: tuple[str, ...]
    labels: torch.Tensor
    size: int
    workers: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def _loaded(self, keys: list[list[tuple[int, int]]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # A generator of its own: the loader draws a seed, which must not come from the global one.
        loader = DataLoader(
            _Files(self.paths, self.labels, self.size),
            batch_sampler=keys,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(0),
        )
        try:
            yield from loader
        except DataError as error:  # from a worker it comes with a traceback before it
            text = str(error).strip().splitlines()[-1]
            raise DataError(text.rpartition("DataError: ")[2]) from None

    def batches(self, batch: int, device: torch.device) -> Iterator[torch.Tensor]:
        """See `data.Part`."""
        keys = [[(i, -1) for i in part.tolist()] for part in torch.arange(len(self)).split(batch)]
        for images, _ in self._loaded(keys):
            yield _standardised(images, IMAGENET_MEAN, IMAGENET_STD, device)

    def epoch(
        self, batch: int, shift: int, generator: torch.Generator, skip: int, device: torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `data.Part`. Random crops and flips, each from a seed of its own."""
        order = torch.randperm(len(self), generator=generator)
        seeds = torch.randint(0, 2**62, (len(self),), generator=generator)
        keys = [[(i, int(seeds[i])) for i in part.tolist()] for part in _chunks(order, batch)[skip:]]
        if not keys:
            return
        for images, labels in self._loaded(keys):
            values = _standardised(images, IMAGENET_MEAN, IMAGENET_STD, device)
            yield values.contiguous(memory_format=torch.channels_last), labels.to(device)


def _classes(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a tree of class folders, train/ and val/")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        images = [e for e in folder.iterdir() if e.suffix.lower() in IMAGE_ENDINGS]
        found = f"{len(images)} images and no class folders" if images else "no class folders"
        raise DataError(f"{folder}: {found}; expected one folder for each class, with its images")
    return names


def _listed(folder: Path, classes: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(
            str(file) for file in (folder / name).rglob("*") if file.suffix.lower() in IMAGE_ENDINGS
        )
        for file in files:
            if not Path(file).is_file():
                raise DataError(f"{file}: is no regular file, as images are")
        if not files:
            raise DataError(
                f"{folder / name}: no images; expected files ending in {', '.join(IMAGE_ENDINGS)}"
            )
        paths += files
        labels += [label] * len(files)
    return paths, torch.tensor(labels, dtype=torch.int64)


def imagenet(
    folder: Path,
    *,
    size: int = 224,
    limit: int = 0,
    workers: int = 0,
    split_seed: int = 0,
    device: torch.device = CPU,
) -> ImageData:
    """ImageNet, or any tree `train/CLASS/*` and `val/CLASS/*` of images, in the formats that Pillow reads.

    4% of the training images, stratified by class (about as many as `val` has), validate; `val` is the test
    set. `size`: the side of the crops. `limit`: images to take of each part. Raises DataError, naming what is
    wrong: folders, classes that differ, classes without images, and the first image of a class where it
    cannot be read.
    """
    for name, value, least in (("size", size, 1), ("limit", limit, 0), ("workers", workers, 0)):
        _check_whole(name, value, least)
    root = Path(folder)
    if not root.is_dir():
        hint = "; unpack it first" if root.is_file() else ""
        raise DataError(f"{root}: no such folder{hint}")
    missing = [name for name in ("train", "val") if not (root / name).is_dir()]
    if missing:
        there = sorted(entry.name for entry in root.iterdir())[:5]
        raise DataError(f"{root}: has no folder {missing[0]!r} (it has {there}); expected train/ and val/")
    classes, others = _classes(root / "train"), _classes(root / "val")
    if classes != others:
        odd = sorted(set(classes) ^ set(others))
        raise DataError(
            f"{root}: train has {len(classes)} classes, val {len(others)}; {odd[0]!r} is in one of them only"
        )
    if len(classes) < 2:
        raise DataError(f"{root / 'train'}: expected at least 2 classes, found {len(classes)}")
    paths, labels = _listed(root / "train", classes)
    test_paths, test_labels = _listed(root / "val", classes)
    for listed, known in ((paths, labels), (test_paths, test_labels)):
        for label in range(len(classes)):
            _decoded(Path(listed[int((known == label).nonzero()[0])]))

    def chosen(names: Sequence[str], known: torch.Tensor, index: torch.Tensor) -> FolderSplit:
        index = index[_limited(known[index], limit)]
        return FolderSplit(tuple(names[i] for i in index.tolist()), known[index], size, workers)

    train, validation = _validated(labels, IMAGENET_VALIDATION, split_seed)
    return ImageData(
        "imagenet",
        len(classes),
        3,
        size,
        0,
        chosen(paths, labels, train),
        chosen(paths, labels, validation),
        chosen(test_paths, test_labels, torch.arange(len(test_labels))),
        device,
    )
