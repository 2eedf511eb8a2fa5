"""Every file that the project reads, spoilt in many ways: refused by name or read for what it says, with
nothing half-changed, in little time and memory.
"""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsprune
from dsprune.recipes import folders, training
from dsprune.recipes.data import ImageData, Split
from dsprune.recipes.runs import Config, Run
from dsprune.resume import load_training, save_training

SEED = 20_260
DEFAULT, NIGHTLY = 200, 2000
MOST_BYTES, MOST_SECONDS = 200 << 20, 5.0
counts = pytest.mark.parametrize(
    "count", [DEFAULT, pytest.param(NIGHTLY, marks=[pytest.mark.nightly, pytest.mark.timeout(3000)])]
)

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 1.5, 1e308, "", "x", [], {}, [1], [[]], {"a": 1},
    10**6, [10**6] * 4, [2, 3, 3000, 3000],
]  # fmt: skip


# ---- spoiling bytes ----


def spoilt_bytes(data: bytes, chance: random.Random) -> bytes:
    """Cut, flipped, spliced, repeated, overwritten or lengthened."""
    raw = bytearray(data)
    at = chance.randrange(len(raw) + 1)
    length = min(len(raw) - at, chance.choice([1, 2, 8, 64, 1024]))
    kind = chance.randrange(7)
    if kind == 0:
        del raw[at:]
    elif kind == 1:
        for _ in range(chance.choice([1, 1, 2, 16])):
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        source = chance.randrange(len(raw))
        raw[at : at + length] = raw[source : source + length]
    elif kind == 3:
        del raw[at : at + max(1, length)]
    elif kind == 4:
        raw[at:at] = raw[at : at + length] or b"\0"
    elif kind == 5:
        raw[at : at + length] = bytes([chance.choice([0, 255])]) * length
    else:
        raw += chance.randbytes(chance.choice([1, 100]))
    return bytes(raw)


def spoilt_value(value: Any, chance: random.Random) -> Any:
    """JSON with one entry replaced, removed, doubled or nested."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        out = copy.copy(value)
        kind = chance.randrange(8)
        if kind == 0:
            del out[key]
        elif kind == 1 and isinstance(out, list):
            out.append(copy.deepcopy(out[key]))
        elif kind == 2 and isinstance(out, dict):
            out[chance.choice(["x", "", *keys])] = out[key]
        else:
            out[key] = spoilt_value(value[key], chance)
        return out
    return chance.choice(NASTY)


def spoilt_json(text: str, chance: random.Random) -> str:
    kind = chance.randrange(12)
    if kind == 0:
        return "[" * 5000 + "]" * 5000
    if kind == 1:  # a name twice
        return text.replace("{", '{"version": 2, "format": 2, "seed": 1, "seed": 2, ', 1)
    if kind == 2:
        return text.replace(": ", f": {chance.choice(['NaN', 'Infinity', '-Infinity', '1e999'])}, ", 1)
    if kind == 3:
        digits = [i for i, letter in enumerate(text) if letter.isdigit()]
        at = chance.choice(digits)
        return text[:at] + chance.choice(["NaN", "-1", "1.0", "true", "9" * 30, "9" * 5000]) + text[at + 1 :]
    if kind == 4:
        return spoilt_bytes(text.encode(), chance).decode("latin1")
    return json.dumps(spoilt_value(json.loads(text), chance))


def spoilt_tensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file spoilt as bytes, in its length, in its header or in the JSON inside that."""
    if chance.random() < 0.35:
        return spoilt_bytes(data, chance)
    (length,) = struct.unpack("<Q", data[:8])
    head, body = data[8 : 8 + length].decode(), data[8 + length :]
    kind = chance.randrange(4)
    if kind == 0:
        other = chance.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", other) + data[8:]
    if kind == 1:
        head = spoilt_json(head, chance)
    else:
        content = json.loads(head)
        meta = content["__metadata__"]
        key = next(k for k in meta if k.startswith("dsprune"))
        meta[key] = spoilt_json(meta[key], chance)
        head = json.dumps(content)
    raw = head.encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + body


def hammer(
    file: Path,
    count: int,
    spoil: Callable[[bytes, random.Random], bytes],
    read: Callable[[], Any],
    check: Callable[[Any], None],
    unchanged: Callable[[], None] = lambda: None,
) -> None:
    """Reads the file spoilt ``count`` times. ``check`` looks at what was read where it was not refused."""
    data = file.read_bytes()
    chance = random.Random(f"{SEED} {file.name}")
    check(read())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(count):
        state = chance.getstate()
        file.write_bytes(spoil(data, chance))
        for again in (False, True):
            start = time.process_time()
            try:
                result = read()
            except ValueError as error:
                assert file.name in str(error), (number, error)
                unchanged()
                refused += not again
            else:
                check(result)
            took = time.process_time() - start
            if took < MOST_SECONDS:  # else once more: a busy machine slows a process down
                break
        grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert took < MOST_SECONDS and grew < MOST_BYTES, (number, state[1][:2])
    file.write_bytes(data)
    check(read())
    assert refused > count // 4


def bits(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())
        if isinstance(value, torch.Tensor)
        else copy.deepcopy(value)
        for name, value in values.items()
    }


# ---- the files ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        with torch.no_grad():
            self.b.weight[:2, 1:] = 0
            self.b.weight[2:, :1] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.b(F.relu(self.norm(self.a(x)))).mean((2, 3)))


@counts
def test_packed_files(tmp_path: Path, count: int) -> None:
    torch.manual_seed(0)
    file, x = tmp_path / "packed.safetensors", torch.randn(2, 3, 6, 6)
    packed = dsprune.pack(Net().eval(), x)
    dsprune.save(packed, file)
    with torch.no_grad():
        expected = packed(x)
    model = Net()
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    own = bits(fresh)

    def check(loaded: dsprune.PackedNetwork) -> None:
        with torch.no_grad():
            assert torch.equal(loaded(x), expected)
        model.load_state_dict(fresh)

    def unchanged() -> None:
        assert bits(model.state_dict()) == own

    hammer(file, count, spoilt_tensors, lambda: dsprune.load(file, model), check, unchanged)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
        optimizer.step()


@counts
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_training_checkpoints(tmp_path: Path, count: int, kind: str) -> None:
    def parts() -> dict[str, Any]:
        model = Net()
        optimizer = (
            torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            if kind == "sgd"
            else torch.optim.Adam(model.parameters())
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {
            "model": model, "optimizer": optimizer, "scheduler": scheduler,
            "order": torch.Generator().manual_seed(1),
        }  # fmt: skip

    def whole(parts: dict[str, Any]) -> Any:
        optimizer = parts["optimizer"].state_dict()
        return [
            bits(parts["model"].state_dict()),
            optimizer["param_groups"],
            {index: bits(entry) for index, entry in optimizer["state"].items()},
            {k: v for k, v in parts["scheduler"].state_dict().items()},
            parts["order"].get_state().tolist(),
            torch.get_rng_state().tolist(),
            random.getstate(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        ]

    file = tmp_path / "training.safetensors"
    torch.manual_seed(0)
    saved = parts()
    steps(saved["model"], saved["optimizer"], 2)
    saved["scheduler"].step()
    save_training(file, saved, {"epoch": 3})
    expected = whole(saved)
    torch.manual_seed(5)
    given = parts()
    steps(given["model"], given["optimizer"], 1)
    spare, seeds = copy.deepcopy(given), torch.get_rng_state()
    spare["scheduler"] = None
    own = whole(given)

    def check(meta: Any) -> None:
        assert meta == {"epoch": 3} and whole(given) == expected
        torch.set_rng_state(seeds)
        given["model"].load_state_dict(spare["model"].state_dict())
        given["optimizer"].load_state_dict(spare["optimizer"].state_dict())
        given["scheduler"].load_state_dict(fresh)
        given["order"].manual_seed(1)
        own[:] = whole(given)

    fresh = copy.deepcopy(given["scheduler"].state_dict())
    hammer(
        file,
        count,
        spoilt_tensors,
        lambda: load_training(file, given),
        check,
        lambda: None if whole(given) == own else pytest.fail("half-loaded"),
    )


def small_data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    part = Split(torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 2)
    return ImageData("digits", 2, 3, 6, 1, part, part, part)


@counts
def test_checkpoints_of_stages(tmp_path: Path, count: int) -> None:
    file, settings = tmp_path / "finetune.safetensors", training.Finetune(cycles=1, epochs=2, batch=4)
    torch.manual_seed(0)
    training.finetune(Net(), small_data(), settings, checkpoint=file)

    def loop() -> training.Loop:
        model = Net()
        identity = training._identity(settings, small_data(), 0)
        return training.Loop("finetune", identity, model, training._sgd(model, settings), torch.Generator())

    def whole(loop: training.Loop) -> Any:
        state = loop.optimizer.state_dict()
        return [
            bits(loop.model.state_dict()), state["param_groups"], bits(loop.best), loop.epoch, loop.within,
            {index: bits(entry) for index, entry in state["state"].items()}, loop.history,
            loop.generator.get_state().tolist(), loop.losses.item(), torch.get_rng_state().tolist(),
        ]  # fmt: skip

    right = loop()
    right.load(file)
    expected, current = whole(right), [loop()]
    own = [whole(current[0])]

    def check(_: Any) -> None:
        assert whole(current[0]) == expected
        current[0] = loop()
        own[0] = whole(current[0])

    hammer(
        file,
        count,
        spoilt_tensors,
        lambda: current[0].load(file),
        check,
        lambda: None if whole(current[0]) == own[0] else pytest.fail("half-loaded"),
    )


@counts
def test_run_json(tmp_path: Path, count: int) -> None:
    file = tmp_path / "run.json"
    Run.create(tmp_path, Config())

    def check(run: Run) -> None:
        assert json.loads(json.dumps(run.config.to_json())) == json.loads(file.read_text())

    def spoil(data: bytes, chance: random.Random) -> bytes:
        if chance.random() < 0.3:
            return spoilt_bytes(data, chance)
        return spoilt_json(data.decode(), chance).encode()

    hammer(file, count, spoil, lambda: Run.open(tmp_path), check)


@counts
@pytest.mark.parametrize("binary", [False, True])
def test_cifar_batches(tmp_path: Path, count: int, binary: bool) -> None:
    import pickle

    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    labels = [i % 10 for i in range(20)]
    file = tmp_path / ("test_batch.bin" if binary else "test_batch")
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        if binary:
            content = b"".join(bytes([y]) + row.tobytes() for y, row in zip(labels, rows, strict=True))
        else:
            content = pickle.dumps({b"data": rows, b"labels": labels}, 2 if name != "test_batch" else 4)
        (tmp_path / f"{name}{'.bin' if binary else ''}").write_bytes(content)
    original = file.read_bytes()

    def check(data: ImageData) -> None:
        images, classes = data.test.images, data.test.labels
        assert images.dtype == torch.uint8 and len(images) == len(classes) > 0
        assert int(classes.min()) >= 0 and int(classes.max()) <= 9
        raw, found = file.read_bytes(), images.numpy().tobytes()
        if binary:
            assert found == b"".join(raw[i + 1 : i + 3073] for i in range(0, len(raw), 3073))
            assert classes.tolist() == list(raw[::3073])
        else:
            assert found in raw

    def spoil(data: bytes, chance: random.Random) -> bytes:
        if binary or chance.random() < 0.4:
            return spoilt_bytes(data, chance)
        # Its pixels are most of it: spoil what surrounds them.
        start = original.index(rows.tobytes()[:64])
        end = start + rows.nbytes
        side = chance.random() < 0.5
        changed = spoilt_bytes(data[:start] if side else data[end:], chance)
        return changed + data[start:] if side else data[:end] + changed

    hammer(file, count, spoil, lambda: folders.cifar10(tmp_path), check)


@counts
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "ppm", "tif", "webp"])
def test_folders_of_images(tmp_path: Path, count: int, ending: str) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    for part in ("train", "val"):
        for name in ("one", "two"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(3):
                Image.fromarray(pixels).save(tmp_path / part / name / f"image{index}.{ending}")
    file = tmp_path / "val" / "one" / f"image0.{ending}"

    def check(data: ImageData) -> None:
        with Image.open(io.BytesIO(file.read_bytes())) as image:
            expected = np.array(image.convert("RGB"))
        assert np.array_equal(np.array(folders._decoded(file)), expected)

    hammer(file, max(1, count // 6), spoilt_bytes, lambda: folders.imagenet(tmp_path, size=8), check)
