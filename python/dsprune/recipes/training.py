"""The training loops: pretrain, learn groups, finetune with the masks held; and evaluation.

Every loop writes a checkpoint before its first epoch, after each one, and every `CHECKPOINT_STEPS` steps of
a longer epoch. Whatever interrupts it, the next run with `resume=True` goes on from the last checkpoint and
ends with the same bits: it holds the model, the optimizer, the learner and all random states.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import nn

from dsprune.checkpoint import (
    CheckpointError,
    explained,
    flatten_optimizer,
    join_optimizer,
    join_state,
    read_checkpoint,
    restore,
    split_state,
    write_checkpoint,
)
from dsprune.learn import MOST_GROUPS
from dsprune.recipes.data import ImageData, Part, batch_count

CHECKPOINT_STEPS = 500
EVALUATED = 256
"""How many images are evaluated at a time, which the last bits of their logits may depend on."""


class TrainingError(RuntimeError):
    """Training that cannot go on, such as a loss that is no longer finite."""


class Progress(Protocol):
    """Told what the loops do."""

    def step(self, stage: str, done: int, total: int, note: str) -> None:
        """`done` of `total` optimizer steps of `stage`; `note` is a short text about the state."""


class Silent:
    """The progress that shows nothing."""

    def step(self, stage: str, done: int, total: int, note: str) -> None:
        return None


MOST = {"groups": MOST_GROUPS, "epochs": 100_000, "cycles": 10_000, "batch": 1 << 20}


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    if get_args(kind):
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind if kind in (int, bool) else isinstance(value, kind)


def check_types(settings: Any) -> None:
    """That a dataclass's fields hold what they are declared as, no float or bool for an int: else a TypeError
    that names the field.
    """
    kinds = get_type_hints(type(settings))
    for entry in dataclasses.fields(settings):
        value, kind = getattr(settings, entry.name), kinds[entry.name]
        if not _fits(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind)
            raise TypeError(f"{entry.name}: expected {wanted}, got {value!r}")


def _check(settings: Any, *, at_least: Mapping[str, float] = {}, above: Mapping[str, float] = {}) -> None:
    check_types(settings)
    for name, most in MOST.items():
        if getattr(settings, name, 0) > most:
            raise ValueError(f"{name}: expected at most {most}, got {getattr(settings, name)!r}")
    for name, bound in at_least.items():
        value = getattr(settings, name)
        if not math.isfinite(value) or value < bound:
            raise ValueError(f"{name}: expected at least {bound:g}, got {value!r}")
    for name, bound in above.items():
        value = getattr(settings, name)
        if not math.isfinite(value) or value <= bound:
            raise ValueError(f"{name}: expected more than {bound:g}, got {value!r}")


@dataclass(frozen=True)
class Pretrain:
    """SGD with momentum; the learning rate rises over the first `warmup` of all steps, then a cosine to 0.

    With `milestones` it is a tenth after each of these epochs instead, and there is no warm-up.
    """

    epochs: int = 14
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    milestones: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.milestones, list):  # JSON has lists
            object.__setattr__(self, "milestones", tuple(self.milestones))
        _check(
            self,
            at_least={"epochs": 1, "batch": 2, "momentum": 0, "weight_decay": 0, "warmup": 0},
            above={"lr": 0},
        )


@dataclass(frozen=True)
class Learn:
    """Group learning: the fields of `Pretrain`, and those that go to `GroupLearner`."""

    groups: int = 4
    strength: float = 0.05
    temperature: float = 0.5
    first_order: bool = False
    proximal: bool = False
    epochs: int = 16
    batch: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        _check(
            self,
            at_least={
                "groups": 1, "strength": 0, "epochs": 1, "batch": 2, "momentum": 0, "weight_decay": 0
            },
            above={"lr": 0, "temperature": 0},
        )  # fmt: skip


@dataclass(frozen=True)
class Prune:
    """The fraction of the FLOPs or parameters to remove, of the whole network or of its prunable convs; or
    the fraction of the dense network's time to take, for `batch` images.
    """

    flops: float | None = 0.62
    params: float | None = None
    count: str = "network"
    latency: float | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        if sum(v is not None for v in (self.flops, self.params, self.latency)) != 1:
            raise ValueError("prune: expected exactly one target: flops, params or latency")
        for name in ("flops", "params", "latency"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                kind = "left" if name == "latency" else "to remove"
                raise ValueError(f"{name}: expected the fraction {kind}, between 0 and 1, got {value!r}")
        _check(self, at_least={"batch": 1})
        if self.count not in ("network", "prunable"):
            raise ValueError(f"count: expected 'network' or 'prunable', got {self.count!r}")


@dataclass(frozen=True)
class Finetune:
    """`cycles` times a cosine from `lr` to 0 over `epochs` epochs; the best cycle on validation wins."""

    cycles: int = 2
    epochs: int = 8
    batch: int = 64
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        _check(
            self,
            at_least={"cycles": 1, "epochs": 1, "batch": 2, "momentum": 0, "weight_decay": 0},
            above={"lr": 0},
        )


@dataclass(frozen=True)
class Score:
    """Accuracy in percent, mean cross-entropy in nats, and logits (N, classes)."""

    accuracy: float
    loss: float
    logits: torch.Tensor


@torch.no_grad()
def evaluate(model: nn.Module, split: Part, batch: int = EVALUATED) -> Score:
    """Score `model` in eval mode (its mode is restored) on all images of `split`, on the model's device."""
    training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        logits = torch.cat([model(images).cpu() for images in split.batches(batch, device)])
    finally:
        model.train(training)
    return Score(
        100 * (logits.argmax(1) == split.labels).float().mean().item(),
        F.cross_entropy(logits, split.labels).item(),
        logits,
    )


def cosine(step: int, total: int, warmup: float = 0.0) -> float:
    """The learning rate's factor at `step` of `total`: linear over the share `warmup`, then cosine to 0."""
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, total - rise)))


def seed_everything(seed: int, stage: int) -> torch.Generator:
    """Seed torch's global generator and return one for the data order, both for this seed and stage."""
    torch.manual_seed(1000 * seed + 2 * stage)
    return torch.Generator().manual_seed(1000 * seed + 2 * stage + 1)


class Stateful(Protocol):
    """What the loops need of a `GroupLearner` to store it."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Loop:
    """All that one stage's next epoch depends on."""

    stage: str
    settings: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    learner: Stateful | None = None
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    # Within an epoch: the steps taken, the sum of their losses, and the generator as the epoch began.
    within: int = 0
    losses: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    start: torch.Tensor | None = None

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        more, optimizer = flatten_optimizer(self.optimizer, "optimizer.")
        tensors.update(more)
        tensors.update({f"best.{name}": value for name, value in self.best.items()})
        tensors["random.data"] = self.generator.get_state() if self.start is None else self.start
        tensors["losses"] = self.losses
        tensors["random.torch"] = torch.get_rng_state()
        learner = None
        if self.learner is not None:
            learner = split_state(self.learner.state_dict(), "learner", tensors)
        meta = {
            "stage": self.stage,
            "settings": self.settings,
            "epoch": self.epoch,
            "within": self.within,
            "history": self.history,
            "optimizer": optimizer,
            "learner": learner,
        }
        write_checkpoint(path, tensors, meta)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same stage and settings; CheckpointError where it is of another."""
        tensors, meta = read_checkpoint(path)
        if meta.get("stage") != self.stage:
            raise CheckpointError(f"{path}: a checkpoint of {meta.get('stage')!r}, expected {self.stage!r}")
        if not isinstance(meta.get("settings"), dict):
            raise CheckpointError(f"{path}: names no settings")
        if meta["settings"] != self.settings:
            changed = sorted(
                key
                for key in {*meta["settings"], *self.settings}
                if meta["settings"].get(key) != self.settings.get(key)
            )
            raise CheckpointError(
                f"{path}: made with other settings ({', '.join(changed)}); start without resume"
            )
        with explained(path):
            parts: list[tuple[Any, Any]] = [
                (self.model, part_of(tensors, "model.")),
                (self.optimizer, join_optimizer(part_of(tensors, "optimizer."), meta["optimizer"])),
            ]
            if self.learner is not None:
                parts.append((self.learner, join_state(meta["learner"], tensors)))
            epoch, within, history = meta["epoch"], meta["within"], meta["history"]
            for name, value in (("epoch", epoch), ("within", within)):
                if type(value) is not int or value < 0:
                    raise ValueError(f"{name} is {value!r}")
            if not isinstance(history, list) or len(history) != epoch:
                raise ValueError(f"a history of other than {epoch} epochs")
            best, losses, data = part_of(tensors, "best."), tensors["losses"], tensors["random.data"]
            if losses.shape != self.losses.shape or losses.dtype != self.losses.dtype:
                raise ValueError(f"losses of {losses.dtype} {tuple(losses.shape)}")
            if best:
                own = self.model.state_dict()
                if own.keys() != best.keys() or any(own[n].shape != best[n].shape for n in own):
                    raise ValueError("the best network is of another make")
        restore(path, parts, [(self.generator, data), (torch.default_generator, tensors["random.torch"])])
        self.best, self.epoch, self.history, self.within = best, epoch, history, within
        self.losses.copy_(losses)


def part_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor], source: Path) -> None:
    """Load a state dict into `model`, or raise CheckpointError in one line and leave it as it was."""
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [name for name in state if name in own and state[name].shape != own[name].shape]
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("has another shape for", shapes)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{source}: does not fit the network: {what} {names[0]!r}{more}")
    model.load_state_dict({**own, **state})


def _run(
    loop: Loop,
    data: ImageData,
    *,
    epochs: int,
    batch: int,
    lr: Callable[[int], float],
    step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    after_epoch: Callable[[], None] | None,
    checkpoint: Path | None,
    resume: bool,
    progress: Progress,
) -> None:
    loop.losses = loop.losses.to(data.device)
    if resume and checkpoint is not None and checkpoint.exists():
        loop.load(checkpoint)
    elif checkpoint is not None:
        loop.save(checkpoint)
    steps = batch_count(len(data.train), batch)
    if steps == 0:
        raise ValueError(f"batch: {len(data.train)} training images give no batch of {batch}")
    total = epochs * steps
    note = _note(loop.history)
    progress.step(loop.stage, loop.epoch * steps + loop.within, total, note)
    while loop.epoch < epochs:
        done = loop.epoch * steps + loop.within
        loop.start = loop.generator.get_state()
        loop.model.train()
        for images, labels in data.train.epoch(batch, data.shift, loop.generator, loop.within, data.device):
            for group in loop.optimizer.param_groups:
                group["lr"] = lr(done)
            loop.losses += step(images, labels).detach()
            done += 1
            loop.within += 1
            if checkpoint is not None and loop.within % CHECKPOINT_STEPS == 0 and loop.within < steps:
                loop.save(checkpoint)
            progress.step(loop.stage, done, total, note)
        mean = loop.losses.item() / steps
        if not math.isfinite(mean):
            raise TrainingError(
                f"{loop.stage}: the loss is {mean} after epoch {loop.epoch + 1}; try a lower learning rate"
            )
        score = evaluate(loop.model, data.validation)
        loop.epoch += 1
        loop.within, loop.start = 0, None
        loop.losses.zero_()
        loop.history.append(
            {"loss": mean, "validation_accuracy": score.accuracy, "validation_loss": score.loss}
        )
        if after_epoch is not None:
            after_epoch()
        if checkpoint is not None:
            loop.save(checkpoint)
        note = _note(loop.history)
        progress.step(loop.stage, done, total, note)
    loop.model.eval()


def _note(history: list[dict[str, Any]]) -> str:
    if not history:
        return ""
    return f"loss {history[-1]['loss']:.3f}, validation {history[-1]['validation_accuracy']:.1f}%"


def _sgd(model: nn.Module, settings: Pretrain | Learn | Finetune) -> torch.optim.SGD:
    return torch.optim.SGD(
        (p for p in model.parameters() if p.requires_grad),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _identity(settings: Any, data: ImageData, seed: int) -> dict[str, Any]:
    identity = {
        **dataclasses.asdict(settings),
        "data": data.name,
        "size": data.size,
        "images": len(data.train),
        "seed": seed,
    }
    return dict(json.loads(json.dumps(identity)))  # as a checkpoint has it


def pretrain(
    model: nn.Module,
    data: ImageData,
    settings: Pretrain,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train `model` in place from where it is; returns the history, one entry an epoch.

    Raises TrainingError where the loss is not finite, CheckpointError where `resume` does not fit.
    """
    generator = seed_everything(seed, 1)
    loop = Loop("pretrain", _identity(settings, data, seed), model, _sgd(model, settings), generator)
    steps = batch_count(len(data.train), settings.batch)
    total, milestones = settings.epochs * steps, settings.milestones

    def rate(step: int) -> float:
        if milestones:
            return settings.lr * 0.1 ** sum(step // steps >= epoch for epoch in milestones)
        return settings.lr * cosine(step, total, settings.warmup)

    _run(
        loop,
        data,
        epochs=settings.epochs,
        batch=settings.batch,
        lr=rate,
        step=_plain_step(model, loop.optimizer),
        after_epoch=None,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress or Silent(),
    )
    return loop.history


def learn(
    model: nn.Module,
    data: ImageData,
    settings: Learn,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Learn the groups of `model`'s prunable convs, training it on; returns the assignment and the history.

    The assignment is that of `GroupLearner.assignment()`: for each conv, the group (O,) of each filter.
    Raises as `pretrain` does.
    """
    from dsprune.learn import GroupLearner

    generator = seed_everything(seed, 2)
    optimizer = _sgd(model, settings)
    total = settings.epochs * batch_count(len(data.train), settings.batch)
    learner = GroupLearner(
        model,
        data.example,
        groups=settings.groups,
        strength=settings.strength,
        total_steps=total,
        temperature=settings.temperature,
        seed=seed,
        order="first" if settings.first_order else "exact",
        update="proximal" if settings.proximal else "subgradient",
    )
    loop = Loop("learn", _identity(settings, data, seed), model, optimizer, generator, learner)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return learner.step(lambda: F.cross_entropy(model(images), labels), optimizer)

    _run(
        loop,
        data,
        epochs=settings.epochs,
        batch=settings.batch,
        lr=lambda t: settings.lr * cosine(t, total),
        step=step,
        after_epoch=None,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress or Silent(),
    )
    return learner.assignment(), loop.history


def finetune(
    model: nn.Module,
    data: ImageData,
    settings: Finetune,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Train `model`, whose prune masks hold its zeros, and leave it at its best cycle on validation images.

    A model without masks is trained as a whole. Returns the history; entries at a cycle's end have
    `"cycle"`, the winning one `"best": true`. Raises as `pretrain` does.
    """
    generator = seed_everything(seed, 3)
    loop = Loop("finetune", _identity(settings, data, seed), model, _sgd(model, settings), generator)
    steps = settings.epochs * batch_count(len(data.train), settings.batch)

    def end_of_epoch() -> None:
        if loop.epoch % settings.epochs:
            return
        last = loop.history[-1]
        last["cycle"] = loop.epoch // settings.epochs
        previous = next((entry for entry in loop.history if entry.get("best")), None)
        rank = (last["validation_accuracy"], -last["validation_loss"])
        if previous is None or rank > (previous["validation_accuracy"], -previous["validation_loss"]):
            if previous is not None:
                previous["best"] = False
            last["best"] = True
            loop.best = {name: value.detach().clone() for name, value in model.state_dict().items()}

    _run(
        loop,
        data,
        epochs=settings.epochs * settings.cycles,
        batch=settings.batch,
        lr=lambda t: settings.lr * cosine(t % steps, steps),
        step=_plain_step(model, loop.optimizer),
        after_epoch=end_of_epoch,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress or Silent(),
    )
    model.load_state_dict(loop.best)
    return loop.history
