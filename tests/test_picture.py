"""Pictures: what is drawn is what the layouts say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from dsp_kernels import GroupLayout
from dsprune.models import cifar_resnet
from dsprune.picture import (
    PALETTE,
    LayerPicture,
    channel_order,
    draw_report,
    draw_structure,
    group_color,
    layer_image,
    layers_of,
)

LAYER = LayerPicture("conv", 6, 5, (((0, 2), (1, 3)), ((2, 5), (4,)), ((), ())))


def masked(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random groups on every 3x3 conv but the stem."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and "stem" not in name:
            group = torch.randint(0, 4, (module.out_channels,), generator=generator)
            reads = torch.rand(4, module.in_channels, generator=generator) < 0.5
            mask = reads[group][:, :, None, None].expand_as(module.weight).float()
            prune.custom_from_mask(module, "weight", mask)
    return model


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def has_color(image: np.ndarray, color: tuple[float, ...]) -> bool:
    return bool((np.abs(image[..., :3] - np.array(color)) < 0.01).all(-1).any())


def test_layer_numbers() -> None:
    assert LAYER.kept == 6 / 30
    assert LAYER.dead_filters == 2


def test_image_is_sorted_by_group() -> None:
    image = layer_image(LAYER)
    order = channel_order(LAYER)
    assert sorted(order) == list(range(6))
    first, second = group_color(0), group_color(1)
    columns = {channel: position for position, channel in enumerate(order)}
    for row in (0, 1):
        painted = {c for c in range(6) if np.allclose(image[row, columns[c]], first)}
        assert painted == {0, 2}
    assert {c for c in range(6) if np.allclose(image[2, columns[c]], second)} == {2, 5}
    assert np.allclose(image[3:], 1)  # dead filters are white
    # Channels with the same readers are together, unread ones last.
    assert set(order[3:]) == {1, 3, 4}
    assert order.index(2) == 1


def test_every_group_is_one_run_for_two_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    reads = torch.rand(2, 40, generator=generator) < 0.5
    groups = tuple((tuple(r.nonzero().flatten().tolist()), (i,)) for i, r in enumerate(reads))
    order = channel_order(LayerPicture("x", 40, 2, groups))
    for channels, _ in groups:
        positions = sorted(order.index(c) for c in channels)
        assert positions == list(range(positions[0], positions[0] + len(positions)))


def test_layers_of_structure_mask_and_zeros_agree() -> None:
    model = masked(cifar_resnet(20))
    by_mask = layers_of(model)
    structure = {
        layer.name: GroupLayout.from_mask(model.get_submodule(layer.name).weight_mask[:, :, 0, 0] != 0)
        for layer in by_mask
    }
    assert len(by_mask) == 18
    assert layers_of(structure) == by_mask
    for layer in by_mask:
        prune.remove(model.get_submodule(layer.name), "weight")
    assert layers_of(model) == by_mask


def test_layers_of_a_packed_network() -> None:
    import dsprune

    model = masked(cifar_resnet(20)).eval()
    packed = dsprune.pack(model, torch.zeros(1, 3, 8, 8))
    expected = {layer.name: layer.kept for layer in layers_of(model)}
    assert {layer.name: layer.kept for layer in layers_of(packed)} == expected


@pytest.mark.parametrize("source", [3, None, "model", [1]])
def test_layers_of_something_else(source: object) -> None:
    with pytest.raises(TypeError, match="source"):
        layers_of(source)


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_structure(cifar_resnet(20), tmp_path / "x.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_structure({}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_colors_are_distinct() -> None:
    colors = [group_color(i) for i in range(2 * len(PALETTE))]
    assert len(set(colors)) >= 2 * len(PALETTE) - 1  # black has no darker form
    assert all(0 <= part <= 1 for color in colors for part in color)


@pytest.mark.parametrize(("depth", "layers"), [(20, 18), (56, 54)])
def test_draw_structure(tmp_path: Path, depth: int, layers: int) -> None:
    model = masked(cifar_resnet(depth))
    assert len(layers_of(model)) == layers
    image = read_png(draw_structure(model, tmp_path / "new" / "structure.png"))
    assert image.shape[0] > 500 and image.shape[1] > 900
    assert all(has_color(image, group_color(group)) for group in range(4))
    # Panels fill the picture: no empty band at the bottom.
    assert (image[int(0.9 * len(image)) :, :, :3] < 0.99).any()


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    path = draw_structure({"conv": LAYER}, tmp_path / f"a.{suffix}")
    assert path.stat().st_size > 1000


def test_many_groups_and_one_layer(tmp_path: Path) -> None:
    groups = tuple(((i, (i + 1) % 32), (i,)) for i in range(32))
    image = read_png(draw_structure({"c": LayerPicture("c", 32, 32, groups)}, tmp_path / "a.png"))
    assert all(has_color(image, group_color(group)) for group in range(8))


def test_draw_report(tmp_path: Path) -> None:
    model = masked(cifar_resnet(20))
    layers = layers_of(model)
    path = draw_report(
        model,
        tmp_path / "report.png",
        macs={layer.name: (layer.kept * 1e6, 1e6) for layer in layers},
        accuracy={"dense": 99.0, "pruned": 12.5, "packed": 98.6},
        latency={1: {"dense": 1.0, "packed": 0.5}, 128: {"dense": 10.0, "packed": 4.0}},
        title="A title",
        subtitle="more",
    )
    image = read_png(path)
    assert image.shape[1] > image.shape[0] > 800
    right = image[:, int(0.7 * image.shape[1]) :]
    assert all(has_color(right, group_color(group)) for group in range(4))
