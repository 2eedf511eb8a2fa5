"""The GPU's view of a layout: steps, tiles and work items hold every product once and read nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from conv_cases import random_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_kernels import GroupLayout
from dsp_kernels.conv import tiles
from dsp_kernels.layout import gray_order, runs

# Stretches of the nine layers for G groups: (G, as released, ordered).
RUNS = [(2, 94, 18), (3, 147, 35), (4, 198, 52)]
KERNELS = [(1, 1), (3, 3), (1, 3), (2, 2)]


@st.composite
def layouts(draw: st.DrawFn) -> GroupLayout:
    """Overlapping, empty and single-channel groups, dead filters, odd and whole sizes."""
    sizes = st.one_of(st.integers(1, 70), st.sampled_from([8, 16, 64, 128]))
    return random_layout(
        random.Random(draw(st.integers(0, 2**31))), draw(sizes), draw(sizes), draw(st.integers(1, 6))
    )


def weight_places(layout: GroupLayout, kernel: tuple[int, int]) -> dict[tuple[int, int, int, int], int]:
    """(filter, channel, row, column) of every packed weight, with its place: the format, read off anew."""
    places, at = {}, 0
    for channels, filters in layout.groups:
        for f in filters:
            for c in channels:
                for y in range(kernel[0]):
                    for x in range(kernel[1]):
                        places[f, c, y, x] = at
                        at += 1
    assert at == layout.weight_numel(kernel)
    return places


def offsets(word: int) -> tuple[int, int]:
    return word >> 16, ((word & 0xFFFF) ^ 0x8000) - 0x8000


def walk(table: tiles.Tiles) -> list[tuple[int, int, int, tuple[int, int], tuple[int, ...], bool]]:
    """What the kernel multiplies, by its tables alone: (channel written, channel read, packed weight's place,
    offset of the tap, phase, whether in a step with holes), zero weights left out.
    """
    found = []
    entries, valid = table.entries.numpy(), table.read.numpy() == -1
    # One step more than there are, which is empty: kernels load it ahead.
    assert (table.read.numpy()[~valid] == 0).all() and (entries[-1] == [-1, 0]).all() and not valid[-1].any()
    assert len(entries) == len(valid) == 1 + sum({i[0]: i[1] + i[2] for i in table.items.tolist()}.values())
    for item in table.items.tolist():
        first, full, other, tile, row, *phase = item[:9]
        assert item[9:] == [0] * (tiles.ITEM - 9)
        columns = table.outputs[row].tolist()
        for step in range(full + other):
            weights = table.weight_index[tile + step].numpy()
            for k, n in zip(*np.nonzero(weights >= 0), strict=True):
                start, word = entries[first + step][k // tiles.CHUNK].tolist()
                assert start >= 0 and columns[n] >= 0
                if step < full:
                    assert valid[first + step][k], "a hole in a step that zeroes none"
                else:
                    assert valid[first + step][k], "a weight for a channel that is zeroed"
                found.append(
                    (columns[n], start + int(k) % tiles.CHUNK, int(weights[k, n]), offsets(word),
                     tuple(phase), step >= full)
                )  # fmt: skip
    return found


@settings(max_examples=40)
@given(
    layout=layouts(),
    kernel=st.sampled_from(KERNELS),
    dilation=st.sampled_from([(1, 1), (2, 3)]),
    block_n=st.sampled_from([16, 32, 64]),
    block_k=st.sampled_from([16, 32, 64]),
    data=st.data(),
)
def test_every_product_of_the_forward_is_in_the_items_once(
    layout: GroupLayout,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    block_n: int,
    block_k: int,
    data: st.DataObject,
) -> None:
    align = data.draw(st.sampled_from([a for a in (1, 2, 4, 8) if layout.in_channels % a == 0]))
    padding = data.draw(st.sampled_from([(0, 0), (1, 2)]))
    table = tiles.forward_tiles(
        layout, kernel, padding, dilation, block_n=block_n, block_k=block_k, align=align
    )
    expected = {
        (f, c, place, (y * dilation[0], x * dilation[1]), (0, 0, -padding[0], -padding[1]))
        for (f, c, y, x), place in weight_places(layout, kernel).items()
    }
    found = walk(table)
    assert len(found) == len(expected) and {entry[:5] for entry in found} == expected
    # Every filter is written once, dead ones too.
    assert sorted(f for f in table.outputs.flatten().tolist() if f >= 0) == list(range(layout.out_channels))
    # A full step reads its group's channels alone; none reads beyond the tensor or off its alignment.
    readers = [set(channels) for channels, filters in layout.groups if filters]
    for item in table.items.tolist():
        first, full, other = item[:3]
        mine = [f for f in table.outputs[item[4]].tolist() if f >= 0]
        group = next((r for r, (_, fs) in zip(readers, _live(layout), strict=True) if mine[0] in fs), set())
        for step in range(first, first + full + other):
            for start, _ in table.entries[step].tolist():
                if start < 0:
                    continue
                assert start % align == 0 and start + tiles.CHUNK <= max(layout.in_channels, tiles.CHUNK)
                if step < first + full:
                    assert set(range(start, start + tiles.CHUNK)) <= group
    assert table.partial == any(item[2] > 0 for item in table.items.tolist())
    assert table.most_steps == max((item[1] + item[2] for item in table.items.tolist()), default=0)
    assert table.figures.macs == layout.pairs * kernel[0] * kernel[1]
    assert table.figures.padded_macs == sum(
        (item[1] + item[2]) * block_k * block_n for item in table.items.tolist()
    )


def _live(layout: GroupLayout) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(channels, filters) for channels, filters in layout.groups if filters]


@settings(max_examples=40)
@given(
    layout=layouts(),
    kernel=st.sampled_from(KERNELS),
    stride=st.sampled_from([(1, 1), (2, 2), (3, 1)]),
    dilation=st.sampled_from([(1, 1), (2, 1)]),
    padding=st.sampled_from([(0, 0), (1, 1)]),
)
def test_every_product_of_the_input_s_gradient_is_in_the_items_once(
    layout: GroupLayout,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """For each pixel of the input, one after the other: its phase's products are those of the definition."""
    align = next(a for a in (8, 4, 2, 1) if layout.out_channels % a == 0)
    table = tiles.grad_input_tiles(
        layout, kernel, stride, padding, dilation, block_n=16, block_k=32, align=align
    )
    places = weight_places(layout, kernel)
    by_phase: dict[tuple[int, ...], set[tuple[int, int, int, tuple[int, int]]]] = {}
    found = walk(table)
    for c, f, place, offset, phase, _ in found:
        assert (c, f, place, offset) not in by_phase.setdefault(phase, set())
        by_phase[phase].add((c, f, place, offset))
    phases = {tuple(item[5:9]) for item in table.items.tolist()}
    assert len({phase[:2] for phase in phases}) == len(phases) == stride[0] * stride[1]
    for phase in phases:
        row, column, out_y, out_x = phase
        # Pixel (row + i s, column + j s) takes filter f at tap (y, x) from output pixel (out + i + dy, ...).
        expected = {
            (c, f, place, ((row + padding[0] - y * dilation[0]) // stride[0] - out_y,
                           (column + padding[1] - x * dilation[1]) // stride[1] - out_x))
            for (f, c, y, x), place in places.items()
            if (row + padding[0] - y * dilation[0]) % stride[0] == 0
            and (column + padding[1] - x * dilation[1]) % stride[1] == 0
        }  # fmt: skip
        assert by_phase.get(phase, set()) == expected
        written = [
            c
            for item in table.items.tolist()
            if tuple(item[5:9]) == phase
            for c in table.outputs[item[4]].tolist()
            if c >= 0
        ]
        assert sorted(written) == list(range(layout.in_channels)), "a channel is written twice, or not at all"


@settings(max_examples=40)
@given(
    layout=layouts(),
    kernel=st.sampled_from(KERNELS),
    block_n=st.sampled_from([16, 64]),
    block_k=st.sampled_from([16, 64]),
)
def test_every_weight_s_gradient_has_one_place(
    layout: GroupLayout, kernel: tuple[int, int], block_n: int, block_k: int
) -> None:
    align, filter_align = (
        next(a for a in (8, 4, 2, 1) if n % a == 0) for n in (layout.in_channels, layout.out_channels)
    )
    table = tiles.grad_weight_tiles(
        layout,
        kernel,
        (1, 1),
        (1, 2),
        block_n=block_n,
        block_k=block_k,
        align=align,
        filter_align=filter_align,
    )
    position = table.position.tolist()
    assert len(set(position)) == len(position) == layout.weight_numel(kernel)
    for (f, c, y, x), place in weight_places(layout, kernel).items():
        item, cell = divmod(position[place], block_k * block_n)
        step, row = table.items[item].tolist()
        k, n = divmod(cell, block_n)
        start, word = table.entries[step][k // tiles.CHUNK].tolist()
        chunk = table.filters[row][n // tiles.CHUNK].item()
        assert (start + k % tiles.CHUNK, chunk + n % tiles.CHUNK) == (c, f)
        assert offsets(word) == (y, 2 * x)


@given(layout=layouts())
def test_runs_are_whole_chunks_that_cover_the_channels(layout: GroupLayout) -> None:
    total = layout.in_channels
    align = next(a for a in (8, 4, 2, 1) if total % a == 0)
    for channels, filters in _live(layout):
        wanted = set(channels)
        chunks = tiles.cover(sorted(channels), total, align)
        covered: list[int] = []
        for start, valid in chunks:
            assert start % align == 0 and len(valid) == tiles.CHUNK and any(valid)
            for i, v in enumerate(valid):
                assert not v or start + i in wanted
            covered += [start + i for i, v in enumerate(valid) if v]
        assert sorted(covered) == sorted(wanted), "each channel once"
        stretches = tiles.aligned_runs(channels, total, align)
        assert [s for s, _ in stretches] == sorted(s for s, _ in stretches)
        for start, length in stretches:
            assert start % align == 0 and (length % 8 == 0 or align < 8)
        if align == 8:
            assert all(length % 8 == 0 for _, length in stretches)
            assert len(stretches) <= len(runs(sorted(channels)))
        assert filters


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(2, 4),
    channels=st.integers(1, 200),
    filters=st.integers(4, 40),
)
def test_ordered_channels_come_in_few_runs(seed: int, groups: int, channels: int, filters: int) -> None:
    """2, 4 and 8 runs in all for 2, 3 and 4 groups, in the planner's own figures, on random layouts."""
    rng = random.Random(seed)
    membership = [rng.randrange(2**groups) for _ in range(channels)]
    order = gray_order(membership)
    sets = [[i for i, c in enumerate(order) if membership[c] >> g & 1] for g in range(groups)]
    owners = [f % groups for f in range(filters)]
    layout = GroupLayout(
        channels,
        filters,
        [(s, [f for f, o in enumerate(owners) if o == g]) for g, s in enumerate(sets) if s],
    )
    align = next(a for a in (8, 4, 2, 1) if channels % a == 0)
    figures = tiles.forward_tiles(layout, (1, 1), (0, 0), (1, 1), block_n=16, block_k=32, align=align).figures
    most = {2: 2, 3: 4, 4: 8}[groups]
    assert figures.runs <= most and figures.aligned_runs <= figures.runs


def figures(layout: GroupLayout) -> tiles.Figures:
    align = next(a for a in (8, 4, 2, 1) if layout.in_channels % a == 0)
    return tiles.forward_tiles(layout, (3, 3), (1, 1), (1, 1), block_n=16, block_k=32, align=align).figures


@pytest.mark.parametrize(("groups", "released", "ordered"), RUNS)
def test_figures_of_the_authors_networks(
    authors_data: Path, groups: int, released: int, ordered: int
) -> None:
    """The inputs of the released ResNet-20's second convolutions, private to their blocks: stretches of
    channels in the order of the release, and in Gray order.
    """
    stored = json.loads((authors_data / f"resnet20_g{groups}.json").read_text())["groups"]
    names = [name for name in stored if name.endswith("conv_b")]
    assert len(names) == 9
    before = after = 0
    for name in names:
        of = [(c, f) for c, f in stored[name] if f]
        channels = 1 + max(i for c, _ in of for i in c)
        filters = 1 + max(i for _, f in of for i in f)
        order = gray_order([{g for g, (c, _) in enumerate(of) if i in c} for i in range(channels)])
        place = {old: new for new, old in enumerate(order)}
        found = figures(GroupLayout(channels, filters, [(sorted(place[i] for i in c), f) for c, f in of]))
        plain = figures(GroupLayout(channels, filters, of))
        assert found.runs <= {2: 2, 3: 4, 4: 8}[groups], name
        assert found.aligned_runs <= found.runs and found.padded_macs <= plain.padded_macs
        assert found.macs == plain.macs == 9 * sum(len(c) * len(f) for c, f in of)
        before, after = before + plain.runs, after + found.runs
    assert (before, after) == (released, ordered)


def test_what_the_tables_refuse() -> None:
    layout = GroupLayout(8, 8, [(range(8), range(8))])
    good = {"block_n": 16, "block_k": 16}
    with pytest.raises(ValueError, match="spans 32769 pixels"):
        tiles.forward_tiles(layout, (2, 1), (0, 0), (2**15, 1), **good)
    with pytest.raises(ValueError, match="align must be 1, 2, 4 or 8, got 3"):
        tiles.forward_tiles(layout, (1, 1), (0, 0), (1, 1), align=3, **good)
    for block in ({"block_n": 8, "block_k": 16}, {"block_n": 16, "block_k": 48}):
        with pytest.raises(ValueError, match="powers of two of at least 16"):
            tiles.grad_weight_tiles(layout, (1, 1), (0, 0), (1, 1), **block)
