"""Beside Torch-Pruning: channels cut out of our layers, its importance, its dependency graph."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsprune
from dsp_kernels import GroupLayout
from dsprune import interop
from dsprune.models import cifar_resnet
from dsprune.nn import PackedConv2d, PermutedGroupedConv2d

X = torch.randn(2, 3, 16, 16)


def layer(activation: str | None = None) -> PermutedGroupedConv2d:
    layout = GroupLayout(6, 7, [([5, 0, 2], [3, 0]), ([1, 4, 0], [4, 2, 1]), ([3], [6])])  # filter 5 is dead
    made = PermutedGroupedConv2d(layout, 3, padding=1, activation=activation)
    nn.init.normal_(made.bias)  # type: ignore[arg-type]
    return made


def test_it_comes_with_the_package() -> None:
    code = "import dsprune, sys; dsprune.interop.cut_filters; assert 'torch_pruning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=1200)


@pytest.mark.parametrize("gone", [[0], [2, 5], [6, 4, 3, 2, 1]])
def test_filters_are_cut(gone: list[int]) -> None:
    conv, x = layer(), torch.randn(2, 6, 8, 7)
    conv(x).square().sum().backward()
    expected, gradient = conv(x).detach(), conv.layout.unpack(conv.weight.grad, 3)
    kept = [i for i in range(7) if i not in gone]
    assert interop.cut_filters(conv, gone) is conv
    assert conv.out_channels == conv.layout.out_channels == len(kept) and conv.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(conv(x), expected[:, kept])
    assert torch.equal(conv.layout.unpack(conv.weight.grad, 3), gradient[kept])


@pytest.mark.parametrize("gone", [[0], [3, 1], [3, 5, 0, 2]])
def test_channels_are_cut(gone: list[int]) -> None:
    """As if the channels had always been zero; a group left without channels gives its bias."""
    conv, x = layer(), torch.randn(2, 6, 8, 7)
    kept = [i for i in range(6) if i not in gone]
    without = x.clone()
    without[:, gone] = 0
    with torch.no_grad():
        expected = conv(without)
        interop.cut_channels(conv, gone)
        assert conv.in_channels == conv.layout.in_channels == len(kept)
        assert float((conv(x[:, kept]) - expected).abs().max()) < 1e-5


def test_what_is_refused() -> None:
    for cut in (interop.cut_filters, interop.cut_channels):
        for bad in ([9], [-1], [True], list(range(6)) + [6] * (cut is interop.cut_filters)):
            with pytest.raises(ValueError, match="expected"):
                cut(layer(), bad)
        with pytest.raises(ValueError, match="packed with train=True"):
            cut(layer("relu"), [0])


def test_torch_pruning_cuts_our_layers() -> None:
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(nets.Residual()), 0)
    packed = dsprune.pack(model, X, train=True).network.eval()
    assert any(isinstance(m, PackedConv2d) for m in packed.modules())
    graph = tp.DependencyGraph().build_dependency(
        packed, X, customized_pruners=interop.torch_pruning_layers()
    )
    group = graph.get_pruning_group(packed.b1[0], interop_cut(graph, packed.b1[0]), idxs=[1, 5])
    assert graph.check_pruning_group(group)
    expected = nets.Residual().eval()
    expected.load_state_dict(dsprune.graph.clean_copy(model).state_dict())
    with torch.no_grad():  # cut channels are channels whose BatchNorm gives zero
        for norm in (expected.b1[1],):
            norm.weight[[1, 5]], norm.bias[[1, 5]] = 0.0, 0.0
    group.prune()
    assert packed.b1[0].out_channels == 14 and packed.b2[0].in_channels == 14
    with torch.no_grad():
        assert float((packed(X) - expected(X)).abs().max()) < 1e-5


def interop_cut(graph: Any, module: nn.Module) -> Any:
    return graph.get_pruner_of_module(module).prune_out_channels


def test_torch_pruning_importance() -> None:
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = cifar_resnet(20)
    assignment = {c.name: torch.arange(c.out_channels) % 2 for c in dsprune.prunable_convs(model, X)[:3]}
    norm = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    given = interop.torch_pruning_importance(model, assignment, norm)
    for name, value in given.items():
        squares = model.get_submodule(name).weight.detach().double().square().flatten(2).sum(-1)
        for group in (0, 1):  # with p=2 and no normalisation it is ours
            rows = assignment[name] == group
            assert torch.allclose(value[rows].sum(0), squares[rows].sum(0), rtol=1e-4)
            shares = value[rows].sum(1) / value[rows].sum()
            assert torch.allclose(shares, squares[rows].sum(1) / squares[rows].sum(), rtol=1e-4)
    ours = dsprune.find_structure(model, X, assignment, flops=0.05)
    theirs = dsprune.find_structure(model, X, assignment, flops=0.05, importance=given)
    assert abs(ours.flops_cut - theirs.flops_cut) < 0.02
    with pytest.raises(ValueError, match="does it want gradients"):
        interop.torch_pruning_importance(model, assignment, tp.importance.GroupTaylorImportance())
    F.cross_entropy(model(X), torch.tensor([0, 1])).backward()
    taylor = interop.torch_pruning_importance(model, assignment, tp.importance.GroupTaylorImportance())
    structure = dsprune.find_structure(model, X, assignment, flops=0.05, importance=taylor)
    assert any(structure[name] != ours[name] for name in assignment)


@pytest.mark.parametrize(
    ("importance", "error", "text"),
    [
        ([1], TypeError, "importance: expected a mapping"),
        ({"b": torch.ones(3, 3)}, ValueError, r"importance\['b'\]: expected shape \(12, 12\)"),
        ({"b": -torch.ones(12, 12)}, ValueError, r"importance\['b'\]: expected finite"),
    ],
)
def test_bad_importance(importance: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dsprune.find_structure(nets.Plain(), X, {"b": torch.arange(12) % 2}, flops=0.1, importance=importance)
