"""Packed networks on disk: one safetensors file with a JSON header, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsp_kernels import GroupLayout

from .files import parse_json, read_tensors, tensors_to_bytes
from .graph import clean_copy, unwrap
from .inputs import tensors_of
from .masks import settle_parametrizations
from .pack import PackedNetwork, PackedState, fill, pack

__all__ = ["load", "save", "write_atomically"]

FORMAT = "dsprune-packed"
VERSION = 2
UNSIGNED = 1  # the version before, without a SHA-256: still read
# Example inputs are made again to load a file: of large ones fewer images, as a network takes any number.
ALL_ELEMENTS = 1 << 27  # of an input that a file names
MOST_ELEMENTS = 1 << 24  # of one that is made
FEW_ELEMENTS = 1 << 20  # with fewer elements than that all images are made
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
            if math.prod(shape) > ALL_ELEMENTS or math.prod(_fewer([list(shape)])[0]) > MOST_ELEMENTS:
                raise ValueError(
                    f"packed: was packed for an input of the shape {tuple(shape)}, more than {ALL_ELEMENTS} "
                    f"elements, or {MOST_ELEMENTS} in two images; pack for smaller ones, others run too"
                )
            inputs.append({"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")})
        elif shape is None or (isinstance(shape, (bool, int, float, str)) and _is_json(shape)):
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
    named = state.tensors | {f"{MASK}{name}": mask for name, mask in state.masks.items()}
    write_atomically(path, tensors_to_bytes(named, FORMAT, header))


def _is_json(value: Any) -> bool:
    """Whether a value comes back from JSON as it is."""
    try:
        return repr(parse_json(json.dumps(value))) == repr(value)
    except (TypeError, ValueError):
        return False


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"path: no file at {name!r}")
    try:
        tensors, header = read_tensors(name, FORMAT, ("version", VERSION), UNSIGNED)
    except KeyError:
        raise ValueError(f"path: {name!r} was not written by dsprune.save") from None
    except ValueError as error:
        raise ValueError(f"path: {name!r} has {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"path: {name!r} has a header of another format")
    return header, tensors


def _layouts(header: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, GroupLayout]:
    """The layouts in a header; their sizes are the model's before anything is made of them. LookupError for a
    layer that the model lacks.
    """
    layouts = {}
    for name, value in header["layouts"].items():
        conv = modules.get(name)
        if not isinstance(conv, nn.Conv2d):
            raise LookupError(f"model: has no Conv2d {name!r}")
        for key in ("in_channels", "out_channels"):
            own = getattr(conv, key)
            if type(value[key]) is not int or value[key] != own:
                raise ValueError(f"{key} {value[key]!r} for {name!r}, which has {own}")
        groups = value["groups"]
        if not isinstance(groups, list) or len(groups) > conv.out_channels:
            raise ValueError(f"other than a list of at most {conv.out_channels} groups for {name!r}")
        layouts[name] = GroupLayout.from_json(value)
    return layouts


def _fewer(shapes: list[list[int]]) -> list[list[int]]:
    """Shapes of example inputs with fewer images where they have many elements; two at least."""
    largest = max(shapes, key=math.prod, default=[])
    if not largest or largest[0] <= 2 or math.prod(largest) <= FEW_ELEMENTS:
        return shapes
    images = max(2, FEW_ELEMENTS // math.prod(largest[1:]))
    return [[images, *shape[1:]] if shape[:1] == largest[:1] else shape for shape in shapes]


def _examples(inputs: Any, device: torch.device, *, whole: bool) -> tuple[Any, ...]:
    """The example inputs that a file's header names; ``whole``: with all their images."""
    generator = torch.Generator().manual_seed(0)
    out: list[Any] = []
    shapes = []
    for entry in inputs:
        if not isinstance(entry, Mapping):
            raise ValueError(f"an input that is no entry: {entry!r}")
        if "shape" in entry:
            shape = entry["shape"]
            if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"an input of the shape {shape!r}")
            if math.prod(shape) > ALL_ELEMENTS:
                raise ValueError(f"an input of the shape {shape!r}, more than {ALL_ELEMENTS} elements")
            shapes.append(shape)
    chosen = iter(shapes if whole else _fewer(shapes))
    for entry in inputs:
        if "shape" not in entry:
            out.append(entry["value"])
            continue
        dtype = getattr(torch, str(entry["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"an input of the unknown dtype {entry['dtype']!r}")
        shape = next(chosen)
        if math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"an input of the shape {shape!r}, more than {MOST_ELEMENTS} elements")
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
        FileNotFoundError: no such file. ValueError: truncated, damaged, of another format or version, with a
            header that is broken or states other sizes than the model's, or not for this architecture or its
            precision; ``train`` or ``backend`` as for ``pack``. TypeError: ``model`` is no module. PackError:
            the network does not compute what the dense one does. ``model`` is left as it was.
    """
    inner = unwrap(model)
    header, tensors = _read(path)
    try:
        layouts = _layouts(header, dict(inner.named_modules(remove_duplicate=False)))
        weights = next((p for p in inner.parameters()), None)
        device = weights.device if weights is not None else torch.device("cpu")
        inputs = _examples(header["inputs"], device, whole=False)
        saved_for_training, extra = header["train"], header.get("extra", {})
        if not isinstance(saved_for_training, bool):
            raise ValueError(f"train is {saved_for_training!r}")
        if not isinstance(extra, dict):
            raise ValueError(f"extra is a {type(extra).__name__}")
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"path: {os.fspath(path)!r} has an incomplete header ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)!r} has a broken header ({error})") from error
    except LookupError as error:
        raise ValueError(f"{error}, which {os.fspath(path)!r} has") from None
    masks = {name.removeprefix(MASK): tensors.pop(name) for name in list(tensors) if name.startswith(MASK)}
    state = PackedState(tensors, layouts, masks, extra)
    # The trial copy is packed first: where that fails, the caller's model has not been touched.
    trial = clean_copy(inner)
    try:
        fill(trial, state, hold_all=True)
    except ValueError as error:
        raise ValueError(f"{error} (path: {os.fspath(path)!r})") from error
    trial.train(inner.training)
    training = saved_for_training if train is None else train
    try:
        try:
            packed = pack(trial, inputs, train=training, backend=backend)
        except ValueError:  # its batch may be a constant
            all_images = _examples(header["inputs"], device, whole=True)
            if [v.shape for v in tensors_of(all_images)] == [v.shape for v in tensors_of(inputs)]:
                raise
            packed = pack(trial, all_images, train=training, backend=backend)
    except (TypeError, ValueError) as error:
        if not str(error).startswith(("example_input:", "an input of")):
            raise
        raise ValueError(
            f"path: {os.fspath(path)!r} names inputs that the model does not take ({error})"
        ) from error
    given = [tuple(entry["shape"]) if "shape" in entry else entry["value"] for entry in header["inputs"]]
    packed.example_shapes = given[: len(packed.example_dtypes)]
    settle_parametrizations(inner)
    fill(inner, state)
    return packed
