"""Whether one call may stand in for a network's layers, and whether what it was made from still holds."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .nn import PermutedGroupedConv2d

__all__ = ["Watch"]

_version = operator.attrgetter("_version")


class Watch:
    """Watches the weights and hooks of a network for those who run it in one call.

    It is asked before each call, and a long call before has emptied the caches: loops are in C and touch
    little. Writing weights through ``.data`` goes unseen, and so does writing what packed layers derive from
    their layouts.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._owners: tuple[dict[str, Any], ...] = ()
        self._names: tuple[str, ...] = ()
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._counted: tuple[torch.Tensor, ...] = ()  # tensors of inference mode have no version
        self._versions: tuple[int, ...] = ()
        modules = list(network.modules())
        self._hooks: list[Any] = [m._forward_hooks for m in modules] + [m._forward_pre_hooks for m in modules]
        self._hooks += [torch.nn.modules.module._global_forward_hooks]
        self._hooks += [torch.nn.modules.module._global_forward_pre_hooks]

    def changed(self) -> bool:
        """Whether weights are others than at the last call of this method; True at the first."""
        if (
            self._tensors
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._tensors))
            and tuple(map(_version, self._counted)) == self._versions
        ):
            return False
        found = [
            (owner, name, tensor)
            for module in self._network.modules()
            for owner in (module._parameters, module._buffers)
            if not (owner is module._buffers and isinstance(module, PermutedGroupedConv2d))
            for name, tensor in owner.items()
            if tensor is not None
        ]
        self._owners, self._names, self._tensors = zip(*found, strict=True) if found else ((), (), ())
        self._counted = tuple(tensor for tensor in self._tensors if not tensor.is_inference())
        self._versions = tuple(map(_version, self._counted))
        return True

    def refuses(self, x: torch.Tensor) -> str | None:
        """Why a call with ``x`` must go through the layers; None where nobody would see the difference."""
        if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self._tensors)):
            return "gradients are wanted"
        if any(self._hooks):
            return "a layer has hooks"
        if (
            _get_current_dispatch_mode() is not None
            or torch.overrides._get_current_function_mode() is not None
        ):
            return "a torch mode wants to see every operator"
        # The first question is quick, and nearly always answered with no.
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            return "autocast is on"
        return None
