"""Checkpoints: one safetensors file with JSON in its header. Nothing is ever unpickled.

A file is written beside its target, flushed to the disk and renamed over it, so that an interruption at
any moment leaves either the old checkpoint or the new one.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dsprune.files import parse_json, read_tensors, regular_file, tensors_to_bytes
from dsprune.io import write_atomically

FORMAT = 2
MOST_JSON = 1 << 26  # bytes of a JSON file of ours
_KEY = "dsprune"


class CheckpointError(ValueError):
    """A file that is missing, damaged, of another version, or that does not fit."""


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step that survives a crash; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` by `content` as indented JSON, in one step."""
    write_bytes(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError where there is none, or one that says two things."""
    try:
        content = parse_json(regular_file(path, MOST_JSON).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Save tensors by name and a JSON object to one safetensors file, in one step."""
    write_bytes(path, tensors_to_bytes(tensors, _KEY, {**meta, "format": FORMAT}))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the JSON object of a checkpoint.

    Raises CheckpointError, naming the file, where it is missing, damaged or of another version.
    """
    try:
        return read_tensors(regular_file(path), _KEY, ("format", FORMAT))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except KeyError:
        raise CheckpointError(f"{path}: a safetensors file, but not a dsprune checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None


@contextmanager
def explained(source: Path) -> Iterator[None]:
    """What goes wrong with a checkpoint's contents in this block becomes a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        raise CheckpointError(f"{source}: does not fit: {text}") from error


def _snapshot(target: Any) -> Callable[[], None]:
    """What brings an object with a state dict back to its present state."""
    if isinstance(target, nn.Module):
        own = {
            name: value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
            for name, value in target.state_dict(keep_vars=True).items()
        }
        return lambda: _undone(target.load_state_dict(own))
    held = dict(vars(target)) if hasattr(target, "__dict__") else {}
    if isinstance(target, torch.optim.Optimizer):  # gets new objects for all that it loads
        return lambda: vars(target).update(held)
    state = copy.deepcopy(target.state_dict())

    def undo() -> None:
        if hasattr(target, "__dict__"):
            vars(target).clear()
            vars(target).update(held)
        target.load_state_dict(state)

    return undo


def _undone(_: Any) -> None:
    return None


def restore(
    source: Path, parts: Sequence[tuple[Any, Any]], generators: Sequence[tuple[torch.Generator, torch.Tensor]]
) -> None:
    """Gives objects the states of a checkpoint: all of them, or none.

    Modules, optimizers and schedulers are compared with their states first. CheckpointError, naming
    `source`, for whatever does not fit; every object is then as it was.
    """
    with explained(source):
        for target, state in parts:
            if isinstance(target, nn.Module):
                _check_module(target, state)
            elif isinstance(target, torch.optim.Optimizer):
                _check_optimizer(target, state)
            elif isinstance(target, LRScheduler):
                _check_alike("scheduler", target.state_dict(), state)
        for generator, value in generators:
            torch.Generator(generator.device).set_state(value)
    undo = [_snapshot(target) for target, _ in parts]
    before = [generator.get_state() for generator, _ in generators]
    try:
        with explained(source):
            for target, state in parts:
                target.load_state_dict(state)
            for generator, value in generators:
                generator.set_state(value)
    except BaseException:
        for step in undo:
            step()
        for (generator, _), value in zip(generators, before, strict=True):
            generator.set_state(value)
        raise


def _check_module(module: nn.Module, state: Any) -> None:
    own = module.state_dict(keep_vars=True)
    if not isinstance(state, Mapping) or own.keys() != state.keys():
        odd = sorted(map(str, own.keys() ^ state.keys())) if isinstance(state, Mapping) else [type(state)]
        raise ValueError(f"the model and the checkpoint do not both have {odd[0]!r}")
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            given = state[name]
            if (
                not isinstance(given, torch.Tensor)
                or given.shape != value.shape
                or given.dtype != value.dtype
            ):
                raise ValueError(f"{name} is {_described(given)}, the model's is {_described(value)}")


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]


# Of torch.optim: a value for each element of the parameter.
_ELEMENTWISE = {
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg",
    "acc_delta", "sum", "prev", "ax",
}  # fmt: skip


def _check_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """That the state is one of this optimizer's, for these parameters."""
    groups, values = state["param_groups"], state["state"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(f"the optimizer has {len(optimizer.param_groups)} groups, not {len(groups)}")
    parameters: dict[Any, torch.Tensor] = {}
    for own, given in zip(optimizer.param_groups, groups, strict=True):
        if len(own["params"]) != len(given["params"]):
            raise ValueError(
                f"a group of the optimizer has {len(own['params'])} parameters, not {len(given['params'])}"
            )
        parameters.update(zip(given["params"], own["params"], strict=True))
        for key in own.keys() - {"params"}:
            if key in given:
                _check_alike(key, own[key], given[key])
    for index, entries in values.items():
        if index not in parameters:
            raise ValueError(f"a state for parameter {index!r}, which the optimizer does not have")
        parameter = parameters[index]
        for key, value in entries.items():
            if key in _ELEMENTWISE and value is not None:
                fits = isinstance(value, torch.Tensor) and value.shape == parameter.shape
                if not fits or value.is_floating_point() != parameter.is_floating_point():
                    raise ValueError(
                        f"{key} of parameter {index} is {_described(value)}, where the parameter is "
                        f"{_described(parameter)}"
                    )
            elif key == "step" and not (
                (isinstance(value, torch.Tensor) and value.numel() == 1)
                or (isinstance(value, int | float) and not isinstance(value, bool))
            ):
                raise ValueError(f"step of parameter {index} is {_described(value)}")


def _check_alike(name: str, own: Any, given: Any) -> None:
    """That a value may stand in another's place: of its kind, and finite where it is a number."""
    if own is None or given is None:
        return
    if isinstance(own, Mapping):
        if not isinstance(given, Mapping) or own.keys() != given.keys():
            raise ValueError(f"{name} has other entries than this one's {sorted(map(str, own))}")
        for key in own:
            _check_alike(str(key), own[key], given[key])
        return
    if isinstance(own, bool) or isinstance(given, bool):
        fits = type(own) is type(given)
    elif isinstance(own, int | float | torch.Tensor):
        fits = isinstance(given, int | float | torch.Tensor)
        if isinstance(given, float):
            fits = not math.isnan(given)
    elif isinstance(own, list | tuple):
        fits = isinstance(given, list | tuple) and len(own) == len(given)
        for one, other in zip(own, given, strict=False):
            _check_alike(name, one, other)
    else:
        fits = isinstance(given, type(own)) or isinstance(own, type(given))
    if not fits:
        raise ValueError(f"{name} is {_described(given)}, where this one has {_described(own)}")


def split_state(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A state dict as JSON, its tensors taken out into `tensors` under `name`; the inverse is `join_state`.

    Tuples, counters and keys that are no text come back as they were. TypeError for anything else.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        kind = "counter" if isinstance(value, Counter) else "items"
        return {kind: [[key, split_state(v, f"{name}.{key}", tensors)] for key, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [split_state(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}  # such as the best loss so far, where there is none
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{name}: cannot store a {type(value).__name__} in a checkpoint")


def join_state(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `split_state` took apart; tensors are copies."""
    if "tensor" in value:
        return tensors[value["tensor"]].clone()
    if "float" in value:
        return float(value["float"])
    if "items" in value:
        return {key: join_state(v, tensors) for key, v in value["items"]}
    if "counter" in value:
        return Counter({key: join_state(v, tensors) for key, v in value["counter"]})
    if "list" in value:
        return [join_state(v, tensors) for v in value["list"]]
    if "tuple" in value:
        return tuple(join_state(v, tensors) for v in value["tuple"])
    return value["value"]


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and JSON; the inverse is `join_optimizer`.

    The live state is made contiguous on the way, as it will be after reading: the same numbers in another
    memory order may round differently in the next step.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for values in optimizer.state.values():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                values[key] = value.contiguous()
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{index}.{key}"] = value
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def join_optimizer(tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that `flatten_optimizer` took apart; `tensors` without its prefix."""
    state: dict[int, dict[str, Any]] = {}
    for index, values in meta["scalars"].items():
        state.setdefault(int(index), {}).update(values)
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor.clone()
    groups = [
        {key: tuple(v) if isinstance(v, list) and key != "params" else v for key, v in group.items()}
        for group in meta["param_groups"]
    ]
    return {"state": state, "param_groups": groups}
