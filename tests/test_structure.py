"""What to remove for a target."""

from __future__ import annotations

import json

import nets
import pytest
import torch
from torch.nn.utils import prune

import dsprune
from dsp_kernels import GroupLayout
from dsprune.models import cifar_resnet
from dsprune.structure import Structure, drop_below

X = torch.randn(1, 3, 16, 16)


def assign(model: torch.nn.Module, groups: int = 3) -> dict[str, torch.Tensor]:
    return {i.name: torch.arange(i.out_channels) % groups for i in dsprune.prunable_convs(model, X)}


def test_drop_below_takes_the_least_first() -> None:
    importance = torch.tensor([0.5, 0.1, 0.3, 0.1])
    assert drop_below(importance, 0.0).all()
    assert drop_below(importance, 0.15).tolist() == [True, False, True, True]
    assert drop_below(importance, 0.25).tolist() == [True, False, True, False]
    assert drop_below(importance, 0.9999).tolist() == [True, False, False, False]


def test_drop_below_never_wipes_a_group() -> None:
    """Four equal channels, and one alone: the released code drops all of them once the least share reaches
    the threshold.
    """
    assert drop_below(torch.ones(4), 0.9).sum() == 1
    assert drop_below(torch.ones(1), 0.99).tolist() == [True]
    assert drop_below(torch.zeros(3), 0.1).tolist() == [False] * 3


@pytest.mark.parametrize("count", ["network", "prunable"])
@pytest.mark.parametrize("goal", [0.3, 0.6])
@pytest.mark.parametrize("kind", ["flops", "params"])
def test_target_is_met_and_not_by_much(kind: str, goal: float, count: str) -> None:
    model = nets.Residual()
    structure = dsprune.find_structure(model, X, assign(model), **{kind: goal}, count=count)
    reached = structure.flops_cut if kind == "flops" else structure.params_cut
    assert goal <= reached < goal + 0.06


@pytest.mark.parametrize("count", ["network", "prunable"])
def test_the_summary_of_the_masked_network_agrees(count: str) -> None:
    model = cifar_resnet(20)
    structure = dsprune.find_structure(model, X, assign(model), flops=0.5, count=count)
    assert 0.5 <= structure.flops_cut < 0.51
    dsprune.apply_structure(model, structure)
    counted = dsprune.summary(model, X)
    assert counted.flops_cut(count) == pytest.approx(structure.flops_cut, abs=1e-12)
    assert counted.params_cut(count) == pytest.approx(structure.params_cut, abs=1e-12)


def test_groups_of_the_assignment_share_their_channels() -> None:
    model = nets.Residual()
    assignment = assign(model)
    structure = dsprune.find_structure(model, X, assignment, flops=0.5)
    assert set(structure) == set(assignment)
    for name, layout in structure.items():
        for channels, filters in layout.groups:
            assert len({int(assignment[name][f]) for f in filters}) == 1 and channels


def test_last_convolution_of_a_block_loses_whole_filters() -> None:
    model = cifar_resnet(20)
    with torch.no_grad():
        model.stage1[0].conv_b.weight[[1, 6]] *= 1e-3
        model.stage1[0].conv_a.weight[[1, 6]] *= 1e-3
    structure = dsprune.find_structure(model, X, assign(model, 2), flops=0.3)
    assert {1, 6} <= set(structure["stage1.0.conv_b"].dead_filters)
    # The first convolution keeps a weak filter as long as somebody reads it.
    mask = structure["stage1.0.conv_b"].mask()
    alive = set(structure["stage1.0.conv_a"].live_filters)
    assert {f for f in (1, 6) if bool(mask[:, f].any())} <= alive


def test_excluded_layers_stay_dense() -> None:
    model = nets.Residual()
    structure = dsprune.find_structure(model, X, assign(model), flops=0.2, exclude=["a1.0"])
    assert "a1.0" not in structure


def test_weakest_channels_go_first() -> None:
    model = nets.Plain()
    with torch.no_grad():
        model.b.weight[:, [2, 9]] *= 1e-4
    structure = dsprune.find_structure(model, X, {"b": torch.zeros(12, dtype=torch.long)}, flops=0.12)
    (channels, _filters), *rest = structure["b"].groups
    assert not rest and {2, 9}.isdisjoint(channels)


def test_the_model_is_not_changed() -> None:
    model = nets.Residual().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dsprune.find_structure(model, X, assign(model), flops=0.4)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_apply_structure_follows_prunes_convention() -> None:
    model = nets.Residual()
    structure = dsprune.find_structure(model, X, assign(model), flops=0.5)
    assert dsprune.apply_structure(model, structure) is model
    conv = model.b2[0]
    assert prune.is_pruned(conv) and {"weight_orig", "weight_mask"} <= set(model.b2[0].state_dict())
    assert torch.equal(conv.weight_mask[:, :, 0, 0].bool(), structure["b2.0"].mask())
    model(X).sum().backward()
    assert conv.weight_orig.grad is not None and bool(
        (conv.weight_orig.grad[conv.weight_mask == 0] == 0).all()
    )
    prune.remove(conv, "weight")
    assert torch.equal(conv.weight.detach().flatten(2).ne(0).any(-1), structure["b2.0"].mask())


def test_second_structure_keeps_the_first_ones_zeros() -> None:
    model = nets.Residual()
    dsprune.apply_structure(model, dsprune.find_structure(model, X, assign(model), flops=0.3))
    first = model.b2[0].weight.detach().flatten(2).ne(0).any(-1)
    dsprune.apply_structure(model, dsprune.find_structure(model, X, assign(model), flops=0.6))
    second = model.b2[0].weight.detach().flatten(2).ne(0).any(-1)
    assert not (second & ~first).any() and second.sum() < first.sum()
    assert dsprune.summary(model, X).flops_cut() >= 0.6


def test_structure_survives_json() -> None:
    model = nets.Residual()
    structure = dsprune.find_structure(model, X, assign(model), flops=0.4)
    again = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert again == structure
    with pytest.raises(ValueError, match="data: not a structure"):
        Structure.from_json({"layouts": {}})


def test_works_where_export_does_not() -> None:
    model = nets.Untraceable()
    structure = dsprune.find_structure(model, torch.randn(1, 4, 8, 8), {"b": torch.arange(8) % 2}, flops=0.3)
    assert structure.flops_cut >= 0.3


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({}, ValueError, "flops, params, latency: expected exactly one"),
        ({"flops": 0.5, "params": 0.5}, ValueError, "flops, params, latency: expected exactly one"),
        ({"flops": 0.5, "latency": 0.5}, ValueError, "flops, params, latency: expected exactly one"),
        ({"latency": 0.0}, ValueError, "latency: expected the fraction"),
        ({"latency": 0.5, "against": "jit"}, ValueError, "against: expected one of"),
        ({"latency": 0.5, "cache": 3}, TypeError, "cache: expected a path"),
        ({"flops": 1.0}, ValueError, "flops: expected the fraction"),
        ({"flops": -0.1}, ValueError, "flops: expected the fraction"),
        ({"params": float("nan")}, ValueError, "params: expected the fraction"),
        ({"flops": "half"}, TypeError, "flops: expected a number"),
        ({"flops": 0.5, "count": "all"}, ValueError, "count: expected 'network' or 'prunable', got 'all'"),
        ({"flops": 0.999}, ValueError, "flops: expected at most 0."),
        ({"flops": 0.5, "exclude": ["nope"]}, ValueError, "exclude: 'nope' is no convolution"),
        ({"flops": 0.5, "exclude": "b"}, TypeError, "exclude: expected a sequence"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], text: str) -> None:
    model = nets.Plain()
    with pytest.raises(error, match=text):
        dsprune.find_structure(model, X, assign(model), **kwargs)


@pytest.mark.parametrize(
    ("assignment", "error", "text"),
    [
        ({}, ValueError, "assignment: names no convolution"),
        ({"zzz": torch.zeros(3)}, ValueError, "assignment: 'zzz' is no convolution"),
        ({"b": torch.zeros(11, dtype=torch.long)}, ValueError, r"assignment\['b'\]: expected shape \(12,\)"),
        ({"b": torch.zeros(12)}, TypeError, r"assignment\['b'\]: expected integer"),
        (
            {"b": -torch.ones(12, dtype=torch.long)},
            ValueError,
            r"assignment\['b'\]: expected group numbers from 0",
        ),
        ([1], TypeError, "assignment: expected a mapping"),
    ],
)
def test_bad_assignments(assignment: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        dsprune.find_structure(nets.Plain(), X, assignment, flops=0.3)


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ValueError, match="'grouped' has 4 groups already"):
        dsprune.find_structure(nets.Zoo(), X, {"grouped": torch.zeros(16, dtype=torch.long)}, flops=0.1)


def test_non_finite_weights_are_refused() -> None:
    model = nets.Plain()
    with torch.no_grad():
        model.b.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of 'b' is not finite"):
        dsprune.find_structure(model, X, {"b": torch.zeros(12, dtype=torch.long)}, flops=0.1)


@pytest.mark.parametrize(
    ("structure", "error", "text"),
    [
        ({"zzz": GroupLayout(12, 12, [])}, ValueError, "structure: 'zzz' is no Conv2d"),
        ({"b": GroupLayout(12, 11, [])}, ValueError, r"structure\['b'\]: expected a layout of 12 filters"),
        ({"b": [1]}, TypeError, r"structure\['b'\]: expected a GroupLayout"),
        ([1], TypeError, "structure: expected a mapping"),
    ],
)
def test_apply_refuses_and_changes_nothing(structure: object, error: type[Exception], text: str) -> None:
    model = nets.Plain()
    if isinstance(structure, dict):
        structure = {"a.0": GroupLayout(3, 12, []), **structure}
    with pytest.raises(error, match=text):
        dsprune.apply_structure(model, structure)
    assert not prune.is_pruned(model)


def test_a_parametrized_weight_is_refused_before_anything_changes() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3))
    torch.nn.utils.parametrizations.spectral_norm(model[1])
    layout = GroupLayout(4, 4, [([0], [0])])
    with pytest.raises(ValueError, match=r"structure: the weight of '1' is parametrized"):
        dsprune.apply_structure(model, {"0": layout, "1": layout})
    assert not hasattr(model[0], "weight_mask")
