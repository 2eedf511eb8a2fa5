"""Reading files: JSON that says one thing only, safetensors files that tell when they are damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

__all__ = ["parse_json", "read_tensors", "regular_file", "tensors_to_bytes"]

_DIGEST = "sha256"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} twice in one object")
    return out


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def parse_json(text: str) -> Any:
    """What a JSON text says. ValueError where it is none, with a name twice in one object, a number that is
    not finite, or more nesting than Python follows.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def regular_file(path: str | os.PathLike[str], at_most: int | None = None) -> Path:
    """The path of a file that can be read to its end: no folder, pipe or device.

    Raises FileNotFoundError where there is nothing, ValueError, naming it, for something else and for more
    than `at_most` bytes.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file")
    if not file.is_file():
        raise ValueError(f"{file}: is no regular file")
    if at_most is not None and file.stat().st_size > at_most:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, expected at most {at_most}")
    return file


def _digest(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the JSON and of every tensor with its name, dtype and shape."""
    total = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return total.hexdigest()


def tensors_to_bytes(tensors: Mapping[str, torch.Tensor], key: str, content: Mapping[str, Any]) -> bytes:
    """A safetensors file with ``content`` as JSON under ``key`` of its metadata, a SHA-256 over both in it.

    Tensors that share memory (tied weights) are written once a name. ValueError for numbers in ``content``
    that are not finite.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    again = json.loads(json.dumps(content, allow_nan=False))  # as it will be read: its keys are text
    # One entry of metadata: of several, safetensors writes the order as it comes.
    stored = {**again, _DIGEST: _digest(again, plain)}
    return serialize(plain, {key: json.dumps(stored, sort_keys=True)})


def read_tensors(
    path: str | os.PathLike[str], key: str, version: tuple[str, int], unsigned: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the JSON object of a file that ``tensors_to_bytes`` made; ``version``: the name and the
    value of the entry that tells the format; ``unsigned``: an older version, which had no SHA-256.

    Raises ValueError, without the file's name, where it is damaged, of another kind or of another version;
    KeyError where it is a safetensors file without our metadata.
    """
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"no whole safetensors file ({error})") from None
    if key not in metadata:
        raise KeyError(key)
    try:
        content = parse_json(metadata[key])
    except ValueError as error:
        raise ValueError(f"a broken header ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"a broken header (a {type(content).__name__}, no object)")
    given = content.get(version[0])
    if type(given) is not int or given not in (version[1], unsigned):
        raise ValueError(f"{version[0]} {given!r}; this package reads {version[0]} {version[1]}")
    if given == unsigned and _DIGEST not in content:
        return tensors, content
    if content.pop(_DIGEST, None) != _digest(content, tensors):
        raise ValueError("damaged contents (their SHA-256 is another than when the file was written)")
    return tensors, content
