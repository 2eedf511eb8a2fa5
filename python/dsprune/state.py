"""What a forward pass changes in a model besides its result: found, and brought back.

Networks count calls, keep anchors by image size, or write into their buffers. A trial run, or an attempt to
export, leaves none of that behind.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["State", "containers_in", "preserved", "tensors_in", "where_changed"]

CONTAINERS = (dict, list, set, deque)
# Objects that are looked into no further: classes, functions and the like, and what others own.
CLOSED = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
FOREIGN = {"torch", "numpy", "logging", "threading", "functools", "weakref", "types", "builtins", "inspect"}


def _open(value: Any) -> bool:
    """Whether an object's attributes are part of a model's state."""
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, (*CLOSED, torch.Tensor)) or not hasattr(value, "__dict__"):
        return False
    return type(value).__module__.partition(".")[0] not in FOREIGN


class _Walk:
    """The attribute dictionaries, containers and tensors that a model holds, each once, with names."""

    def __init__(self, model: Any) -> None:
        self.attributes: list[tuple[str, Any]] = []
        self.containers: list[tuple[str, Any]] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        seen: set[int] = set()
        queue: list[tuple[str, Any]] = [("", model)]
        while queue:
            name, value = queue.pop()
            if id(value) in seen:
                continue
            if isinstance(value, torch.Tensor):
                self.tensors.append((name, value))
            elif isinstance(value, (*CONTAINERS, tuple)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                if not isinstance(value, tuple):
                    self.containers.append((name, value))
                # The tables of a module have its names: parameters, buffers, layers.
                prefix = name.rpartition(".")[0] if _is_table(name) else name
                queue += [(f"{prefix}.{key}".lstrip("."), item) for key, item in items]
            elif _open(value):
                self.attributes.append((name, value))
                queue += [(f"{name}.{key}".lstrip("."), item) for key, item in vars(value).items()]
            else:
                continue
            seen.add(id(value))


def tensors_in(model: nn.Module) -> list[torch.Tensor]:
    """All tensors that a model holds: parameters, buffers, and those in attributes and containers."""
    return [tensor for _, tensor in _Walk(model).tensors]


def containers_in(value: Any) -> list[tuple[str, Any, Any]]:
    """The dictionaries, lists and sets in arguments, by name, each with a copy of it."""
    return [(name, thing, thing.copy()) for name, thing in _Walk(value).containers]


def where_changed(containers: list[tuple[str, Any, Any]]) -> str | None:
    """The name of an entry that is not as it was when ``containers_in`` looked; None where all are."""
    for name, thing, before in containers:
        key = _difference(before, thing)
        if key is not None:
            return f"{name}.{key}".lstrip(".")
    return None


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, torch.Tensor):
        return False
    try:
        return bool(a == b)
    except Exception:  # what cannot be compared has been changed
        return False


def _difference(before: Any, now: Any, tensors: bool = True) -> Any:
    """Where two containers of one kind differ: a key, an index; None where they do not."""
    if isinstance(before, set):
        return None if before == now else ""
    if not isinstance(before, dict):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    for key in {**before, **now}:
        if key not in before or key not in now:
            return key
        if not _same(before[key], now[key]) and (tensors or not isinstance(before[key], torch.Tensor)):
            return key
    return None


def _is_table(name: str) -> bool:
    """Whether a container of this name holds a module's parameters, buffers or layers."""
    return name.rpartition(".")[2] in ("_parameters", "_buffers", "_modules")


class State:
    """A model's state at one time: attributes, containers in them, and the values of buffers and other
    tensors; those of parameters on demand (a copy), else no more than which memory they are in.
    """

    def __init__(self, model: nn.Module, parameters: bool = False) -> None:
        walk = _Walk(model)
        self._attributes = [(name, thing, dict(vars(thing))) for name, thing in walk.attributes]
        self._containers = [(name, thing, thing.copy()) for name, thing in walk.containers]
        self._values = [
            (name, tensor, _copy(tensor))
            for name, tensor in walk.tensors
            if parameters or not isinstance(tensor, nn.Parameter)
        ]
        self._memory = [
            (tensor, tensor.data) for _, tensor in walk.tensors if isinstance(tensor, nn.Parameter)
        ]

    def changed(self, tensors: bool = True) -> str | None:
        """The name of something that is not as it was; None where all is. ``tensors=False``: besides the
        values of tensors and what modules hold as parameters and buffers, for which a tracer puts its own.
        """
        for name, thing, before in (*self._attributes, *self._containers):
            now = vars(thing) if isinstance(before, dict) and not isinstance(thing, dict) else thing
            key = _difference(before, now, tensors or not _is_table(name))
            if key is not None:
                return f"{name}.{key}".lstrip(".")
        for name, tensor, value in self._values:
            if tensors and not _equal(tensor, value):
                return name
        return None

    def restore(self) -> None:
        """Brings everything back that is not as it was."""
        for _, thing, attributes in self._attributes:
            now = vars(thing)
            if now.keys() != attributes.keys() or any(now[k] is not v for k, v in attributes.items()):
                now.clear()
                now.update(attributes)
        for _, thing, before in self._containers:
            if _difference(before, thing) is None:
                continue
            thing.clear()
            if isinstance(thing, (dict, set)):
                thing.update(before)
            else:
                thing.extend(before)
        for parameter, memory in self._memory:
            if parameter.data_ptr() != memory.data_ptr() or parameter.shape != memory.shape:
                parameter.data = memory
        with torch.no_grad():
            for _, tensor, value in self._values:
                if tensor.shape != value.shape:
                    tensor.data = value
                elif not _equal(tensor, value):
                    tensor.copy_(value)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy; what is seen many times through strides of zero (a network without its weights) stays one."""
    once = tensor.detach()
    if once.layout is torch.strided:
        for dim, stride in enumerate(once.stride()):
            if stride == 0 and once.shape[dim] > 1:
                once = once.narrow(dim, 0, 1)
    return once.clone().expand(tensor.shape)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.equal(b) or bool(((a == b) | ((a != a) & (b != b))).all())  # NaN is as it was


@contextmanager
def preserved(model: nn.Module, parameters: bool = False) -> Iterator[State]:
    """The model's state is, after the block, what it was before: see :class:`State`."""
    state = State(model, parameters)
    try:
        yield state
    finally:
        state.restore()
