"""Packed networks on disk: one safetensors file with a JSON header, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from dsp_kernels import GroupLayout

from .graph import clean_copy, unwrap
from .masks import settle_parametrizations
from .pack import PackedNetwork, PackedState, fill, pack

__all__ = ["load", "save", "write_atomically"]

FORMAT = "dsprune-packed"
VERSION = 2
MASK = "mask of "  # begins the names of the tensors that are prune masks


def target_file(path: str | os.PathLike[str]) -> Path:
    """A path that a file is to be written to, looked at before the work for it begins; nothing is made.

    Raises TypeError where it is no path, OSError where a folder is in its place or a file where its folder
    should be.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected the name of a file, got {type(path).__name__}")
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"path: expected the name of a file, got the folder {str(target)!r}")
    there = next((folder for folder in target.absolute().parents if folder.exists()), None)
    if there is not None and not there.is_dir():
        raise NotADirectoryError(f"path: {str(target)!r} cannot be written: {str(there)!r} is no folder")
    return target


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes ``data`` to a temporary file beside ``path``, syncs it and renames it: readers see the old or
    the new file. The folder is made where it is missing.

    Raises TypeError as ``target_file`` does, and OSError where the file cannot be written; an older one is
    then untouched.
    """
    target = target_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is on the disk only when its folder is
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(packed: PackedNetwork, path: str | os.PathLike[str]) -> None:
    """Saves a packed network: packed weights and groups by module name, and the input shapes it was packed
    for.

    Args:
        packed: from ``pack`` or ``load``; a fused one is saved in the precision that it was packed in.
        path: the file to write (safetensors; the groups are JSON in its header). Replaced atomically; its
            folder is made where it is missing.

    Raises:
        TypeError: ``packed`` is no ``PackedNetwork``, ``path`` no path, or the example held arguments, or the
        network has extra state (``get_extra_state``), that JSON cannot carry.
        OSError: the file cannot be written; an older file at ``path`` is then untouched.
    """
    if not isinstance(packed, PackedNetwork):
        raise TypeError(f"packed: expected a PackedNetwork, got {type(packed).__name__}")
    state = packed.packed_state()
    inputs: list[dict[str, Any]] = []
    for shape, dtype in zip(packed.example_shapes, packed.example_dtypes, strict=True):
        if dtype is not None:
            inputs.append({"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")})
        elif shape is None or isinstance(shape, (bool, int, float, str)):
            inputs.append({"value": shape})
        else:
            raise TypeError(f"packed: an example argument of type {type(shape).__name__} cannot be saved")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "train": packed._state is None and packed.unfused_reason is None,
        "inputs": inputs,
        "layouts": {name: layout.to_json() for name, layout in state.layouts.items()},
    }
    for name, value in state.extra.items():
        if not _is_json(value):
            raise TypeError(f"packed: {name} is a {type(value).__name__} that JSON cannot carry")
    if state.extra:
        header["extra"] = state.extra
    # Tied weights are written once a name: safetensors refuses shared memory.
    named = state.tensors | {f"{MASK}{name}": mask for name, mask in state.masks.items()}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in named.items()}
    write_atomically(path, serialize(tensors, {FORMAT: json.dumps(header, sort_keys=True)}))


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it is."""
    try:
        return repr(json.loads(json.dumps(value))) == repr(value)
    except (TypeError, ValueError):
        return False


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"path: no file at {name!r}")
    try:
        with safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: {name!r} is no whole safetensors file ({error})") from error
    if FORMAT not in metadata:
        raise ValueError(f"path: {name!r} was not written by dsprune.save")
    try:
        header = json.loads(metadata[FORMAT])
    except json.JSONDecodeError as error:
        raise ValueError(f"path: {name!r} has a broken header ({error})") from error
    if not isinstance(header, Mapping) or header.get("format") != FORMAT:
        raise ValueError(f"path: {name!r} has a header of another format")
    if header.get("version") != VERSION:
        raise ValueError(
            f"path: {name!r} has version {header.get('version')!r}; this package reads version {VERSION}"
        )
    return dict(header), tensors


def _examples(header: Mapping[str, Any], device: torch.device) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    out: list[Any] = []
    for entry in header["inputs"]:
        if not isinstance(entry, Mapping):
            raise ValueError(f"an input that is no entry: {entry!r}")
        if "shape" not in entry:
            out.append(entry["value"])
            continue
        dtype = getattr(torch, str(entry["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"an input of the unknown dtype {entry['dtype']!r}")
        shape = entry["shape"]
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"an input of the shape {shape!r}")
        if dtype.is_floating_point:
            out.append(torch.randn(shape, generator=generator).to(device=device, dtype=dtype))
        else:
            out.append(torch.zeros(shape, device=device, dtype=dtype))
    return tuple(out)


def load(
    path: str | os.PathLike[str], model: nn.Module, *, train: bool | None = None, backend: str | None = None
) -> PackedNetwork:
    """Loads a packed network: fills the dense network with the saved weights and packs it again.

    Args:
        path: written by ``save``.
        model: a fresh dense network of the same architecture, of the dtypes that were saved, on any device;
            filled in place as ``unpack`` does it. Parametrizations (such as weight norm) come off it for
            good: the file has the weights that they computed.
        train: as for ``pack``; None: as it was when saved.
        backend: as for ``pack``.

    Returns:
        The packed network; its outputs are those of the saved one, bit for bit, on the same machine and
            backend.

    Raises:
        FileNotFoundError: no such file. ValueError: truncated, of another format or version, with a header
            that is broken, or not for this architecture or its precision; ``train`` or ``backend`` as for
            ``pack``. TypeError: ``model`` is no module. PackError: the network does not compute what the
            dense one does. ``model`` is left as it was.
    """
    inner = unwrap(model)
    header, tensors = _read(path)
    try:
        layouts = {str(name): GroupLayout.from_json(value) for name, value in header["layouts"].items()}
        weights = next((p for p in inner.parameters()), None)
        inputs = _examples(header, weights.device if weights is not None else torch.device("cpu"))
        saved_for_training = bool(header["train"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"path: {os.fspath(path)!r} has an incomplete header ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)!r} has a broken header ({error})") from error
    modules = dict(inner.named_modules())
    for name in layouts:
        if not isinstance(modules.get(name), nn.Conv2d):
            raise ValueError(f"model: has no Conv2d {name!r}, which the file has")
    masks = {name.removeprefix(MASK): tensors.pop(name) for name in list(tensors) if name.startswith(MASK)}
    state = PackedState(tensors, layouts, masks, dict(header.get("extra", {})))
    # The trial copy is packed first: where that fails, the caller's model has not been touched.
    trial = clean_copy(inner)
    fill(trial, state, hold_all=True)
    trial.train(inner.training)
    try:
        packed = pack(trial, inputs, train=saved_for_training if train is None else train, backend=backend)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("example_input:"):
            raise
        raise ValueError(
            f"path: {os.fspath(path)!r} names inputs that the model does not take ({error})"
        ) from error
    settle_parametrizations(inner)
    fill(inner, state)
    return packed
