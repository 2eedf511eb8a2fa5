"""Hands tensors to the compiled CUDA kernels: float16, bfloat16 and float32, NHWC, on a CUDA device.

Tensors that are not channels_last are copied to it, and the result back. float32 is multiplied as float32,
or, where ``torch.backends.cuda.matmul`` allows it, as TF32.

How the work is cut is a table (``csrc/conv/cuda_table.h``), made on the host once for each layout, geometry,
precision and device, and kept, least recently used first out. A plan on a GPU is read once, at first use,
which waits for the device; nothing waits afterwards, so that calls can be captured in a CUDA graph once they
have run outside of it. The weight is laid out by a small kernel, and kept as the Triton kernels keep theirs
(:mod:`dsp_kernels.conv.prepared`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import activations
from .._kept import Kept
from ..backends import native_module
from ..layout import GroupLayout
from .prepared import capturing, layout_of, precision_of, prepared_weight, record
from .shapes import Pair, is_channels_last, output_size

__all__ = ["forget", "forward", "grad_input", "grad_weight"]

_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT = 0, 1, 2
_PRECISIONS = {torch.float16: 0, torch.bfloat16: 1}
_TF32, _FLOAT32 = 2, 3
# Blocks of threads a multiprocessor that hide each other's waiting: what registers and shared memory allow.
_BLOCKS = 3

_tables: Kept[Any, Any] = Kept(1024)


def forget() -> None:
    """Drops all tables that are kept."""
    _tables.clear()


@cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def _stream(device: torch.device) -> tuple[int, int]:
    """The device's index and its current stream's handle."""
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


def _check(status: int) -> None:
    if status == 0:
        return
    text = f"the CUDA convolution refused: {native_module().last_error()}"
    raise ValueError(text) if status == 1 else RuntimeError(text)


def _check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype not in (*_PRECISIONS, torch.float32):
        raise ValueError(
            f"{name} must be float16, bfloat16 or float32 for the cuda backend, got {tensor.dtype}"
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} for this call of the cuda backend, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _nhwc(x: Tensor) -> Tensor:
    """``x`` with its elements in the order NHWC, one after the other, from a multiple of 16 bytes on."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.channels_last)


def _empty_nhwc(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _as_format(out: Tensor, channels_last: bool) -> Tensor:
    return out if channels_last else out.contiguous()


@dataclass(frozen=True)
class _Table:
    host: Tensor
    device: Tensor
    prepared_bytes: int
    workspace: int

    def on(self, index: int, stream: int) -> tuple[int, int, int, int, int]:
        """What every call begins with."""
        return index, stream, self.host.data_ptr(), self.host.numel(), self.device.data_ptr()

    def new_workspace(self) -> Tensor:
        return torch.empty(self.workspace, dtype=torch.float32, device=self.device.device)


def _make(
    operation: int, precision: int, layout: GroupLayout, geometry: tuple[int, ...], blocks: int
) -> tuple[Tensor, int, int]:
    """The table's words on the host, bytes of laid out weights, elements of the workspace."""
    core = native_module()
    plan = layout.plan()
    arguments = (operation, precision, *geometry, plan.data_ptr(), plan.numel(), 0, blocks)
    status, needed = core.cuda_conv2d_table(*arguments, 0, 0)
    _check(status)
    words = torch.empty(needed, dtype=torch.int32)
    status, _ = core.cuda_conv2d_table(*arguments, words.data_ptr(), needed)
    _check(status)
    status, prepared, workspace, *_ = core.cuda_conv2d_sizes(words.data_ptr(), needed)
    _check(status)
    return words, prepared, workspace


def _table(operation: int, x: Tensor, plan: Tensor, size: Sequence[int], kernel: Pair, *rest: Pair) -> _Table:
    """``size``: (batch, channels, height, width) of the convolution's input; ``rest``: stride, padding,
    dilation."""
    layout = layout_of(plan)
    device = x.device
    precision = _PRECISIONS.get(x.dtype)
    if precision is None:
        precision = _TF32 if precision_of(x) == "tf32" else _FLOAT32
    geometry = (size[0], size[2], size[3], *kernel, *(value for pair in rest for value in pair))
    blocks = _BLOCKS * _processors(_stream(device)[0])
    key: tuple[Hashable, ...] = (operation, precision, layout, geometry, blocks, device)
    found: _Table | None = _tables.get(key)
    if found is None:
        if capturing(device):
            raise RuntimeError(
                "the cuda convolution meets a layout or geometry for the first time inside a CUDA graph's "
                "capture: call it once with the same shapes before capturing"
            )
        words, prepared, workspace = _make(operation, precision, layout, geometry, blocks)
        # From memory that is not pinned: the copy is done when this returns, for every stream.
        found = _tables.put(key, _Table(words, words.to(device, copy=True), prepared, workspace))
    record(found.device)
    return found


def _run(
    table: _Table,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    activation: str,
) -> None:
    core = native_module()
    index, stream = _stream(x.device)
    weight = weight.contiguous()
    workspace = table.new_workspace()
    call = table.on(index, stream)

    def make() -> Tensor:
        out = torch.empty(table.prepared_bytes, dtype=torch.uint8, device=x.device)
        _check(
            core.cuda_conv2d_prepare(
                *call, weight.data_ptr(), weight.numel(), out.data_ptr(), table.prepared_bytes
            )
        )
        return out

    prepared = prepared_weight(weight, table.device, make)
    _check(
        core.cuda_conv2d_run(
            *call,
            x.data_ptr(),
            x.numel(),
            prepared.data_ptr(),
            table.prepared_bytes,
            *((0, 0) if bias is None else (bias.data_ptr(), bias.numel())),
            *((0, 0) if residual is None else (residual.data_ptr(), residual.numel())),
            out.data_ptr(),
            out.numel(),
            workspace.data_ptr(),
            table.workspace,
            activations.find(activation).code,
        )
    )


def forward(
    x: Tensor,
    weight: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    activation: str,
) -> Tensor:
    """See :func:`dsp_kernels.conv.reference.forward`. Raises ValueError for arguments that do not fit, and
    RuntimeError, with CUDA's text, where a device cannot be used.
    """
    _check_tensor("x", x, x)
    _check_tensor("weight", weight, x)
    shape = (x.shape[0], out_channels, *output_size(x.shape, kernel, stride, padding, dilation))
    if bias is not None:
        _check_tensor("bias", bias, x)
        bias = bias.contiguous()
        if bias.numel() != out_channels:
            raise ValueError(f"bias must have {out_channels} elements, got {bias.numel()}")
    if residual is not None:
        _check_tensor("residual", residual, x)
        if residual.shape != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
        residual = _nhwc(residual)
    out = _empty_nhwc(shape, x)
    if out.numel() > 0:
        table = _table(_FORWARD, x, plan, x.shape, kernel, stride, padding, dilation)
        _run(table, _nhwc(x), weight, bias, residual, out, activation)
    return _as_format(out, is_channels_last(x))


def grad_input(
    grad: Tensor,
    weight: Tensor,
    plan: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """See :func:`dsp_kernels.conv.reference.grad_input`; raises as :func:`forward`."""
    _check_tensor("grad", grad, grad)
    _check_tensor("weight", weight, grad)
    out = _empty_nhwc(input_size, grad)
    if out.numel() > 0:
        table = _table(_GRAD_INPUT, grad, plan, input_size, kernel, stride, padding, dilation)
        _run(table, _nhwc(grad), weight, None, None, out, "none")
    return _as_format(out, is_channels_last(grad))


def grad_weight(
    grad: Tensor,
    x: Tensor,
    plan: Tensor,
    weight_numel: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """See :func:`dsp_kernels.conv.reference.grad_weight`; raises as :func:`forward`."""
    _check_tensor("grad", grad, x)
    _check_tensor("x", x, x)
    out = torch.empty(weight_numel, dtype=x.dtype, device=x.device)
    if grad.numel() == 0 or x.numel() == 0:
        return out.zero_()
    table = _table(_GRAD_WEIGHT, x, plan, x.shape, kernel, stride, padding, dilation)
    grad, x = _nhwc(grad), _nhwc(x)
    workspace = table.new_workspace()
    _check(
        native_module().cuda_conv2d_grad_weight(
            *table.on(*_stream(x.device)),
            grad.data_ptr(),
            grad.numel(),
            x.data_ptr(),
            x.numel(),
            out.data_ptr(),
            weight_numel,
            workspace.data_ptr(),
            table.workspace,
        )
    )
    return out
