"""Pictures of what was learned: which group of filters reads which input channels, layer by layer.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), told apart by colour-blind readers;
beyond eight groups they repeat, darker.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dsprune.pack import PackedNetwork

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_PRUNED = "#EDEDEA"
_DEAD = "#FFFFFF"
_INK = "#222222"
_QUIET = "#6B6B6B"


@dataclass(frozen=True)
class LayerPicture:
    """One layer: groups of (channels, filters) of a conv with these many channels and filters."""

    name: str
    in_channels: int
    out_channels: int
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @property
    def kept(self) -> float:
        """The share of the (filter, channel) pairs that is left."""
        pairs = sum(len(channels) * len(filters) for channels, filters in self.groups)
        return pairs / (self.in_channels * self.out_channels)

    @property
    def dead_filters(self) -> int:
        """How many filters belong to no group that reads anything."""
        return self.out_channels - sum(len(filters) for channels, filters in self.groups if channels)


def layers_of(source: Any) -> list[LayerPicture]:
    """The layers of a structure (a mapping from names to `GroupLayout`), or of a network.

    Of a network, dense, masked or packed: `PermutedGroupedConv2d` by its layout, a conv by its prune mask or
    by the zeros in its weights; filters that read the same channels form a group. Convs with nothing pruned
    and convs that are grouped already are left out. Raises TypeError for anything else, ValueError where no
    layer is left.
    """
    if isinstance(source, nn.Module):
        if isinstance(source, PackedNetwork):
            source = source.dense_model()
        layers = [layer for name, module in source.named_modules() if (layer := _of_module(name, module))]
    elif isinstance(source, Mapping) or (hasattr(source, "keys") and hasattr(source, "__getitem__")):
        layers = [_of_layout(name, source[name]) for name in source.keys()]  # noqa: SIM118
    else:
        raise TypeError(f"source: expected a network or a structure, got {type(source).__name__}")
    if not layers:
        raise ValueError("source: nothing to draw, no layer is pruned")
    return layers


def _of_layout(name: str, layout: Any) -> LayerPicture:
    groups = tuple((tuple(map(int, c)), tuple(map(int, f))) for c, f in layout.groups)
    return LayerPicture(name, int(layout.in_channels), int(layout.out_channels), groups)


def _of_module(name: str, module: nn.Module) -> LayerPicture | None:
    layout = getattr(module, "layout", None)
    if layout is not None and hasattr(layout, "groups"):
        return _of_layout(name, layout)
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return None
    mask = getattr(module, "weight_mask", None)
    kept = (mask if isinstance(mask, torch.Tensor) else module.weight.detach()) != 0
    return _of_mask(name, kept.flatten(2).any(2).cpu().numpy())


def _of_mask(name: str, mask: np.ndarray) -> LayerPicture | None:
    if mask.all():
        return None
    rows: dict[bytes, list[int]] = {}
    for index, row in enumerate(mask):
        if row.any():
            rows.setdefault(row.tobytes(), []).append(index)
    groups = tuple(
        (tuple(np.flatnonzero(mask[filters[0]]).tolist()), tuple(filters)) for filters in rows.values()
    )
    return LayerPicture(name, mask.shape[1], mask.shape[0], groups)


def group_color(index: int) -> tuple[float, float, float]:
    """The colour of a group, as red, green and blue between 0 and 1."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(PALETTE[index % len(PALETTE)])
    shade = 0.72 ** (index // len(PALETTE))
    return red * shade, green * shade, blue * shade


def channel_order(layer: LayerPicture) -> list[int]:
    """All channels, those with the same readers together, in Gray-code order of their readers, so that each
    group's channels are few runs; unread channels come last."""

    def rank(channel: int) -> tuple[bool, int]:
        code = 0
        for bit, (_, filters) in enumerate(layer.groups):
            if filters and channel in sets[bit]:
                code |= 1 << bit
        position = code
        while code := code >> 1:
            position ^= code
        return position == 0, position

    sets = [set(channels) for channels, _ in layer.groups]
    return sorted(range(layer.in_channels), key=rank)


def layer_image(layer: LayerPicture) -> np.ndarray:
    """The layer as a picture (filters, channels, 3): filters sorted by group, dead ones last; channels in
    `channel_order`; kept pairs in the group's colour."""
    from matplotlib.colors import to_rgb

    image = np.empty((layer.out_channels, layer.in_channels, 3))
    image[:] = to_rgb(_PRUNED)
    column = {channel: position for position, channel in enumerate(channel_order(layer))}
    row = 0
    for index, (channels, filters) in enumerate(layer.groups):
        if channels and filters:
            columns = [column[channel] for channel in channels]
            image[row : row + len(filters), columns] = group_color(index)
            row += len(filters)
    image[row:] = to_rgb(_DEAD)
    return image


def _panel(axes: Axes, layer: LayerPicture, font: float) -> None:
    rows, columns = layer.out_channels, layer.in_channels
    large = max(rows, columns) > 192
    axes.imshow(
        layer_image(layer), aspect="auto", interpolation="antialiased" if large else "nearest",
        extent=(0, columns, rows, 0),
    )  # fmt: skip
    live = rows - layer.dead_filters
    if live < rows:
        axes.fill_between(
            [0, columns], live, rows, facecolor="none", hatch="////", edgecolor="#BBBBBB", linewidth=0
        )
    if max(rows, columns) <= 40:
        width = 0.5 if max(rows, columns) <= 24 else 0.25
        axes.vlines(range(1, columns), 0, live, colors="white", linewidth=width)
        axes.hlines(range(1, live), 0, columns, colors="white", linewidth=width)
    edge = 0
    for channels, filters in layer.groups:
        if channels and filters:
            edge += len(filters)
            axes.axhline(edge, color="white", linewidth=1.4)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#C8C8C8")
        spine.set_linewidth(0.6)
    axes.set_title(layer.name, fontsize=font, color=_INK, pad=2.5)
    axes.set_xlabel(
        f"{columns} → {rows}  ·  {100 * layer.kept:.0f}% kept", fontsize=font * 0.9, color=_QUIET, labelpad=2
    )


def _split(figure: Figure | SubFigure, rows: int, columns: int, **options: Any) -> list[SubFigure]:
    return list(np.asarray(figure.subfigures(rows, columns, **options)).flat)


def _grid(figure: Figure | SubFigure, layers: Sequence[LayerPicture], columns: int, font: float) -> None:
    rows = math.ceil(len(layers) / columns)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, layer in zip(panels.flat, layers, strict=False):
        _panel(axes, layer, font)
    for axes in panels.flat[len(layers) :]:
        axes.set_axis_off()


def _legend(figure: Figure | SubFigure, layers: Sequence[LayerPicture], y: float, font: float) -> None:
    from matplotlib.patches import Patch

    count = min(max(len(layer.groups) for layer in layers), 12)
    handles = [Patch(facecolor=group_color(i), label=f"group {i + 1}") for i in range(count)]
    handles.append(Patch(facecolor=_PRUNED, edgecolor="#C8C8C8", linewidth=0.6, label="pruned"))
    if any(layer.dead_filters for layer in layers):
        handles.append(
            Patch(facecolor="white", edgecolor="#BBBBBB", hatch="////", linewidth=0.6, label="dead filters")
        )
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.005, y), ncols=len(handles), fontsize=font,
        frameon=False, handlelength=1.1, handleheight=1.1, columnspacing=1.4, handletextpad=0.5,
        borderaxespad=0,
    )  # fmt: skip


def _columns(count: int) -> int:
    """Six to nine panels a row, more for more layers, whichever leaves the fewest places empty."""
    if count <= 6:
        return count
    low, high = (6, 7) if count <= 24 else (7, 9)
    return min(range(low, high + 1), key=lambda columns: (-count % columns, abs(2 * columns - low - high)))


def draw_structure(source: Any, path: str | Path, *, title: str = "Learned structure") -> Path:
    """Draw every pruned layer of `source` (see `layers_of`) to an image file and return its path.

    One panel a layer: a row is a filter, sorted by group, a column an input channel, sorted by its readers,
    a coloured cell a kernel that is left. The file's ending (.png, .svg, .pdf) chooses the format. Raises
    TypeError and ValueError as `layers_of` does.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = layers_of(source)
    columns = _columns(len(layers))
    rows = math.ceil(len(layers) / columns)
    width = max(7.0, 1.75 * columns)
    height = 1.0 + 1.95 * rows
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    head = 0.95 / height
    top, body = _split(figure, 2, 1, height_ratios=[head, 1 - head], hspace=0)
    top.text(0.005, 0.78, title, fontsize=15, fontweight="bold", color=_INK, va="center")
    top.text(
        0.005, 0.45, "one row a filter, sorted by group; one column an input channel, sorted by its readers",
        fontsize=9, color=_QUIET, va="center",
    )  # fmt: skip
    _legend(top, layers, 0.28, 9)
    body.set_facecolor("white")
    _grid(body, layers, columns, 7.5)
    body.subplots_adjust(
        left=0.012,
        right=0.988,
        top=1 - 0.22 / (height - 0.95),
        bottom=0.28 / (height - 0.95),
        wspace=0.12,
        hspace=0.36,
    )
    return _write(figure, path)


def _write(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=_INK, pad=7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#C8C8C8")
    axes.tick_params(length=0, labelsize=8, colors=_INK)


def _macs_panel(axes: Axes, layers: Sequence[LayerPicture], macs: Mapping[str, tuple[float, float]]) -> None:
    _plain(axes, "Multiply-adds per layer: kept of dense")
    shown = [layer for layer in layers if layer.name in macs]
    largest = max((macs[layer.name][1] for layer in shown), default=1.0)
    unit, scale = ("M", 1e6) if largest >= 1e6 else ("k", 1e3)
    for y, layer in enumerate(shown):
        kept, dense = macs[layer.name]
        axes.barh(y, dense / scale, height=0.74, color=_PRUNED, edgecolor="#C8C8C8", linewidth=0.5)
        pairs = [len(channels) * len(filters) for channels, filters in layer.groups]
        left = 0.0
        for index, count in enumerate(pairs):
            share = kept / scale * count / max(1, sum(pairs))
            axes.barh(y, share, left=left, height=0.74, color=group_color(index))
            left += share
        axes.text(
            dense / scale + largest / scale * 0.015, y, f"{100 * kept / dense:.0f}%",
            va="center", fontsize=7.5, color=_QUIET,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [layer.name for layer in shown], fontsize=7.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, largest / scale * 1.12)
    axes.set_xlabel(f"{unit} multiply-adds per image", fontsize=8, color=_QUIET)
    axes.margins(y=0)


def _accuracy_panel(axes: Axes, accuracy: Mapping[str, float]) -> None:
    _plain(axes, "Test accuracy")
    low = min(accuracy.values())
    floor = 0.0 if low < 60 else 10 * math.floor((low - 5) / 10)
    for y, value in enumerate(accuracy.values()):
        color = PALETTE[0] if y == len(accuracy) - 1 else "#9A9A9A"
        axes.plot([floor, value], [y, y], color=color, linewidth=2, alpha=0.45, solid_capstyle="butt")
        axes.plot([value], [y], "o", color=color, markersize=8)
        axes.annotate(
            f"{value:.2f}%", (value, y), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8.5,
            color=_INK, fontweight="bold" if y == len(accuracy) - 1 else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(accuracy)), list(accuracy), fontsize=8.5)
    axes.set_ylim(len(accuracy) - 0.4, -0.6)
    axes.set_xlim(floor, 100 + (100 - floor) * 0.22)
    ticks = np.linspace(floor, 100, 5)
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])


def _latency_panel(axes: Axes, latency: Mapping[int, Mapping[str, float]]) -> None:
    _plain(axes, "Latency, best dense form against packed")
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    labels, y = [], 0.0
    for batch, times in latency.items():
        dense, packed = times["dense"], times["packed"]
        longest = max(dense, packed)
        for name, value in (("dense", dense), ("packed", packed)):
            axes.barh(y, value / longest, height=0.8, color="#B8B8B8" if name == "dense" else PALETTE[2])
            note = f"{value:.2f} ms" + (f"  ({dense / packed:.2f}x)" if name == "packed" else "")
            axes.text(value / longest + 0.015, y, note, va="center", fontsize=8.5, color=_INK)
            labels.append((y, f"batch {batch}, {name}"))
            y += 0.9
        y += 0.5
    axes.set_yticks([position for position, _ in labels], [text for _, text in labels], fontsize=8.5)
    axes.set_ylim(y - 0.6, -0.7)
    axes.set_xlim(0, 1.5)


def draw_report(
    source: Any,
    path: str | Path,
    *,
    macs: Mapping[str, tuple[float, float]],
    accuracy: Mapping[str, float],
    latency: Mapping[int, Mapping[str, float]],
    title: str,
    subtitle: str = "",
) -> Path:
    """Draw one picture of a whole run to an image file and return its path.

    `macs`: for each layer's name, the multiply-adds kept and dense; `accuracy`: names and percent, in order,
    the last one the result; `latency`: for each batch size, milliseconds of "dense" and "packed". Raises
    TypeError and ValueError as `layers_of` does.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = layers_of(source)
    columns = _columns(len(layers))
    rows = math.ceil(len(layers) / columns)
    height = max(9.2, 1.5 + 1.75 * rows)
    figure = Figure(figsize=(16.5, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    head = 1.15 / height
    top, body = _split(figure, 2, 1, height_ratios=[head, 1 - head], hspace=0)
    top.text(0.008, 0.74, title, fontsize=19, fontweight="bold", color=_INK, va="center")
    top.text(0.008, 0.44, subtitle, fontsize=11.5, color=_QUIET, va="center")
    _legend(top, layers, 0.24, 9.5)
    left, right = _split(body, 1, 2, width_ratios=[1.9, 1], wspace=0)
    _grid(left, layers, columns, 8)
    inner = height - 1.15
    left.subplots_adjust(
        left=0.012,
        right=0.985,
        top=1 - 0.22 / inner,
        bottom=0.3 / inner,
        wspace=0.1,
        hspace=0.55 / (inner / rows),
    )
    grid = right.add_gridspec(3, 1, height_ratios=[max(4.2, 0.2 * len(layers)), 1.25, 1.75], hspace=0.38)
    _macs_panel(right.add_subplot(grid[0]), layers, macs)
    _accuracy_panel(right.add_subplot(grid[1]), accuracy)
    _latency_panel(right.add_subplot(grid[2]), latency)
    right.subplots_adjust(left=0.25, right=0.985, top=1 - 0.25 / inner, bottom=0.12 / inner)
    return _write(figure, path)
