"""The GPU's view of a layout: chunks of channels, steps along K, tiles of filters, and the work items of one
launch. Host code; nothing here needs Triton or a device.

The convolution is one matrix product a group, M pixels by N filters, summed over K = channels times taps,
with activations in NHWC. It is cut like this:

chunk
    Eight neighbouring channels, the unit of reading: 16 bytes in half precision. A group's channels are
    covered by as few chunks as possible, each starting at a multiple of ``align`` channels. A chunk is *full*
    where the group reads all eight, else *partial*: the channels in between, its *holes*, are not the
    group's. They have zero rows in the weights, and kernels zero them in the activations as well, so that
    0 * Inf does not reach a filter that does not read them.
step
    ``block_k / 8`` entries, each a chunk at a tap of the kernel: what one turn of the K loop multiplies. Taps
    and chunks are packed into steps together, so a group of one chunk and a 3x3 kernel fills 72 of K and not
    nine padded blocks. Steps of full chunks come first; only the others pay for the zeroing of holes.
item
    A tile of up to ``block_n`` outputs of a group and the group's steps. All items, and those of outputs that
    read nothing, go into one launch.

The gradient for the input is the same with filters read and channels written: channels read by the same
groups (an *atom*) take the place of a group's filters. A stride splits the image into phases, each with the
taps that meet it and items of its own, so nothing is scattered and no zeros are multiplied.

Figures (:class:`Figures`, ``tiles.figures``), for reports and cost models; a group, or an atom at a phase:

==================  ========================================================================================
``channels``        channels read, ``filters``: outputs written, ``taps``: taps of the kernel that reach them
``runs``            stretches of neighbouring channels read; ``aligned_runs``: the same of chunks
``chunks``          chunks read, ``partial_chunks`` of them with holes
``k``, ``k_pad``    length of K: channels x taps; with holes and the last step's filling
``n``, ``n_pad``    outputs; filled up to whole tiles
``macs``            multiply-adds an output pixel (k n); ``padded_macs``: what is computed (k_pad n_pad)
==================  ========================================================================================

Totals over the groups have the same names; ``waste`` is ``padded_macs / macs - 1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..layout import INT32_MAX, GroupLayout, runs
from .shapes import Pair

__all__ = [
    "CHUNK",
    "ITEM",
    "Figures",
    "GroupFigures",
    "Tiles",
    "WeightTiles",
    "aligned_runs",
    "atoms",
    "cover",
    "forward_tiles",
    "grad_input_tiles",
    "grad_weight_tiles",
]

CHUNK = 8
# Words of an item: first step, full steps, other steps, first weight tile, row of the outputs, then the
# phase: first output row and column, input row and column of that output at tap offset 0. The rest is 0.
ITEM = 12
_TAP_LIMIT = 2**15

Offsets = tuple[int, int, int]  # tap of the kernel, rows and columns from the output pixel's origin
Phase = tuple[int, int, int, int]


@dataclass(frozen=True)
class GroupFigures:
    """What one group (or one atom at one phase) reads, writes and wastes; see the module's text."""

    channels: int
    filters: int
    taps: int
    runs: int
    aligned_runs: int
    chunks: int
    partial_chunks: int
    k_pad: int
    n_pad: int

    @property
    def k(self) -> int:
        return self.channels * self.taps

    @property
    def n(self) -> int:
        return self.filters

    @property
    def macs(self) -> int:
        return self.k * self.n

    @property
    def padded_macs(self) -> int:
        return self.k_pad * self.n_pad


@dataclass(frozen=True)
class Figures:
    """The figures of all groups with work, and their sums."""

    groups: tuple[GroupFigures, ...]

    def _sum(self, name: str) -> int:
        return sum(getattr(g, name) for g in self.groups)

    @property
    def runs(self) -> int:
        return self._sum("runs")

    @property
    def aligned_runs(self) -> int:
        return self._sum("aligned_runs")

    @property
    def chunks(self) -> int:
        return self._sum("chunks")

    @property
    def partial_chunks(self) -> int:
        return self._sum("partial_chunks")

    @property
    def k_pad(self) -> int:
        return self._sum("k_pad")

    @property
    def n_pad(self) -> int:
        return self._sum("n_pad")

    @property
    def macs(self) -> int:
        return self._sum("macs")

    @property
    def padded_macs(self) -> int:
        return self._sum("padded_macs")

    @property
    def waste(self) -> float:
        """The share of multiply-adds beyond those that are needed: 0 for none, 1 for as many again."""
        return self.padded_macs / self.macs - 1 if self.macs else 0.0


@dataclass(frozen=True)
class Tiles:
    """The tables of a launch of the matrix product (forward, or gradient for the input). CPU tensors.

    ``items``: int32 (items, ITEM). ``entries``: int32 (steps + 1, block_k / 8, 2), a chunk's first channel
    (-1: no chunk) and its tap's offset, rows << 16 | columns & 0xffff; the last step is empty, for kernels
    that load one step ahead. ``read``: int16 (steps + 1, block_k), all bits set where a channel of a chunk is
    read, else 0. ``outputs``: int32 (rows, block_n), the channel that each column of a tile
    writes, -1 for none. ``weight_index``: int32 (weight tiles, block_k, block_n), where each weight of a tile
    is in the packed weight, -1 for zero.
    ``output_align``: outputs come in aligned stretches of so many neighbours (1, 2, 4 or 8).
    ``most_steps``: the longest item. ``partial``: there are steps with holes. ``pointwise``: every entry is
    at the output pixel itself, inside the image. ``reach``: the largest tap offset, in rows and in columns.
    """

    block_n: int
    block_k: int
    items: Tensor
    entries: Tensor
    read: Tensor
    outputs: Tensor
    weight_index: Tensor
    output_align: int
    most_steps: int
    partial: bool
    pointwise: bool
    reach: tuple[int, int]
    figures: Figures

    @property
    def n_items(self) -> int:
        return self.items.shape[0]


@dataclass(frozen=True)
class WeightTiles:
    """The tables of the weight's gradient. CPU tensors.

    An item is a step (``block_k`` pairs of channel and tap) by ``block_n / 8`` chunks of filters, summed over
    pixels. ``items``: int32 (items, 2), step and row of ``filters``. ``entries``: as in :class:`Tiles`.
    ``filters``: int32 (rows, block_n / 8), first filters of chunks, -1 for none. ``position``: int32 (packed
    weights,), where each packed weight is in (items, block_k, block_n).
    """

    block_n: int
    block_k: int
    items: Tensor
    entries: Tensor
    filters: Tensor
    position: Tensor
    pointwise: bool
    reach: tuple[int, int]

    @property
    def n_items(self) -> int:
        return self.items.shape[0]


def cover(channels: Sequence[int], total: int, align: int = CHUNK) -> list[tuple[int, list[bool]]]:
    """As few chunks as cover ``channels``: (first channel, which of its eight are meant), in ascending order.

    ``channels``: ascending indices below ``total``. Chunks start at multiples of ``align`` (1, 2, 4 or 8; it
    divides ``total`` if that is more than 8) and end within ``total`` if that has eight channels. A channel
    is meant in one chunk only, also where two overlap.
    """
    last = max(total - CHUNK, 0)
    out: list[tuple[int, list[bool]]] = []
    end = 0
    for c in channels:
        if not out or c >= end:
            start = min(c // align * align, last)
            end = start + CHUNK
            out.append((start, [False] * CHUNK))
        out[-1][1][c - out[-1][0]] = True
    return out


def aligned_runs(channels: Iterable[int], total: int, align: int = CHUNK) -> list[tuple[int, int]]:
    """The chunks that cover ``channels`` as stretches of memory: (first channel, number of channels)."""
    out: list[tuple[int, int]] = []
    for start, _ in cover(sorted(channels), total, align):
        if out and start <= out[-1][0] + out[-1][1]:
            out[-1] = (out[-1][0], start + CHUNK - out[-1][0])
        else:
            out.append((start, CHUNK))
    return out


def atoms(layout: GroupLayout) -> list[tuple[list[int], list[int]]]:
    """Channels read by the same groups: (filters of these groups, channels), each ascending; unread last.

    By their first channel; channels that no filter reads form one atom without filters.
    """
    readers: list[list[int]] = [[] for _ in range(layout.in_channels)]
    for g, (channels, filters) in enumerate(layout.groups):
        if filters:
            for c in channels:
                readers[c].append(g)
    sets: dict[tuple[int, ...], list[int]] = {}
    for c, groups in enumerate(readers):
        sets.setdefault(tuple(groups), []).append(c)
    unread = sets.pop((), [])
    out = [(sorted(f for g in groups for f in layout.groups[g][1]), chans) for groups, chans in sets.items()]
    return [*out, ([], unread)] if unread else out


def _pairs(layout: GroupLayout) -> np.ndarray:
    """int64 (out_channels, in_channels): the position of a filter's weight for a channel in pairs, or -1."""
    out = np.full((layout.out_channels, layout.in_channels), -1, dtype=np.int64)
    at = 0
    for channels, filters in layout.groups:
        size = len(channels) * len(filters)
        if size:
            block = np.arange(at, at + size).reshape(len(filters), len(channels))
            out[np.asarray(filters)[:, None], np.asarray(channels)[None, :]] = block
            at += size
    return out


def _check(kernel: Pair, dilation: Pair, align: int, blocks: tuple[int, int], numel: int) -> None:
    for k, d in zip(kernel, dilation, strict=True):
        if (k - 1) * d >= _TAP_LIMIT:
            raise ValueError(
                f"kernel_size={tuple(kernel)} with dilation={tuple(dilation)} spans {(k - 1) * d + 1} "
                f"pixels; the triton backend takes at most {_TAP_LIMIT}"
            )
    if align not in (1, 2, 4, 8):
        raise ValueError(f"align must be 1, 2, 4 or 8, got {align}")
    block_n, block_k = blocks
    if block_k < 16 or block_n < 16 or block_k & (block_k - 1) or block_n & (block_n - 1):
        raise ValueError(
            f"block_n and block_k must be powers of two of at least 16, got {block_n}, {block_k}"
        )
    if numel > INT32_MAX:
        raise ValueError(f"weight has {numel} elements; the triton backend takes at most {INT32_MAX}")


def _word(dy: int, dx: int) -> int:
    word = (dy & 0xFFFF) << 16 | (dx & 0xFFFF)
    return word - (1 << 32) if word >= 1 << 31 else word


class _Steps:
    """Collects entries into steps, and what each row of K stands for: (source channel, tap) or -1."""

    def __init__(self, block_k: int) -> None:
        self.per_step = block_k // CHUNK
        self.entries: list[tuple[int, int]] = []
        self.valid: list[list[bool]] = []
        self.taps: list[int] = []

    @property
    def count(self) -> int:
        return len(self.entries) // self.per_step

    def add(self, start: int, valid: list[bool], tap: Offsets) -> None:
        self.entries.append((start, _word(tap[1], tap[2])))
        self.valid.append(valid)
        self.taps.append(tap[0])

    def fill(self) -> None:
        while len(self.entries) % self.per_step:
            self.entries.append((-1, 0))
            self.valid.append([False] * CHUNK)
            self.taps.append(-1)

    def add_group(
        self, chunks: list[tuple[int, list[bool]]], taps: Sequence[Offsets], *, split: bool
    ) -> tuple[int, int, int]:
        """All chunks at all taps. Returns the first step, and how many have no holes and how many do.

        ``split``: full chunks first, apart from the others. Entries without a chunk load nothing, so a step
        that they fill up has no holes.
        """
        first = self.count
        if not split:
            self._add_all(chunks, taps)
            self.fill()
            return first, self.count - first, 0
        self._add_all([(start, valid) for start, valid in chunks if all(valid)], taps)
        holes = [(start, valid) for start, valid in chunks if not all(valid)]
        if not holes:
            self.fill()
        full = self.count - first
        self._add_all(holes, taps)
        self.fill()
        return first, full, self.count - first - full

    def _add_all(self, chunks: list[tuple[int, list[bool]]], taps: Sequence[Offsets]) -> None:
        """A step's worth of chunks at all taps, then the next: what one tap has read is still in the
        first-level cache when another reads it.
        """
        for i in range(0, len(chunks), self.per_step):
            for tap in taps:
                for start, valid in chunks[i : i + self.per_step]:
                    self.add(start, valid, tap)

    def sources(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the rows of steps ``first`` to ``last``: source channel (-1: none), tap."""
        a, b = first * self.per_step, last * self.per_step
        starts = np.array([s for s, _ in self.entries[a:b]], dtype=np.int64).reshape(-1, 1)
        valid = np.array(self.valid[a:b], dtype=bool).reshape(-1, CHUNK)
        taps = np.array(self.taps[a:b], dtype=np.int64).reshape(-1, 1)
        channels = np.where(valid, starts + np.arange(CHUNK), -1)
        return channels.reshape(-1), np.broadcast_to(taps, channels.shape).reshape(-1)

    def tables(self) -> tuple[Tensor, Tensor]:
        """``entries`` and ``read`` of :class:`Tiles`, with an empty step after the last."""
        empty = self.per_step
        entries = torch.tensor([*self.entries, *[(-1, 0)] * empty], dtype=torch.int32, device="cpu")
        valid = torch.tensor([*self.valid, *[[False] * CHUNK] * empty], dtype=torch.bool, device="cpu")
        read = -valid.to(torch.int16)
        return entries.reshape(-1, self.per_step, 2), read.reshape(-1, self.per_step * CHUNK)


def _tile(values: Sequence[int], size: int) -> list[list[int]]:
    rows = [list(values[i : i + size]) for i in range(0, len(values), size)]
    for row in rows:
        row += [-1] * (size - len(row))
    return rows


def _alignment(rows: list[list[int]], total: int) -> int:
    """The most of 8, 4, 2, 1 such that each aligned stretch of so many columns writes aligned neighbours."""
    table = np.asarray(rows, dtype=np.int64).reshape(len(rows), -1)
    for align in (8, 4, 2):
        if total % align:
            continue
        parts = table.reshape(-1, align)
        none = (parts < 0).all(axis=1)
        neighbours = (parts == parts[:, :1] + np.arange(align)).all(axis=1) & (parts[:, 0] % align == 0)
        if bool((none | neighbours).all()):
            return align
    return 1


def _build(
    jobs: Sequence[tuple[Sequence[int], Sequence[int], Sequence[Offsets], Phase]],
    pairs: np.ndarray,
    kernel_taps: int,
    block_n: int,
    block_k: int,
    align: int,
    pointwise: bool,
) -> Tiles:
    """``jobs``: (channels read, channels written, taps, phase); ``pairs``: (read, written) -> pair or -1."""
    n_sources, n_outputs = pairs.shape
    steps = _Steps(block_k)
    items: list[list[int]] = []
    rows: list[list[int]] = []
    index: list[np.ndarray] = []
    figures: list[GroupFigures] = []
    weight_tiles = 0
    most = 0
    reach = (0, 0)
    for sources, outputs, taps, phase in jobs:
        if not outputs:
            continue
        chunks = cover(sources, n_sources, align) if taps else []
        first, full, other = steps.add_group(chunks, taps, split=True)
        tiles = _tile(outputs, block_n)
        channels, tap_of = steps.sources(first, first + full + other)
        if chunks:
            reach = (
                max(reach[0], *(abs(dy) for _, dy, _ in taps)),
                max(reach[1], *(abs(dx) for _, _, dx in taps)),
            )
            figures.append(
                GroupFigures(
                    len(sources),
                    len(outputs),
                    len(taps),
                    len(runs(sources)),
                    len(aligned_runs(sources, n_sources, align)),
                    len(chunks),
                    sum(not all(valid) for _, valid in chunks),
                    (full + other) * block_k,
                    len(tiles) * block_n,
                )
            )
        for row in tiles:
            items.append([first, full, other, weight_tiles, len(rows), *phase])
            rows.append(row)
            weight_tiles += full + other
            columns = np.asarray(row)
            pair = pairs[channels[:, None], columns[None, :]]
            none = (channels[:, None] < 0) | (columns[None, :] < 0) | (pair < 0)
            index.append(np.where(none, -1, pair * kernel_taps + tap_of[:, None]).astype(np.int32))
        most = max(most, full + other)
    entries, read = steps.tables()
    table = np.zeros((len(items), ITEM), dtype=np.int32)
    if items:
        table[:, : len(items[0])] = items
    flat = np.concatenate(index) if index else np.empty((0, block_n), dtype=np.int32)
    return Tiles(
        block_n=block_n,
        block_k=block_k,
        items=torch.from_numpy(table),
        entries=entries,
        read=read,
        outputs=torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, block_n),
        weight_index=torch.from_numpy(flat).reshape(-1, block_k, block_n),
        output_align=_alignment(rows, n_outputs),
        most_steps=most,
        partial=any(item[2] for item in items),
        pointwise=pointwise,
        reach=reach,
        figures=Figures(tuple(figures)),
    )


def forward_tiles(
    layout: GroupLayout,
    kernel: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    block_n: int,
    block_k: int,
    align: int = CHUNK,
) -> Tiles:
    """The tables of the forward convolution.

    ``kernel``, ``padding``, ``dilation``: (vertical, horizontal), pixels. ``block_n``, ``block_k``: extent of
    a tile in filters and in K, powers of two from 16. ``align``: where chunks may start, in channels; it
    divides the distance between pixels in memory. Raises ValueError for values that the kernels do not take.
    """
    kh, kw = kernel
    _check(kernel, dilation, align, (block_n, block_k), layout.pairs * kh * kw)
    taps = [(y * kw + x, y * dilation[0], x * dilation[1]) for y in range(kh) for x in range(kw)]
    phase = (0, 0, -padding[0], -padding[1])
    jobs = [(sorted(channels), sorted(filters), taps, phase) for channels, filters in layout.groups]
    jobs.append(([], list(layout.dead_filters), [], phase))
    pointwise = tuple(kernel) == (1, 1) and tuple(padding) == (0, 0)
    return _build(jobs, _pairs(layout).T, kh * kw, block_n, block_k, align, pointwise)


def _phases(
    kernel: int, stride: int, padding: int, dilation: int
) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """Of one axis: (first input pixel, first output pixel of the gradient there, [(tap, offset)]) a phase.

    Pixel y of the input meets output pixel (y + padding - tap dilation) / stride, where that is whole: for
    the pixels of a phase, y = first + j stride, that is the first output pixel + j + offset.
    """
    out = []
    for residue in range(stride):
        first = (residue - padding) % stride
        taps = [
            (k, -((k * dilation - residue) // stride))
            for k in range(kernel)
            if (k * dilation - residue) % stride == 0
        ]
        out.append((first, (first + padding - residue) // stride, taps))
    return out


def grad_input_tiles(
    layout: GroupLayout,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    block_n: int,
    block_k: int,
    align: int = CHUNK,
) -> Tiles:
    """The tables of the gradient for the input: read are filters of ``grad``, written are channels of ``x``.

    Arguments as in :func:`forward_tiles`; ``align`` concerns ``grad``. Raises ValueError likewise.
    """
    kh, kw = kernel
    _check(kernel, dilation, align, (block_n, block_k), layout.pairs * kh * kw)
    vertical = _phases(kh, stride[0], padding[0], dilation[0])
    horizontal = _phases(kw, stride[1], padding[1], dilation[1])
    jobs: list[tuple[Sequence[int], Sequence[int], Sequence[Offsets], Phase]] = []
    for row, y, tall in vertical:
        for column, x, wide in horizontal:
            taps = [(ky * kw + kx, dy, dx) for ky, dy in tall for kx, dx in wide]
            phase = (row, column, y, x)
            for filters, channels in atoms(layout):
                jobs.append((filters if taps else [], channels, taps if filters else [], phase))
    pointwise = (kh, kw, *stride, *padding) == (1, 1, 1, 1, 0, 0)
    return _build(jobs, _pairs(layout), kh * kw, block_n, block_k, align, pointwise)


def grad_weight_tiles(
    layout: GroupLayout,
    kernel: Pair,
    padding: Pair,
    dilation: Pair,
    *,
    block_n: int,
    block_k: int,
    align: int = CHUNK,
    filter_align: int = CHUNK,
) -> WeightTiles:
    """The tables of the gradient for the packed weight.

    Arguments as in :func:`forward_tiles`; ``filter_align`` is ``align`` for ``grad``. Holes need no zeroing
    here: what they give is not read. Raises ValueError likewise, and for results beyond 32-bit indices.
    """
    kh, kw = kernel
    numel = layout.pairs * kh * kw
    _check(kernel, dilation, align, (block_n, block_k), numel)
    taps = [(y * kw + x, y * dilation[0], x * dilation[1]) for y in range(kh) for x in range(kw)]
    pairs = _pairs(layout).T
    steps = _Steps(block_k)
    items: list[tuple[int, int]] = []
    rows: list[list[int]] = []
    position = np.full(numel, -1, dtype=np.int64)
    for channels, filters in layout.groups:
        if not filters:
            continue
        first, count, _ = steps.add_group(
            cover(sorted(channels), layout.in_channels, align), taps, split=False
        )
        covered = cover(sorted(filters), layout.out_channels, filter_align)
        per_row = block_n // CHUNK
        for i in range(0, len(covered), per_row):
            part = covered[i : i + per_row]
            starts = [start for start, _ in part]
            of_column = [start + j if valid[j] else -1 for start, valid in part for j in range(CHUNK)]
            of_column += [-1] * (block_n - len(of_column))
            columns = np.asarray(of_column)
            for step in range(first, first + count):
                channel, tap = steps.sources(step, step + 1)
                pair = pairs[channel[:, None], columns[None, :]]
                k, n = np.nonzero((channel[:, None] >= 0) & (columns[None, :] >= 0) & (pair >= 0))
                position[pair[k, n] * kh * kw + tap[k]] = (len(items) * block_k + k) * block_n + n
                items.append((step, len(rows)))
            rows.append(starts + [-1] * (per_row - len(starts)))
    size = len(items) * block_k * block_n
    if size > INT32_MAX:
        raise ValueError(f"the weight's gradient takes a workspace of {size} elements, at most {INT32_MAX}")
    entries, _ = steps.tables()
    return WeightTiles(
        block_n=block_n,
        block_k=block_k,
        items=torch.tensor(items, dtype=torch.int32, device="cpu").reshape(-1, 2),
        entries=entries,
        filters=torch.tensor(rows, dtype=torch.int32, device="cpu").reshape(-1, block_n // CHUNK),
        position=torch.from_numpy(position.astype(np.int32)),
        pointwise=(kh, kw) == (1, 1) and tuple(padding) == (0, 0),
        reach=((kh - 1) * dilation[0], (kw - 1) * dilation[1]),
    )
