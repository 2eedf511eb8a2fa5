"""What is kept of plans and weights for the kernels that run on a GPU, Triton's and the compiled ones.

A plan on a GPU is read once, at first use. A weight is laid out at each call where its gradient is wanted,
once for each of its versions where it is not (``requires_grad`` is off, or gradients are), and kept for the
last few tables. An optimizer's step is seen, whether or not it counts as a version; what else writes past the
version counter (``weight.data``) is not, until a call that wants the gradient comes between or
:func:`dsp_kernels._written.written` is told.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._kept import Kept
from .._written import listen
from ..layout import GroupLayout, decode

__all__ = [
    "FORMS",
    "capturing",
    "forget",
    "layout_of",
    "precision_of",
    "prepared_weight",
    "record",
    "recording",
    "refuse_capture",
]

FORMS = 4  # laid out copies that are kept of one weight, each for a table of its own

_layouts: Kept[Any, Any] = Kept(1024)
_weights: Kept[Any, Any] = Kept(1024)


def _written(storages: set[int]) -> None:
    _weights.drop(lambda value: not storages.isdisjoint(p.storage.cdata for p in value))


listen(_written)


def forget() -> None:
    """Drops all layouts and weights that are kept."""
    _layouts.clear()
    _weights.clear()


def _identity(tensor: Tensor) -> tuple[Any, ...] | None:
    """What tells a tensor's content from any other's while its storage lives; None for one without version.

    The storage's own address stays taken for as long as a :class:`StorageWeakRef` to it is kept beside.
    """
    if tensor.is_inference():
        return None
    storage = tensor.untyped_storage()
    return (storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.stride(0), tensor._version)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, what: str) -> None:
    if capturing(device):
        raise RuntimeError(
            f"the convolution meets {what} for the first time inside a CUDA graph's capture: call it "
            "once with the same shapes before capturing"
        )


def layout_of(plan: Tensor) -> GroupLayout:
    """The layout of a plan; waits for the device once if the plan is on one."""
    key = _identity(plan)
    if key is None:
        if plan.device.type == "cpu":
            return decode(plan)
        key = (plan.untyped_storage()._cdata, plan.storage_offset(), plan.numel(), plan.stride(0), -1)
    found = _layouts.get(key)
    if found is None or found[0].expired():
        refuse_capture(plan.device, "a plan")
        _layouts.drop(lambda value: value[0].expired())
        found = _layouts.put(key, (StorageWeakRef(plan.untyped_storage()), decode(plan)))
    return found[1]


def precision_of(x: Tensor) -> str:
    """The launch table's word for how ``x`` is multiplied: "half", "tf32" or "ieee"."""
    if x.dtype != torch.float32:
        return "half"
    allowed = x.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


_recorded: ContextVar[list[Tensor] | None] = ContextVar("dsp_kernels_recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """The list of what calls inside, on this thread, read of the tables and weights that are kept. A CUDA
    graph knows their addresses alone: they must outlive it, whatever is forgotten here.
    """
    held: list[Tensor] = []
    token = _recorded.set(held)
    try:
        yield held
    finally:
        _recorded.reset(token)


def record(*tensors: Tensor) -> None:
    """Notes that a call reads these, which are kept beyond it."""
    held = _recorded.get()
    if held is not None:
        held.extend(tensors)


@dataclass(frozen=True)
class _Prepared:
    """A weight as the kernels read it, made for ``table`` at a version, and the stream that filled it. The
    table is not held: a weight laid out for one that was dropped is dropped in turn.
    """

    storage: StorageWeakRef
    version: int
    table: weakref.ref[Tensor]
    laid_out: Tensor
    stream: int
    event: Any


def prepared_weight(weight: Tensor, table: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, the contiguous ``weight`` laid out for ``table``; see the module's text for when it is
    kept, which the last few are for each weight.
    """
    identity = _identity(weight)
    if identity is None:
        return make()
    *where, version = identity
    key = (*where, weight.dtype)
    if weight.requires_grad:
        # Training. An update through ``.data`` leaves the version as it is, so what evaluation kept goes.
        _weights.pop(key, None)
        return make()
    device = weight.device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    handle = 0 if stream is None else stream.cuda_stream
    kept: tuple[_Prepared, ...] = _weights.get(key) or ()
    kept = tuple(
        p for p in kept if p.version == version and not p.storage.expired() and p.table() is not None
    )
    for found in kept:
        if found.table() is table:
            if found is not kept[-1]:
                _weights.put(key, (*(p for p in kept if p is not found), found))
            if stream is not None and found.stream != handle and not capturing(device):
                # A capture is preceded by a synchronisation, and may not wait for what lies outside of it.
                stream.wait_event(found.event)
                found.laid_out.record_stream(stream)
            record(found.laid_out)
            return found.laid_out
    out = make()
    if capturing(device):
        return out  # filled when the graph runs, not now
    _weights.drop(lambda value: value[0].storage.expired())
    event = None if stream is None else stream.record_event()
    storage = StorageWeakRef(weight.untyped_storage())
    made = _Prepared(storage, version, weakref.ref(table), out, handle, event)
    _weights.put(key, (*kept[1 - FORMS :], made))
    record(out)
    return out
