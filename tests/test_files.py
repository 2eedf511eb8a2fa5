"""Files that are not what they say, and settings that are not what they must be: refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dsprune
from dsprune import clock
from dsprune.checkpoint import CheckpointError, read_checkpoint, read_json, restore, write_checkpoint
from dsprune.files import parse_json, tensors_to_bytes
from dsprune.recipes import folders, training
from dsprune.recipes.demo import Timing
from dsprune.recipes.runs import Config, Run
from dsprune.resume import load_training, save_training

X = torch.randn(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ('{"a": {"b": 1, "b": 2}}', "'b' twice"),
        ('{"a": NaN}', "NaN is no JSON"),
        ("[-Infinity]", "-Infinity is no JSON"),
        ("[1e999]", "too large"),
        ("1" * 5000, "digits"),
    ],
)
def test_json_that_says_no_one_thing(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"run.json.*{reason}"):
        read_json(tmp_path / "run.json")


@pytest.fixture(scope="module")
def packed_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("packed") / "p.safetensors"
    dsprune.save(dsprune.pack(nets.structured_zeros(nets.Plain()).eval(), X), file)
    return file.read_bytes()


def rewritten(file: Path, change: Any) -> None:
    """The packed file with another header, whole: as somebody would write it who means it."""
    with safe_open(file, framework="pt") as stored:
        tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        header = json.loads(stored.metadata()["dsprune-packed"])
        del header["sha256"]
    change(header)
    file.write_bytes(tensors_to_bytes(tensors, "dsprune-packed", header))


SIZES = {
    "many filters": (lambda h: h["layouts"]["b"].update(out_channels=10**6), "out_channels 1000000 for 'b'"),
    "many channels": (lambda h: h["layouts"]["b"].update(in_channels=2**62), "in_channels .* for 'b'"),
    "a bool": (lambda h: h["layouts"]["b"].update(in_channels=True), "in_channels True for 'b'"),
    "a float": (lambda h: h["layouts"]["b"].update(out_channels=12.0), "out_channels 12.0 for 'b'"),
    "many groups": (lambda h: h["layouts"]["b"].update(groups=[[[0], []]] * 10**5), "at most 12 groups"),
    "a large image": (lambda h: h["inputs"][0].update(shape=[2, 3, 30000, 30000]), "more than"),
    "no image": (lambda h: h["inputs"][0].update(shape=[2, 3, 16.0, 16]), "shape"),
    "a float dimension": (lambda h: h["inputs"][0].update(shape=[True, 3, 16, 16]), "shape"),
    "train": (lambda h: h.update(train=1), "train is 1"),
    "version": (lambda h: h.update(version=2.0), "version 2.0"),
    "another layer": (lambda h: h["layouts"].update(head=h["layouts"].pop("b")), "has no Conv2d 'head'"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_in_a_packed_file_are_the_models(name: str, tmp_path: Path, packed_bytes: bytes) -> None:
    file = tmp_path / "p.safetensors"
    file.write_bytes(packed_bytes)
    change, reason = SIZES[name]
    rewritten(file, change)
    with pytest.raises(ValueError, match=reason) as error:
        dsprune.load(file, nets.Plain())
    assert str(file) in str(error.value)


def test_a_changed_tensor_or_header_is_noticed(tmp_path: Path, packed_bytes: bytes) -> None:
    file = tmp_path / "p.safetensors"
    file.write_bytes(packed_bytes)
    with safe_open(file, framework="pt") as stored:
        tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    tensors["b.bias"][0] += 1
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=r"p.safetensors.*SHA-256"):
        dsprune.load(file, nets.Plain())
    tensors["b.bias"][0] -= 1
    save_file(
        tensors, file, {**metadata, "dsprune-packed": metadata["dsprune-packed"].replace("false", "true")}
    )
    with pytest.raises(ValueError, match=r"p.safetensors.*SHA-256"):
        dsprune.load(file, nets.Plain())


# ---- checkpoints ----


def loop_parts(momentum: float = 0.9) -> dict[str, Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def everything(parts: dict[str, Any]) -> str:
    return repr(
        [
            [value.tolist() for value in parts["model"].state_dict().values()],
            parts["optimizer"].state_dict(),
            parts["scheduler"].state_dict(),
            torch.get_rng_state().tolist(),
        ]
    )


def test_states_that_are_not_finite_come_back(tmp_path: Path) -> None:
    parts = loop_parts()
    assert parts["scheduler"].best == math.inf
    save_training(tmp_path / "c", parts)
    parts["scheduler"].step(0.5)
    load_training(tmp_path / "c", parts)
    assert parts["scheduler"].best == math.inf


def drop(name: str) -> Any:
    return lambda tensors, meta: tensors.pop(name)


def other(name: str, value: torch.Tensor) -> Any:
    return lambda tensors, meta: tensors.update({name: value})


MOMENTUM = "part.optimizer.state.0.momentum_buffer"
DAMAGES = {
    "a momentum of another shape": other(MOMENTUM, torch.ones(3, 4)),
    "a momentum that broadcasts": other(MOMENTUM, torch.ones(1)),
    "a momentum of integers": other(MOMENTUM, torch.ones(4, 3, dtype=torch.int64)),
    "a weight of another shape": other("part.model.1.weight", torch.ones(4, 2)),
    "a weight of another dtype": other("part.model.1.weight", torch.ones(2, 4, dtype=torch.float64)),
    "no last weight": drop("part.model.1.bias"),
    "no generator": drop("random.numpy@0"),
    "a generator that is none": other("random.torch@0", torch.zeros(7, dtype=torch.uint8)),
    "Python's generator": other("random.python@0", torch.zeros(7, dtype=torch.int64)),
    "no parts": lambda tensors, meta: meta.update(parts=[]),
    "no meta": lambda tensors, meta: meta.pop("meta"),
    "processes": lambda tensors, meta: meta.update(processes=True),
    "a flat scheduler": lambda tensors, meta: meta["parts"].update(scheduler={"value": 3}),
    "an optimizer's list": lambda tensors, meta: meta["parts"].update(optimizer={"list": []}),
    "a tensor that is not there": lambda tensors, meta: meta["parts"].update(model={"tensor": "x"}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_changes_nothing(name: str, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    save_training(file, loop_parts())
    tensors, meta = read_checkpoint(file)
    DAMAGES[name](tensors, meta)
    write_checkpoint(file, tensors, meta)
    parts = loop_parts(0.5)
    before = everything(parts)
    with pytest.raises(CheckpointError, match=r"c.safetensors"):
        load_training(file, parts)
    assert everything(parts) == before


def test_what_fails_last_undoes_the_rest(tmp_path: Path) -> None:
    class Late:
        """Notices only when it loads, and half-way."""

        def __init__(self) -> None:
            self.value = 1

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]
            if self.value == 7:
                raise RuntimeError("seven")

    parts, source = loop_parts(), loop_parts(0.1)
    late, generator = Late(), torch.Generator().manual_seed(3)
    before, drawn = everything(parts), generator.get_state().tolist()
    states = [(parts[name], source[name].state_dict()) for name in parts]
    with pytest.raises(CheckpointError, match="c: does not fit: seven"):
        restore(tmp_path / "c", [*states, (late, {"value": 7})], [(generator, torch.Generator().get_state())])
    assert everything(parts) == before and late.value == 1 and generator.get_state().tolist() == drawn
    restore(tmp_path / "c", [*states, (late, {"value": 8})], [])
    assert everything(parts) == everything(source) and late.value == 8


# ---- data ----


def cifar(folder: Path, labels: Any = None) -> Path:
    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        given = labels if name == "test_batch" and labels is not None else [i % 10 for i in range(20)]
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": given}, 2))
    return folder


@pytest.mark.parametrize(
    "label", [2**70, -(2**70), 10, -1, True, 1.0, None, "1"], ids=lambda value: repr(value)[:8]
)
def test_labels_that_are_none(label: Any, tmp_path: Path) -> None:
    with pytest.raises(folders.DataError, match=r"test_batch: expected labels 0 to 9"):
        folders.cifar10(cifar(tmp_path, [*(i % 10 for i in range(19)), label]))


@pytest.mark.parametrize("ending", ["", ".bin"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_no_regular_file_among_cifars(kind: str, ending: str, tmp_path: Path) -> None:
    cifar(tmp_path)
    if ending:
        for path in list(tmp_path.iterdir()):
            path.unlink()
        for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
            (tmp_path / f"{name}.bin").write_bytes(bytes(3073 * 20))
    path = tmp_path / f"data_batch_3{ending}"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(folders.DataError, match=r"data_batch_3.*no regular file"):
        folders.cifar10(tmp_path)


def image_tree(folder: Path) -> Path:
    from PIL import Image

    for part in ("train", "val"):
        for name in ("one", "two"):
            (folder / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (9, 7)).save(folder / part / name / f"{index}.png")
    return folder


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing"])
def test_no_regular_file_among_images(kind: str, tmp_path: Path) -> None:
    path = image_tree(tmp_path) / "train" / "two" / "odd.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    with pytest.raises(folders.DataError, match=r"odd.png: is no regular file"):
        folders.imagenet(tmp_path)


def test_an_image_that_states_more_than_it_holds(tmp_path: Path) -> None:
    import struct
    import zlib

    path = image_tree(tmp_path) / "val" / "one" / "0.png"
    raw = path.read_bytes()
    head = b"IHDR" + struct.pack(">II", 6000, 6000) + raw[24:29]
    path.write_bytes(raw[:12] + head + struct.pack(">I", zlib.crc32(head)) + raw[33:])
    with pytest.raises(folders.DataError, match=r"0.png: not a readable image \(6000 x 6000 pixels"):
        folders.imagenet(tmp_path)


def test_a_pipe_in_a_files_place(tmp_path: Path) -> None:
    for name in ("run.json", "c.safetensors"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"run.json.*no regular file"):
        Run.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"c.safetensors.*no regular file"):
        read_checkpoint(tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError, match=r"c.safetensors"):
        dsprune.load(tmp_path / "c.safetensors", nets.Plain())


# ---- settings ----


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (training.Learn, "groups", 100_000), (training.Learn, "groups", 2.0),
        (training.Learn, "groups", True), (training.Learn, "strength", math.nan),
        (training.Learn, "lr", math.inf), (training.Learn, "lr", True),
        (training.Learn, "first_order", 1), (training.Pretrain, "epochs", 1.5),
        (training.Pretrain, "milestones", (1.5,)), (training.Pretrain, "milestones", "12"),
        (training.Pretrain, "epochs", 10**9), (training.Finetune, "cycles", False),
        (training.Finetune, "momentum", "0.9"), (training.Prune, "batch", 1.0),
        (training.Prune, "flops", True),
        (training.Prune, "flops", math.nan), (Config, "size", 16.0), (Config, "seed", True),
        (Config, "threads", 1.0), (Config, "limit", None), (Config, "folder", 3), (Config, "depth", 20.0),
    ],
)  # fmt: skip
def test_settings_are_of_their_kind(kind: Any, name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        kind(**{name: value})
    if not isinstance(value, float) or math.isfinite(value):
        content = Config().to_json()
        stage = {training.Learn: "learn", training.Pretrain: "pretrain", training.Finetune: "finetune"}
        place = content if kind is Config else content[stage.get(kind, "prune")]
        place[name] = value
        (tmp_path / "run.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=rf"run.json.*{name}"):
            Run.open(tmp_path)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Config)])
def test_a_setting_that_is_missing_is_no_default(name: str, tmp_path: Path) -> None:
    content = Config().to_json()
    del content[name]
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"run.json.*{name}"):
        Run.open(tmp_path)


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0, -1, True])
def test_seconds_are_finite(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        Timing(seconds=seconds)
    with pytest.raises(ValueError, match="seconds"):
        clock.medians({"a": lambda: None}, seconds=seconds)


def test_groups_are_not_without_bound() -> None:
    with pytest.raises(ValueError, match="groups: expected at most 4096"):
        dsprune.GroupLearner(nets.Residual(), X, groups=100_000, strength=1e-3, total_steps=10)
    with pytest.raises(TypeError, match="groups"):
        dsprune.GroupLearner(nets.Residual(), X, groups=2.0, strength=1e-3, total_steps=10)  # type: ignore


@pytest.mark.parametrize(
    "options", [{"limit": 2.0}, {"limit": True}, {"limit": -1}, {"size": 8.5}, {"workers": -1}]
)
def test_options_of_folders(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        folders.imagenet(tmp_path, **options)
