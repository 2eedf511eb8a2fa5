"""The recipes on small folders in the formats of the data sets: end to end, killed, resumed; bad folders."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.util
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dsprune
from dsprune import cli
from dsprune.recipes import demo, folders, recipe, runs, stages, training
from dsprune.recipes.datasets import load_data
from dsprune.recipes.folders import DataError, cifar10, imagenet

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """One thread, and latencies at one batch size: what takes long here is not what is tested."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "Timing", functools.partial(demo.Timing, batches=(1,)))
        yield
    torch.set_num_threads(threads)


# ---- folders in the data sets' formats ----


def _example() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "examples" / "recipes.py"
    spec = importlib.util.spec_from_file_location("recipes_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = _example()
batch_of = example.cifar_batch
TRIAL, CIFAR = example.SMALL, example.OPTIONS["cifar10"]


def old_names(data: bytes) -> bytes:
    """A pickle as CIFAR-10's, which has NumPy by its old module name."""
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's python version, with 20 images a batch."""
    folder = tmp_path_factory.mktemp("cifar") / "cifar10-data"
    example.write_cifar10(folder)
    for file in (folder / "cifar-10-batches-py").iterdir():
        file.write_bytes(old_names(file.read_bytes()))
        assert b"numpy.core" in file.read_bytes()
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet's tree with two classes; odd sizes, one grey image, two formats."""
    folder = tmp_path_factory.mktemp("imagenet") / "imagenet-data"
    example.write_imagenet(folder)
    return folder


def test_cifar_is_read_as_it_is(cifar: Path, tmp_path: Path) -> None:
    data = cifar10(cifar)
    assert (data.name, data.classes, data.channels, data.size, data.shift) == ("cifar10", 10, 3, 32, 4)
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 20)
    assert sorted(data.validation.labels.tolist()) == [*range(10)]  # one of each class
    raw, labels = batch_of(20, 5)
    assert data.test.labels.tolist() == labels
    images = torch.cat(list(data.test.batches(7, torch.device("cpu"))))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (folders.CIFAR_MEAN, folders.CIFAR_STD))
    expected = (torch.from_numpy(raw.reshape(20, 3, 32, 32)).double() / 255 - mean) / std
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)
    # All training and validation images together are those of the five batches.
    everything = np.concatenate([batch_of(20, i)[0] for i in range(5)])
    held = torch.cat([data.train.images, data.validation.images]).flatten(1).numpy()  # type: ignore
    assert sorted(map(bytes, held)) == sorted(map(bytes, everything))
    # The binary version gives the same, from either folder.
    binary = tmp_path / "cifar-10-batches-bin"
    binary.mkdir()
    for index, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images_, labels_ = batch_of(20, index)
        rows = np.concatenate([np.array(labels_, np.uint8)[:, None], images_], 1)
        (binary / f"{name}.bin").write_bytes(rows.tobytes())
    for place in (tmp_path, binary):
        other = cifar10(place)
        assert torch.equal(other.train.images, data.train.images)  # type: ignore
        assert torch.equal(other.test.labels, data.test.labels)
    few = cifar10(cifar, limit=10)
    assert (len(few.train), len(few.validation), len(few.test)) == (10, 10, 10)


def test_cifar_batches_are_flipped_and_cropped(cifar: Path) -> None:
    data = cifar10(cifar)
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    start = generator.get_state()
    found = list(data.train.epoch(16, 4, generator, 0, cpu))
    assert [len(y) for _, y in found] == [16] * 5 + [10]
    # What is skipped changes nothing of the rest.
    generator.set_state(start)
    rest = list(data.train.epoch(16, 4, generator, 4, cpu))
    assert len(rest) == 2
    for (x, y), (u, v) in zip(found[4:], rest, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    plain = list(data.train.epoch(16, 0, torch.Generator().manual_seed(0), 0, cpu))
    flipped = 0
    images = torch.cat(list(data.train.batches(90, cpu)))
    black = folders._standardised(
        torch.zeros(1, 3, 1, 1, dtype=torch.uint8), folders.CIFAR_MEAN, folders.CIFAR_STD, cpu
    )
    padded = black.expand(90, 3, 40, 40).clone()
    padded[:, :, 4:36, 4:36] = images
    for x, y in plain[:1]:
        for image, label in zip(x, y, strict=True):
            same = (images == image).flatten(1).all(1) | (images.flip(3) == image).flatten(1).all(1)
            assert same.sum() == 1 and data.train.labels[same] == label
            flipped += int((images.flip(3) == image).flatten(1).all(1).any())
    assert 0 < flipped < 16
    for image in found[0][0][:3]:
        crops = [padded[:, :, r : r + 32, c : c + 32] for r in range(9) for c in range(9)]
        hits = sum(
            int((crop == image).flatten(1).all(1).sum())
            + int((crop.flip(3) == image).flatten(1).all(1).sum())
            for crop in crops
        )
        assert hits == 1


def test_the_tree_is_read_as_it_is(tree: Path) -> None:
    data = imagenet(tree, size=32)
    assert (data.classes, data.size, len(data.train), len(data.validation), len(data.test)) == (
        2,
        32,
        14,
        2,
        6,
    )
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert not set(data.train.paths) & set(data.validation.paths)  # type: ignore
    cpu = torch.device("cpu")
    images = torch.cat(list(data.test.batches(4, cpu)))
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.float32
    # The middle of the image whose shorter side is 36 or 37 of 256/224 * 32.
    first = Image.open(tree / "val" / "n01440764" / "0.png")
    side = 37
    scaled = first.resize((side, round(40 * side / 36)), Image.Resampling.BILINEAR)
    left, top = round((scaled.width - 32) / 2), round((scaled.height - 32) / 2)
    middle = np.asarray(scaled.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1) / 255
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (folders.IMAGENET_MEAN, folders.IMAGENET_STD))
    assert np.abs(images[0].numpy() - (middle - mean) / std).max() < 0.1
    generator = torch.Generator().manual_seed(3)
    start, before = generator.get_state(), torch.get_rng_state()
    found = list(data.train.epoch(4, 0, generator, 0, cpu))
    assert [len(y) for _, y in found] == [4, 4, 4, 2]
    assert torch.equal(torch.get_rng_state(), before)
    generator.set_state(start)
    workers = imagenet(tree, size=32, workers=1)
    rest = list(workers.train.epoch(4, 0, generator, 2, cpu))
    for (x, y), (u, v) in zip(found[2:], rest, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    again = list(data.train.epoch(4, 0, generator, 0, cpu))
    assert not torch.equal(again[0][0], found[0][0])


def idx(sizes: tuple[int, ...], content: bytes, magic: bytes = b"\0\0\x08") -> bytes:
    return gzip.compress(magic + bytes([len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + content)


def write_fashion(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Fashion-MNIST's four files with 200 and 30 images."""
    folder.mkdir(parents=True)
    generator, content = np.random.default_rng(0), {}
    for name, count in (("train", 200), ("t10k", 30)):
        images = generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(idx((count, 28, 28), images.tobytes()))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx((count,), labels.tobytes()))
        content[name] = images, labels
    return content


def test_fashion_is_read_as_it_is(tmp_path: Path) -> None:
    content = write_fashion(tmp_path / "data")
    data = load_data("fashion-mnist", None, tmp_path / "data")
    assert (data.name, data.classes, data.channels, data.size) == ("fashion-mnist", 10, 1, 28)
    assert (len(data.train), len(data.validation), len(data.test)) == (180, 20, 30)
    assert data.validation.labels.bincount().tolist() == [2] * 10
    assert data.test.labels.tolist() == content["t10k"][1].tolist()
    images = torch.cat(list(data.test.batches(7, torch.device("cpu"))))
    expected = (torch.from_numpy(content["t10k"][0])[:, None].double() / 255 - 0.2860) / 0.3530
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)
    held = torch.cat([data.train.images, data.validation.images]).flatten(1).numpy()  # type: ignore
    assert sorted(map(bytes, held)) == sorted(map(bytes, content["train"][0].reshape(200, -1)))
    few = load_data("fashion-mnist", 28, tmp_path / "data", limit=20, workers=1)
    assert (len(few.train), len(few.validation), len(few.test)) == (20, 20, 20)
    with pytest.raises(ValueError, match="size: Fashion-MNIST has images of 28 pixels, got 32"):
        load_data("fashion-mnist", 32, tmp_path / "data")


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
FULL = b"\0" * 784 * 3
FASHION = {
    "missing": (IMAGES, None, "no such file"),
    "no gzip": (IMAGES, b"\0\0\x08\x03" + FULL, "not a readable gzip file"),
    "cut off": (IMAGES, idx((3, 28, 28), FULL)[:-20], "not a readable gzip file"),
    "bits": (IMAGES, idx((3, 28, 28), bytes(range(251)) * 10)[:60] + b"zz" * 30, "not a readable gzip file"),
    "empty": (IMAGES, b"", "not an IDX file of 28 x 28 images (it begins with nothing)"),
    "labels for images": (IMAGES, idx((3,), b"abc"), "not an IDX file of 28 x 28 images"),
    "floats": (IMAGES, idx((3, 28, 28), FULL, b"\0\0\x0d"), "not an IDX file of 28 x 28 images"),
    "no sizes": (IMAGES, gzip.compress(b"\0\0\x08\x03\0\0"), "ends within its header"),
    "a bomb": (IMAGES, idx((2**32 - 1, 28, 28), FULL), "sizes 4294967295 x 28 x 28, expected 1 to 60000"),
    "another size": (IMAGES, idx((3, 32, 32), FULL), "sizes 3 x 32 x 32"),
    "none": (IMAGES, idx((0, 28, 28), b""), "sizes 0 x 28 x 28"),
    "few bytes": (IMAGES, idx((4, 28, 28), FULL), "fewer bytes than the 4 28 x 28 images"),
    "more bytes": (IMAGES, idx((2, 28, 28), FULL), "more bytes than the 2 28 x 28 images"),
    "count": (LABELS, idx((199,), bytes(199)), "199 labels for 200 images"),
    "label": (LABELS, idx((200,), bytes(199) + b"\x0a"), "expected labels 0 to 9, got 10"),
}


@pytest.mark.parametrize("case", FASHION)
def test_what_is_wrong_with_fashion(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, text = FASHION[case]
    write_fashion(tmp_path / "data")
    file = tmp_path / "data" / name
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    run = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *TRIAL]
    assert cli.main(["recipe", "fashion-mnist", *run]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dsprune: {file}: ") and text in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """A header of 3 TB, and 400 MB of zeros behind a small one: neither is read."""
    import tracemalloc

    write_fashion(tmp_path / "data")
    for sizes in ((2**32 - 1, 28, 28), (3, 28, 28)):
        (tmp_path / "data" / IMAGES).write_bytes(idx(sizes, bytes(1 << 22)))
        tracemalloc.start()
        with pytest.raises(DataError, match=IMAGES):
            folders.fashion_mnist(tmp_path / "data")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


# ---- what is wrong with a folder ----


def write_batch(path: Path, **content: Any) -> None:
    named = {name.encode(): value for name, value in content.items()}
    path.write_bytes(old_names(pickle.dumps(named, protocol=2)))


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/dsprune-was-here",)


def spoil(kind: str, folder: Path) -> str:
    """Breaks CIFAR-10 in one way; what the error must say."""
    place = folder / "cifar-10-batches-py"
    batch = place / "data_batch_2"
    data, labels = batch_of(4, 0)
    if kind == "missing batch":
        batch.unlink()
        return "data_batch_2: no such file"
    if kind == "cut off":
        batch.write_bytes(batch.read_bytes()[:100])
        return "data_batch_2: not a CIFAR-10 batch"
    if kind == "code":
        batch.write_bytes(pickle.dumps({b"data": Malicious(), b"labels": labels}))
        return "data_batch_2: not a CIFAR-10 batch (it asks for posix.mkdir"
    if kind == "floats":
        write_batch(batch, data=data.astype(np.float32), labels=labels)
        return "an array that is not of bytes"
    if kind == "shape":
        write_batch(batch, data=data[:, :100].copy(), labels=labels)
        return "images of shape (100,), expected 3,072 bytes"
    if kind == "count":
        write_batch(batch, data=data, labels=labels[:3])
        return "4 images and 3 labels"
    if kind == "labels":
        write_batch(batch, data=data, labels=[0, 1, 2, 10])
        return "expected labels 0 to 9"
    if kind == "CIFAR-100":
        write_batch(batch, data=data, fine_labels=labels)
        return "this is CIFAR-100"
    shutil.rmtree(place)
    if kind == "empty":
        return "no CIFAR-10 in it; expected cifar-10-batches-py"
    assert kind == "archive"
    (folder / "cifar-10-python.tar.gz").touch()
    return "unpack it first"


CIFAR_WAYS = ["missing batch", "cut off", "code", "floats", "shape", "count", "labels", "CIFAR-100", "empty"]


@pytest.mark.parametrize("kind", [*CIFAR_WAYS, "archive"])
def test_what_is_wrong_with_cifar(
    kind: str, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cifar, tmp_path / "data")
    text = spoil(kind, tmp_path / "data")
    arguments = [
        "recipe",
        "cifar10",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
        *CIFAR,
    ]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert text in error and error.startswith("dsprune: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert not Path("/tmp/dsprune-was-here").exists()


def spoil_tree(kind: str, root: Path) -> str:
    classes = sorted(entry.name for entry in (root / "val").iterdir())
    if kind == "no val":
        shutil.rmtree(root / "val")
        return "has no folder 'val' (it has ['train'])"
    if kind == "flat val":
        for name in classes:
            for index, file in enumerate((root / "val" / name).iterdir()):
                file.rename(root / "val" / f"{name}{index}{file.suffix}")
            (root / "val" / name).rmdir()
        return "6 images and no class folders"
    if kind == "other class":
        (root / "val" / classes[0]).rename(root / "val" / "n99")
        return f"{classes[0]!r} is in one of them only"
    if kind == "empty class":
        for file in (root / "train" / classes[1]).iterdir():
            file.unlink()
        return f"{classes[1]}: no images; expected files ending in .jpg"
    if kind == "one image":
        for file in sorted((root / "train" / classes[1]).iterdir())[1:]:
            file.unlink()
        return "leaves none to validate on"
    assert kind == "no image"
    (root / "train" / classes[0] / "0.png").write_bytes(b"\x89PNG nothing")
    return "0.png: not a readable image"


@pytest.mark.parametrize(
    "kind", ["no val", "flat val", "other class", "empty class", "one image", "no image"]
)
def test_what_is_wrong_with_a_tree(
    kind: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tree, tmp_path / "data")
    text = spoil_tree(kind, tmp_path / "data")
    run = ["--out", str(tmp_path / "run"), "--arch", "resnet18", "--size", "32", *TRIAL]
    assert cli.main(["recipe", "imagenet", "--data", str(tmp_path / "data"), *run]) == 1
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_named_when_it_is_met(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "data")
    (tmp_path / "data" / "val" / "n01440764" / "1.JPEG").write_bytes(b"broken")
    for workers in (0, 1):
        data = imagenet(tmp_path / "data", size=32, workers=workers)
        with pytest.raises(DataError, match=r"^\S*/1\.JPEG: not a readable image") as error:
            list(data.test.batches(6, torch.device("cpu")))
        assert "\n" not in str(error.value)


BAD = {
    "depth": (["cifar10", "--depth", "32"], "depth: expected one of [20, 56], got 32"),
    "groups": (["cifar10", "--groups", "5"], "groups: expected one of [2, 3, 4], or a target"),
    "arch": (["imagenet", "--arch", "vgg16"], "arch: expected one of ['resnet18', 'resnet50']"),
    "imagenet groups": (["imagenet", "--groups", "4"], "groups: expected one of [2]"),
    "fashion depth": (["fashion-mnist", "--depth", "21"], "depth: expected one of [20, 32"),
    "scale": (["cifar10", "--epochs-scale", "0"], "epochs-scale: expected more than 0"),
    "flops": (["cifar10", "--flops", "1.5"], "flops: expected the fraction"),
    "limit": (["cifar10", "--limit", "-1"], "limit: expected at least 0"),
    "small limit": (["cifar10", "--limit", "3"], "limit: expected at least 10"),
    "device": (["cifar10", "--device", "tpu"], "device: expected 'cpu' or 'cuda'"),
    "workers": (["imagenet", "--workers", "-1"], "workers: expected 0 to 256"),
    "seconds": (["cifar10", "--seconds", "0"], "seconds: expected more than 0"),
    "weights": (["cifar10", "--weights", "/nowhere.safetensors"], "no such file"),
    "nothing": (["cifar10", "--data", "/nowhere"], "/nowhere: no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str, cifar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, text = BAD[case]
    given = arguments if "--data" in arguments else [*arguments, "--data", str(cifar)]
    assert cli.main(["recipe", *given, "--out", str(tmp_path / "run")]) == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        (["cifar10"], "cifar10-resnet20-g4"),
        (["cifar10", "--depth", "56", "--groups", "3"], "cifar10-resnet56-g3"),
        (["fashion-mnist", "--groups", "2"], "fashion-mnist-resnet20-g2"),
        (["imagenet", "--arch", "resnet18"], "imagenet-resnet18-g2"),
    ],
)
def test_a_folder_is_chosen(given: list[str], folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Path] = []
    monkeypatch.setattr(cli, "_run_recipe", lambda out, *rest: chosen.append(out))
    assert cli.main(["recipe", *given, "--data", "d"]) == 0
    assert cli.main(["recipe", *given, "--data", "d", "--out", "mine"]) == 0
    assert chosen == [Path("outputs") / folder, Path("mine")]


def test_a_small_class_takes_no_more_of_the_others() -> None:
    labels = torch.tensor([0] * 200 + [1] * 2 + [2] * 30)
    train, validation = folders._validated(labels, 0.1, 0)
    assert labels[validation].bincount().tolist() == [20, 1, 3]
    assert torch.equal(torch.cat([train, validation]).sort().values, torch.arange(232))
    with pytest.raises(DataError, match="a single training image"):
        folders._validated(torch.tensor([0, 0, 1]), 0.1, 0)


# ---- the published settings ----


def test_the_settings_are_the_published_ones() -> None:
    for depth, strength in ((20, 2e-3), (56, 5e-4)):
        config = recipe.cifar10_config(Path("d"), depth=depth, groups=3)
        assert config.pretrain == training.Pretrain(164, 128, 0.1, 0.9, 1e-4, 0, (82, 123))
        assert config.learn == training.Learn(3, strength, 0.5, False, False, 120, 128, 0.05, 0.9, 1e-3)
        assert config.finetune == training.Finetune(5, 80, 128, 0.015, 0.9, 1e-3)
        assert recipe._as_published(config)
    assert recipe.cifar10_config(Path("d"), depth=20, groups=4).prune == training.Prune(
        0.6357, None, "prunable"
    )
    assert recipe.imagenet_config(Path("d"), arch="resnet50").prune.flops == 0.7
    assert recipe.published("imagenet", "ResNet-50", 2, 0.81) == (75.45, 80.03, 66.00)
    assert recipe.published("cifar10", "ResNet-20", 5) is None
    assert not recipe._as_published(recipe.cifar10_config(Path("d"), epochs_scale=0.5))
    fashion = recipe.fashion_config(Path("d"), groups=2, flops=0.8)
    assert recipe._as_published(fashion) and fashion.prune == training.Prune(0.8)
    assert not recipe._as_published(dataclasses.replace(fashion, limit=100))
    assert recipe.published("fashion-mnist", "ResNet-20", 4) is None
    assert not recipe._as_published(recipe.cifar10_config(Path("d"), limit=100))


def test_the_learning_rate_falls_at_the_milestones(cifar: Path) -> None:
    rates: list[float] = []

    class Watch:
        def step(self, stage: str, done: int, total: int, note: str) -> None:
            rates.append(optimizers[-1].param_groups[0]["lr"])

    optimizers: list[torch.optim.Optimizer] = []
    original = training._sgd
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_sgd", lambda m, s: optimizers.append(original(m, s)) or optimizers[-1])
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
        settings = training.Pretrain(epochs=4, batch=90, lr=0.5, warmup=0, milestones=(1, 3))
        training.pretrain(model, cifar10(cifar), settings, progress=Watch())
    assert sorted({round(rate, 6) for rate in rates}) == [0.005, 0.05, 0.5]


# ---- end to end ----


@pytest.fixture(scope="module")
def ran(cifar: Path) -> tuple[Path, str]:
    """A finished trial of the CIFAR-10 recipe, by the example, and what it printed."""
    import contextlib
    import io

    said = io.StringIO()
    looks: list[int] = []
    original = training.evaluate

    def counted(model: torch.nn.Module, split: Any, batch: int = 256) -> training.Score:
        looks.append(len(split))
        return original(model, split, batch)

    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", counted)
        torch.set_num_threads(1)
        assert example.main(["cifar10", "--out", str(cifar.parent)]) == 0
    # Each network is tested once (20 test images, 10 validation images), and after everything else but the
    # validation of the report.
    assert looks.count(20) == 4 and looks[-7:] == [20] * 4 + [10] * 3
    return cifar.parent / "cifar10", said.getvalue()


def test_the_report_is_whole_and_true(ran: tuple[Path, str], cifar: Path) -> None:
    folder, said = ran
    report = json.loads((folder / "report.json").read_text())
    run = runs.Run.open(folder)
    data = run.data()
    packed = run.packed(data)
    assert report["test_accuracy"]["packed"] == training.evaluate(packed, data.test).accuracy
    assert report["cost"]["macs_left"] == dsprune.summary(packed, data.example).macs
    assert report["cost"]["prunable_macs_cut_percent"] >= 61.23
    assert report["channel_pruning"]["macs_cut_percent"] >= report["cost"]["macs_cut_percent"]
    assert report["published"] == {"accuracy": 92.07, "flops_cut": 61.23, "params_cut": 48.35}
    assert report["published_settings"] is False and report["reloaded_same_bits"] is True
    assert report["versions"]["torch"] == torch.__version__
    assert {len(report["history"][stage]) for stage in ("dense", "learned")} == {1}
    assert len(report["history"]["finetuned"]) == 5
    for row in report["latency_ms"].values():
        forms = {"eager", "channels_last", "TorchScript", "packed", "channel pruning"}
        assert set(row) - {"OpenVINO", "ONNX Runtime"} == forms
    text = (folder / "report.md").read_text()
    for needle in (
        "92.07%",
        "61.23%",
        "A trial",
        "this run",
        "channel pruning",
        '"strength": 0.002',
        "torch ",
    ):
        assert needle in text
    for needle in ("92.07%", "a trial: not the settings", "speed-up", "report.md"):
        assert needle in said
    for name in ("curves.png", "structure.png"):
        with Image.open(folder / name) as image:
            assert image.size[0] > 300


def test_a_finished_run_is_only_shown_again(
    ran: tuple[Path, str], cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = ran
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    command = ["recipe", "cifar10", "--data", str(cifar), "--out", str(folder), *CIFAR]
    assert cli.main(command) == 1
    assert "--resume to go on with it or --force" in capsys.readouterr().err
    assert cli.main([*command, "--resume"]) == 0
    assert "92.07%" in capsys.readouterr().out
    assert cli.main([*command, "--resume", "--seed", "3"]) == 1
    assert "was begun with other settings (seed)" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    # Other commands know the run, too.
    assert cli.main(["bench", "--run", str(folder), "--batch", "1", "--seconds", "0.01"]) == 0


@pytest.fixture
def _no_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what follows packing, which the run of `ran` has done: it takes long."""
    monkeypatch.setattr(recipe, "_channel_pruned", lambda run, data, cost: run.packed(data))
    monkeypatch.setattr(
        stages,
        "logits_in_new_process",
        lambda run, data, images: recipe._logits(run.packed(data), images),
    )


@pytest.mark.nightly
@pytest.mark.skipif(os.name != "posix", reason="kills a process")
@pytest.mark.usefixtures("_no_extras")
def test_killed_and_resumed_it_ends_in_the_same_bits(
    ran: tuple[Path, str], cifar: Path, tmp_path: Path
) -> None:
    folder, _ = ran
    run = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "dsprune.cli", "recipe", "cifar10", "--data", str(cifar)]
    command += ["--out", str(run), *CIFAR, "--resume"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    awaited = random.SystemRandom().choice(["dense", "learned", "pruned"])
    end = time.monotonic() + 2400
    while not (run / f"{awaited}.safetensors").exists() and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.005)
    time.sleep(random.SystemRandom().uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "report.json").exists()
    assert cli.main(command[3:]) == 0
    for name in ("dense", "learned", "pruned", "finetuned", "packed"):
        ours, theirs = (load_file(place / f"{name}.safetensors") for place in (run, folder))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].numpy().tobytes() == theirs[key].numpy().tobytes() for key in ours), (
            awaited,
            name,
        )


@pytest.mark.nightly
@pytest.mark.usefixtures("_no_extras")
def test_imagenet_interrupted_within_an_epoch(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense weights are given; learning is interrupted in the middle of its epoch and goes on from there."""
    monkeypatch.setattr(training, "CHECKPOINT_STEPS", 2)
    weights = tmp_path / "dense.safetensors"
    torch.manual_seed(0)
    save_file(dsprune.models.resnet18(num_classes=2).state_dict(), weights)
    seen: list[int] = []
    original = cli._Bars.step

    def step(self: Any, stage: str, done: int, total: int, note: str) -> None:
        original(self, stage, done, total, note)
        if stage == "learn":
            seen.append(done)
            if done == 3 and len(seen) == 4:
                raise KeyboardInterrupt

    monkeypatch.setattr(cli._Bars, "step", step)
    stopped = tree.parent / "imagenet"
    base = ["imagenet", "--out", str(tree.parent), "--weights", str(weights)]
    assert example.main(base) == cli.INTERRUPTED
    assert seen == [0, 1, 2, 3]
    shutil.copytree(tree, tmp_path / "moved")
    assert example.main([*base, "--data", str(tmp_path / "moved"), "--resume"]) == 0
    assert seen[4] == 2  # from the checkpoint after the second of four steps
    assert "69.55%" in capsys.readouterr().out
    report = json.loads((stopped / "report.json").read_text())
    assert report["dense_weights"] == str(weights) and report["history"]["dense"] == []
    # The same learning, not interrupted.
    config = runs.Run.open(stopped).config
    whole, data = recipe.open_recipe(tmp_path / "whole", config, weights=weights)
    stages.make_dense(whole, data, weights=weights)
    stages.make_learned(whole, data)
    ours, theirs = (load_file(place / "learned.safetensors") for place in (stopped, whole.path))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].numpy().tobytes() == theirs[key].numpy().tobytes() for key in ours)


def test_data_need_a_folder() -> None:
    with pytest.raises(ValueError, match="data: cifar10 needs the folder"):
        load_data("cifar10")
    with pytest.raises(ValueError, match="size: CIFAR-10 has images of 32"):
        load_data("cifar10", 16, Path("x"))
