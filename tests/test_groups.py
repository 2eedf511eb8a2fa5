"""Groups without training against all partitions of tiny layers; importances against their definitions."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsprune
from dsprune import groups as grouping
from tests import nets

X = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """A stem and two convolutions that are grouped; the inputs' channels differ in size."""

    def __init__(self, filters: int = 6, channels: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.a = nn.Conv2d(channels, filters, 3, padding=1)
        self.b = nn.Conv2d(filters, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(torch.relu(self.a(torch.relu(self.stem(x)))))
        return y


def kept(energy: Tensor, member: tuple[int, ...] | list[int], keep: int) -> float:
    """What a grouping keeps, by its definition."""
    total = 0.0
    for group in set(member):
        rows = energy[[o for o, g in enumerate(member) if g == group]]
        total += float(rows.sum(0).sort(descending=True).values[:keep].sum())
    return total


def best_of_all(energy: Tensor, groups: int, keep: int) -> float:
    partitions = itertools.product(range(groups), repeat=len(energy))
    return max(kept(energy, member, keep) for member in partitions if len(set(member)) == groups)


@pytest.mark.parametrize("filters, channels, groups", [(6, 5, 2), (6, 7, 3), (5, 8, 4), (7, 4, 2)])
def test_all_partitions(filters: int, channels: int, groups: int) -> None:
    keep = grouping.kept_channels(channels, 0.5)
    for seed in range(6):
        torch.manual_seed(seed)
        energy = torch.rand(filters, channels, dtype=torch.float64) ** 4
        found = grouping.cluster(energy, groups, 0.5, grouping.STARTS, torch.Generator().manual_seed(0))
        assert found.dtype == torch.int64 and found.shape == (filters,)
        assert len(found.unique()) == groups and int(found.max()) == groups - 1
        assert kept(energy, found.tolist(), keep) == pytest.approx(
            best_of_all(energy, groups, keep), rel=1e-9
        )


def test_calibration_weighs_the_channels() -> None:
    torch.manual_seed(3)
    model = Two(6, 6).double()
    batches = [torch.randn(n, 3, 9, 9, dtype=torch.float64) for n in (2, 5)]
    with torch.no_grad():
        model.stem.weight.mul_(torch.linspace(0.5, 2, 6, dtype=torch.float64).view(-1, 1, 1, 1))
    x = torch.cat([torch.relu(model.stem(batch)) for batch in batches])
    energy = model.a.weight.detach().square().sum((2, 3)) * x.square().mean((0, 2, 3)).detach()
    found = dsprune.group_filters(model, X.double(), 2, batches)["a"].tolist()
    assert kept(energy, found, 3) == pytest.approx(best_of_all(energy, 2, 3), rel=1e-9)
    plain = dsprune.group_filters(model, X.double(), 2)["a"].tolist()
    assert kept(energy, found, 3) > 1.001 * kept(energy, plain, 3)  # another question has another answer
    energy = model.a.weight.detach().square().sum((2, 3))
    assert kept(energy, plain, 3) == pytest.approx(best_of_all(energy, 2, 3), rel=1e-9)


def test_planted_groups_are_found() -> None:
    """Filters that read disjoint halves of the channels, in a layer too large for every partition."""
    torch.manual_seed(0)
    model = Two(64, 32)
    side = torch.randperm(64) % 2
    with torch.no_grad():
        model.a.weight[side == 0, 16:] *= 0.1
        model.a.weight[side == 1, :16] *= 0.1
    found = dsprune.group_filters(model, X, 2)["a"]
    assert bool((found == side).all() or (found == 1 - side).all())


def test_the_alternation_gains_where_single_moves_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping, "MOVED", 0)
    energy = torch.rand(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 6
    found = grouping.cluster(energy, 3, 0.5, 8, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    random = [kept(energy, (torch.randperm(40, generator=generator) % 3).tolist(), 12) for _ in range(200)]
    assert kept(energy, found.tolist(), 12) > max(random)
    # A round more would change nothing: every filter is where most of it is kept.
    sets = [energy[found == g].sum(0).topk(12).indices for g in range(3)]
    own = torch.stack([energy[:, channels].sum(1) for channels in sets])
    assert torch.equal(own.max(0).values, own.gather(0, found[None])[0])


def test_groups_depend_on_the_seed_alone() -> None:
    model = nets.Plain()
    first = dsprune.group_filters(model, X, 3, seed=5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = dsprune.group_filters(model, X, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("energy", [torch.zeros(7, 4), torch.ones(7, 4), torch.eye(7, 4)])
def test_every_group_has_a_filter(energy: Tensor) -> None:
    for groups in (1, 2, 3, 7, 9):
        found = grouping.cluster(energy.double(), groups, 0.5, 4, torch.Generator().manual_seed(0))
        assert sorted(found.unique().tolist()) == list(range(min(groups, 7)))
        assert found.tolist()[0] == 0


def test_the_model_and_its_masks_are_left_alone() -> None:
    model = Two()
    mask = torch.ones_like(model.a.weight)
    mask[:, 0] = 0
    nn.utils.prune.custom_from_mask(model.a, "weight", mask)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    found = dsprune.group_filters(model, X, 2, [X], cut=0.5)
    assert model.training and set(found) == {"a", "b"}
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    structure = dsprune.find_structure(model, X, found, flops=0.5)
    assert structure.flops_cut >= 0.5


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "groups": ({"groups": 0}, ValueError, "groups: expected an integer of at least 1, got 0"),
    "groups type": ({"groups": 2.0}, TypeError, "groups: expected an integer"),
    "starts": ({"starts": 0}, ValueError, "starts: expected"),
    "cut": ({"cut": 1.0}, ValueError, "cut: expected the share of channels"),
    "cut type": ({"cut": True}, TypeError, "cut: expected a number"),
    "seed": ({"seed": 0.5}, TypeError, "seed: expected an integer"),
    "exclude": ({"exclude": ["stem"]}, ValueError, "exclude: 'stem' is no prunable convolution"),
    "exclude text": ({"exclude": "a"}, TypeError, "exclude: expected a sequence"),
    "everything": ({"exclude": ["a", "b"]}, ValueError, "model: no convolution to group"),
    "no batches": ({"batches": []}, ValueError, "batches: expected one batch at least"),
    "a tensor": ({"batches": X}, TypeError, "batches: expected an iterable of batches, got Tensor"),
    "no inputs": ({"batches": ["x"]}, TypeError, "batches\\[0\\]: expected a tensor"),
    "not finite": ({"batches": [X, X / 0]}, ValueError, "batches\\[1\\]: expected finite"),
    "example": ({"example_input": 3}, TypeError, "example_input: expected a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    given, error, text = BAD[case]
    arguments = {"example_input": X, "groups": 2, **given}
    with pytest.raises(error, match=text):
        dsprune.group_filters(Two(), **arguments)


def test_weights_that_are_not_finite_are_named() -> None:
    model = Two()
    with torch.no_grad():
        model.b.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model: the weight of 'b' is not finite"):
        dsprune.group_filters(model, X, 2)


# ---- importances


def assignment(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.arange(model.get_submodule(name).weight.shape[0]) % 2  # type: ignore
        for name in ("a", "b")
    }


def test_activation_importance_is_its_definition() -> None:
    torch.manual_seed(0)
    model = Two(8, 8).double()
    batches = [torch.randn(n, 3, 9, 9, dtype=torch.float64) for n in (2, 3)]
    x = torch.cat([torch.relu(model.stem(batch)) for batch in batches])
    y = torch.relu(model.a(x))
    wanted = {
        "a": model.a.weight.square().sum((2, 3)) * x.square().mean((0, 2, 3)),
        "b": model.b.weight.square().sum((2, 3)) * y.square().mean((0, 2, 3)),
    }
    groups = assignment(model)
    given = dsprune.find_structure(model, X.double(), groups, flops=0.4, importance=wanted)
    found = dsprune.find_structure(
        model, X.double(), groups, flops=0.4, importance="activation", batches=iter(batches)
    )
    plain = dsprune.find_structure(model, X.double(), groups, flops=0.4)
    assert found == given and found.layouts != plain.layouts


@pytest.mark.parametrize("masked", [False, True])
def test_taylor_importance_is_its_definition(masked: bool) -> None:
    torch.manual_seed(0)
    model = Two(8, 8).double()
    if masked:
        mask = torch.ones_like(model.a.weight)
        mask[1, 2] = 0
        nn.utils.prune.custom_from_mask(model.a, "weight", mask)
    batches = [(torch.randn(4, 3, 9, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 3])) for _ in range(3)]

    def loss_of(network: nn.Module) -> Callable[[Any], Tensor]:
        return lambda batch: F.cross_entropy(network(batch[0]).mean((2, 3)), batch[1])

    wanted: dict[str, Any] = {"a": 0.0, "b": 0.0}
    twin = copy.deepcopy(dsprune.graph.clean_copy(model))
    for batch in batches:
        twin.zero_grad()
        loss_of(twin)(batch).backward()
        for name in wanted:
            weight = twin.get_submodule(name).weight
            wanted[name] = wanted[name] + (weight * weight.grad).sum((2, 3)).square().detach() / 3  # type: ignore
    groups = assignment(model)
    given = dsprune.find_structure(model, X.double(), groups, flops=0.4, importance=wanted)
    model.zero_grad(set_to_none=True)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    found = dsprune.find_structure(
        model, X.double(), groups, flops=0.4, importance="taylor", batches=batches, closure=loss_of(model)
    )
    assert (
        found == given
        and found.layouts != dsprune.find_structure(model, X.double(), groups, flops=0.4).layouts
    )
    # Gradients and modes are as they were.
    assert model.training and bool((model.stem.weight.grad == 1).all())
    assert all(p.grad is None for name, p in model.named_parameters() if name != "stem.weight")


BAD_IMPORTANCES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "kind": ({"importance": "size"}, ValueError, "importance: expected one of \\['magnitude', 'activation'"),
    "type": ({"importance": 3}, TypeError, "importance: expected a mapping of names, or one of .*, got int"),
    "no batches": ({"importance": "activation"}, ValueError, "batches: expected inputs"),
    "batches": ({"batches": [X]}, ValueError, "batches: go with importance='activation' or 'taylor'"),
    "given": ({"importance": {}, "batches": [X]}, ValueError, "batches, closure: expected none"),
    "closure": (
        {"importance": "activation", "batches": [X], "closure": abs}, ValueError, "closure: goes with",
    ),
    "no closure": ({"importance": "taylor", "batches": [X]}, TypeError, "closure: expected a function"),
    "no loss": (
        {"importance": "taylor", "batches": [X], "closure": lambda b: 1.0}, TypeError, "closure: expected it",
    ),
    "no gradient": (
        {"importance": "taylor", "batches": [X], "closure": torch.sum}, ValueError, "closure: expected a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_IMPORTANCES)
def test_bad_importances(case: str) -> None:
    given, error, text = BAD_IMPORTANCES[case]
    model = Two()
    with pytest.raises(error, match=text):
        dsprune.find_structure(model, X, assignment(model), flops=0.3, **given)


def test_a_loss_of_another_network_is_refused() -> None:
    model, other = Two(), Two()
    with pytest.raises(ValueError, match="closure: the loss does not depend on the weight of 'a'"):
        dsprune.find_structure(
            model, X, assignment(model), flops=0.3, importance="taylor", batches=[X],
            closure=lambda batch: other(batch).sum(),
        )  # fmt: skip
    assert all(p.requires_grad for p in model.parameters())
