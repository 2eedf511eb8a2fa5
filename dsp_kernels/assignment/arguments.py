"""What the rooms check of an operator's tensors before they take addresses: the operators can be called past
``group_lasso``, which checks its own arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .reference import accumulation_dtype

__all__ = ["check_layers"]


def _refuse(name: str, wanted: object, found: object) -> None:
    raise ValueError(f"{name}: expected {wanted}, got {found}")


def _check_list(name: str, values: Sequence[object] | None, count: int) -> None:
    if values is not None and len(values) != count:
        _refuse(f"{name}: number of layers", count, len(values))


def check_layers(
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
    grad: Tensor | None = None,
    weight_directions: Sequence[Tensor] | None = None,
    log_directions: Sequence[Tensor] | None = None,
) -> None:
    """ValueError where numbers, shapes, dtypes or devices do not fit the weights.

    Directions of weights may have any dtype; whoever reads them casts them. Layers may differ in their number
    of groups.
    """
    count = len(weights)
    if count == 0:
        _refuse("weights", "at least one layer", "none")
    _check_list("log_probabilities", logs, count)
    _check_list("scales", scales, count)
    _check_list("weight_directions", weight_directions, count)
    _check_list("log_directions", log_directions, count)
    device, dtype = weights[0].device, accumulation_dtype(weights[0].dtype)
    if grad is not None and grad.shape != (count,):
        _refuse("grad: shape", (count,), tuple(grad.shape))
    if grad is not None and grad.device != device:
        _refuse("grad: device", device, grad.device)
    for index, (weight, log) in enumerate(zip(weights, logs, strict=True)):
        # Nothing is worded before it is refused: this runs in every call.
        shape, log_shape = weight.shape, log.shape
        if not weight.is_floating_point() or len(shape) < 2 or 0 in shape:
            wanted = "a filled floating-point (filters, channels, ...) tensor"
            _refuse(f"weights[{index}]", wanted, f"{weight.dtype} of shape {tuple(shape)}")
        if accumulation_dtype(weight.dtype) != dtype:
            _refuse(f"weights[{index}]: accumulation dtype", dtype, weight.dtype)
        if weight.device != device:
            _refuse(f"weights[{index}]: device", device, weight.device)
        if len(log_shape) != 2 or log_shape[0] == 0 or log_shape[1] != shape[0]:
            _refuse(f"log_probabilities[{index}]: shape", f"(groups, {shape[0]})", tuple(log_shape))
        if log.dtype != dtype:
            _refuse(f"log_probabilities[{index}]: dtype", dtype, log.dtype)
        if log.device != device:
            _refuse(f"log_probabilities[{index}]: device", device, log.device)
        if weight_directions is not None:
            towards = weight_directions[index]
            if towards.shape != shape:
                _refuse(f"weight_directions[{index}]: shape", tuple(shape), tuple(towards.shape))
            if towards.device != device:
                _refuse(f"weight_directions[{index}]: device", device, towards.device)
        if log_directions is not None:
            towards = log_directions[index]
            if towards.shape != log_shape:
                _refuse(f"log_directions[{index}]: shape", tuple(log_shape), tuple(towards.shape))
            if towards.dtype != dtype:
                _refuse(f"log_directions[{index}]: dtype", dtype, towards.dtype)
            if towards.device != device:
                _refuse(f"log_directions[{index}]: device", device, towards.device)
