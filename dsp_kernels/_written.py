"""Who keeps something that was made from weights hears here that they were written.

Torch counts writes (``_version``), and whoever keeps something goes by that. Some writes it does not count:
fused optimizers (``torch._fused_sgd_`` and its kin), and those through ``.data``, NumPy and DLPack. Every
optimizer's step is told of here; for the rest there is :func:`written`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["listen", "stepped", "storage_of", "written"]

_lock = threading.Lock()
_listeners: list[weakref.WeakMethod[Callable[[set[int]], None]] | Callable[[], Any]] = []


def storage_of(tensor: Tensor) -> int:
    """What names a tensor's memory for as long as somebody holds the tensor."""
    return int(tensor.untyped_storage()._cdata)


def listen(heard: Callable[[set[int]], None]) -> None:
    """Has ``heard`` called with the storages that were written. A bound method does not keep its object."""
    bound = hasattr(heard, "__self__")
    with _lock:
        _listeners[:] = [reference for reference in _listeners if reference() is not None]
        _listeners.append(weakref.WeakMethod(heard) if bound else lambda: heard)


def written(tensors: Iterable[Tensor]) -> None:
    """Tells everybody that these tensors, and what shares their memory, were written."""
    with _lock:
        heard = [found for reference in _listeners if (found := reference()) is not None]
    if heard:
        storages = set(map(storage_of, tensors))
        for tell in heard:
            tell(storages)


def stepped(optimizer: Any, *_: Any) -> None:
    """The hook behind every optimizer's step: its parameters were written. Changes nothing itself."""
    if _listeners:
        written(value for group in optimizer.param_groups for value in group["params"])


register_optimizer_step_post_hook(stepped)
