"""Loops as users write them: scaling, accumulation, autocast, averages, compiled models, checkpoints."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dsprune
from dsp_kernels import GroupLayout
from dsprune.checkpoint import read_checkpoint, write_checkpoint
from dsprune.resume import CheckpointError

EXAMPLE = torch.zeros(1, 3, 8, 8)
NAMES = {"first", "second"}
Structure = dict[str, GroupLayout]


class Net(nn.Module):
    """A stem, a residual block and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(x + self.second_norm(self.second(y)))
        return self.head(self.drop(x.mean((2, 3))))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.compiler.reset()


def make(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).train()


@pytest.fixture(scope="module")
def structure() -> Structure:
    groups = [([0, 2, 3, 5], [0, 2, 4, 6]), ([1, 2, 5, 6, 7], [1, 3, 5, 7])]
    return {name: GroupLayout(8, 8, groups) for name in NAMES}


def pruned(form: str, structure: Structure, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A network to finetune, by masks or in packed form."""
    model = dsprune.apply_structure(make(dtype), structure)
    return model if form == "masked" else dsprune.pack(model, EXAMPLE.to(dtype), train=True)


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights by the dense network's names, zeros where pruned."""
    if isinstance(model, dsprune.PackedNetwork):
        return {name: v.detach() for name, v in dsprune.unpack(model, Net()).state_dict().items()}
    clean = copy.deepcopy(model.state_dict())
    for name in NAMES:
        clean[f"{name}.weight"] = clean.pop(f"{name}.weight_orig") * clean.pop(f"{name}.weight_mask")
    return clean


def batch(step: int, dtype: torch.dtype = torch.float32, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (count,), generator=generator)
    return torch.randn(count, 3, 8, 8, generator=generator).to(dtype), labels


def finetune(
    model: nn.Module,
    *,
    steps: int = 4,
    scaled: bool = False,
    parts: int = 1,
    autocast: bool = False,
    forward: Any = None,
    averaged: Any = None,
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=256.0)
    dtype = next(model.parameters()).dtype
    forward = model if forward is None else forward
    losses = []
    torch.manual_seed(1)
    for step in range(steps):
        images, labels = batch(step, dtype)
        optimizer.zero_grad()
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(forward(x).float() if autocast else forward(x), y) / parts
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if averaged is not None:
            averaged.update_parameters(model)
    return losses


def zeros_kept(model: nn.Module, structure: Structure) -> bool:
    dense = dense_state(model)
    kept = {name: dense[f"{name}.weight"].ne(0).flatten(2).any(-1) for name in NAMES}
    return all(torch.equal(kept[name], structure[name].mask()) for name in NAMES)


def close(one: dict[str, Tensor], other: dict[str, Tensor], tol: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tol, atol=tol, msg=lambda t, n=name: f"{n}: {t}")


FORMS = ["masked", "packed"]


@pytest.mark.parametrize("form", FORMS)
def test_a_scaler_changes_nothing_but_rounding(form: str, structure: Structure) -> None:
    plain, scaled = (pruned(form, structure) for _ in range(2))
    finetune(plain)
    finetune(scaled, scaled=True)
    close(dense_state(plain), dense_state(scaled), 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_accumulated_gradients_are_the_joined_batchs(form: str, structure: Structure) -> None:
    whole, parts = (pruned(form, structure).eval() for _ in range(2))  # statistics would differ
    finetune(whole)
    finetune(parts, parts=2)
    close(dense_state(whole), dense_state(parts), 1e-5)


def test_autocast_trains_both_forms_alike(structure: Structure) -> None:
    found = {}
    for form in FORMS:
        model = pruned(form, structure)
        before = dense_state(model)
        losses = finetune(model, autocast=True, scaled=True, steps=6)
        assert np.isfinite(losses).all() and zeros_kept(model, structure)
        found[form] = dense_state(model)
        assert not torch.equal(found[form]["first.weight"], before["first.weight"])
    close(found["masked"], found["packed"], 2e-2)
    assert all((found["packed"][f"{n}.weight"] == 0).any() for n in NAMES)


@pytest.mark.parametrize("form", FORMS)
def test_averaged_weights(form: str, structure: Structure) -> None:
    model = pruned(form, structure)
    # Averaging buffers rounds whole numbers, the plans of packed layers among them.
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=form == "masked")
    finetune(model, averaged=ema)
    assert zeros_kept(ema.module, structure)
    assert not torch.equal(dense_state(ema.module)["first.weight"], dense_state(model)["first.weight"])
    dense = Net()
    dense.load_state_dict(dense_state(ema.module))
    x = batch(9)[0]
    with torch.no_grad():
        expected = dense.eval()(x)
        torch.testing.assert_close(ema.eval()(x), expected, rtol=1e-5, atol=1e-5)
        fast = dsprune.pack(dense if form == "packed" else ema.module, EXAMPLE)
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)


def test_averaged_weights_while_learning() -> None:
    model = make()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    learner = dsprune.GroupLearner(model, EXAMPLE, groups=2, strength=0.1, total_steps=3)
    expected = torch.zeros(())
    for step in range(3):
        x, y = batch(step)
        learner.step(lambda x=x, y=y: F.cross_entropy(model(x), y), optimizer)
        ema.update_parameters(model)
        now = model.first.weight.detach().clone()
        expected = now if step == 0 else expected.lerp(now, 0.5)
    torch.testing.assert_close(ema.module.first.weight.detach(), expected)
    found = dsprune.find_structure(ema.module, EXAMPLE, learner.assignment(), flops=0.3)
    assert set(found) == NAMES


@pytest.mark.nightly
@pytest.mark.parametrize("form", [*FORMS, "learning"])
def test_compiled_models(form: str, structure: Structure) -> None:
    """The packed one by Inductor, which is slow to start; the others only traced."""
    states = []
    for compiled in (False, True):
        model = make() if form == "learning" else pruned(form, structure)
        backend = "inductor" if form == "packed" else "aot_eager"
        forward = torch.compile(model, backend=backend) if compiled else model
        if form != "learning":
            # Dropout draws other numbers under Inductor.
            nn.Module.eval(model.get_submodule("network.drop" if form == "packed" else "drop"))
            finetune(model, steps=3, forward=forward)
            states.append(dense_state(model))
            continue
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        learner = dsprune.GroupLearner(forward, EXAMPLE, groups=2, strength=0.1, total_steps=3)
        torch.manual_seed(1)
        for step in range(3):
            x, y = batch(step)
            learner.step(lambda x=x, y=y, f=forward: F.cross_entropy(f(x), y), optimizer)
        logits = {f"logits.{name}": value.detach() for name, value in learner.logits.items()}
        states.append({**model.state_dict(), **logits})
    close(*states, 1e-4)


# ---- checkpoints ----


def loop_parts(model: nn.Module, schedule: str = "cosine") -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedules = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
        "steps": lambda: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5], 0.5),
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
        "in turn": lambda: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
                torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
            ],
            [3],
        ),
    }
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedules[schedule](),
        "scaler": torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=2),
        "learner": dsprune.GroupLearner(model, EXAMPLE, groups=2, strength=0.1, total_steps=8),
        "average": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        "order": torch.Generator().manual_seed(7),
    }


def loop(parts: dict[str, Any], steps: int) -> None:
    """Steps that draw from every random generator."""
    for _ in range(steps):
        index = torch.randint(100, (8,), generator=parts["order"])
        x, y = batch(int(index.sum()))
        x = x * (1 + 0.1 * random.gauss(0, 1) + 0.1 * np.random.standard_normal())
        parts["learner"].step(
            lambda x=x, y=y: F.cross_entropy(parts["model"](x), y), parts["optimizer"], scaler=parts["scaler"]
        )
        parts["schedule"].step()
        parts["average"].update_parameters(parts["model"])


@pytest.mark.parametrize("schedule", ["cosine", "steps", "one cycle", "in turn"])
def test_a_loaded_loop_goes_on_to_the_same_bits(schedule: str, tmp_path: Path) -> None:
    parts = loop_parts(make(), schedule)
    loop(parts, 3)
    path = tmp_path / "new" / "half.safetensors"
    dsprune.save_training(path, parts, {"step": 3, "note": "half"})
    loop(parts, 4)
    dsprune.save_training(tmp_path / "whole.safetensors", parts)

    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    again = loop_parts(Net(), schedule)
    compiled = {**again, "model": torch.compile(again["model"], backend="eager")}  # wrappers do not matter
    assert dsprune.load_training(path, compiled) == {"step": 3, "note": "half"}
    loop(again, 4)
    dsprune.save_training(tmp_path / "resumed.safetensors", again)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_random_states(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    model = nn.Linear(2, 2)
    path = tmp_path / "a.safetensors"
    dsprune.save_training(path, {"model": model, "order": generator}, random=False)
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError, match="saved without random states; give random=False"):
        dsprune.load_training(path, {"model": nn.Linear(2, 2), "order": torch.Generator()})
    other = nn.Linear(2, 2)
    draw = torch.Generator().manual_seed(8)
    torch.set_rng_state(before)
    assert dsprune.load_training(path, {"model": other, "order": draw}, random=False) == {}
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(draw.get_state(), generator.get_state())  # a part, whatever the global states
    assert torch.equal(torch.get_rng_state(), before)
    # Made by more processes: which of its states would be this one's?
    tensors, content = read_checkpoint(path)
    write_checkpoint(path, tensors, {**content, "processes": 2})
    state = draw.manual_seed(8).get_state()
    dsprune.load_training(path, {"model": other, "order": draw}, random=False)
    assert torch.equal(draw.get_state(), state)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        dsprune.load_training(path, {"model": model})
    dsprune.save_training(path, {"model": model})
    with pytest.raises(CheckpointError, match=r"holds \['model'\], asked for \['model', 'more'\]"):
        dsprune.load_training(path, {"model": model, "more": torch.Generator()})
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors: does not fit: weight is torch\.float32 \(2, 2\)"
    ):
        dsprune.load_training(path, {"model": nn.Linear(3, 2)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        dsprune.load_training(path, {"model": model})
    write_checkpoint(path, {}, {"stage": "learn"})
    with pytest.raises(CheckpointError, match=r"was not written by dsprune\.save_training"):
        dsprune.load_training(path, {"model": model})


class Odd:
    """Has a state that no file should hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"function": os.getpid}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "parts: expected a dictionary of what to store"),
        ([nn.Linear(1, 1)], "parts: expected a dictionary"),
        ({"": nn.Linear(1, 1)}, "parts: expected names"),
        ({"a": 3}, r"parts\['a'\]: expected an object with state_dict"),
        ({"a": Odd()}, "part.a.function: cannot store a builtin_function_or_method"),
    ],
)
def test_what_cannot_be_stored(parts: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=text):
        dsprune.save_training(tmp_path / "a.safetensors", parts)
    assert not list(tmp_path.iterdir())
