"""Group learning as a callback of Lightning's ``Trainer``: ``pip install 'dsp-kernels[lightning]'``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dsprune.learn import GroupLearner, RandomState

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise ImportError(f"Lightning is missing ({error}): pip install 'dsp-kernels[lightning]'") from error

__all__ = ["GroupLearning"]


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """No logging from ``training_step``: what the look-ahead computes is nobody's metric."""
    held = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    for name in ("log", "log_dict"):
        object.__setattr__(module, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            object.__delattr__(module, name)
        for name, value in held.items():
            object.__setattr__(module, name, value)


@contextmanager
def _rates(optimizer: torch.optim.Optimizer, rates: list[Any]) -> Iterator[None]:
    """The learning rates of the step just taken, where a scheduler has already moved on."""
    later = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, later, strict=True):
            group["lr"] = rate


class GroupLearning(Callback):
    """Learns the groups of a network while Lightning trains it.

    After each step of the optimizer it calls ``training_step`` once more on the same batches (not with
    ``order="first"``), without logging, and takes the learner's step. Accumulated batches, gradient clipping,
    gradient scaling, autocast, learning rate schedulers and DDP are those of the ``Trainer``; the learner's
    state is part of Lightning's checkpoints. Needs automatic optimization and one optimizer; gradients are
    None once the callback has run.

    Args:
        network: the name of the ``LightningModule``'s attribute that holds the network, such as ``"model"``.
        example_input: as for ``GroupLearner``; None: the module's ``example_input_array``.
        total_steps: None: the steps that the ``Trainer`` is to take.
        settings: as for ``GroupLearner``: ``groups``, ``strength`` and so on.
    """

    def __init__(
        self, network: str, *, example_input: Any = None, total_steps: int | None = None, **settings: Any
    ) -> None:
        super().__init__()
        self._network = network
        self._example_input = example_input
        self._total_steps = total_steps
        self._settings = settings
        self._learner: GroupLearner | None = None
        self._stored: dict[str, Any] | None = None
        self._batches: list[tuple[RandomState, Any, int]] = []
        self._random: RandomState | None = None
        self._step: tuple[list[Any], float | None] | None = None

    @property
    def learner(self) -> GroupLearner:
        """The learner. RuntimeError before training has begun."""
        if self._learner is None:
            raise RuntimeError("the learner is made when training begins")
        return self._learner

    def state_dict(self) -> dict[str, Any]:
        """The learner's state, for Lightning's checkpoint."""
        return {} if self._learner is None else self._learner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called by Lightning before training begins; the learner takes it when it is made."""
        self._stored = state_dict or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ValueError(
                "GroupLearning: with manual optimization call GroupLearner.step in training_step instead"
            )
        if len(trainer.optimizers) != 1:
            raise ValueError(f"GroupLearning: expected one optimizer, got {len(trainer.optimizers)}")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "GroupLearning: expected a strategy with whole models in every process (one device, or DDP), "
                f"got {type(trainer.strategy).__name__}"
            )
        example = self._example_input
        if example is None:
            example = pl_module.example_input_array
        if example is None:
            raise ValueError("example_input: give one, or set the module's example_input_array")
        total: Any = self._total_steps or trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("total_steps: expected a number, the Trainer has no end")
        settings = dict(self._settings)
        if trainer.world_size > 1:
            settings.setdefault("process_group", torch.distributed.group.WORLD)
        device = pl_module.device
        example = tuple(
            value.to(device) if isinstance(value, Tensor) else value
            for value in (example if isinstance(example, tuple) else (example,))
        )
        network = pl_module.get_submodule(self._network)
        if self._learner is not None and self._stored is None:
            self._stored = self._learner.state_dict()  # a second call of fit goes on
        self._learner = GroupLearner(network, example, total_steps=int(total), **settings)
        if self._stored is not None:
            self._learner.load_state_dict(self._stored)
            self._stored = None
        self._batches, self._step = [], None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._random = RandomState(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        rates = [group["lr"] for group in optimizer.param_groups]
        self._step = (rates, None if scaler is None else scaler.get_scale())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._random is not None
        self._batches.append((self._random, batch, batch_idx))
        if self._step is None:
            return
        (rates, old_scale), self._step = self._step, None
        batches, self._batches = self._batches, []
        optimizer = trainer.optimizers[0]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        share = len(batches) / trainer.accumulate_grad_batches
        closures = [self._closure(trainer, pl_module, *entry, share) for entry in batches]

        def clip() -> None:
            pl_module.configure_gradient_clipping(
                optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )

        with _rates(optimizer, rates):
            self.learner.after_step(
                closures,
                optimizer,
                scaler=scaler,
                grad_hook=clip if trainer.gradient_clip_val else None,
                skipped=scaler is not None and old_scale is not None and scaler.get_scale() < old_scale,
            )

    @staticmethod
    def _closure(
        trainer: Trainer,
        module: LightningModule,
        random: RandomState,
        batch: Any,
        batch_idx: int,
        share: float,
    ) -> Callable[[], Tensor]:
        """The loss of a batch, as ``training_step`` computed it; the last batches of an epoch, where they are
        fewer than are accumulated, weigh ``share``.
        """
        arguments = (batch, batch_idx)[: len(inspect.signature(module.training_step).parameters)]

        def loss() -> Tensor:
            random.restore()
            with _silent(module):
                out = trainer.strategy.training_step(*arguments)
            value = out if isinstance(out, Tensor) else None if out is None else out["loss"]
            if value is None:
                raise RuntimeError("GroupLearning: training_step skipped a batch that it had trained on")
            return value * share

        return loss
