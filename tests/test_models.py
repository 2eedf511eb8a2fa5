"""The built-in networks: published weights load, sizes are the published ones, bad arguments are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dsprune.models import CIFAR_DEPTHS, cifar_resnet, resnet18, resnet50


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_authors_networks_load_and_give_their_logits(authors_data: Path, groups: int) -> None:
    model = cifar_resnet(20).eval()
    model.load_state_dict(load_file(authors_data / f"resnet20_g{groups}.safetensors"))
    reference = load_file(authors_data / f"resnet20_g{groups}.reference.safetensors")
    with torch.no_grad():
        logits = model(reference["images"])
    assert (logits - reference["logits"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("depth", "expected"), [(20, 272_474), (32, 466_906), (44, 661_338), (56, 855_770), (110, 1_730_714)]
)
def test_cifar_parameters_and_depth(depth: int, expected: int) -> None:
    model = cifar_resnet(depth)
    # In the main path: the stem, two convs a block, the classifier.
    main = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in n]
    assert len(main) + 1 == depth
    # Counted by hand, projections included.
    blocks = (depth - 2) // 6
    counted = 3 * 16 * 9 + 32 + 640 + 10
    for stage, (before, width) in enumerate(((16, 16), (16, 32), (32, 64))):
        counted += width * before * 9 + (2 * blocks - 1) * width * width * 9 + 2 * blocks * 2 * width
        counted += before * width + 2 * width if stage else 0
    assert parameters(model) == expected == counted


@pytest.mark.parametrize(("build", "expected"), [(resnet18, 11_689_512), (resnet50, 25_557_032)])
def test_imagenet_parameters_are_the_published_ones(build: object, expected: int) -> None:
    assert parameters(build()) == expected  # type: ignore[operator]


def test_imagenet_state_dict_names_and_shapes() -> None:
    state = resnet50().state_dict()
    shapes = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.downsample.0.weight": (256, 64, 1, 1),
        "layer1.0.downsample.1.num_batches_tracked": (),
        "layer3.5.conv2.weight": (256, 256, 3, 3),
        "layer4.2.bn3.bias": (2048,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "fc.weight": (1000, 2048),
        "fc.bias": (1000,),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert len(state) == 320
    small = resnet18(num_classes=7, in_channels=1).state_dict()
    assert len(small) == 122
    assert small["conv1.weight"].shape == (64, 1, 7, 7)
    assert small["fc.weight"].shape == (7, 512)
    assert small["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert "layer1.0.downsample.0.weight" not in small


@pytest.mark.parametrize("size", [8, 9, 16, 32])
def test_cifar_takes_any_image_size(size: int) -> None:
    model = cifar_resnet(20, num_classes=5, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, size, size)).shape == (2, 5)


def test_strides_halve_the_maps() -> None:
    model = cifar_resnet(20).eval()
    sizes: dict[str, tuple[int, ...]] = {}
    for name in ("stage1", "stage2", "stage3"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: sizes.__setitem__(name, tuple(out.shape))
        )
    deep = resnet50().eval()
    deep.layer4.register_forward_hook(lambda _m, _a, out: sizes.__setitem__("layer4", tuple(out.shape)))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
        deep(torch.zeros(1, 3, 64, 64))
    assert sizes == {
        "stage1": (1, 16, 32, 32),
        "stage2": (1, 32, 16, 16),
        "stage3": (1, 64, 8, 8),
        "layer4": (1, 2048, 2, 2),
    }


def test_block_is_the_documented_formula() -> None:
    block = cifar_resnet(20).eval().stage2[0]
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        inner = block.bn_b(block.conv_b(torch.relu(block.bn_a(block.conv_a(x)))))
        expected = torch.relu(block.shortcut.bn(block.shortcut.conv(x)) + inner)
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("depth", [0, 18, 21, -20, 1000])
def test_bad_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=r"depth: expected one of \[20, 32, 44, 56, 110\]"):
        cifar_resnet(depth)
    assert depth not in CIFAR_DEPTHS


@pytest.mark.parametrize("depth", ["20", 20.0, None, True])
def test_depth_of_another_type(depth: object) -> None:
    with pytest.raises(TypeError, match="depth"):
        cifar_resnet(depth)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["num_classes", "in_channels"])
@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_bad_counts(name: str, value: object, error: type[Exception]) -> None:
    for build in (lambda **k: cifar_resnet(20, **k), resnet18, resnet50):
        with pytest.raises(error, match=name):
            build(**{name: value})


def test_widths() -> None:
    narrow = cifar_resnet(20, 10, 1, widths=(5, 9, 12))
    shapes = [tuple(narrow.get_submodule(f"stage{i}.0.conv_a").weight.shape[:2]) for i in (1, 2, 3)]  # type: ignore
    assert shapes == [(5, 5), (9, 5), (12, 9)]
    assert narrow(torch.zeros(2, 1, 9, 9)).shape == (2, 10)
    for widths, error in (((16, 32), ValueError), ((16, 0, 8), ValueError), ((1, 2, 3.0), TypeError)):
        with pytest.raises(error, match="widths"):
            cifar_resnet(20, widths=widths)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="widths"):
        cifar_resnet(20, widths="123")  # type: ignore[arg-type]


def test_same_seed_same_weights() -> None:
    torch.manual_seed(3)
    first = cifar_resnet(20).state_dict()
    torch.manual_seed(3)
    second = cifar_resnet(20).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
