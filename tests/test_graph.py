"""The view of the exported graph: layers, roles, copies, input sizes."""

from __future__ import annotations

import warnings

import nets
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import dsprune
from dsprune.graph import clean_copy, conv_infos, prunable_convs, trace, unwrap
from dsprune.models import cifar_resnet, resnet18, resnet50


def roles(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[bool, bool, bool]]:
    return {i.name: (i.is_stem, i.is_shortcut, i.last_in_block) for i in conv_infos(model, x)}


def test_roles_of_a_cifar_resnet() -> None:
    found = roles(cifar_resnet(20), torch.randn(1, 3, 32, 32))
    assert [n for n, r in found.items() if r[0]] == ["stem.conv"]
    assert {n for n, r in found.items() if r[1]} == {"stage2.0.shortcut.conv", "stage3.0.shortcut.conv"}
    assert {n for n, r in found.items() if r[2]} == {
        f"stage{s}.{b}.conv_b" for s in (1, 2, 3) for b in range(3)
    }
    assert len(prunable_convs(cifar_resnet(20), torch.randn(1, 3, 32, 32))) == 18


@pytest.mark.parametrize(("make", "last", "count"), [(resnet18, "conv2", 16), (resnet50, "conv3", 48)])
def test_roles_of_imagenet_resnets(make: type, last: str, count: int) -> None:
    infos = conv_infos(make(), torch.randn(1, 3, 64, 64))
    assert [i.name for i in infos if i.is_stem] == ["conv1"]
    assert all("downsample" in i.name for i in infos if i.is_shortcut)
    assert sum(i.is_shortcut for i in infos) == (3 if make is resnet18 else 4)
    assert all(i.last_in_block == i.name.endswith(last) for i in infos if i.prunable)
    assert sum(i.prunable for i in infos) == count


def test_roles_do_not_come_from_names() -> None:
    found = roles(nets.Residual(), torch.randn(1, 3, 16, 16))
    assert found["project.0"] == (False, True, False)
    assert found["a2.0"][2] and found["b2.0"][2] and not found["a1.0"][2]


def test_depthwise_and_grouped_are_not_prunable() -> None:
    names = {i.name for i in prunable_convs(nets.Zoo(), torch.randn(1, 3, 16, 16))}
    assert {"depthwise", "grouped", "stem.0", "up"}.isdisjoint(names)
    assert {"point.0", "dilated.0", "shared", "mix", "squeeze"} <= names


def test_shared_module_is_one_info_with_two_uses() -> None:
    shared = next(i for i in conv_infos(nets.Zoo(), torch.randn(1, 3, 16, 16)) if i.name == "shared")
    assert shared.uses == 2
    assert shared.macs == 2 * 16 * 16 * 9 * 16 * 16


def test_macs_and_sizes() -> None:
    infos = {i.name: i for i in conv_infos(nets.Plain(), torch.randn(1, 3, 17, 13))}
    assert infos["c"].output_size == (8, 6)
    assert infos["c"].macs == 12 * 12 * 9 * 48


def test_batch_and_image_size_stay_free() -> None:
    graph = trace(nets.Plain().eval(), torch.randn(1, 3, 16, 16))
    for shape in ((1, 3, 16, 16), (7, 3, 31, 12)):
        assert graph.limits.admit([shape])
        assert graph.module(torch.randn(shape)).shape == (shape[0], 5)
    assert not graph.limits.admit([(2, 4, 16, 16)])


def test_branch_on_the_size_is_kept_to_one_side() -> None:
    graph = trace(nets.SizeBranch().eval(), torch.randn(1, 4, 16, 16))
    assert graph.limits.admit([(3, 4, 16, 16)])
    assert not graph.limits.admit([(3, 4, 15, 16)])


def test_trace_restores_modes() -> None:
    model = nets.Plain()
    model.a.eval()
    trace(model, torch.randn(1, 3, 16, 16))
    assert model.training and not model.a.training and not model.a[1].training


def test_clean_copy_applies_prune_masks_and_leaves_the_model_alone() -> None:
    model = nets.Plain()
    prune.random_unstructured(model.b, "weight", amount=0.5)
    model(torch.randn(2, 3, 16, 16))  # makes .weight a non-leaf, which copy.deepcopy refuses
    clone = clean_copy(model)
    assert isinstance(clone.b.weight, nn.Parameter)
    assert torch.equal(clone.b.weight, model.b.weight)
    assert prune.is_pruned(model) and not prune.is_pruned(clone)
    assert clone.b.weight.data_ptr() != model.b.weight.data_ptr()


def test_clean_copy_applies_parametrizations() -> None:
    model = nets.Plain().eval()
    parametrizations.weight_norm(model.b, "weight")
    clone = clean_copy(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(clone(x), model(x))
    assert "b.weight" in dict(clone.named_parameters())


def test_unwrap() -> None:
    model = nets.Plain()
    assert unwrap(torch.compile(nn.DataParallel(model))) is model
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        unwrap(3)  # type: ignore[arg-type]


def test_fallback_without_export() -> None:
    with pytest.warns(UserWarning, match=r"torch\.export failed"):
        infos = conv_infos(nets.Untraceable(), torch.randn(1, 4, 8, 8))
    assert [i.name for i in infos] == ["a", "b"]
    assert infos[0].is_stem and infos[1].prunable and infos[1].output_size == (8, 8)


def test_failed_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv_infos(nets.Untraceable(), torch.randn(1, 4, 8, 8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [3, "x", (), [1, 2], None])
def test_example_input_must_hold_a_tensor(bad: object) -> None:
    with pytest.raises(TypeError, match="example_input"):
        prunable_convs(nets.Plain(), bad)


def test_an_input_that_the_model_does_not_take() -> None:
    """It is said at once, by the argument's name, and not taken for a failure of the tracer."""
    model, x = nets.Plain(), torch.randn(1, 4, 16, 16)
    text = r"^example_input: the model does not take float32 \(1, 4, 16, 16\): .* 3 channels"
    with pytest.raises(ValueError, match=text):
        prunable_convs(model, x)
    with pytest.raises(ValueError, match=text):
        dsprune.GroupLearner(model, x, groups=2, strength=0.1, total_steps=1)
    with pytest.raises(ValueError, match=text):
        dsprune.find_structure(model, x, {}, flops=0.5)
    with pytest.raises(ValueError, match=text):
        dsprune.summary(model, x)
