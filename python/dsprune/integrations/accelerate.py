"""Group learning in a loop written with Accelerate: ``pip install 'dsp-kernels[accelerate]'``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsprune.learn import Closure, GroupLearner

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise ImportError(f"Accelerate is missing ({error}): pip install 'dsp-kernels[accelerate]'") from error

__all__ = ["AcceleratedGroupLearner"]


class AcceleratedGroupLearner(GroupLearner):
    """A ``GroupLearner`` that knows its ``Accelerator``.

    It uses the accelerator's gradient scaler, learns in all its processes together, and is part of
    ``accelerator.save_state`` and ``load_state``.

    Args:
        accelerator: whose ``prepare`` made ``model``. Plain, or with ``DistributedDataParallel``; sharded
            models are refused.
        model: the prepared model.
        example_input, settings: as for ``GroupLearner``.

    Raises TypeError or ValueError, naming the argument: another accelerator, sharded models, and as
    ``GroupLearner``.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, example_input: Any, **settings: Any
    ) -> None:
        if not isinstance(accelerator, Accelerator):
            raise TypeError(f"accelerator: expected an Accelerator, got {type(accelerator).__name__}")
        kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
        if not (kind == "NO" or kind.startswith("MULTI_")):
            raise ValueError(f"accelerator: expected whole models in every process, got {kind}")
        if accelerator.num_processes > 1:
            settings.setdefault("process_group", torch.distributed.group.WORLD)
        super().__init__(model, example_input, **settings)
        self._accelerator = accelerator
        accelerator.register_for_checkpointing(self)

    def step(
        self,
        closure: Closure | Sequence[Closure],
        optimizer: Any,
        *,
        scaler: Any = None,
        grad_hook: Callable[[], object] | None = None,
    ) -> Tensor:
        """As ``GroupLearner.step``, with the optimizer that ``accelerator.prepare`` gave.

        The closure computes the loss by the prepared model and calls no ``accelerator.backward``; for
        gradient accumulation give a list of closures, not ``accelerator.accumulate``. A learning rate
        scheduler steps afterwards, as usual.
        """
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        scaler = self._accelerator.scaler if scaler is None else scaler
        return super().step(closure, optimizer, scaler=scaler, grad_hook=grad_hook)
