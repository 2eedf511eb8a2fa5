"""Checkpoints for training loops of one's own: everything that the next step depends on, in one file.

The file is safetensors with JSON in its header, written whole or not at all; nothing is unpickled. What is
loaded gives the bits of a run that was never interrupted, in one process or in several.
"""

from __future__ import annotations

import os
import random as python_random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import (
    CheckpointError,
    explained,
    join_state,
    read_checkpoint,
    restore,
    split_state,
    write_checkpoint,
)
from .graph import unwrap

__all__ = ["CheckpointError", "load_training", "save_training"]

_KIND = "training"


def _processes() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _generators() -> dict[str, Tensor]:
    """The states of the global random number generators, each as bytes or integers."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    assert name == "MT19937"
    _, words, gauss = python_random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(np.array([*keys, position, has_gauss], dtype=np.int64)),
        "numpy.gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        states["accelerator"] = torch.get_device_module(device).get_rng_state()
    return states


def _set_generators(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    has, gauss = states["python.gauss"].tolist()
    python_random.setstate((3, tuple(states["python"].tolist()), gauss if has else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy.gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    if "accelerator" in states and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        torch.get_device_module(device).set_rng_state(states["accelerator"])


def _check_generators(states: Mapping[str, Tensor]) -> None:
    """Raises something where the states are none; tried on generators that nobody uses."""
    torch.Generator().set_state(states["torch"])
    has, gauss = states["python.gauss"].tolist()
    python_random.Random().setstate((3, tuple(states["python"].tolist()), gauss if has else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy.gauss"].item()
    np.random.RandomState().set_state(
        ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    )
    if "accelerator" in states and states["accelerator"].dtype != torch.uint8:
        raise ValueError(f"the accelerator's random state is {states['accelerator'].dtype}")


def _gathered(state: Tensor, processes: int) -> list[Tensor]:
    """The states of all processes, in the order of their ranks; the same in each of them."""
    if processes == 1:
        return [state]
    device = "cpu" if "gloo" in str(dist.get_backend()) else torch.accelerator.current_accelerator()
    own = state.to(device).contiguous()
    states = [torch.zeros_like(own) for _ in range(processes)]
    dist.all_gather(states, own)
    return [state.cpu() for state in states]


def _check(parts: object) -> Mapping[str, Any]:
    if not isinstance(parts, Mapping) or not parts:
        raise TypeError(f"parts: expected a dictionary of what to store, by name, got {type(parts).__name__}")
    for name, part in parts.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"parts: expected names, got {name!r}")
        stateful = hasattr(part, "state_dict") and hasattr(part, "load_state_dict")
        if not stateful and not isinstance(part, torch.Generator):
            raise TypeError(
                f"parts[{name!r}]: expected an object with state_dict and load_state_dict, or a "
                f"torch.Generator, got {type(part).__name__}"
            )
    return parts


def save_training(
    path: str | os.PathLike[str],
    parts: Mapping[str, Any],
    meta: Mapping[str, Any] | None = None,
    *,
    random: bool = True,
) -> None:
    """Stores the state of a training loop in one file, replaced atomically.

    In a distributed run every process calls it: the file, which the first one writes, holds the random
    states of all of them, and the rest as the first process has it. It returns when the file is there.

    Args:
        path: the file to write; its folder is made where it is missing.
        parts: by name, all that the next step depends on: the model (wrappers of ``torch.compile`` and
            ``DistributedDataParallel`` are looked through), its optimizer, learning rate scheduler,
            ``GradScaler``, ``GroupLearner``, ``AveragedModel``, or whatever else has ``state_dict`` and
            ``load_state_dict``; and ``torch.Generator`` objects, such as that of the data order.
        meta: what JSON can carry, such as the epoch and the step.
        random: whether the states of the global generators of torch, Python and NumPy are stored too.

    An optimizer's state becomes contiguous in memory, as it will be once loaded: the same numbers in another
    order may round differently.

    Raises:
        TypeError: a part without a state, or a state that holds something other than tensors and plain
            values. OSError: the file cannot be written; an older one is then untouched. What stops the first
            process from writing is raised in every process.
    """
    rank, processes = _processes()
    tensors: dict[str, Tensor] = {}
    states: dict[str, Any] = {}
    per_process: dict[str, Tensor] = {}
    for name, part in _check(parts).items():
        if isinstance(part, torch.Generator):
            per_process[f"generator.{name}"] = part.get_state()
            continue
        if isinstance(part, torch.optim.Optimizer):
            for values in part.state.values():
                for key, value in values.items():
                    if isinstance(value, Tensor):
                        values[key] = value.contiguous()
        state = unwrap(part).state_dict() if isinstance(part, nn.Module) else part.state_dict()
        states[name] = split_state(state, f"part.{name}", tensors)
    if random:
        per_process.update({f"random.{name}": state for name, state in _generators().items()})
    for name, value in per_process.items():
        for index, state in enumerate(_gathered(value, processes)):
            tensors[f"{name}@{index}"] = state
    failure: Exception | None = None
    if rank == 0:
        try:
            content = {"kind": _KIND, "parts": states, "processes": processes, "meta": dict(meta or {})}
            write_checkpoint(Path(path), tensors, content)
        except Exception as error:  # told to the others, which would wait for ever
            failure = error
    if processes > 1:
        failure = _shared(failure, rank)
    if failure is not None:
        raise failure


def _shared(failure: Exception | None, rank: int) -> Exception | None:
    """What went wrong in the first process, in all of them; they wait for it here."""
    kinds = (OSError, TypeError, ValueError, RuntimeError)
    status: list[Any] = [None]
    if failure is not None:
        kind = next((i for i, kind in enumerate(kinds) if isinstance(failure, kind)), len(kinds) - 1)
        status = [(kind, str(failure))]
    dist.broadcast_object_list(status, src=0)
    if rank == 0 or status[0] is None:
        return failure
    return kinds[status[0][0]](f"process 0 could not save: {status[0][1]}")


def load_training(
    path: str | os.PathLike[str], parts: Mapping[str, Any], *, random: bool = True
) -> dict[str, Any]:
    """Gives the parts the state that ``save_training`` stored; the next step has the bits it would have had.

    In a distributed run every process calls it, after the same objects have been made.

    Args:
        path: the file.
        parts: the same names as when it was saved, with objects of the same make.
        random: whether the global random states are set too. They belong to a number of processes; False
            goes on with another number, not to the same bits. ``torch.Generator`` parts are set wherever the
            number of processes is that of the file, and left alone otherwise.

    Returns:
        ``meta`` as it was given.

    Raises:
        CheckpointError (a ValueError), naming the file: one that is missing, damaged, no training checkpoint,
            with other parts, made by another number of processes, or whose states do not fit the parts. All
            parts and the random states are then as they were.
    """
    source = Path(path)
    tensors, content = read_checkpoint(source)
    if content.get("kind") != _KIND:
        raise CheckpointError(f"{source}: was not written by dsprune.save_training")
    rank, processes = _processes()
    with explained(source):
        states, saved_by, meta = content["parts"], content["processes"], content["meta"]
        if not isinstance(states, dict) or not isinstance(meta, dict) or type(saved_by) is not int:
            raise ValueError("a damaged header")
    if random and saved_by != processes:
        raise CheckpointError(
            f"{source}: made by {saved_by} processes, this run has {processes}; give "
            "random=False to go on without their random states"
        )
    generators = {n for n, part in _check(parts).items() if isinstance(part, torch.Generator)}
    stored_generators = {
        n.removeprefix("generator.").rsplit("@", 1)[0] for n in tensors if n.startswith("generator.")
    }
    stored, given = {*states, *stored_generators}, set(parts)
    if stored != given or generators != stored_generators:
        raise CheckpointError(f"{source}: holds {sorted(stored)}, asked for {sorted(given)}")
    if random and f"random.torch@{rank}" not in tensors:
        raise CheckpointError(f"{source}: was saved without random states; give random=False")
    own = f"@{rank}"
    with explained(source):
        loaded = [
            (unwrap(part) if isinstance(part, nn.Module) else part, join_state(states[name], tensors))
            for name, part in parts.items()
            if name not in generators
        ]
        drawn = [
            (parts[name], tensors[f"generator.{name}{own}"]) for name in generators if saved_by == processes
        ]
        globals_ = {
            name.removeprefix("random.").removesuffix(own): state
            for name, state in tensors.items()
            if name.startswith("random.") and name.endswith(own)
        }
        if random:
            _check_generators(globals_)
    restore(source, loaded, drawn)
    if random:
        _set_generators(globals_)
    return dict(meta)
