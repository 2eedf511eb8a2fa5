"""The published experiments as a trial: a small folder in the data set's own format, and the command on it.

    python examples/recipes.py cifar10 --out outputs/trial
    python examples/recipes.py imagenet --out outputs/trial

Further options are the command's: `--groups 4`, `--resume`. In earnest the folder is the data set, and the
options are left away: `dsprune recipe cifar10 --data DIR`. The images are coloured noise: the figures in
`report.md` mean nothing.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from dsprune import cli

SMALL = ["--epochs-scale", "0.001", "--seconds", "0.01", "--threads", "1", "--device", "cpu"]
OPTIONS = {
    "cifar10": ["--depth", "20", "--groups", "2", "--limit", "30", *SMALL],
    "imagenet": ["--arch", "resnet18", "--size", "32", "--batch", "4", "--workers", "0", *SMALL],
}


def cifar_batch(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Images (count, 3072), uint8, whose mean colour tells their class, of all classes by turns."""
    generator = np.random.default_rng(seed)
    labels = [i % 10 for i in range(count)]
    noise = generator.integers(0, 60, (count, 3072))
    shade = np.repeat(np.array([[18 * c, 180 - 18 * c, 18 * ((3 * c) % 10)] for c in labels]), 1024, axis=1)
    return (noise + shade).astype(np.uint8), labels


def write_cifar10(folder: Path, images: int = 20) -> None:
    """CIFAR-10's python version: six pickles of so many images each."""
    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data, labels = cifar_batch(images, seed)
        content = {b"batch_label": b"b", b"labels": labels, b"data": data, b"filenames": [b"a.png"] * images}
        (place / name).write_bytes(pickle.dumps(content, protocol=2))


def write_imagenet(folder: Path, train: int = 8, val: int = 3) -> None:
    """ImageNet's tree with two classes of so many images: odd sizes, two formats, one grey image a class."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(("n01440764", "n02102040")):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (40 + i, 36, 3)).astype(np.uint8) + np.uint8(100 * label)
                image = Image.fromarray(pixels)
                image = image.convert("L") if i == 1 else image
                image.save(place / (f"{i}.JPEG" if i % 2 else f"{i}.png"))


def main(arguments: list[str] | None = None) -> int:
    """Writes the folder where it is not there yet, runs the command, and returns its exit status."""
    options = argparse.ArgumentParser()
    options.add_argument("recipe", choices=sorted(OPTIONS))
    options.add_argument("--out", type=Path, required=True)
    args, further = options.parse_known_args(arguments)
    data, run = args.out / f"{args.recipe}-data", args.out / args.recipe
    if not data.exists():
        {"cifar10": write_cifar10, "imagenet": write_imagenet}[args.recipe](data)
    command = ["recipe", args.recipe, "--data", str(data), "--out", str(run), *OPTIONS[args.recipe], *further]
    print("dsprune", *command, flush=True)
    return cli.main(command)


if __name__ == "__main__":
    sys.exit(main())
