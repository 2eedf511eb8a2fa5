"""Random networks of the operators that the graph passes know, packed in both forms, against float64.

To have an operator tried, add a row to ``OPERATORS``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import dsprune

# What a row makes: the operator on the network, a value and another of its shape, and the result's channels.
Made = tuple[Callable[[Any, Tensor, Tensor], Tensor], int]
Row = Callable[["Net", int], Made]


def pointwise(call: Callable[[Tensor], Tensor]) -> Row:
    return lambda net, c: ((lambda net, a, b: call(a)), c)


def binary(call: Callable[[Tensor, Tensor], Tensor]) -> Row:
    return lambda net, c: ((lambda net, a, b: call(a, b)), c)


def layer(
    make: Callable[[int], nn.Module], call: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
) -> Row:
    """A layer of its own, made for so many channels; ``call``: how it is called."""

    def row(net: Net, c: int) -> Made:
        made, place = make(c), len(net.layers)
        net.layers.append(made)
        out = made.out_channels if isinstance(made, nn.Conv2d) else c

        def run(net: Net, a: Tensor, b: Tensor) -> Tensor:
            found = net.layers[place]
            return found(a) if call is None else call(found, a, b)

        return run, out

    return row


def again(net: Net, c: int) -> Made:
    """A layer that the network has already, on two values."""
    fitting = [
        (place, known.out_channels)
        for place, known in enumerate(net.layers)
        if isinstance(known, nn.Conv2d) and known.in_channels == c and known.groups == 1
    ]
    if not fitting:
        return (lambda net, a, b: a), c
    place, out = fitting[0]
    return (lambda net, a, b: net.layers[place](a) + net.layers[place](b)), out


def shuffle(a: Tensor) -> Tensor:
    n, c, h, w = a.shape
    return a.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def indices(a: Tensor) -> Tensor:
    """Both outputs of a pooling."""
    values, places = F.max_pool2d(a, 3, 1, 1, return_indices=True)
    return values + (places % 3).to(a.dtype)


OPERATORS: dict[str, Row] = {
    "conv": layer(lambda c: nn.Conv2d(c, 6, 3, padding=1)),
    "conv without bias": layer(lambda c: nn.Conv2d(c, 4, 3, padding=1, bias=False)),
    "conv 1x1": layer(lambda c: nn.Conv2d(c, 8, 1)),
    "conv, dilated": layer(lambda c: nn.Conv2d(c, 6, 3, padding=2, dilation=2)),
    "conv, same": layer(lambda c: nn.Conv2d(c, 6, 3, padding="same")),
    "conv, reflected": layer(lambda c: nn.Conv2d(c, 6, 3, padding=1, padding_mode="reflect")),
    "conv, in groups": layer(lambda c: nn.Conv2d(c, c, 3, padding=1, groups=2)),
    "conv twice": layer(lambda c: nn.Conv2d(c, c, 3, padding=1), lambda m, a, b: m(F.relu(m(a)))),
    "depthwise": layer(lambda c: nn.Conv2d(c, c, 3, padding=1, groups=c)),
    "the same conv": again,
    "norm": layer(nn.BatchNorm2d),
    "norm twice": layer(nn.BatchNorm2d, lambda m, a, b: m(F.relu(a)) - m(b)),
    "gate": layer(
        lambda c: nn.Conv2d(c, c, 1), lambda m, a, b: a * torch.sigmoid(m(F.adaptive_avg_pool2d(b, 1)))
    ),
    "shuffle": pointwise(shuffle),
    "indices": pointwise(indices),
    "relu": pointwise(F.relu),
    "relu6": pointwise(F.relu6),
    "relu in place": pointwise(lambda a: F.relu_(a.clone())),
    "hardswish": pointwise(F.hardswish),
    "sigmoid": pointwise(torch.sigmoid),
    "silu": pointwise(F.silu),
    "gelu": pointwise(F.gelu),
    "gelu, tanh": pointwise(lambda a: F.gelu(a, approximate="tanh")),
    "leaky relu": pointwise(lambda a: F.leaky_relu(a, 0.1)),
    "elu": pointwise(F.elu),
    "mish": pointwise(F.mish),
    "prelu": layer(nn.PReLU),
    "instance norm": layer(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "group norm": layer(lambda c: nn.GroupNorm(2, c)),
    "layer norm": layer(nn.LayerNorm, lambda m, a, b: m(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "linear": layer(lambda c: nn.Linear(c, c), lambda m, a, b: m(a.movedim(1, 3)).movedim(3, 1)),
    "transposed conv": layer(
        lambda c: nn.ConvTranspose2d(c, c, 2, stride=2), lambda m, a, b: F.avg_pool2d(m(a), 2)
    ),
    "pixel shuffle": pointwise(
        lambda a: F.pixel_unshuffle(F.pixel_shuffle(torch.cat([a, a], 1), 2), 2)[:, ::2]
    ),
    "bilinear": pointwise(
        lambda a: F.interpolate(F.interpolate(a, scale_factor=2, mode="bilinear"), size=a.shape[2:])
    ),
    "stack": pointwise(lambda a: torch.stack([a, -a], 2).flatten(1, 2)[:, ::2]),
    "softmax of planes": pointwise(lambda a: a.flatten(2).softmax(2).view(a.shape)),
    "map": pointwise(lambda a: a * a.mean(1, keepdim=True).sigmoid()),
    "x + 1": pointwise(lambda a: a + 1),
    "1 - x": pointwise(lambda a: 1 - a),
    "x * 2": pointwise(lambda a: a * 2),
    "0.5 * x": pointwise(lambda a: 0.5 * a),
    "x / 2": pointwise(lambda a: a / 2),
    "x * 0": pointwise(lambda a: a * 0),
    "clamp": pointwise(lambda a: a.clamp(-1, 1)),
    "x + a tensor": pointwise(lambda a: a + torch.tensor(1.5, dtype=a.dtype)),
    "x * height": pointwise(lambda a: a * (a.shape[2] / 8)),
    "max pool": pointwise(lambda a: F.max_pool2d(a, 3, 1, 1)),
    "average pool": pointwise(lambda a: F.avg_pool2d(a, 3, 1, 1)),
    "mean": pointwise(lambda a: a - a.mean((2, 3), keepdim=True)),
    "down and up": pointwise(
        lambda a: F.interpolate(F.max_pool2d(a, 2, 2, ceil_mode=True), size=a.shape[2:])
    ),
    "flip": pointwise(lambda a: a.flip(1)),
    "roll": pointwise(lambda a: a.roll(1, 1)),
    "reflect": pointwise(lambda a: F.pad(a, (1, 1, 1, 1), mode="reflect")[:, :, 2:, :-2]),
    "pad": pointwise(lambda a: F.pad(a, (1, 1, 1, 1), value=0.5)[:, :, 1:-1, 1:-1]),
    "softmax": pointwise(lambda a: torch.softmax(a, 1)),
    # without rows, and without steps: in torch, between native segments
    "erf": pointwise(torch.special.erf),
    "atan": pointwise(lambda a: torch.atan(a) + 0.1),
    "cumsum": pointwise(lambda a: a.cumsum(3)),
    "pieces": pointwise(lambda a: torch.cat([v.sin() for v in a.unbind(3)], 1).view(*a.shape)),
    "in place": pointwise(lambda a: a.clone().mul_(0.5).add_(a)),
    "rot": binary(lambda a, b: torch.rot90(a, 2, (2, 3)) + torch.special.erf(b)),
    "integers": pointwise(lambda a: a * torch.arange(a.shape[3]).remainder(2).to(a.dtype)),
    "add": binary(lambda a, b: a + b),
    "sub": binary(lambda a, b: a - b),
    "sub, alpha": binary(lambda a, b: torch.sub(a, b, alpha=2)),
    "mul": binary(lambda a, b: a * torch.tanh(b)),
    "maximum": binary(torch.maximum),
    "div": binary(lambda a, b: a / (1 + b.relu())),
    "cat": binary(lambda a, b: torch.cat([a[:, : a.shape[1] // 2], b], 1)[:, : a.shape[1]]),
    "chunk": binary(lambda a, b: torch.cat([a.chunk(2, 1)[1], b.chunk(2, 1)[0]], 1)),
    "slice": binary(lambda a, b: torch.cat([a[:, 1:], b[:, :1]], 1)),
}

Steps = list[tuple[str, int, int]]
STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATORS)), st.integers(0, 7), st.integers(0, 7)),
    min_size=2,
    max_size=7,
)


class Net(nn.Module):
    """Applies each step to earlier values; a flag doubles the result. ``more``: gives some of them, too."""

    def __init__(self, steps: Steps, more: bool = False) -> None:
        super().__init__()
        self.more = more
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList()
        self.calls: list[tuple[Callable[[Any, Tensor, Tensor], Tensor], int, int]] = []
        channels = [8]
        for name, first, second in steps:
            a = len(channels) - 1 - first % len(channels)
            alike = [i for i, c in enumerate(channels) if c == channels[a]]
            call, out = OPERATORS[name](self, channels[a])
            self.calls.append((call, a, alike[second % len(alike)]))
            channels.append(out)
        self.head = nn.Conv2d(channels[-1], 4, 1)

    def forward(self, x: Tensor, twice: bool = False) -> Any:
        values = [self.stem(x)]
        for call, a, b in self.calls:
            values.append(call(self, values[a], values[b]))
        y = self.head(values[-1])
        y = y * 2 if twice else y
        return {"y": y, "more": (values[0], [values[len(values) // 2]])} if self.more else y


class Several(nn.Module):
    """Networks beside one another: tracing costs more for each call than for each operator."""

    def __init__(self, nets_: list[Net]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets_)

    def forward(self, x: Tensor, twice: bool = False) -> list[Any]:
        return [net(x, twice) for net in self.nets]


def compare(model: nn.Module, seed: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    nets.structured_zeros(nets.random_norms(model, seed), seed, dead=0.3).eval()
    exact = copy.deepcopy(model).double()
    example = torch.randn(1 + seed % 2, 3, *size)
    for train in (False, True):
        packed = dsprune.pack(model, example, train=train).eval()
        assert train or packed.fused, packed.unfused_reason
        for shape in (tuple(example.shape), (3, 3, *size), (2, 3, size[1] + 1, size[0] + 3)):
            x = torch.randn(shape)
            flags = (False, True) if shape == tuple(example.shape) and seed % 4 == 0 else (False,)
            for flag in flags:
                with torch.no_grad():
                    given, expected = packed(x, flag), exact(x.double(), flag)
                (given, form), (expected, meant) = tree_flatten(given), tree_flatten(expected)
                assert form == meant
                for a, b in zip(given, expected, strict=True):
                    assert a.shape == b.shape
                    scale = max(1.0, float(b.abs().max()))
                    assert float((a.double() - b).abs().max()) <= 1e-4 * scale, (train, shape, flag)


SIZES = st.sampled_from([(6, 6), (8, 5), (4, 9)])
ONE = given(STEPS, st.integers(0, 999), SIZES)
TEN = given(st.lists(STEPS, min_size=10, max_size=10), st.integers(0, 999), SIZES)


def one(steps: Steps, seed: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    compare(Net(steps, more=seed % 3 == 0), seed, size)


def ten(steps: list[Steps], seed: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    compare(Several([Net(s, more=(seed + i) % 5 == 0) for i, s in enumerate(steps)]), seed, size)


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@ONE
def test_random_networks(steps: Steps, seed: int, size: tuple[int, int]) -> None:
    one(steps, seed, size)


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@TEN
def test_random_networks_beside_one_another(steps: list[Steps], seed: int, size: tuple[int, int]) -> None:
    ten(steps, seed, size)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=1000, suppress_health_check=list(HealthCheck))
@ONE
def test_a_thousand_random_networks(steps: Steps, seed: int, size: tuple[int, int]) -> None:
    one(steps, seed, size)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@TEN
def test_a_thousand_random_networks_beside_one_another(
    steps: list[Steps], seed: int, size: tuple[int, int]
) -> None:
    ten(steps, seed, size)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_row_makes_an_operator(name: str) -> None:
    """Rows are applied to values of every number of channels that there is."""
    for before in ("relu", "conv", "conv without bias"):
        net, x = Net([(before, 0, 0), (name, 0, 1), (name, 0, 0)]).eval(), torch.randn(2, 3, 6, 5)
        assert net(x).shape == (2, 4, 6, 5)
