"""Whether one call may stand in for a network's layers, and whether what it was made from still holds."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dsp_kernels._library import transforming
from dsp_kernels._written import listen, storage_of

__all__ = ["Watch"]

_version = operator.attrgetter("_version")


class Watch:
    """Watches the layers, weights and hooks of a network for those who run it in one call.

    It is asked before each call, and a long call before has emptied the caches: loops are in C and touch
    little. An optimizer's step is seen, also a fused one's, which torch does not count as a write. Writing
    weights through ``.data``, NumPy or DLPack goes unseen until :func:`dsp_kernels._written.written` is told,
    and so does writing a packed layer's plan.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._known = False
        # What each name stood for: layers, parameters and buffers, None where there was none.
        self._owners: tuple[dict[str, Any], ...] = ()
        self._names: tuple[str, ...] = ()
        self._things: tuple[Any, ...] = ()
        self._weights: list[torch.Tensor] = []
        self._versions: tuple[int, ...] = ()
        self._uncounted = False
        self._storages: set[int] = set()
        self._hooks: list[Any] = []
        listen(self._written)

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, (self._network,)  # a copy has yet to look

    def _written(self, storages: set[int]) -> None:
        if not storages.isdisjoint(self._storages):
            self._known = False

    def changed(self) -> bool:
        """Whether layers or weights are others than at the last call of this method; True at the first.

        Within a transform, whose weights may be no tensors in memory, nothing is found out.
        """
        if transforming():
            return False
        if (
            self._known
            and all(map(operator.is_, map(dict.get, self._owners, self._names), self._things))
            and (self._uncounted or tuple(map(_version, self._weights)) == self._versions)
        ):
            return False
        modules = list(self._network.modules())
        entries = [
            (owner, name, thing)
            for module in modules
            for owner in (module._modules, module._parameters, module._buffers)
            for name, thing in owner.items()
            if name != "blank"  # a packed layer's: moves with its plan
        ]
        self._owners, self._names, self._things = zip(*entries, strict=True) if entries else ((), (), ())
        tensors = [thing for thing in self._things if isinstance(thing, torch.Tensor)]
        self._weights = [tensor for tensor in tensors if tensor.is_floating_point()]
        self._uncounted = any(tensor.is_inference() for tensor in self._weights)
        self._versions = () if self._uncounted else tuple(map(_version, self._weights))
        self._storages = set(map(storage_of, self._weights))
        self._hooks = [m._forward_hooks for m in modules] + [m._forward_pre_hooks for m in modules]
        self._hooks += [torch.nn.modules.module._global_forward_hooks]
        self._hooks += [torch.nn.modules.module._global_forward_pre_hooks]
        self._known = True
        return True

    def refuses(self, x: torch.Tensor, *others: torch.Tensor) -> str | None:
        """Why a call with these tensors must go through the layers; None where nobody would see the
        difference. Goes by what ``changed`` has found.
        """
        if transforming():
            return "forward-mode derivatives or a transform of torch.func may be wanted"
        if self._uncounted:
            return "weights made in inference mode do not tell when they are written"
        if torch.is_grad_enabled() and (
            x.requires_grad
            or any(w.requires_grad for w in self._weights)
            or any(o.requires_grad for o in others)
        ):
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
