"""A packed network run as one native program: when, when not and why, and the same outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsprune
from dsp_kernels import available_backends
from dsprune.run.native import KEPT_PLANS, NativeRunner, to_program

pytestmark = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)


def packed_of(make: type[nn.Module], seed: int = 0) -> dsprune.PackedNetwork:
    torch.manual_seed(seed)
    model = nets.structured_zeros(nets.random_norms(make(), seed), seed).eval()
    return dsprune.pack(model, torch.randn(1, 3, 16, 16))


def cache(packed: dsprune.PackedNetwork) -> NativeRunner:
    return packed._runner(packed.network)


class Pools(nn.Module):
    """Every step that a program has: pools, concatenation, a lone BatchNorm, depthwise, flatten, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nets.conv_bn(3, 8)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix = nets.conv_bn(16, 8)
        self.last = nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        y = F.relu(self.norm(x))
        z = F.relu6(self.depthwise(y))
        x = F.relu(self.mix(torch.cat([y, z], 1))) + F.avg_pool2d(y, 3, 1, 1)
        x = F.relu(self.last(x))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("make", [nets.Plain, nets.Residual, nets.DeadButBiased, Pools])
def test_program_equals_the_layers(make: type[nn.Module], seed: int) -> None:
    packed = packed_of(make, seed)
    for shape in ((1, 3, 16, 16), (5, 3, 23, 18)):
        x = torch.randn(shape)
        with torch.no_grad():
            program = cache(packed).find((x,))
            assert program is not None, packed.program_reason
            torch.testing.assert_close(packed(x), packed.network(x), rtol=1e-5, atol=1e-6)
            assert torch.equal(packed(x), packed(x))


def test_same_bits_whatever_the_threads() -> None:
    packed, x = packed_of(Pools), torch.randn(7, 3, 20, 20)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(packed(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_concurrent_callers() -> None:
    packed = packed_of(nets.Residual)
    inputs = [torch.randn(1 + i % 3, 3, 16 + 2 * (i % 4), 16) for i in range(24)]

    def infer(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return packed(x)

    expected = [infer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(infer, inputs), expected, strict=True))


def test_structure_of_the_result_is_kept() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.Plain()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
            return {"logits": self.net(x), "nothing": None}

    packed = packed_of(Net)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert cache(packed).find((x,)) is not None
        out = packed(x)
    assert set(out) == {"logits", "nothing"} and out["nothing"] is None and out["logits"].shape == (2, 5)


def test_unknown_step_runs_layer_by_layer_and_says_so() -> None:
    packed = packed_of(nets.Zoo)
    with torch.no_grad():
        packed(torch.randn(1, 3, 16, 16))
    assert "operator" in (packed.program_reason or "")


def test_other_backend_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.structured_zeros(nets.Plain()).eval()
    packed = dsprune.pack(model, torch.randn(1, 3, 16, 16), backend="reference")
    with torch.no_grad():
        packed(torch.randn(1, 3, 16, 16))
    assert "reference" in (packed.program_reason or "")
    monkeypatch.setenv("DSP_KERNELS_BACKEND", "reference")
    packed = dsprune.pack(model, torch.randn(1, 3, 16, 16))
    with torch.no_grad():
        packed(torch.randn(1, 3, 16, 16))
    assert "reference" in (packed.program_reason or "")


def test_gradients_go_through_the_layers() -> None:
    packed = packed_of(nets.Residual)
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    assert cache(packed).find((x,)) is None
    packed(x).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)


def test_hooks_of_inner_layers_are_called() -> None:
    packed, x, seen = packed_of(nets.Plain), torch.randn(1, 3, 16, 16), []
    with torch.no_grad():
        packed(x)
        handle = packed.network.head.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
        packed(x)
        handle.remove()
        packed(x)
    assert seen == [1]


@pytest.mark.parametrize("how", ["in place", "load_state_dict", "new parameter"])
def test_changed_weights_are_noticed(how: str) -> None:
    packed, x = packed_of(nets.Plain), torch.randn(1, 3, 16, 16)
    head = packed.network.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        before = packed(x)
        if how == "in place":
            head.weight.mul_(2)
        elif how == "new parameter":
            head.weight = nn.Parameter(head.weight * 2)
        else:
            state = packed.state_dict()
            packed.load_state_dict({**state, "network.head.weight": state["network.head.weight"] * 2})
        after = packed(x)
        torch.testing.assert_close(after, packed.network(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(after, before)


def test_a_replaced_layer_is_noticed() -> None:
    packed, x, seen = packed_of(nets.Plain), torch.randn(1, 3, 16, 16), []
    head = packed.network.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        packed(x)
        packed.network.head = nn.Linear(head.in_features, 4, bias=False)
        after = packed(x)
        assert packed.program_reason is None and after.shape == (1, 4)
        torch.testing.assert_close(after, packed.network(x), rtol=1e-5, atol=1e-6)
        packed.network.head.bias = nn.Parameter(torch.ones(4))
        torch.testing.assert_close(packed(x), after + 1, rtol=1e-5, atol=1e-6)
        packed.network.head.register_forward_hook(lambda *_: seen.append(1))
        packed(x)
    assert seen == [1]


def test_a_network_without_weights_keeps_its_program() -> None:
    class Pool(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.max_pool2d(x, 2)

    packed, x = dsprune.pack(Pool(), torch.randn(1, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(packed(x), F.max_pool2d(x, 2))
        assert cache(packed).find((x,)) is cache(packed).find((x,)) is not None


@pytest.mark.parametrize("last", ["relu", "sum"])
def test_flat_outputs(last: str) -> None:
    """Of a step that is neither a linear layer nor a flattening."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.conv(x).mean((2, 3))
            return F.relu(self.a(x)) if last == "relu" else self.a(x) + self.b(x)

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    packed = dsprune.pack(model, x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-5, atol=1e-6)
    assert packed.program_reason is None


def test_dtype_changes_are_noticed() -> None:
    packed, x = packed_of(nets.Plain), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        before = packed(x)
        torch.testing.assert_close(packed.double()(x.double()).float(), before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed.float()(x), before)


def test_inference_mode() -> None:
    packed, x = packed_of(nets.Plain), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = packed(x)
    with torch.inference_mode():
        assert torch.equal(packed(x), expected)
        made_there = packed_of(nets.Plain)
        assert torch.equal(made_there(x), expected) and made_there.program_reason is None
        head = made_there.network.head
        assert isinstance(head, nn.Linear)
        head.weight.mul_(2)
        assert not torch.equal(made_there(x), expected)
        # A weight that does not tell when it is written: layers run.
        head.weight = nn.Parameter(head.weight.clone())
        for _ in range(2):
            head.weight.mul_(2)
            torch.testing.assert_close(made_there(x), made_there.network(x))
        assert "inference mode" in (made_there.program_reason or "")


def test_few_sizes_are_kept() -> None:
    packed = packed_of(nets.Plain)
    with torch.no_grad():
        for size in range(8, 12 + KEPT_PLANS):
            packed(torch.randn(1, 3, size, 9))
    assert len(cache(packed)._plans) == KEPT_PLANS


def test_copies_make_their_own_plans() -> None:
    packed, x = packed_of(nets.Plain), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = packed(x)
    fresh = copy.copy(cache(packed))
    assert not fresh._plans and fresh.network is packed.network
    with torch.no_grad():
        program = fresh.find((x,))
        assert program is not None and torch.equal(fresh.run(program, (x,)), expected)


def test_more_than_one_input_has_no_program() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    program, reason = to_program(torch.fx.symbolic_trace(Two()), (3, 8, 8))
    assert program is None and reason == "the network takes more than one input"
    assert to_program(nn.Linear(2, 2), (3, 8, 8)) == (None, "the network is no exported graph")


# Operators that take a number, with the number on either side and in every form that torch takes.
WITH_NUMBERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "x + 0": lambda x: x + 0,
    "x + 1": lambda x: x + 1,
    "x + 2": lambda x: x + 2,
    "3 + x": lambda x: 3 + x,
    "x + 1.0": lambda x: x + 1.0,
    "x + True": lambda x: x + True,
    "x += 1": lambda x: x.clone().add_(1),
    "x + tensor": lambda x: x + torch.tensor(1),
    "x + a tensor of one": lambda x: x + torch.tensor([1.0]),
    "x - 1": lambda x: x - 1,
    "1 - x": lambda x: 1 - x,
    "rsub": lambda x: torch.rsub(x, 1, alpha=2),
    "x * 2": lambda x: x * 2,
    "2 * x": lambda x: 2 * x,
    "x / 2": lambda x: x / 2,
    "1 / x": lambda x: 1 / (x.abs() + 1),
    "x // 1": lambda x: x // 1,
    "x % 2": lambda x: x % 2,
    "x ** 2": lambda x: x**2,
    "2 ** x": lambda x: 2**x,
    "add, alpha": lambda x: torch.add(x, x, alpha=2),
    "sub, alpha": lambda x: torch.sub(x, x.relu(), alpha=2),
    "add 1, alpha": lambda x: torch.add(x, 1, alpha=2),
    "clamp": lambda x: x.clamp(0, 1),
    "clamp from below": lambda x: x.clamp(min=1),
    "clamp from above": lambda x: x.clamp(max=1),
    "hardtanh": lambda x: F.hardtanh(x, 0, 2),
    "maximum": lambda x: torch.maximum(x, torch.tensor(1.0)),
    "minimum": lambda x: torch.minimum(torch.tensor(1.0), x),
    "leaky relu": lambda x: F.leaky_relu(x, 1),
    "threshold": lambda x: F.threshold(x, 1, 2),
    "where": lambda x: torch.where(x > 1, x, 1),
    "fill": lambda x: x.masked_fill(x > 0, 1),
    "lerp": lambda x: torch.lerp(x, x.relu(), 2),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=1),
    "full": lambda x: x + torch.full_like(x, 1),
    "cat": lambda x: torch.cat([x, torch.ones_like(x)], 1),
    "its height": lambda x: x + x.shape[2],
    "its width, in float": lambda x: x / x.shape[3],
    "padding": lambda x: F.pad(x, (1, 1, 1, 1), value=1),
    "max pool": lambda x: F.max_pool2d(x, 1, 2),
    "mean": lambda x: x.mean((2, 3), keepdim=True) + 1,
}


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_numbers_are_numbers_at_every_size(name: str) -> None:
    """The first steps' outputs have the same sizes as what is computed with at one of the sizes, and not at
    another.
    """

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Conv2d(16 if name == "cat" else 8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.adaptive_avg_pool2d(F.relu(self.b(F.relu(self.a(x)))), 6)
            return self.last(WITH_NUMBERS[name](x))

    torch.manual_seed(0)
    model = nets.structured_zeros(Net()).eval()
    packed, exact = dsprune.pack(model, torch.randn(2, 3, 12, 12)), copy.deepcopy(model).double()
    with torch.no_grad():
        for shape in ((2, 3, 12, 12), (1, 3, 6, 6), (3, 3, 9, 7)):
            x = torch.randn(shape)
            expected = exact(x.double())
            torch.testing.assert_close(packed(x).double(), expected, rtol=1e-4, atol=1e-5)
