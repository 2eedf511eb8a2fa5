"""What the launchers of the GPU kernels share: copies to the device, counting launches, and operators over
the layers of a network.

Nothing here waits for the device. Addresses and step lengths go up through pinned memory where they have
changed, else what is on the device is used again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .arguments import check_layers
from .plan import Layer, Plan

__all__ = [
    "DTYPES",
    "count_launches",
    "forget",
    "group_lasso",
    "group_lasso_backward",
    "group_lasso_hessian",
    "is_plain",
    "like",
    "note",
    "remembered",
    "rows_contiguous",
    "upload",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take as weights."""

_REMEMBERED = 16
_lock = threading.Lock()
_networks: dict[Any, Any] = {}
_watchers: list[list[str]] = []
_captured: list[Tensor] = []


@contextlib.contextmanager
def count_launches() -> Iterator[list[str]]:
    """Collects the names of the kernels launched, and "copy" for each copy to the device, in a list."""
    seen: list[str] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def note(name: str) -> None:
    """Tells :func:`count_launches` of one launch."""
    for seen in _watchers:
        seen.append(name)


def upload(values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of host numbers on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    note("copy")
    if device.type != "cuda":
        return host.to(device)
    host = host.pin_memory()
    if capturing():
        _captured.append(host)  # every replay of the graph reads it
    return host.to(device, non_blocking=True)


def capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True)
class _Kept:
    """A value, and where it lies on a CUDA device: the stream that fills it, and when that is done."""

    value: Any
    stream: int = 0
    event: Any = None


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, tuple) else vars(value).values() if isinstance(value, Plan) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def remembered(
    store: dict[Any, Any], key: Any, make: Callable[[], Any], device: torch.device | None = None
) -> Any:
    """``store[key]``, made where it is missing; the least recently used of ``_REMEMBERED`` goes.

    ``device``: where the value's tensors are filled by work of the current stream. Another stream that takes
    the value waits for that work.
    """
    stream = torch.cuda.current_stream(device) if device is not None and device.type == "cuda" else None
    with _lock:
        kept: _Kept | None = store.pop(key, None)
        if kept is not None:
            store[key] = kept
    if kept is not None:
        if stream is not None and stream.cuda_stream != kept.stream and not capturing():
            # A capture is preceded by a synchronisation, and may not wait for what lies outside of it.
            stream.wait_event(kept.event)
            for tensor in _tensors(kept.value):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
        return kept.value
    value = make()
    # What is made while a graph is captured gets its contents only when the graph runs.
    if not capturing():
        made = _Kept(value) if stream is None else _Kept(value, stream.cuda_stream, stream.record_event())
        with _lock:
            store[key] = made
            while len(store) > _REMEMBERED:
                del store[next(iter(store))]
    return value


def forget() -> None:
    """Drops all networks that are kept."""
    with _lock:
        _networks.clear()


def is_plain(weight: Tensor) -> bool:
    """Whether the kernels read the tensor as it lies: contiguous, or channels last."""
    if weight.dtype not in DTYPES:
        return False
    return weight.is_contiguous() or (
        weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """``tensor`` with the dtype and memory order of a plain ``weight``, copied where it must be."""
    tensor = tensor.to(weight.dtype)
    if weight.is_contiguous():
        return tensor.contiguous()
    return tensor.contiguous(memory_format=torch.channels_last)


def rows_contiguous(tensor: Tensor) -> Tensor:
    """A matrix with its rows contiguous."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


# ---- the operators


def _parts(weights: Sequence[Tensor], logs: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the layers that one launch takes: of one dtype and one number of groups."""
    found: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, (weight, log) in enumerate(zip(weights, logs, strict=True)):
        found.setdefault((log.shape[0], weight.dtype), []).append(index)
    return list(found.values())


def _plain(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight if is_plain(weight) else weight.contiguous() for weight in weights]


def _network(
    kind: Callable[..., Any],
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
    picked: Sequence[int],
) -> tuple[Any, list[Tensor], Tensor]:
    own = [weights[index] for index in picked]
    groups, factors = logs[picked[0]].shape[0], [scales[index] for index in picked]
    key = (kind, tuple(map(Layer.of, own)), groups, own[0].dtype, own[0].device, tuple(factors))
    network = remembered(_networks, key, lambda: kind(own, groups, factors))
    return network, own, torch.cat([logs[index] for index in picked], 1)


def _split(matrix: Tensor, offsets: Sequence[int]) -> list[Tensor]:
    """The columns of each layer, copied: an operator's results share no memory."""
    sizes = [end - begin for begin, end in pairwise(offsets)]
    copied: Any = torch.split_with_sizes_copy
    parts = copied(matrix, sizes, dim=1)
    return [part.contiguous() for part in parts]


def _index(picked: Sequence[int], total: int, values: Tensor) -> Tensor:
    return values if len(picked) == total else values[list(picked)]


def group_lasso(
    kind: Callable[..., Any], weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.group_lasso`; ``kind`` is the backend's ``Network``."""
    check_layers(weights, logs, scales)
    plain = _plain(weights)
    parts = _parts(plain, logs)
    results = []
    for picked in parts:
        network, own, matrix = _network(kind, plain, logs, scales, picked)
        results.append(network.penalties(own, matrix))
    return _joined(parts, results)


def _joined(parts: Sequence[Sequence[int]], results: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return results[0]
    order = [index for picked in parts for index in picked]
    out = torch.empty(len(order), dtype=results[0].dtype, device=results[0].device)
    for picked, values in zip(parts, results, strict=True):
        for place, index in enumerate(picked):
            out[index] = values[place]
    return out


def group_lasso_backward(
    kind: Callable[..., Any],
    grad: Tensor,
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_backward`."""
    check_layers(weights, logs, scales, grad)
    plain = _plain(weights)
    outs = [torch.empty_like(weight) for weight in plain]
    log_outs: list[Tensor] = list(logs)
    for picked in _parts(plain, logs):
        network, own, matrix = _network(kind, plain, logs, scales, picked)
        amounts = _index(picked, len(plain), grad).to(network.dtype).contiguous()
        out = network.backward(own, matrix, amounts, [outs[i] for i in picked])
        for index, part in zip(picked, _split(out, network.offsets), strict=True):
            log_outs[index] = part
    return outs + log_outs


def group_lasso_hessian(
    kind: Callable[..., Any],
    grad: Tensor,
    weight_directions: Sequence[Tensor],
    log_directions: Sequence[Tensor],
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_hessian`."""
    check_layers(weights, logs, scales, grad, weight_directions, log_directions)
    plain = _plain(weights)
    outs = [torch.empty_like(weight) for weight in plain]
    log_outs: list[Tensor] = list(logs)
    parts = _parts(plain, logs)
    for_grad = []
    for picked in parts:
        network, own, matrix = _network(kind, plain, logs, scales, picked)
        directions = [like(weight_directions[i], plain[i]) for i in picked]
        towards = torch.cat([log_directions[i] for i in picked], 1)
        amounts = _index(picked, len(plain), grad).to(network.dtype).contiguous()
        values, out = network.hessian(own, matrix, amounts, directions, towards, [outs[i] for i in picked])
        for_grad.append(values)
        for index, part in zip(picked, _split(out, network.offsets), strict=True):
            log_outs[index] = part
    return [_joined(parts, for_grad).to(grad.dtype), *outs, *log_outs]
