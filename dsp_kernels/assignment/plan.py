"""How the Triton kernels cut a network's layers into tiles: host arithmetic, without Triton.

A :class:`Plan` depends on the layers' shapes, their memory order, the dtype and the alignment alone, not on
addresses. The words of its tables are described in ``triton_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["Layer", "Plan", "Tiling", "make_plan", "tiling"]

ADDRESSES = 4
"""Addresses of a layer: weight, direction, output, keep."""


@dataclass(frozen=True)
class Layer:
    """One weight as it lies: ``filters`` O, ``channels`` C, ``taps`` K, and whether the taps are innermost
    (contiguous) or the channels are (channels last)."""

    filters: int
    channels: int
    taps: int
    channels_last: bool

    @classmethod
    def of(cls, weight: Tensor) -> Layer:
        """The layer of a contiguous or channels-last weight (O, C, ...taps)."""
        filters, channels = weight.shape[:2]
        return cls(filters, channels, weight.numel() // (filters * channels), not weight.is_contiguous())

    @property
    def width(self) -> int:
        """Elements of one filter."""
        return self.channels * self.taps


@dataclass(frozen=True)
class Tiling:
    """The sizes of tiles, powers of two.

    A tile of the passes over the weights is ``rows`` filters and ``lanes`` elements of each; one of the
    passes over S and T is ``moved_rows`` by ``moved_lanes``. ``chunk`` filters share one partial sum.
    ``width`` and ``depth`` are those of the sums of partial sums. ``warps``: threads / 32 of a program.
    ``most_groups``: how many groups' column sums are kept at a time at most.
    """

    rows: int
    lanes: int
    moved_rows: int
    moved_lanes: int
    chunk: int
    width: int = 256
    depth: int = 8
    warps: int = 4
    most_groups: int = 8

    def block(self, groups: int) -> int:
        """How many groups' column sums are kept at a time."""
        return min(self.most_groups, 1 << (groups - 1).bit_length())


SHIPPED = {
    2: Tiling(rows=2, lanes=512, moved_rows=16, moved_lanes=128, chunk=64, most_groups=4),
    4: Tiling(rows=8, lanes=256, moved_rows=16, moved_lanes=128, chunk=64),
    8: Tiling(rows=8, lanes=128, moved_rows=8, moved_lanes=128, chunk=64),
}
"""By the bytes of a weight's element. A tile is 2,048 elements of float32, 1,024 of the others: 16 registers
a thread, or 8 beside the wider sums of half floats. The largest kernel holds six or seven tiles at once."""

INTERPRETED = Tiling(rows=4, lanes=64, moved_rows=4, moved_lanes=16, chunk=8, width=16, depth=2)
"""For Triton's interpreter, in which elements cost time and small layers should still have several tiles."""


def tiling(element_size: int, interpreted: bool = False) -> Tiling:
    """The tiling for weights of that many bytes an element."""
    return INTERPRETED if interpreted else SHIPPED[element_size]


@dataclass(frozen=True)
class Plan:
    """The tables of one network on one device.

    ``layers`` int64 (L, fields); tiles int32 (tiles, 5): ``squares`` for the pass over W and D, ``flat`` for
    the pass that applies factors, ``moved`` and ``moved_rows`` for those over S and T, ``flat_sums`` and
    ``moved_sums`` for the sums of the row sums of the two. ``pitch``: channels of all layers, the row
    length of the (G, channels) matrices. The sizes of the work space are in elements.
    """

    tiles: Tiling
    vector: int
    strided: bool
    filters: int
    pitch: int
    offsets: tuple[int, ...]
    columns_size: int
    rows_size: int
    squares_size: int
    layers: Tensor
    squares: Tensor
    flat: Tensor
    moved: Tensor
    moved_rows: Tensor
    flat_sums: Tensor
    moved_sums: Tensor


def vector_width(layers: Sequence[Layer], element_size: int, addresses: Sequence[int]) -> int:
    """How many elements every row of every layer may be loaded at a time, at most 16 bytes."""
    width = 16 // element_size
    while width > 1 and (
        any(layer.channels % width for layer in layers)
        or any(address % (width * element_size) for address in addresses)
    ):
        width //= 2
    return width


def _channels_of_a_tile(layer: Layer, lanes: int, vector: int) -> int:
    """How many whole channels a tile of the first pass takes: a multiple of the vector width."""
    inner = 1 if layer.channels_last else layer.taps
    return lanes // inner // vector * vector


def _cut(total: int, step: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of ``total``."""
    return [(start, min(step, total - start)) for start in range(0, total, step)]


def _tensor(rows: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=dtype).to(device)


def make_plan(
    layers: tuple[Layer, ...], groups: int, vector: int, tiles: Tiling, device: torch.device
) -> Plan:
    """The plan for ``layers`` with ``groups`` groups whose rows are aligned to ``vector`` elements.

    Where a kernel has so many taps that a tile would not hold a vector of channels, the taps are walked one
    by one, without vectors.
    """
    strided = any(_channels_of_a_tile(layer, tiles.lanes, vector) == 0 for layer in layers)
    if strided:
        vector = 1
    table: list[tuple[int, ...]] = []
    squares: list[tuple[int, ...]] = []
    flat: list[tuple[int, ...]] = []
    moved: list[tuple[int, ...]] = []
    moved_rows: list[tuple[int, ...]] = []
    flat_sums: list[tuple[int, ...]] = []
    moved_sums: list[tuple[int, ...]] = []
    channel_at = columns_at = rows_at = squares_at = 0
    offsets = (0, *accumulate(layer.filters for layer in layers))
    for index, layer in enumerate(layers):
        by_tap = layer.channels_last or strided
        inner = 1 if by_tap else layer.taps
        outer = layer.taps if by_tap else 1
        step = layer.taps if by_tap and not layer.channels_last else 1
        jump = 1 if step > 1 else layer.channels
        chunks = _cut(layer.filters, tiles.chunk)
        flat_blocks = _cut(layer.width, tiles.lanes)
        channel_blocks = _cut(layer.channels, tiles.moved_lanes)
        table.append(
            (
                layer.filters, layer.channels // vector, layer.taps, inner, outer, jump // vector, step,
                offsets[index], channel_at, columns_at, len(chunks), rows_at, squares_at // vector,
                layer.channels, 1 if layer.channels_last else layer.taps,
            )
        )  # fmt: skip
        held = tiles.lanes if by_tap else _channels_of_a_tile(layer, tiles.lanes, vector)
        for place, (row, _) in enumerate(chunks):
            for start, count in _cut(layer.channels, held):
                squares.append((index, row, start * inner // vector, count * inner // vector, place))
            for start, count in channel_blocks:
                moved.append((index, row, start // vector, count // vector, place))
        for row, _ in _cut(layer.filters, tiles.rows):
            for place, (start, count) in enumerate(flat_blocks):
                flat.append((index, row, start // vector, count // vector, place))
        for row, _ in _cut(layer.filters, tiles.moved_rows):
            for place, (start, count) in enumerate(channel_blocks):
                moved_rows.append((index, row, start // vector, count // vector, place))
        for row, _ in _cut(layer.filters, tiles.width):
            flat_sums.append((index, row, 0, len(flat_blocks), 0))
            moved_sums.append((index, row, 0, len(channel_blocks), 0))
        channel_at += layer.channels
        columns_at += 3 * groups * len(chunks) * layer.channels
        rows_at += max(2 * len(flat_blocks), len(channel_blocks)) * groups * layer.filters
        if layer.taps > 1:
            # Rows of S begin where vectors of them do.
            squares_at += -(-layer.filters * layer.channels // 8) * 8
    return Plan(
        tiles=tiles,
        vector=vector,
        strided=strided,
        filters=offsets[-1],
        pitch=channel_at,
        offsets=offsets,
        columns_size=columns_at,
        rows_size=rows_at,
        squares_size=squares_at,
        layers=_tensor(table, torch.int64, device),
        squares=_tensor(squares, torch.int32, device),
        flat=_tensor(flat, torch.int32, device),
        moved=_tensor(moved, torch.int32, device),
        moved_rows=_tensor(moved_rows, torch.int32, device),
        flat_sums=_tensor(flat_sums, torch.int32, device),
        moved_sums=_tensor(moved_sums, torch.int32, device),
    )
