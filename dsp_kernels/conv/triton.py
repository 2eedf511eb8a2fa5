"""Launches the Triton kernels: float16, bfloat16 and float32, NHWC, on a CUDA device (or, under Triton's
interpreter, on the CPU).

Channels that are neighbours in memory are read where they are, whatever the distance between pixels; any
other tensor (NCHW, expanded) is first copied to channels_last, which is the only copy of an activation that
is ever made. Outputs are allocated here, in the memory format of ``x`` (``grad``).

float32 is multiplied as float32, or, where ``torch.backends.cuda.matmul`` allows it, as TF32.

Tables (:mod:`dsp_kernels.conv.tiles`) are made once for each layout, geometry and launch and kept, least
recently used first out. A plan on a GPU is read once, at first use, which waits for the device; nothing waits
afterwards, so that calls can be captured in a CUDA graph once they have run outside of it.

The weight is laid out in tiles by a small kernel and kept (:mod:`dsp_kernels.conv.prepared`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._kept import Kept
from ..layout import INT32_MAX, GroupLayout
from . import launches, prepared, tiles
from .launches import Launch
from .prepared import layout_of, precision_of, prepared_weight, record, refuse_capture
from .shapes import Pair, empty_output, output_size

__all__ = ["Launch", "bucket", "choose_launch", "forget", "forward", "grad_input", "grad_weight", "launching"]

_ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Fewer pixels than this are "small" in the launch table.
_SMALL = 8192
_MOST_SLICES = 64
_WORKSPACE = 2**26  # elements of float32 that slices of the weight's gradient may take
_BLOCK = 1024

_forced: ContextVar[Launch | None] = ContextVar("dsp_kernels_launch", default=None)


@contextmanager
def launching(launch: Launch | None) -> Iterator[None]:
    """All calls inside use ``launch`` in place of the table's choice. For tuning and tests."""
    token = _forced.set(launch)
    try:
        yield
    finally:
        _forced.reset(token)


# ---- caches ----

_launches: Kept[Any, Any] = Kept(4096)
_tables: Kept[Any, Any] = Kept(1024)


def forget() -> None:
    """Drops all tables and weights that are kept."""
    for kept in (_launches, _tables):
        kept.clear()
    prepared.forget()
    launches.forget()


# ---- configurations ----


@cache
def _device(index: int) -> tuple[str, int]:
    """Architecture and number of multiprocessors of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def machine(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors; "interpreter" for what is no CUDA device."""
    if device.type != "cuda":
        return "interpreter", 1
    return _device(torch.cuda.current_device() if device.index is None else device.index)


def exact_key(op: str, precision: str, layout: GroupLayout, kernel: Pair, pixels: int) -> str:
    """The launch table's key for one shape. ``op``: "conv", "grad_input" or "grad_weight"."""
    sizes = f"{layout.in_channels}x{layout.out_channels}x{len(layout.groups)}x{layout.pairs}"
    return f"{op}/{precision}/{kernel[0]}x{kernel[1]}/{sizes}/m{pixels}"


def _find(keys: Sequence[str], rows: Sequence[Mapping[str, object]]) -> Launch | None:
    """The first of the keys in the first of the rows that has any."""
    found = next((row[k] for row in rows for k in keys if k in row), None)
    return found if isinstance(found, Launch) else None


def _keys(bucket: str) -> list[str]:
    """The rows that fit a bucket, the best first: its own, any kernel's, and the forward's."""
    own = [bucket, bucket.removesuffix("/taps")]
    return list(dict.fromkeys(own + [key.replace("grad_input/", "conv/") for key in own]))


def bucket(
    op: str,
    precision: str,
    layout: GroupLayout,
    kernel: Pair,
    pixels: int,
    rows: Sequence[Mapping[str, object]],
) -> str:
    """The launch table's key for all shapes that share a configuration with this one; ``rows``: the rows to
    choose from, whose widths of tiles are those there are. The width is the one whose tiles take least: each
    reads its pixels again, so that narrow ones lose where a group has more filters than they hold.
    """
    if op == "grad_weight":
        return f"grad_weight/{precision}"
    if op == "conv":
        problems = [(len(channels), len(filters)) for channels, filters in layout.groups]
    else:
        problems = [(len(filters), len(channels)) for filters, channels in tiles.atoms(layout)]
    taps = kernel[0] * kernel[1]
    end = ("small" if pixels < _SMALL else "large") + ("/taps" if taps > 1 else "")
    prefix = f"conv/{precision}/n"
    widths = sorted({int(key.split("/")[2][1:]) for row in rows for key in row if key.startswith(prefix)})

    def effort(width: int) -> float:
        launch = _find(_keys(f"{op}/{precision}/n{width}/{end}"), rows)
        if launch is None:
            return math.inf
        return launch.effort(taps) * sum(k * -(-n // launch.BLOCK_N) for k, n in problems)

    return f"{op}/{precision}/n{min(widths, key=effort)}/{end}"


def choose_launch(
    op: str, precision: str, layout: GroupLayout, kernel: Pair, pixels: int, arch: str
) -> Launch:
    """The table's configuration for a call: exact shape, bucket of this architecture, bucket of any. The
    gradient for the input goes by the forward's rows where it has none of its own, and a kernel of several
    taps by those for any.

    ``op``: "conv", "grad_input" or "grad_weight"; ``precision``: "half", "tf32" or "ieee"; ``pixels``:
    positions of a phase, batch included; ``arch``: "sm_90" and the like.

    Raises RuntimeError where no row fits, and ValueError, naming the file, for a table that is none.
    """
    rows = (launches.rows_of(arch), launches.rows_of("default"))
    key = bucket(op, precision, layout, kernel, pixels, rows)
    found = _find([exact_key(op, precision, layout, kernel, pixels), *_keys(key)], rows)
    if found is None:
        raise RuntimeError(f"the table of launches has no configuration for {key}")
    return found


def _launch(op: str, x: Tensor, layout: GroupLayout, kernel: Pair, pixels: int) -> tuple[Launch, str, int]:
    """Configuration, precision, multiprocessors."""
    arch, processors = machine(x.device)
    precision = precision_of(x)
    forced = _forced.get()
    if forced is not None:
        return forced, precision, processors
    key = (op, precision, layout, tuple(kernel), pixels, arch)
    found = _launches.get(key)
    if found is None:
        found = _launches.put(key, choose_launch(op, precision, layout, kernel, pixels, arch))
    return found, precision, processors


# ---- tables and weights on the device ----


@dataclass(frozen=True)
class _OnDevice:
    """Tables, and the tensors of them that the kernels read, on the device."""

    tables: Any
    tensors: dict[str, Tensor]


def _on_device(key: tuple[Hashable, ...], device: torch.device, make: Callable[[], Any]) -> _OnDevice:
    key = (*key, device)
    found = _tables.get(key)
    if found is None:
        refuse_capture(device, "a layout or geometry")
        tables = make()
        # From memory that is not pinned: the copies are done when this returns, for every stream.
        tensors = {
            name: value.to(device) for name, value in vars(tables).items() if isinstance(value, Tensor)
        }
        found = _tables.put(key, _OnDevice(tables, tensors))
    record(*found.tensors.values())
    return found


def _weight_tiles(kernels: ModuleType, weight: Tensor, index: Tensor) -> Tensor:
    """The weight in tiles."""
    weight = weight.contiguous()

    def make() -> Tensor:
        out = torch.empty(max(index.numel(), 1), dtype=weight.dtype, device=weight.device)
        if index.numel():
            grid = (-(-index.numel() // _BLOCK),)
            kernels.prepare_weight_kernel[grid](weight, index, out, index.numel(), BLOCK=_BLOCK)
        return out

    return prepared_weight(weight, index, make)


# ---- arguments ----


def _power_of_two(*values: int, limit: int) -> int:
    """The largest power of two up to ``limit`` that divides all values."""
    return math.gcd(limit, *values)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    """Strides with 0 for sizes of one, whose strides mean nothing."""
    n, c, h, w = (0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    return n, c, h, w


def _neighbours(x: Tensor) -> Tensor:
    """``x`` with channels that are neighbours in memory: itself, or a channels_last copy."""
    if x.shape[1] == 1 or x.stride(1) == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _alignment(x: Tensor) -> int:
    """The vector of channels, up to 16 bytes, to which every pixel of ``x`` is aligned."""
    n, _, h, w = _strides(x)
    channels = x.shape[1] if x.shape[1] > tiles.CHUNK else 0
    limit = 16 // x.element_size()
    return _power_of_two(n, h, w, channels, x.data_ptr() // x.element_size(), limit=limit)


def _check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {like.dtype} on {like.device} for this call of the triton backend, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check(
    x: Tensor, layout: GroupLayout, kernel: Pair, channels: int, filters: int, weight_numel: int
) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"the triton backend takes {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if channels != layout.in_channels:
        raise ValueError(f"x has {channels} channels, the layout has in_channels={layout.in_channels}")
    if filters != layout.out_channels:
        raise ValueError(
            f"the output has {filters} channels, the layout has out_channels={layout.out_channels}"
        )
    expected = layout.pairs * kernel[0] * kernel[1]
    if weight_numel != expected:
        raise ValueError(
            f"weight must have {expected} elements ({layout.pairs} pairs, kernel {kernel[0]}x{kernel[1]}), "
            f"got {weight_numel}"
        )


def _check_reach(x: Tensor, reach: tuple[int, int]) -> None:
    """Distances between the taps of one pixel must fit 32 bits; whole tensors need not."""
    _, _, h, w = _strides(x)
    span = reach[0] * h + reach[1] * w + x.shape[1]
    if span > INT32_MAX:
        raise ValueError(
            f"the taps of one pixel span {span} elements; the triton backend takes at most {INT32_MAX}"
        )


def _check_grid(programs: int) -> int:
    if programs > INT32_MAX:
        raise ValueError(f"a launch of {programs} programs is too large; the device takes {INT32_MAX}")
    return programs


def _kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    kernel: Pair,
    in_step: Pair,
    out_step: Pair,
    activation: int,
    op: str,
    layout: GroupLayout,
    make: Callable[[int, int, int], tiles.Tiles],
    geometry: tuple[Hashable, ...],
) -> None:
    """The matrix product of forward and gradient for the input, into ``out``."""
    x = _neighbours(x)
    batch, _, height, width = out.shape
    pixels = batch * -(-height // out_step[0]) * -(-width // out_step[1])
    launch, precision, processors = _launch(op, x, layout, kernel, pixels)
    align = _alignment(x)
    block_m, block_n, block_k = launch.BLOCK_M, launch.BLOCK_N, launch.BLOCK_K
    key = (op, layout, geometry, block_n, block_k, align)
    found = _on_device(key, x.device, lambda: make(block_n, block_k, align))
    tables, on_device = found.tables, found.tensors
    _check_reach(x, tables.reach)
    m_tiles = -(-pixels // block_m)
    programs = tables.n_items * m_tiles
    split = launch.split
    if split == 0:
        split = 1 << max(min(processors // programs, 8, tables.most_steps // 4), 1).bit_length() - 1
    split = max(1, min(split, tables.most_steps))
    kernels = _kernels()
    wide = pixels + block_m > INT32_MAX
    upcast = x.device.type == "cpu" and x.dtype == torch.bfloat16
    y, r = _strides(out), (0, 0, 0, 0)
    out_align = tables.output_align if out.stride(1) == 1 else 0
    residual_align = 0
    if residual is not None:
        r = _strides(residual)
        if residual.stride(1) == 1:
            address = residual.data_ptr() // residual.element_size()
            residual_align = _power_of_two(r[0], r[2], r[3], address, limit=max(out_align, 1))
    with _on(x.device):
        tiled = _weight_tiles(kernels, weight, on_device["weight_index"])
        sums = None
        if split > 1:
            sums = torch.empty(split * programs * block_m * block_n, dtype=torch.float32, device=x.device)
        finish = {
            "ACTIVATION": activation,
            "HAS_BIAS": bias is not None,
            "HAS_RESIDUAL": residual is not None,
            "OUT_ALIGN": out_align,
            "RESIDUAL_ALIGN": residual_align,
            "WIDE": wide,
            "UPCAST": upcast,
        }
        x_n, _, x_h, x_w = _strides(x)
        to = (*out.shape[2:], y[0], y[2], y[3], y[1], r[0], r[2], r[3], r[1], *out_step)
        kernels.conv_kernel[(_check_grid(split * programs),)](
            x,
            tiled,
            bias,
            residual,
            out,
            sums,
            on_device["items"],
            on_device["entries"],
            on_device["read"],
            on_device["outputs"],
            tables.n_items,
            m_tiles,
            batch,
            *x.shape[2:],
            x.shape[1],
            x_n,
            x_h,
            x_w,
            *to,
            *in_step,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            SPLIT=split,
            ALIGN=min(align, launch.copy // x.element_size()),
            TAIL=x.shape[1] < tiles.CHUNK,
            POINTWISE=tables.pointwise,
            PARTIAL=tables.partial,
            PRECISION="tf32" if precision == "tf32" else "ieee",
            num_warps=launch.warps,
            num_stages=launch.stages,
            **finish,
        )
        if sums is not None:
            kernels.conv_reduce_kernel[(programs,)](
                sums,
                bias,
                residual,
                out,
                on_device["items"],
                on_device["outputs"],
                tables.n_items,
                m_tiles,
                batch,
                *to,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                SPLIT=split,
                num_warps=launch.warps,
                **finish,
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
    """See :func:`dsp_kernels.conv.reference.forward`; ``plan`` may be on the CPU or on the device of ``x``.

    One launch for all groups and for the filters that read nothing; with a split sum a second one. Raises
    ValueError for sizes that do not agree with the plan or that the kernels do not take, and RuntimeError
    where a CUDA graph's capture comes before the first call.
    """
    layout = layout_of(plan)
    _check(x, layout, kernel, x.shape[1], out_channels, weight.numel())
    _check_tensor("weight", weight, x)
    shape = (x.shape[0], out_channels, *output_size(x.shape, kernel, stride, padding, dilation))
    if bias is not None:
        _check_tensor("bias", bias, x)
        bias = bias.contiguous()
        if bias.shape != (out_channels,):
            raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias.shape)}")
    if residual is not None:
        _check_tensor("residual", residual, x)
        if residual.shape != shape:
            raise ValueError(f"residual must have the output's shape {shape}, got {tuple(residual.shape)}")
    out = empty_output(x, shape)
    if out.numel() == 0:
        return out
    kernel, padding, dilation = tuple(kernel), tuple(padding), tuple(dilation)
    _product(
        x,
        weight,
        bias,
        residual,
        out,
        kernel,
        stride,
        (1, 1),
        _ACTIVATIONS[activation],
        "conv",
        layout,
        lambda n, k, align: tiles.forward_tiles(
            layout, kernel, padding, dilation, block_n=n, block_k=k, align=align
        ),
        (kernel, padding, dilation),
    )
    return out


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
    """See :func:`dsp_kernels.conv.reference.grad_input`. The forward's kernel over atoms of channels; a
    stride is cut into phases. Raises ValueError and RuntimeError as :func:`forward` does.
    """
    layout = layout_of(plan)
    _check(grad, layout, kernel, input_size[1], grad.shape[1], weight.numel())
    _check_tensor("weight", weight, grad)
    out = empty_output(grad, tuple(input_size))
    if out.numel() == 0 or grad.numel() == 0:
        return out.zero_()
    kernel, stride = tuple(kernel), tuple(stride)
    padding, dilation = tuple(padding), tuple(dilation)
    _product(
        grad,
        weight,
        None,
        None,
        out,
        kernel,
        (1, 1),
        stride,
        0,
        "grad_input",
        layout,
        lambda n, k, align: tiles.grad_input_tiles(
            layout, kernel, stride, padding, dilation, block_n=n, block_k=k, align=align
        ),
        (kernel, stride, padding, dilation),
    )
    return out


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
    """See :func:`dsp_kernels.conv.reference.grad_weight`. Pixels are cut into slices with sums of their own,
    which a second kernel adds in order. Raises ValueError and RuntimeError as :func:`forward` does.
    """
    layout = layout_of(plan)
    _check(x, layout, kernel, x.shape[1], grad.shape[1], weight_numel)
    _check_tensor("grad", grad, x)
    out = x.new_empty(weight_numel)
    if weight_numel == 0:
        return out
    if grad.numel() == 0 or x.numel() == 0:
        return out.zero_()
    x, grad = _neighbours(x), _neighbours(grad)
    batch, _, out_h, out_w = grad.shape
    pixels = batch * out_h * out_w
    launch, precision, processors = _launch("grad_weight", x, layout, kernel, pixels)
    align, grad_align = _alignment(x), _alignment(grad)
    kernel, padding, dilation = tuple(kernel), tuple(padding), tuple(dilation)
    key = (
        *("grad_weight", layout, kernel, padding, dilation),
        *(launch.BLOCK_N, launch.BLOCK_K, align, grad_align),
    )
    found = _on_device(
        key,
        x.device,
        lambda: tiles.grad_weight_tiles(
            layout,
            kernel,
            padding,
            dilation,
            block_n=launch.BLOCK_N,
            block_k=launch.BLOCK_K,
            align=align,
            filter_align=grad_align,
        ),
    )
    tables, on_device = found.tables, found.tensors
    _check_reach(x, tables.reach)
    blocks = -(-pixels // launch.BLOCK_M)
    size = tables.n_items * launch.BLOCK_K * launch.BLOCK_N
    slices = launch.split or max(1, min(2 * processors // tables.n_items, _MOST_SLICES, _WORKSPACE // size))
    per_slice = -(-blocks // min(slices, blocks))
    slices = -(-blocks // per_slice)
    kernels = _kernels()
    upcast = x.device.type == "cpu" and x.dtype == torch.bfloat16
    x_n, _, x_h, x_w = _strides(x)
    g_n, _, g_h, g_w = _strides(grad)
    with _on(x.device):
        sums = torch.empty(slices * size, dtype=torch.float32, device=x.device)
        kernels.grad_weight_kernel[(_check_grid(slices * tables.n_items),)](
            x,
            grad,
            sums,
            on_device["items"],
            on_device["entries"],
            on_device["filters"],
            tables.n_items,
            per_slice,
            batch,
            *x.shape[2:],
            x.shape[1],
            x_n,
            x_h,
            x_w,
            out_h,
            out_w,
            grad.shape[1],
            g_n,
            g_h,
            g_w,
            *stride,
            *padding,
            BLOCK_M=launch.BLOCK_M,
            BLOCK_N=launch.BLOCK_N,
            BLOCK_K=launch.BLOCK_K,
            ALIGN=align,
            TAIL=x.shape[1] < tiles.CHUNK,
            GRAD_ALIGN=grad_align,
            GRAD_TAIL=grad.shape[1] < tiles.CHUNK,
            POINTWISE=tables.pointwise,
            PRECISION="tf32" if precision == "tf32" else "ieee",
            WIDE=pixels + launch.BLOCK_M * per_slice > INT32_MAX,
            UPCAST=upcast,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
        kernels.grad_weight_reduce_kernel[(-(-weight_numel // _BLOCK),)](
            sums,
            on_device["position"],
            out,
            weight_numel,
            slices,
            size,
            BLOCK=_BLOCK,
            ROUND=upcast,
        )
    return out
