"""Checkpoints: one safetensors file with JSON in its header. Nothing is ever unpickled.

A file is written beside its target, flushed to the disk and renamed over it, so that an interruption at
any moment leaves either the old checkpoint or the new one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from dsprune.io import write_atomically

FORMAT = 1
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
    """The JSON object in `path`; CheckpointError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_checkpoint(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Save tensors by name and a JSON object to one safetensors file, in one step."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {_KEY: json.dumps({**meta, "format": FORMAT}, allow_nan=False)}
    # Tensors that share storage (tied weights) are written out in full.
    seen: set[int] = set()
    for name, tensor in flat.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            flat[name] = tensor.clone()
        seen.add(flat[name].data_ptr())
    write_bytes(path, to_bytes(flat, metadata=header))


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the JSON object of a checkpoint.

    Raises CheckpointError, naming the file, where it is missing, damaged or of another version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
    if header is None:
        raise CheckpointError(f"{path}: a safetensors file, but not a dsprune checkpoint")
    try:
        meta = json.loads(header)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: damaged header ({error})") from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {meta.get('format')!r}, expected {FORMAT}")
    return tensors, meta


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
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"{name}: cannot store a {type(value).__name__} in a checkpoint")


def join_state(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `split_state` took apart; tensors are copies."""
    if "tensor" in value:
        return tensors[value["tensor"]].clone()
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
    """An optimizer's state as named tensors and JSON; the inverse is `restore_optimizer`.

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


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, torch.Tensor],
    meta: Mapping[str, Any],
    prefix: str,
) -> None:
    """Give `optimizer` the state that `flatten_optimizer` took; CheckpointError where it does not fit."""
    state: dict[int, dict[str, Any]] = {}
    for index, values in meta["scalars"].items():
        state.setdefault(int(index), {}).update(values)
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name[len(prefix) :].split(".", 1)
            state.setdefault(int(index), {})[key] = tensor.clone()
    groups = [
        {key: tuple(v) if isinstance(v, list) and key != "params" else v for key, v in group.items()}
        for group in meta["param_groups"]
    ]
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"optimizer state does not fit this model: {error}") from None
