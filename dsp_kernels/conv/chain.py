"""Three convolutions in one kernel: k x k with ReLU, 1x1 with residual and ReLU, the next block's 1x1 with
ReLU. Host side: which shapes are taken, tables, weights.

With x the inner activation, r the residual stream and act = ReLU:

    h = act(W1 * x + b1)        grouped: each group of filters reads its own channels
    y = act(W2 h + b2 + r)      the new stream
    z = act(W3 y + b3)          the next block's inner activation

h, y and z are rounded to the tensors' dtype where three layers would have stored them, so a chain differs
from its layers in the order of sums alone. W2 and W3 are taken whole, zeros included: what is not finite in h
or y reaches every filter, as in the dense network. W1's groups read their own channels only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..backends import interpreted
from ..layout import GroupLayout
from . import launches, reference
from .launches import ChainLaunch
from .shapes import Pair, output_size
from .tiles import CHUNK, cover
from .triton import machine

if TYPE_CHECKING:
    from ..cost import Conv

__all__ = [
    "Chain",
    "ChainConfig",
    "ChainTables",
    "config_of",
    "constants",
    "copied",
    "launch_key",
    "padded_macs",
    "precision_of",
    "refuses",
    "tables",
    "with_launch",
]

MOST_TILES = 4
WIDEST_NEXT = 128
RESERVED = 12288  # bytes of shared memory beside the pipelined tiles: tables, barriers, exchanges of layout
# Precision -> pixels of a tile, channels of the stream made at a time, stages. With four warps 128 pixels
# spill registers, and so do wide parts that no matrix instruction takes (float32). On sm_90 and sm_100 TF32
# takes 64 pixels by instructions whose operands are then copied word by word.
_SIZES = {"half": (64, 64, 3), "tf32": (32, 32, 2), "ieee": (32, 16, 2)}
# Where the 1x1s' weights stay in shared memory: the most channels of the stream, columns of the last
# convolution, and of inner filters before sm_100 and from there on. More of them spill registers, or (by
# Triton 3.6) take more tensor memory than there is.
KEPT_STREAM, KEPT_NEXT, KEPT_INNER = 256, 64, (96, 64)
REACH = 2**15  # rows or columns that a tap may be away
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class ChainConfig:
    """The constants that a chain kernel is compiled for."""

    stream: int  # channels of the stream, CS
    following: int  # filters of the last convolution, C3
    tiles: int  # of the first convolution's filters, T
    tile_n: int
    n3: int  # C3 up to the next power of two
    block_m: int
    block_k: int
    block_s: int
    holes: bool
    warps: int = 4
    stages: int = 3
    resident: bool = False
    copy: int = 16

    def shared_bytes(self, size: int) -> int:
        """Bytes of shared memory that the pipelined loops take, ``size`` bytes an element: each stage holds a
        tile of everything that its loop loads; and the weights that stay. (What the compiler says is compared
        with it in the tests.)
        """
        inner = self.block_m * self.block_k + self.block_k * self.tile_n
        if self.resident:
            kept = self.tiles * self.tile_n * self.stream + self.stream * self.n3
            return size * (kept + self.stages * inner + self.block_m * self.block_s) + RESERVED
        outer = self.tiles * self.tile_n * self.block_s + self.block_s * self.n3 + self.block_m * self.block_s
        return size * self.stages * max(inner, outer) + RESERVED


@dataclass(frozen=True)
class ChainTables:
    """What the first convolution reads. CPU tensors.

    ``steps``: int32 (steps + 1, 2): first channel / 8 << 8 | bits of the chunks that are read, rows << 16 |
    columns from the output pixel's origin; one more than there are, which is loaded and not used. ``valid``:
    int16 (steps, block_k), all ones where a channel is read.
    ``ranges``: int32 (tiles, 3): first step, first with holes, end. ``index``: int64 (steps, block_k,
    tile_n), positions in the packed weight, -1 for zero. ``filters``: int64 (tiles * tile_n,), the filter
    of each column, -1 for none.
    """

    steps: Tensor
    valid: Tensor
    ranges: Tensor
    index: Tensor
    filters: Tensor


def _power(value: int, least: int = 16) -> int:
    return max(least, 1 << max(0, value - 1).bit_length())


def _jobs(layout: GroupLayout, tile_n: int) -> list[tuple[list[int], list[int]]]:
    """(channels, filters) of each tile; dead filters in tiles without channels."""
    groups = [(sorted(c), sorted(f)) for c, f in layout.groups if f]
    if layout.dead_filters:
        groups.append(([], list(layout.dead_filters)))
    return [(c, f[i : i + tile_n]) for c, f in groups for i in range(0, len(f), tile_n)]


def _tile_n(layout: GroupLayout) -> int | None:
    """The tile that pads least with at most four tiles; None where none does."""
    fitting = {w: len(_jobs(layout, w)) for w in (16, 32, 64) if 0 < len(_jobs(layout, w)) <= MOST_TILES}
    return min(fitting, key=lambda w: (w * fitting[w], -w)) if fitting else None


def _blocks(channels: Sequence[int], total: int, block_k: int) -> list[tuple[int, list[bool], bool]]:
    """Blocks of ``block_k`` channels that cover ``channels``: (first / 8, which are read, whether a chunk of
    those that are read has holes).
    """
    chunks = dict(cover(channels, total, CHUNK))
    out: list[tuple[int, list[bool], bool]] = []
    end = 0
    for start in sorted(chunks):
        if out and start < end:
            continue
        end = start + block_k
        parts = [chunks.get(start + i, [False] * CHUNK) for i in range(0, block_k, CHUNK)]
        holes = any(any(part) and not all(part) for part in parts)
        out.append((start // CHUNK, [v for part in parts for v in part], holes))
    return out


def tables(layout: GroupLayout, kernel: Pair, dilation: Pair, *, tile_n: int, block_k: int) -> ChainTables:
    """The tables of a chain's first convolution. ``layout.in_channels`` is a multiple of 8."""
    taps = kernel[0] * kernel[1]
    pairs = np.full((layout.out_channels, layout.in_channels), -1, dtype=np.int64)
    at = 0
    for reads, writes in layout.groups:
        if writes:
            block = np.arange(at, at + len(reads) * len(writes)).reshape(len(writes), len(reads))
            pairs[np.asarray(writes)[:, None], np.asarray(reads)[None, :]] = block
            at += block.size
    steps: list[tuple[int, int]] = []
    valid: list[list[bool]] = []
    ranges: list[tuple[int, int, int]] = []
    index: list[np.ndarray] = []
    columns: list[int] = []
    for channels, filters in _jobs(layout, tile_n):
        first = len(steps)
        blocks = _blocks(channels, layout.in_channels, block_k)
        full = [b for b in blocks if not b[2]]
        middle = first + len(full) * taps
        row = np.array(filters + [-1] * (tile_n - len(filters)))
        for start8, read, _ in [*full, *(b for b in blocks if b[2])]:
            bits = sum(any(read[i * CHUNK : (i + 1) * CHUNK]) << i for i in range(block_k // CHUNK))
            source = np.where(read, 8 * start8 + np.arange(block_k), -1)
            pair = pairs[row[None, :], source[:, None]]
            none = (source[:, None] < 0) | (row[None, :] < 0) | (pair < 0)
            for tap in range(taps):
                y, x = divmod(tap, kernel[1])
                steps.append((start8 << 8 | bits, y * dilation[0] << 16 | x * dilation[1]))
                valid.append(read)
                index.append(np.where(none, -1, pair * taps + tap))
        ranges.append((first, middle, len(steps)))
        columns += row.tolist()
    flat = np.stack(index) if index else np.empty((0, block_k, tile_n), dtype=np.int64)
    return ChainTables(
        torch.tensor([*steps, (0, 0)], dtype=torch.int32, device="cpu"),
        -torch.tensor(valid, dtype=torch.bool, device="cpu").to(torch.int16).reshape(-1, block_k),
        torch.tensor(ranges, dtype=torch.int32, device="cpu"),
        torch.from_numpy(flat),
        torch.tensor(columns, dtype=torch.int64, device="cpu"),
    )


def launch_key(config: ChainConfig, precision: str) -> str:
    """The key of a chain in the table of launches; ``precision``: "half", "tf32" or "ieee"."""
    first = f"t{config.tiles}x{config.tile_n}"
    return f"chain/{precision}/s{config.stream}/{first}/n{config.n3}"


def precision_of(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def with_launch(config: ChainConfig, launch: ChainLaunch) -> ChainConfig:
    """The configuration launched in another way. Raises ValueError where the stream is no multiple of the
    part that is made at a time.
    """
    if config.stream % launch.BLOCK_S:
        raise ValueError(f"BLOCK_S is {launch.BLOCK_S}; it must divide the stream, {config.stream} channels")
    return replace(
        config,
        block_m=launch.BLOCK_M,
        block_s=launch.BLOCK_S,
        warps=launch.warps,
        stages=launch.stages,
        resident=bool(launch.resident),
        copy=launch.copy,
    )


def launch_of(config: ChainConfig) -> ChainLaunch:
    """How a configuration is launched."""
    return ChainLaunch(
        config.block_m, config.block_s, config.warps, config.stages, int(config.resident), config.copy
    )


def config_of(
    layouts: Sequence[GroupLayout],
    dtype: torch.dtype,
    *,
    block_m: int | None = None,
    shared_memory: int | None = None,
    arch: str | None = None,
) -> ChainConfig:
    """The configuration for three layouts: the table's for this architecture ("sm_90"), where it has one that
    ``shared_memory`` bytes hold, or the usual one: weights stay where they can, fewer stages where no more
    are held.

    Raises ValueError where no tile of filters fits.
    """
    first, second, third = layouts
    tile_n = _tile_n(first)
    if tile_n is None:
        raise ValueError(
            f"the first convolution has {first.out_channels} filters in {len(first.groups)} groups and "
            f"{len(first.dead_filters)} dead ones: more than {MOST_TILES} tiles"
        )
    tiles = len(_jobs(first, tile_n))
    n3 = _power(third.out_channels)
    pixels, part, stages = _SIZES[precision_of(dtype)]
    blocks = [_blocks(sorted(c), first.in_channels, 32) for c, f in first.groups if f]
    config = ChainConfig(
        stream=second.out_channels,
        following=third.out_channels,
        tiles=tiles,
        tile_n=tile_n,
        n3=n3,
        block_m=block_m or pixels,
        block_k=32,
        block_s=min(part if second.out_channels % part == 0 else 16, second.out_channels),
        holes=any(holes for group in blocks for _, _, holes in group),
        stages=stages,
    )
    size = torch.empty(0, dtype=dtype, device="meta").element_size()
    if arch is not None and block_m is None:
        tuned = launches.rows_of(arch).get(launch_key(config, precision_of(dtype)))
        if isinstance(tuned, ChainLaunch) and config.stream % tuned.BLOCK_S == 0:
            other = with_launch(config, tuned)
            if shared_memory is None or other.shared_bytes(size) <= shared_memory:
                return other
        if shared_memory is not None and _keeps(config, precision_of(dtype), arch):
            # A stage more: a step of the k x k copies little, of which more has to be on its way.
            other = replace(config, resident=True, copy=8, stages=4)
            if other.shared_bytes(size) <= shared_memory:
                return other
    if shared_memory is not None and config.shared_bytes(size) > shared_memory:
        config = replace(config, stages=2)
    return config


def _keeps(config: ChainConfig, precision: str, arch: str) -> bool:
    """Whether the kernel may keep the 1x1s' weights: from sm_90 on matrix instructions read them where they
    are; before, each use would take registers.
    """
    number = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0
    most = KEPT_INNER[number >= 100]
    narrow = config.stream <= KEPT_STREAM and config.tiles * config.tile_n <= most and config.n3 <= KEPT_NEXT
    return narrow and precision == "half" and number >= 90


def refuses(convs: Sequence[Conv], dtype: torch.dtype, shared_memory: int) -> str | None:
    """Why three convolutions cannot run as one chain on a device with ``shared_memory`` bytes a block; None
    where they can.
    """
    if len(convs) != 3:
        return f"a chain is three convolutions, not {len(convs)}"
    first, second, third = convs
    a, b, c = (conv.layout for conv in convs)
    if dtype not in DTYPES:
        return f"takes {', '.join(map(str, DTYPES))}, not {dtype}"
    if (first.residual, second.residual, third.residual) != (False, True, False):
        return "the second convolution, and it alone, must have a residual"
    if any(conv.activation != "relu" for conv in convs):
        return "each convolution must end in ReLU"
    for conv in (second, third):
        if conv.kernel != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0):
            return "the second and third convolution must be 1x1 with stride 1 and no padding"
    if b.in_channels != a.out_channels or c.in_channels != b.out_channels:
        return "each convolution must read what the one before it gives"
    if a.in_channels % CHUNK:
        return f"the input has {a.in_channels} channels, no multiple of {CHUNK}"
    if b.out_channels % 16:
        return f"the stream has {b.out_channels} channels, no multiple of 16"
    if c.out_channels > WIDEST_NEXT:
        return f"the third convolution has {c.out_channels} filters, more than {WIDEST_NEXT}"
    if _tile_n(a) is None:
        return f"the first convolution takes more than {MOST_TILES} tiles of filters"
    if any((k - 1) * d >= REACH for k, d in zip(first.kernel, first.dilation, strict=True)):
        return "the first convolution's taps are too far apart"
    if first.pixels >= 2**31:
        return f"{first.pixels} pixels are more than 32 bits count"
    size = torch.empty(0, dtype=dtype, device="meta").element_size()
    need = config_of((a, b, c), dtype, shared_memory=shared_memory).shared_bytes(size)
    if need > shared_memory:
        return f"takes {need} bytes of shared memory, a block has {shared_memory}"
    return None


def padded_macs(convs: Sequence[Conv]) -> int:
    """Multiply-adds of an output pixel as the kernel does them, padding and all; without tables where no
    configuration fits.
    """
    a, b, c = (conv.layout for conv in convs)
    tile_n = _tile_n(a) or 64
    jobs = _jobs(a, tile_n)
    steps = sum(len(_blocks(channels, a.in_channels, 32)) for channels, _ in jobs) * convs[0].taps
    n3 = CHUNK * math.ceil(c.out_channels / CHUNK) if c.out_channels > WIDEST_NEXT else _power(c.out_channels)
    return steps * 32 * tile_n + len(jobs) * tile_n * b.out_channels + b.out_channels * n3


def copied(convs: Sequence[Conv], config: ChainConfig) -> float:
    """Elements that the kernel copies from the second-level cache for each output pixel: the first
    convolution's input at every tap and for every tile of filters, and a tile's share of all weights.
    """
    first = convs[0].layout
    jobs = _jobs(first, config.tile_n)
    conv = convs[0]
    steps = sum(len(_blocks(c, first.in_channels, config.block_k)) for c, _ in jobs) * conv.taps
    weights = steps * config.block_k * config.tile_n
    if not config.resident:
        weights += config.tiles * config.tile_n * config.stream + config.stream * config.n3
    share = 1.0
    if config.copy < 16 and conv.taps > 1:
        # What other taps have read comes from the first-level cache: pixels once, and the rows beside them.
        halo = conv.pixels_read / conv.pixels if conv.pixels else 1.0
        halo += (conv.kernel[0] - 1) * conv.dilation[0] * conv.size[1] / config.block_m
        share = min(1.0, halo / conv.taps)
    return share * steps * config.block_k + weights / config.block_m


def constants(config: ChainConfig, size: int, *, tf32: bool, upcast: bool = False) -> dict[str, Any]:
    """The compile-time arguments of the kernel, launch options apart. ``size``: bytes of an element;
    ``upcast``: operands to float32.
    """
    return {
        "CS": config.stream,
        "C3": config.following,
        "T": config.tiles,
        "HOLES": config.holes,
        "TILE_N": config.tile_n,
        "N3": config.n3,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_S": config.block_s,
        "RESIDENT": config.resident,
        "ALIGN": config.copy // size,
        "PRECISION": "tf32" if tf32 else "ieee",
        "UPCAST": upcast,
    }


class Chain:
    """A chain with its weights laid out for the kernel; call it with (x, residual).

    Args:
        layouts: of the three convolutions, in order.
        weights: packed, one dtype and device (``layout.pack``); the second and third 1x1.
        biases: (filters,) of the same dtype, or None.
        kernel, stride, padding, dilation: the first convolution's, (vertical, horizontal).
        block_m: pixels of a tile, if not the table's. launch: all of the launch, for tuning.
        shared_memory: bytes that a block may use, if known.

    The weights are copied: later changes are not seen. The call takes x (N, C, H, W) and residual (N, S, h,
    w) of the weights' dtype and device, and returns (y, z): (N, S, h, w), (N, filters, h, w), channels_last.
    Raises ValueError for other shapes, TypeError for another dtype. It runs on CUDA, or on the CPU under
    Triton's interpreter; elsewhere through the definition, layer by layer.
    """

    def __init__(
        self,
        layouts: Sequence[GroupLayout],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        block_m: int | None = None,
        shared_memory: int | None = None,
        launch: ChainLaunch | None = None,
    ) -> None:
        first, second, third = layouts
        if second.in_channels != first.out_channels or third.in_channels != second.out_channels:
            raise ValueError("layouts: each must read what the one before it gives")
        self.layouts, self.kernel, self.stride = tuple(layouts), kernel, stride
        self.padding, self.dilation = padding, dilation
        self.weights = [w.detach().clone() for w in weights]
        self.biases = [None if b is None else b.detach().clone() for b in biases]
        like = self.weights[0]
        self.dtype, self.device = like.dtype, like.device
        if first.in_channels % CHUNK or second.out_channels % 16 or third.out_channels > WIDEST_NEXT:
            raise ValueError(
                f"layouts: {first.in_channels} channels (a multiple of {CHUNK} is taken), stream of "
                f"{second.out_channels} (a multiple of 16), {third.out_channels} filters after it (at most "
                f"{WIDEST_NEXT})"
            )
        self.config = config_of(
            layouts,
            like.dtype,
            block_m=block_m,
            shared_memory=shared_memory,
            arch=machine(like.device)[0],
        )
        if launch is not None:
            self.config = with_launch(self.config, launch)
        config = self.config
        made = tables(first, kernel, dilation, tile_n=config.tile_n, block_k=config.block_k)
        self.steps = made.steps.to(self.device)
        self.valid = made.valid.to(self.device)
        self.ranges = made.ranges.to(self.device)
        index, filters = made.index.to(self.device), made.filters.to(self.device)
        padded = torch.cat([like.new_zeros(1), self.weights[0]])
        self.w1 = padded[index + 1].contiguous()
        # W2: one row for each column of h, in the order of the tiles.
        dense = second.unpack(self.weights[1], 1)[:, :, 0, 0].t()
        self.w2 = torch.where((filters >= 0)[:, None], dense[filters.clamp(min=0)], 0.0).contiguous()
        last = third.unpack(self.weights[2], 1)[:, :, 0, 0].t()
        self.w3 = torch.nn.functional.pad(last, (0, config.n3 - third.out_channels)).contiguous()
        b1, b2, b3 = (
            like.new_zeros(layout.out_channels, dtype=torch.float32) if b is None else b.float()
            for layout, b in zip(layouts, self.biases, strict=True)
        )
        self.b1 = torch.where(filters >= 0, b1[filters.clamp(min=0)], 0.0).contiguous()
        self.b2 = b2.contiguous()
        self.b3 = torch.nn.functional.pad(b3, (0, config.n3 - third.out_channels)).contiguous()

    def _check(self, x: Tensor, residual: Tensor) -> tuple[int, int, int]:
        for name, value in (("x", x), ("residual", residual)):
            if value.dtype != self.dtype:
                raise TypeError(f"{name} must be {self.dtype}, as the weights, got {value.dtype}")
            if value.device != self.device:
                raise ValueError(f"{name} must be on {self.device}, as the weights, got {value.device}")
        if x.dim() != 4 or x.shape[1] != self.layouts[0].in_channels:
            raise ValueError(
                f"x must have shape (N, {self.layouts[0].in_channels}, H, W), got {tuple(x.shape)}"
            )
        height, width = output_size(x.shape, self.kernel, self.stride, self.padding, self.dilation)
        expected = (x.shape[0], self.layouts[1].out_channels, height, width)
        if tuple(residual.shape) != expected:
            raise ValueError(f"residual must have shape {expected}, got {tuple(residual.shape)}")
        return int(x.shape[0]), height, width

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        images, height, width = self._check(x, residual)
        if x.device.type != "cuda" and not interpreted():
            return self.layers(x, residual)
        last = torch.channels_last
        x, residual = x.contiguous(memory_format=last), residual.contiguous(memory_format=last)
        shape = (images, self.layouts[1].out_channels, height, width)
        stream = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
        shape = (images, self.layouts[2].out_channels, height, width)
        following = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)
        if stream.numel():
            self._launch(x, residual, stream, following)
        return stream, following

    def _launch(self, x: Tensor, residual: Tensor, stream: Tensor, following: Tensor) -> None:
        from .chain_kernels import chain_forward

        images, channels, height, width = x.shape
        pixels = images * stream.shape[2] * stream.shape[3]
        if pixels >= 2**31:
            raise ValueError(f"x: {pixels} output pixels are more than 32 bits count")
        tiles = math.ceil(pixels / self.config.block_m)
        programs = tiles
        if self.config.resident:
            # Each works on a share of the tiles. Where but one fits a multiprocessor, others come after it.
            programs = min(tiles, 2 * machine(self.device)[1])
        options = constants(
            self.config,
            self.dtype.itemsize,
            tf32=precision_of(self.dtype) == "tf32",
            upcast=self.dtype == torch.bfloat16 and interpreted(),
        )
        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
            chain_forward[(programs,)](
                x, residual, stream, following, self.w1, self.w2, self.w3, self.b1, self.b2, self.b3,
                self.steps, self.valid, self.ranges,
                pixels, height, width, stream.shape[2], stream.shape[3], channels // CHUNK,
                self.stride[0], self.stride[1], self.padding[0], self.padding[1], tiles,
                **options, num_warps=self.config.warps, num_stages=self.config.stages,
            )  # fmt: skip

    def layers(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The same by the definition, one convolution after the other."""
        first, second, third = self.layouts
        one, none = (1, 1), (0, 0)
        h = reference.forward(
            x, self.weights[0], first.plan(), self.biases[0], None, first.out_channels,
            self.kernel, self.stride, self.padding, self.dilation, "relu",
        )  # fmt: skip
        y = reference.forward(
            h, self.weights[1], second.plan(), self.biases[1], residual, second.out_channels,
            one, one, none, one, "relu",
        )  # fmt: skip
        z = reference.forward(
            y, self.weights[2], third.plan(), self.biases[2], None, third.out_channels,
            one, one, none, one, "relu",
        )  # fmt: skip
        return y, z
