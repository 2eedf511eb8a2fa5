"""Group learning in the ``Trainer`` of ``transformers``: ``pip install 'dsp-kernels[transformers]'``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsprune.learn import GroupLearner, RandomState
from dsprune.resume import load_training, save_training

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError(
        f"transformers is missing ({error}): pip install 'dsp-kernels[transformers]'"
    ) from error

__all__ = ["GroupLearning"]

FILE = "group_learner.safetensors"


class GroupLearning(TrainerCallback):
    """Learns the groups of a model while the ``Trainer`` trains it; it adds itself to the trainer.

    After each step of the optimizer it computes the loss of the same batches once more (not with
    ``order="first"``), by the trainer's ``compute_loss``, and takes the learner's step. Accumulation,
    gradient clipping, scaling, autocast and DDP are those of the trainer. The learner's state lies in each
    checkpoint folder and is found by ``train(resume_from_checkpoint=...)``.

    Args:
        trainer: a ``Trainer`` whose model is whole in every process.
        example_input: as for ``GroupLearner``; usually ``pixel_values``.
        total_steps: None: the steps that the trainer is to take.
        settings: as for ``GroupLearner``: ``groups``, ``strength`` and so on.

    Raises TypeError or ValueError for another trainer, or one with FSDP or DeepSpeed; when training begins,
    as ``GroupLearner``.
    """

    def __init__(
        self, trainer: Any, example_input: Any, *, total_steps: int | None = None, **settings: Any
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}")
        if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", False):
            raise ValueError("trainer: expected whole models in every process, got FSDP or DeepSpeed")
        self._trainer: Any = trainer
        self._example_input = example_input
        self._total_steps = total_steps
        self._settings = settings
        self._learner: GroupLearner | None = None
        self._batches: list[tuple[RandomState, Any, Any, Any]] = []
        self._resumed: Path | None = None
        self._training_step = trainer.training_step
        self._load = trainer._load_from_checkpoint
        self._attach()

    def _attach(self) -> None:
        self._trainer.training_step = self._record
        self._trainer._load_from_checkpoint = self._note_folder
        self._trainer.add_callback(self)

    @property
    def learner(self) -> GroupLearner:
        """The learner. RuntimeError before training has begun."""
        if self._learner is None:
            raise RuntimeError("the learner is made when training begins")
        return self._learner

    def _record(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        device = next(model.parameters()).device
        self._batches.append((RandomState(device), model, inputs, num_items_in_batch))
        loss: Tensor = self._training_step(model, inputs, num_items_in_batch)
        return loss

    def _note_folder(self, folder: Any, *args: Any, **kwargs: Any) -> Any:
        self._resumed = Path(folder)
        return self._load(folder, *args, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        settings = dict(self._settings)
        if args.world_size > 1:
            settings.setdefault("process_group", torch.distributed.group.WORLD)
        total = self._total_steps or state.max_steps
        example = tuple(
            value.to(args.device) if isinstance(value, Tensor) else value
            for value in (
                self._example_input if isinstance(self._example_input, tuple) else (self._example_input,)
            )
        )
        self._learner = GroupLearner(trainer.model_wrapped, example, total_steps=total, **settings)
        self._batches = []
        if state.global_step:
            folder = self._resumed or self._folder(args, state)
            load_training(folder / FILE, {"learner": self._learner}, random=False)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        batches, self._batches = self._batches, []
        accelerator = self._trainer.accelerator
        model = batches[-1][1]

        def clip() -> None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)

        optimizer = self._trainer.optimizer
        self.learner.after_step(
            [self._closure(*entry, len(batches)) for entry in batches],
            getattr(optimizer, "optimizer", optimizer),
            scaler=accelerator.scaler,
            grad_hook=clip if args.max_grad_norm else None,
            skipped=accelerator.optimizer_step_was_skipped,
        )

    def _closure(
        self, random: RandomState, model: Any, inputs: Any, items: Any, count: int
    ) -> Callable[[], Tensor]:
        """The loss of a batch as the trainer computed it; a loss that is a share of the accumulated batches'
        already is not divided again.
        """
        trainer = self._trainer
        shared = trainer.model_accepts_loss_kwargs and items is not None
        factor = count if shared or trainer.compute_loss_func is not None else 1

        def loss() -> Tensor:
            random.restore()
            prepared = trainer._prepare_inputs(inputs)
            with trainer.compute_loss_context_manager():
                value = trainer.compute_loss(model, prepared, num_items_in_batch=items)
            return value.mean() * factor

        return loss

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save_training(self._folder(args, state) / FILE, {"learner": self.learner}, random=False)
