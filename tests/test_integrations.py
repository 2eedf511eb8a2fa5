"""Group learning inside Lightning, Accelerate and the Trainer of transformers, against plain loops."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dsprune

SETTINGS: dict[str, Any] = {"groups": 2, "strength": 0.2}
STEPS = 6


class Net(nn.Module):
    """Dropout on demand: the libraries draw random numbers of their own, so masks would differ."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(self.drop(x.mean((2, 3))))


class Images(Dataset):
    """Random images and labels, as pairs."""

    def __init__(self, count: int = 4 * STEPS) -> None:
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(count, 3, 6, 6, generator=generator)
        self.labels = torch.randint(4, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


class NamedImages(Images):
    """The same by the names that models of transformers take."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:  # type: ignore[override]
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


EXAMPLE = torch.zeros(1, 3, 6, 6)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, and other libraries' deprecations are theirs."""
    torch.set_num_threads(1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout).train()


def make_optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def plain(
    *, clip: float | None = None, parts: int = 1, autocast: bool = False, dropout: float = 0.0
) -> tuple[Net, dsprune.GroupLearner]:
    """The loop that the others must equal: `parts` batches of 4 accumulated in each step."""
    model = make(dropout)
    optimizer, schedule = make_optimizer(model)
    steps = STEPS // parts
    learner = dsprune.GroupLearner(model, EXAMPLE, total_steps=steps, **SETTINGS)
    data = Images()
    torch.manual_seed(1)

    def closure(batch: int) -> Any:
        rows = slice(4 * batch, 4 * batch + 4)

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                return F.cross_entropy(model(data.images[rows]).float(), data.labels[rows])

        return loss

    def hook() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)

    for step in range(steps):
        closures = [closure(parts * step + part) for part in range(parts)]
        learner.step(closures, optimizer, grad_hook=hook if clip else None)
        schedule.step()
    return model, learner


def same(
    model: nn.Module, learner: dsprune.GroupLearner, expected: tuple[nn.Module, Any], tol: float
) -> None:
    other, wanted = expected
    assert learner.steps == wanted.steps > 0
    for name, logits in wanted.logits.items():
        assert logits.abs().max() > 1e-4
        torch.testing.assert_close(learner.logits[name], logits, rtol=tol, atol=tol)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tol, atol=tol)


# ---- the two halves of a step ----


def test_after_step_is_the_second_half_of_step() -> None:
    expected = plain(clip=0.5, dropout=0.2)
    model = make(0.2)
    optimizer, schedule = make_optimizer(model)
    learner = dsprune.GroupLearner(model, EXAMPLE, total_steps=STEPS, **SETTINGS)
    data = Images()
    torch.manual_seed(1)
    for step in range(STEPS):
        rows = slice(4 * step, 4 * step + 4)
        learner.before_step()
        optimizer.zero_grad()
        F.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        learner.after_step(
            lambda rows=rows: F.cross_entropy(model(data.images[rows]), data.labels[rows]),
            optimizer,
            grad_hook=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5),
        )
        schedule.step()
    same(model, learner, expected, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner.after_step(lambda: model(EXAMPLE).sum(), optimizer, skipped=True)
    assert learner.steps == STEPS + 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- Lightning ----


def lightning_module() -> Any:
    pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()
            self.logged = 0

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return {"loss": loss}

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.logged += 1
            super().log(*args, **kwargs)

        def configure_optimizers(self) -> Any:
            optimizer, schedule = make_optimizer(self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    return Module()


def fit(
    module: Any, callback: Any, folder: Path, *, more: Any = (), resume: Any = None, **options: Any
) -> None:
    import lightning.pytorch as pl

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=bool(more),
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[callback, *more], **options,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(Images(), batch_size=4), ckpt_path=resume, weights_only=True)


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({"gradient_clip_val": 0.5}, {"clip": 0.5}),
        ({"accumulate_grad_batches": 2}, {"parts": 2}),
        ({"precision": "bf16-mixed"}, {"autocast": True}),
    ],
    ids=["clipping", "accumulation", "autocast"],
)
def test_lightning(options: dict[str, Any], loop: dict[str, Any], tmp_path: Path) -> None:
    module = lightning_module()
    from dsprune.integrations.lightning import GroupLearning

    callback = GroupLearning("net", example_input=EXAMPLE, **SETTINGS)
    fit(module, callback, tmp_path, max_epochs=1, **options)
    assert module.logged == STEPS
    same(module.net, callback.learner, plain(**loop), 1e-5)


@pytest.mark.nightly
def test_lightning_resumes_to_the_same_bits(tmp_path: Path) -> None:
    module, again = lightning_module(), lightning_module()
    from lightning.pytorch.callbacks import ModelCheckpoint

    from dsprune.integrations.lightning import GroupLearning

    def callback() -> GroupLearning:
        return GroupLearning("net", example_input=EXAMPLE, total_steps=2 * STEPS, **SETTINGS)

    made, resumed = callback(), callback()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(module, made, tmp_path, more=[saved], max_epochs=2)
    fit(again, resumed, tmp_path, resume=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert again.logged == STEPS
    assert resumed.learner.steps == 2 * STEPS
    same(again.net, resumed.learner, (module.net, made.learner), 0)
    # A second call of fit goes on with the learner that there is.
    with pytest.raises(ValueError, match="total_steps is 12, expected this learner's 13"):
        made._total_steps = 13
        fit(module, made, tmp_path, max_epochs=3)


def test_lightning_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    module = lightning_module()
    from dsprune.integrations.lightning import GroupLearning

    callback = GroupLearning("net", **SETTINGS)
    with pytest.raises(RuntimeError, match="when training begins"):
        callback.learner  # noqa: B018
    with pytest.raises(ValueError, match="example_input: give one"):
        fit(module, callback, tmp_path, max_epochs=1)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match=r"call GroupLearner\.step"):
        fit(module, GroupLearning("net", example_input=EXAMPLE, **SETTINGS), tmp_path, max_epochs=1)


# ---- Accelerate ----


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    from dsprune.integrations.accelerate import AcceleratedGroupLearner

    def prepared() -> tuple[Any, ...]:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        model = make()
        optimizer, schedule = make_optimizer(model)
        loader = DataLoader(Images(), batch_size=4)
        model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
        learner = AcceleratedGroupLearner(accelerator, model, EXAMPLE, total_steps=STEPS, **SETTINGS)
        return accelerator, model, optimizer, schedule, loader, learner

    def train(count: int, batches: Any, made: tuple[Any, ...]) -> None:
        _, model, optimizer, schedule, _, learner = made
        for _ in range(count):
            images, labels = next(batches)
            learner.step(lambda x=images, y=labels: F.cross_entropy(model(x), y), optimizer)
            schedule.step()

    made = prepared()
    batches = iter(made[4])
    torch.manual_seed(1)
    train(3, batches, made)
    made[0].save_state(str(tmp_path / "half"))
    train(3, batches, made)
    expected = plain(autocast=precision == "bf16")
    same(made[0].unwrap_model(made[1]), made[5], expected, 1e-5)
    # The learner is part of the accelerator's checkpoint.
    again = prepared()
    batches = iter(again[4])
    for _ in range(3):
        next(batches)
    again[0].load_state(str(tmp_path / "half"))
    train(3, batches, again)
    same(again[0].unwrap_model(again[1]), again[5], (made[0].unwrap_model(made[1]), made[5]), 0)
    # The network inside can be pruned and packed as ever.
    structure = dsprune.find_structure(again[1], EXAMPLE, again[5].assignment(), flops=0.2)
    assert set(structure) == {"first", "second"}


# ---- transformers ----


def hugging_face(folder: Path, parts: int = 1, epochs: int = 1) -> tuple[Any, Any]:
    """A Trainer of a model with our network in it, and the callback."""
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs Accelerate")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from dsprune.integrations.transformers import GroupLearning

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make()

        def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
            logits = self.net(pixel_values)
            return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = Model()
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=epochs, use_cpu=True,
        gradient_accumulation_steps=parts, report_to=[], save_strategy="epoch", logging_strategy="no",
        disable_tqdm=True, seed=1, max_grad_norm=0.5,
    )  # fmt: skip
    trainer = InOrder(model=model, args=args, train_dataset=NamedImages(), optimizers=make_optimizer(model))
    return trainer, GroupLearning(trainer, EXAMPLE, total_steps=STEPS // parts, **SETTINGS)


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_transformers(parts: int, tmp_path: Path) -> None:
    trainer, callback = hugging_face(tmp_path, parts)
    trainer.train()
    expected = plain(clip=0.5, parts=parts)
    learner = callback.learner
    assert learner.names == ("net.first", "net.second") and learner.steps == STEPS // parts
    for name, logits in expected[1].logits.items():
        torch.testing.assert_close(learner.logits[f"net.{name}"], logits, rtol=1e-5, atol=1e-5)
    for name, value in expected[0].state_dict().items():
        torch.testing.assert_close(trainer.model.net.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.nightly
def test_transformers_resumes_to_the_same_bits(tmp_path: Path) -> None:
    trainer, callback = hugging_face(tmp_path / "a", epochs=2)
    trainer.train()
    again, resumed = hugging_face(tmp_path / "b", epochs=2)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{STEPS}"))
    assert resumed.learner.steps == 2 * STEPS
    same(again.model, resumed.learner, (trainer.model, callback.learner), 0)
