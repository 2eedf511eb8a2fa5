"""Arguments of a call: brought into one form, and compared with those that a graph was made for.

A graph keeps what the tracer saw of arguments that are no tensors. So whoever runs one compares them, by type
and value, in whatever nest they come; sizes of tensors are another matter (``dsprune.graph.Limits``).
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

__all__ = ["Signature", "describe", "form_of", "noise_like", "own_tensors", "tensors_of"]

CONSTANTS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Size,
    enum.Enum,
    slice,
    range,
)


class Signature:
    """The parameters of a ``forward``: brings every way of passing the same arguments into one."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        found = inspect.signature(forward).parameters.values()
        kinds = inspect.Parameter
        self.names = [p.name for p in found if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        self.only_positional = {p.name for p in found if p.kind is kinds.POSITIONAL_ONLY}
        self.only_keyword = [p.name for p in found if p.kind is kinds.KEYWORD_ONLY]
        self.defaults = {p.name: p.default for p in found if p.default is not kinds.empty}
        self.more = next((p.name for p in found if p.kind is kinds.VAR_POSITIONAL), None)
        self.others = next((p.name for p in found if p.kind is kinds.VAR_KEYWORD), None)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(positional, keyword) arguments that mean the same: by position what can be, in the signature's
        order, without defaults at the end.

        Raises TypeError, as Python does, for arguments that do not fit.
        """
        if len(args) > len(self.names) and self.more is None:
            raise TypeError(
                f"forward: takes {len(self.names)} positional arguments ({', '.join(self.names)}), "
                f"{len(args)} were given"
            )
        left = dict(kwargs)
        values = list(args)
        for place, name in enumerate(self.names):
            if place < len(args):
                if name in left and not (name in self.only_positional and self.others is not None):
                    raise TypeError(f"{name}: given by position and by name")
            elif name in left and name not in self.only_positional:
                values.append(left.pop(name))
            elif name in self.defaults:
                values.append(self.defaults[name])
            else:
                raise TypeError(f"{name}: the argument is missing; forward takes {', '.join(self.names)}")
        while 0 < len(values) <= len(self.names) and self._is_default(
            self.names[len(values) - 1], values[-1]
        ):
            values.pop()
        named = {name: left.pop(name) for name in self.only_keyword if name in left}
        missing = [name for name in self.only_keyword if name not in named and name not in self.defaults]
        if missing:
            raise TypeError(f"{missing[0]}: the keyword argument is missing")
        if left and self.others is None:
            raise TypeError(f"{next(iter(left))}: forward has no such argument")
        kept = {name: value for name, value in named.items() if not self._is_default(name, value)}
        return tuple(values), kept | left

    def _is_default(self, name: str, value: Any) -> bool:
        if name not in self.defaults:
            return False
        default = self.defaults[name]
        if value is default:
            return True
        return type(value) is type(default) and type(value) in (bool, int, str) and bool(value == default)

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """What ``bind`` gave, by parameter: ``*args`` as a tuple, ``**kwargs`` as a dictionary."""
        out = dict(zip(self.names, args, strict=False))
        if self.more is not None and len(args) > len(self.names):
            out[self.more] = tuple(args[len(self.names) :])
        own = {name: kwargs[name] for name in self.only_keyword if name in kwargs}
        others = {name: value for name, value in kwargs.items() if name not in own}
        return out | own | ({self.others: others} if self.others is not None and others else {})


def _leaf_form(value: Any, weights: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and (
            value.dtype == weights or torch.is_autocast_enabled(value.device.type)
        ):
            return "weights' dtype"  # stays when the network changes its own
        return value.dtype
    if not isinstance(value, CONSTANTS):
        raise TypeError(
            "forward: expected tensors, numbers, strings and the like, also in tuples, lists and "
            f"dictionaries, got {type(value).__module__}.{type(value).__qualname__}"
        )
    return type(value), repr(value)


def form_of(args: Sequence[Any], kwargs: Mapping[str, Any], weights: torch.dtype | None) -> tuple[Any, Any]:
    """What a graph depends on besides sizes, hashable, and the flat arguments.

    That is: how they are nested, type and value of those that are no tensors (``True``, ``1`` and ``1.0`` are
    three), the dtypes of tensors. ``weights``: the network's own dtype, which a graph does not depend on.

    Raises TypeError where there is no tensor, or an argument of a type that cannot be compared.
    """
    if not kwargs and all(isinstance(value, torch.Tensor) for value in args):
        leaves, nest = list(args), ""
    else:
        leaves, spec = tree_flatten((tuple(args), dict(kwargs)))
        nest = repr(spec)
    form = tuple(_leaf_form(leaf, weights) for leaf in leaves)
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise TypeError(f"forward: expected a tensor among the arguments, got {describe(args, kwargs)}")
    return (nest, form), leaves


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors in any nest, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def own_tensors(value: Any) -> Any:
    """The same nest with copies of its tensors: a forward pass may write into its arguments."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def noise_like(value: Any) -> Any:
    """The same nest with noise in the place of floating tensors, the same in every call."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    return tree_map_only(torch.Tensor, noise, value)


def describe(args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Arguments in a message: tensors by dtype and shape."""

    class Shown:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.text = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

        def __repr__(self) -> str:
            return self.text

    shown = tree_map_only(torch.Tensor, Shown, (tuple(args), dict(kwargs or {})))
    return ", ".join([repr(v) for v in shown[0]] + [f"{name}={v!r}" for name, v in shown[1].items()])
