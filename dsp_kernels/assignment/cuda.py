"""Hands all layers to the compiled CUDA kernels: float32, float64, bfloat16 and float16, on a CUDA device.

Runs where ``backend="cuda"`` is asked for. It has everything but the Hessian product, which goes to Triton
where that runs, else to the reference. How the work is cut is a table (``csrc/assignment/cuda_table.h``)
made once for the layers' shapes. Nothing here waits for the device once a network has been seen.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from ..backends import can_run, native_module
from . import launch as shared
from .launch import is_plain, like, remembered, rows_contiguous, upload
from .native import Operation
from .plan import ADDRESSES, Layer
from .reference import accumulation_dtype

__all__ = [
    "Network",
    "forget",
    "group_lasso",
    "group_lasso_backward",
    "group_lasso_hessian",
    "is_plain",
    "sample_groups",
    "sample_groups_backward",
]

_ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_tables: dict[Any, Any] = {}


def forget() -> None:
    """Drops all tables that are kept."""
    _tables.clear()
    shared.forget()


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's index and its current stream's handle."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _check(status: int) -> None:
    if status == 0:
        return
    text = f"the CUDA group penalty refused: {native_module().last_error()}"
    raise ValueError(text) if status == 1 else RuntimeError(text)


def _make_table(
    element: int, groups: int, layers: Sequence[Layer], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The words on the host and on the device."""
    core = native_module()
    shapes = array("q", chain(*((la.filters, la.channels, la.taps, int(la.channels_last)) for la in layers)))
    arguments = (element, groups, shapes.buffer_info()[0], len(shapes))
    status, needed = core.cuda_lasso_table(*arguments, 0, 0)
    _check(status)
    words = torch.empty(needed, dtype=torch.int64)
    status, _ = core.cuda_lasso_table(*arguments, words.data_ptr(), needed)
    _check(status)
    # From memory that is not pinned: the copy is done when this returns, for every stream.
    return words, words.to(device, copy=True)


class Network:
    """Plain weights (:func:`is_plain`) of one dtype and device, with their scales, as the kernels see them.

    As ``triton.Network``: log-probabilities are (G, N) matrices over the filters of all layers, of the
    accumulation dtype; step lengths ``rates`` are one number a layer, or a tensor (L,) of the accumulation
    dtype on the device. Launches of an operation: 3 for the penalty or a penalty step, 4 for the gradients,
    6 (with directions 8) for the gradient of a step. Raises ValueError for a kernel of more than 16 KiB.
    """

    def __init__(self, weights: Sequence[Tensor], groups: int, scales: Sequence[float]) -> None:
        self.groups = groups
        self.device = weights[0].device
        self.dtype = accumulation_dtype(weights[0].dtype)
        self.layers = tuple(map(Layer.of, weights))
        self.offsets = (0, *accumulate(layer.filters for layer in self.layers))
        self._scales = tuple(scales)
        self._numbers: dict[tuple[float, ...], Tensor] = {}
        self._bound: dict[tuple[int, ...], tuple[array[int], Tensor]] = {}
        self._sizes: dict[tuple[int, bool], int] = {}
        arguments = (_ELEMENTS[weights[0].dtype], groups, self.layers, self.device)
        self._table: tuple[Tensor, Tensor] = remembered(
            _tables, arguments, lambda: _make_table(*arguments), self.device
        )

    def numbers(self, values: Sequence[float] | Tensor) -> Tensor:
        """One number a layer, on the device.

        Raises ValueError for a tensor of another shape, dtype or device.
        """
        if isinstance(values, Tensor):
            shape = (len(self.layers),)
            if values.shape != shape or values.dtype != self.dtype or values.device != self.device:
                raise ValueError(
                    f"rates: expected {self.dtype} of shape {shape} on {self.device}, "
                    f"got {values.dtype} of shape {tuple(values.shape)} on {values.device}"
                )
            return values.contiguous()
        key = tuple(values)
        found: Tensor = remembered(
            self._numbers, key, lambda: upload(key, self.dtype, self.device), self.device
        )
        return found

    def _bind(self, *lists: Sequence[Tensor] | None) -> tuple[array[int], Tensor]:
        """The addresses of weights, directions, outputs and kept weights, on the host and on the device."""
        key = tuple(
            0 if tensors is None else tensors[index].data_ptr()
            for index in range(len(self.layers))
            for tensors in lists
        )
        assert len(key) == ADDRESSES * len(self.layers)
        found: tuple[array[int], Tensor] = remembered(
            self._bound, key, lambda: (array("q", key), upload(key, torch.int64, self.device)), self.device
        )
        return found

    def _workspace(self, operation: Operation, directed: bool) -> Tensor:
        size = self._sizes.get((operation, directed))
        if size is None:
            table = self._table[0]
            status, _, size, *_ = native_module().cuda_lasso_sizes(
                table.data_ptr(), table.numel(), operation, directed
            )
            _check(status)
            self._sizes[operation, directed] = size
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def _run(
        self,
        operation: Operation,
        weights: Sequence[Tensor],
        logs: Tensor,
        *,
        rates: Tensor | None = None,
        directions: Sequence[Tensor] | None = None,
        outs: Sequence[Tensor] | None = None,
        keeps: Sequence[Tensor] | None = None,
        log_out: Tensor | None = None,
        penalties: Tensor | None = None,
    ) -> None:
        table, device_table = self._table
        addresses, device_addresses = self._bind(weights, directions, outs, keeps)
        scales = self.numbers(self._scales)
        workspace = self._workspace(operation, directions is not None)
        _check(
            native_module().cuda_lasso_run(
                operation,
                *_stream(self.device),
                table.data_ptr(),
                table.numel(),
                device_table.data_ptr(),
                addresses.buffer_info()[0],
                len(addresses),
                device_addresses.data_ptr(),
                logs.data_ptr(),
                self._stride(logs),
                (self.groups - 1) * self._stride(logs) + logs.shape[1],
                0 if rates is None else rates.data_ptr(),
                scales.data_ptr(),
                scales.numel(),
                0 if log_out is None else log_out.data_ptr(),
                0 if log_out is None else self._stride(log_out),
                0 if log_out is None else log_out.numel(),
                0 if penalties is None else penalties.data_ptr(),
                workspace.data_ptr(),
                workspace.numel(),
            )
        )

    @staticmethod
    def _stride(matrix: Tensor) -> int:
        # A single row may carry any stride.
        return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]

    def _log_out(self) -> Tensor:
        return torch.empty((self.groups, self.offsets[-1]), dtype=self.dtype, device=self.device)

    def penalties(self, weights: Sequence[Tensor], logs: Tensor) -> Tensor:
        """The scaled penalties (L,)."""
        out = torch.empty(len(self.layers), dtype=self.dtype, device=self.device)
        self._run(Operation.PENALTY, weights, logs, penalties=out)
        return out

    def backward(
        self, weights: Sequence[Tensor], logs: Tensor, grad: Tensor, outs: Sequence[Tensor]
    ) -> Tensor:
        """amount dR/dW into ``outs``; returns amount dR/dl (G, N). amount: ``grad`` times scale."""
        out = self._log_out()
        self._run(Operation.BACKWARD, weights, logs, rates=grad, outs=outs, log_out=out)
        return out

    def shrink(
        self,
        weights: Sequence[Tensor],
        logs: Tensor,
        rates: Sequence[float] | Tensor,
        *,
        proximal: bool = False,
        keeps: Sequence[Tensor] | None = None,
    ) -> None:
        """The penalty step in place; see ``LassoTable.shrink``."""
        operation = Operation.PROXIMAL if proximal else Operation.SHRINK
        self._run(operation, weights, logs, rates=self.numbers(rates), outs=weights, keeps=keeps)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """targets <- sources, bit for bit."""
        torch._foreach_copy_(list(targets), list(sources))

    def log_gradient(
        self,
        weights: Sequence[Tensor],
        logs: Tensor,
        rates: Sequence[float] | Tensor,
        moves: Sequence[Tensor] | None,
    ) -> Tensor:
        """The gradient (G, N) after one penalty step; see ``LassoTable.log_gradient``."""
        if moves is not None:
            moves = [like(move, weight) for move, weight in zip(moves, weights, strict=True)]
        out = self._log_out()
        self._run(
            Operation.STEP_GRADIENT, weights, logs, rates=self.numbers(rates), directions=moves, log_out=out
        )
        return out


# ---- the operators


def group_lasso(weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.group_lasso`."""
    return shared.group_lasso(Network, weights, logs, scales)


def group_lasso_backward(
    grad: Tensor, weights: Sequence[Tensor], logs: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_backward`."""
    return shared.group_lasso_backward(Network, grad, weights, logs, scales)


def group_lasso_hessian(
    grad: Tensor,
    weight_directions: Sequence[Tensor],
    log_directions: Sequence[Tensor],
    weights: Sequence[Tensor],
    logs: Sequence[Tensor],
    scales: Sequence[float],
) -> list[Tensor]:
    """See :func:`dsp_kernels.assignment.reference.group_lasso_hessian`; made by Triton where that runs."""
    from .choice import room

    triton = can_run("triton", weights[0].device.type, torch.float32) is None
    out: list[Tensor] = room("triton" if triton else "reference").group_lasso_hessian(
        grad, weight_directions, log_directions, weights, logs, scales
    )
    return out


# ---- samples


def _samples(name: str, first: Tensor, second: Tensor, temperature: float, divide: bool) -> Tensor:
    first, second = rows_contiguous(first), rows_contiguous(second)
    groups, count = first.shape
    out = torch.empty((groups, count), dtype=first.dtype, device=first.device)
    _check(
        getattr(native_module(), f"cuda_{name}")(
            *_stream(first.device),
            _ELEMENTS[first.dtype],
            divide,
            groups,
            count,
            temperature,
            first.data_ptr(),
            Network._stride(first),
            second.data_ptr(),
            Network._stride(second),
            out.data_ptr(),
        )
    )
    return out


def sample_groups(logits: Tensor, noise: Tensor, temperature: float, divide_noise: bool) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.sample_groups`.

    Raises ValueError or RuntimeError with the core's text where it refuses its arguments or a launch fails.
    """
    return _samples("sample_groups", logits, noise, temperature, divide_noise)


def sample_groups_backward(grad: Tensor, log_probabilities: Tensor, temperature: float) -> Tensor:
    """See :func:`dsp_kernels.assignment.reference.sample_groups_backward`.

    Raises ValueError or RuntimeError with the core's text where it refuses its arguments or a launch fails.
    """
    return _samples("sample_groups_backward", grad, log_probabilities, temperature, False)
