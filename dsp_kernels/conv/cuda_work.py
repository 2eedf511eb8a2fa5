"""How much work the CUDA kernels make of a forward convolution: what ``csrc/conv/cuda_table.h`` cuts, in
figures alone, for the cost model. No compiled module is needed; a test holds the figures against its tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..layout import GroupLayout
from .shapes import Pair, output_size

__all__ = ["CudaWork", "cuda_work"]

PIXELS = 128  # of a block
_ROW = 64  # bytes of a chunk of channels
_OCTETS = 8  # filters of a block, in eights
_STAGES = 3
_SHARED = 48 * 1024
_MOST_ROWS = 1023
_MOST_SPLITS = 16
_SET_UP = 32  # of a phase, in copies of a row
GATHERED = 8  # a row copied channel by channel costs so many copied whole


@dataclass(frozen=True)
class CudaWork:
    """``multiply_adds``: of the matrix instructions, padding of pixels, channels and filters included.
    ``effort``: the same, and the copies of halos on top, in multiply-adds that take as long by the kernels'
    own rule: a row of a halo costs as much as a pixel at one tap, a gathered one eight times that.
    ``weights``: elements of the laid out weight. ``blocks``: of threads, before sums are split.
    ``most_splits``: into how many shares a sum can go. ``gathered``: groups that are read channel by channel,
    of ``groups``. ``halo_rows``: pixels that a block copies for ``phase_taps`` taps of its 128 outputs.
    """

    multiply_adds: int
    effort: float
    weights: int
    blocks: int
    most_splits: int
    gathered: int
    groups: int
    halo_rows: int
    phase_taps: int

    def splits(self, blocks_wanted: int) -> int:
        """Shares of each sum where ``blocks_wanted`` blocks keep the device busy."""
        if not self.blocks:
            return 1
        return max(1, min(-(-blocks_wanted // self.blocks), self.most_splits, _MOST_SPLITS))


def _cut(channels: Sequence[int], total: int, element: int, taps: int) -> tuple[bool, list[int]]:
    """Whether channels come one by one, and the steps (32 bytes of channels) of each chunk of 64 bytes."""
    columns, unit = _ROW // element, 16 // element
    units = len({c // unit for c in channels})
    by_unit, one_by_one = -(-units // 2), -(-len(channels) // (columns // 2))
    costly = (2 * by_unit if taps > 1 else by_unit) > 3 * one_by_one
    gather = total % unit != 0 or costly
    steps = one_by_one if gather else by_unit
    return gather, [min(2, steps - at) for at in range(0, steps, 2)]


@dataclass(frozen=True)
class _Box:
    """The pixels of a block, how many of them there are, and the taps that share a halo."""

    tiles: int
    rows: int
    phase_taps: int


def _halo(tile: int, in_step: int, tap_step: int, phase: int) -> int:
    if phase == 1:
        return tile
    step = math.gcd(in_step, tap_step)
    return (tile - 1) * (in_step // step) + (phase - 1) * (tap_step // step) + 1


@lru_cache(maxsize=4096)
def _box(
    grid: tuple[int, int],
    in_step: tuple[int, int],
    taps: tuple[int, int],
    tap_step: tuple[int, int],
    batch: int,
    octets: int,
) -> _Box:
    """The box of pixels with the least work: products of all its pixels with each tap, copies of its halo."""
    best, least = _Box(0, 0, 1), math.inf
    for phase in (taps, (1, taps[1]), (1, 1)):
        phase_taps = phase[0] * phase[1]
        rounds = float(taps[0] * taps[1] // phase_taps)
        buffers = _STAGES if phase_taps == 1 else 2
        for width in range(1, min(grid[1], PIXELS) + 1):
            across = _halo(width, in_step[1], tap_step[1], phase[1])
            if across > _MOST_ROWS:
                continue
            for height in range(1, min(grid[0], PIXELS // width) + 1):
                down = _halo(height, in_step[0], tap_step[0], phase[0])
                for images in (1, min(batch, PIXELS // (width * height))):
                    rows = images * down * across
                    shared = buffers * rows * _ROW + _STAGES * octets * 8 * _ROW
                    if rows > _MOST_ROWS or shared > _SHARED:
                        continue
                    tiles = -(-batch // images) * -(-grid[0] // height) * -(-grid[1] // width)
                    work = tiles * rounds * (phase_taps * PIXELS + rows + _SET_UP)
                    if work < least:
                        least, best = work, _Box(tiles, rows, phase_taps)
    return best


@lru_cache(maxsize=4096)
def cuda_work(
    layout: GroupLayout,
    element: int,
    batch: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> CudaWork:
    """The work of a forward convolution of ``batch`` images of ``size`` (height, width) pixels in elements of
    ``element`` bytes (2 or 4); the rest as in :func:`~dsp_kernels.permuted_grouped_conv2d`.
    """
    taps = kernel[0] * kernel[1]
    out = output_size((batch, layout.in_channels, *size), kernel, stride, padding, dilation)
    grid: Pair = out
    in_step = tuple(s if o > 1 else 1 for s, o in zip(stride, out, strict=True))
    tap_step = tuple(d if k > 1 else 1 for d, k in zip(dilation, kernel, strict=True))
    images = batch
    if taps == 1 and stride == (1, 1) and padding == (0, 0):
        grid, in_step, images = (1, batch * size[0] * size[1]), (1, 1), 1  # one long row
    pieces: list[tuple[int, bool, list[int]]] = []  # filters in eights, whether gathered, steps of chunks
    gathered = groups = 0
    for channels, filters in layout.groups:
        if not filters:
            continue
        gather, chunks = _cut(channels, layout.in_channels, element, taps)
        gathered, groups = gathered + gather, groups + 1
        eights = -(-len(filters) // 8)
        tiles = -(-eights // _OCTETS)
        for tile in range(tiles):
            pieces.append((eights * (tile + 1) // tiles - eights * tile // tiles, gather, chunks))
    dead = len(layout.dead_filters)
    for first in range(0, dead, 8 * _OCTETS):
        pieces.append((-(-min(dead - first, 8 * _OCTETS) // 8), False, []))
    if not pieces or batch == 0:
        return CudaWork(0, 0.0, 0, 0, 1, gathered, groups, 0, 1)
    octets = max(eights for eights, _, _ in pieces)
    box = _box(
        (grid[0], grid[1]), (in_step[0], in_step[1]), kernel, (tap_step[0], tap_step[1]), images, octets
    )
    macs, effort, weights, most_splits = 0, 0.0, 0, 1
    for eights, gather, chunks in pieces:
        depth = sum(chunks) * (_ROW // element // 2)
        part = depth * 8 * eights * taps * box.tiles * PIXELS
        copies = box.rows * (GATHERED if gather else 1) + _SET_UP
        macs += part
        effort += part * (1 + copies / (box.phase_taps * PIXELS))
        weights += len(chunks) * (_ROW // element) * taps * 8 * eights
        phases = len(chunks) * (taps // box.phase_taps)
        most_splits = max(most_splits, min(phases, len(chunks) * taps // 4))
    return CudaWork(
        macs,
        effort,
        weights,
        box.tiles * len(pieces),
        most_splits,
        gathered,
        groups,
        box.rows,
        box.phase_taps,
    )
