"""Liveness: what still matters, constants included."""

from __future__ import annotations

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dsprune.graph import trace
from dsprune.liveness import Liveness, along, analyse


def live(
    model: nn.Module, x: torch.Tensor, masks: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    graph = trace(model.eval(), x)
    found = analyse(graph, masks)
    return {site.name: found.pairs[site.node] for site in graph.sites}


def folded(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    graph = trace(model.eval(), x)
    found: Liveness = analyse(graph)
    return {site.name: found.folded[site.node] for site in graph.sites}


def test_dense_network_is_all_alive() -> None:
    pairs = live(nets.Residual(), torch.randn(1, 3, 16, 16))
    assert all(bool(p.all()) for p in pairs.values())


def test_filter_that_nobody_reads_dies() -> None:
    model = nets.Plain()
    with torch.no_grad():
        model.b.weight[:, 4] = 0
    pairs = live(model, torch.randn(1, 3, 16, 16))
    assert not pairs["a.0"][4].any() and pairs["a.0"][3].all()


def test_death_travels_backwards_through_the_whole_chain() -> None:
    model = nets.Plain()
    with torch.no_grad():
        model.head.weight[:, 2] = 0  # kills filter 2 of c, and with it what only that filter read
        model.c.weight[:, 5] = 0
        model.c.weight[2, 5] = 1.0
    pairs = live(model, torch.randn(1, 3, 16, 16))
    assert not pairs["c"][2].any() and not pairs["b"][5].any()


def test_dead_filter_without_bias_frees_its_readers() -> None:
    model = nets.Plain()
    with torch.no_grad():
        model.a[0].weight[3] = 0
        model.a[1].bias[3] = -0.5  # ReLU makes it zero
        model.a[1].running_mean[3] = 0
    assert not live(model, torch.randn(1, 3, 16, 16))["b"][:, 3].any()


def test_constant_is_folded_without_padding_and_kept_with_it() -> None:
    model = nets.DeadButBiased()
    x = torch.randn(1, 3, 16, 16)
    pairs, absorbed = live(model, x), folded(model, x)
    assert absorbed["pointwise"].nonzero().flatten().tolist() == [2, 3]
    assert not pairs["pointwise"][:, 2:5].any()  # channel 4 is zero after the ReLU
    assert not absorbed["padded"].any()
    assert pairs["padded"][:, 2:4].all() and not pairs["padded"][:, 4].any()


def test_batch_norm_weight_of_zero_makes_a_constant() -> None:
    model = nets.Plain()
    with torch.no_grad():
        model.a[1].weight[1] = 0
        model.a[1].bias[1] = 0
    pairs = live(model, torch.randn(1, 3, 16, 16))
    assert not pairs["a.0"][1].any() and not pairs["b"][:, 1].any()


def test_residual_stream_needs_what_any_branch_needs() -> None:
    model = nets.Residual()
    with torch.no_grad():
        model.a1[0].weight[:, 3] = (
            0  # the block's first conv does not read channel 3, the addition still does
        )
    assert live(model, torch.randn(1, 3, 16, 16))["stem.0"][3].all()


def test_concat_and_shuffle_keep_track_of_channels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cat([self.a(x), self.b(x)], 1)
            n, c, h, w = y.shape
            return self.c(F.relu(y.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, c, h, w)))

    model = Net()
    with torch.no_grad():
        model.c.weight[:, 3] = 0  # position 3 holds channel 1 of b: [a0 b0 a1 b1 ...]
    pairs = live(model, torch.randn(1, 3, 6, 6))
    assert pairs["b"].any(1).tolist() == [True, False, True, True]
    assert bool(pairs["a"].all())


def test_channel_slice_and_chunk() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, _ = self.a(x).chunk(2, 1)
            return self.b(first[:, 1:])

    assert live(Net(), torch.randn(1, 3, 5, 5))["a"].any(1).tolist() == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]


def test_flatten_keeps_channels_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3 * 16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(x).flatten(1))

    model = Net()
    with torch.no_grad():
        model.head.weight[:, 16:32] = 0
    assert live(model, torch.randn(1, 3, 4, 4))["a"].any(1).tolist() == [True, False, True]


def test_squeeze_excite_gate_of_zero_kills_the_channel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            return self.b(x * F.relu(self.gate(F.adaptive_avg_pool2d(x, 1))))

    model = Net()
    with torch.no_grad():
        model.gate.weight[2], model.gate.bias[2] = 0, -1.0
        model.gate.weight[:, 2] = 0
    pairs = live(model, torch.randn(1, 3, 5, 5))
    assert not pairs["b"][:, 2].any() and not pairs["a"][2].any()


def test_unknown_operator_keeps_everything_and_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.softmax(self.a(x), 1))

    model = Net()
    with torch.no_grad():
        model.b.weight[:, 1] = 0
        model.a.weight[2], model.a.bias[2] = 0, 0
    graph = trace(model.eval(), torch.randn(1, 3, 5, 5))
    found = analyse(graph)
    assert any("softmax" in name for name in found.unknown)
    pairs = {s.name: found.pairs[s.node] for s in graph.sites}
    assert pairs["a"].any(1).tolist() == [True, True, False, True]
    assert pairs["b"].any(0).tolist() == [True, False, True, True]


def test_average_pool_with_padding_ends_a_constant() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.avg_pool2d(self.a(x), 3, 1, 1))

    model = Net()
    with torch.no_grad():
        model.a.weight[0], model.a.bias[0] = 0, 1.0
    graph = trace(model.eval(), torch.randn(1, 3, 5, 5))
    assert not analyse(graph).folded[graph.sites[1].node].any()


def test_masks_lie_over_the_weights() -> None:
    model = nets.Plain()
    mask = torch.ones(12, 12, dtype=torch.bool)
    mask[:, 7] = False
    assert not live(model, torch.randn(1, 3, 16, 16), {"b.weight": mask})["a.0"][7].any()


@pytest.mark.parametrize("seed", range(4))
def test_dropping_what_is_dead_changes_nothing(seed: int) -> None:
    """Overwrites every product that liveness calls dead; the outputs must not notice."""
    model = nets.structured_zeros(nets.random_norms(nets.Zoo(), seed), seed, dead=0.3).eval().double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(x)
    graph = trace(model, x)
    found = analyse(graph)
    with torch.no_grad():
        for site in graph.sites:
            if site.kind == "conv" and site.groups == 1 and site.uses == 1:
                dead_filters = ~found.pairs[site.node].any(1) & model.get_submodule(site.name).weight.flatten(
                    1
                ).ne(0).any(1)
                model.get_submodule(site.name).weight[dead_filters] = torch.randn(()).double()
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)


def test_along() -> None:
    state = torch.tensor([[1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    assert along(state, 2, 0).isnan().all()
    assert along(state[:, :1], 2, 0).tolist() == [1.0, 1.0]
    assert along(torch.tensor([[True, False], [False, False]]), 2, 0).tolist() == [True, False]
    assert along(torch.tensor(2.0), 3, 0).tolist() == [2.0] * 3
