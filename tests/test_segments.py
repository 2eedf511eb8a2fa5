"""Packed networks of which some operators run in torch: the rest in native segments, the same outputs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

import dsprune
from dsp_kernels import available_backends
from dsprune.run import segments
from dsprune.run.native import KEPT_PLANS, NativeRunner

pytestmark = [
    pytest.mark.skipif(
        available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
    ),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # of torch, about itself, in copies
]

UNKNOWN = "aten.special_erf.default"  # no step is made for it


def unknown(x: Tensor) -> Tensor:
    return torch.special.erf(x)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)


def network(call: Callable[..., Any], seed: int = 0) -> nn.Module:
    class Net(Layers):
        forward = call

    torch.manual_seed(seed)
    return nets.structured_zeros(Net(), seed).eval()


def runner(packed: dsprune.PackedNetwork) -> NativeRunner:
    found = packed._runner(packed.network)
    assert isinstance(found, NativeRunner)
    return found


def same(given: Any, expected: Any) -> None:
    """Structure, types, and values within rounding of those in float64."""
    (have, form), (want, meant) = tree_flatten(given), tree_flatten(expected)
    assert form == meant
    for a, b in zip(have, want, strict=True):
        assert type(a) is type(b)
        if not isinstance(b, Tensor):
            assert a == b
        elif b.is_floating_point():
            assert a.dtype == torch.float32 and a.shape == b.shape
            assert float((a.double() - b).abs().max()) <= 2e-5 * max(1.0, float(b.abs().max()))
        else:
            assert torch.equal(a, b)


def exact(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    double = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    with torch.no_grad():
        return copy.deepcopy(model).double()(*double)


def at_start(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(unknown(x))))


def in_the_middle(m: Any, x: Tensor) -> Tensor:
    return m.c(F.relu(m.b(unknown(F.relu(m.a(x))))))


def at_the_end(m: Any, x: Tensor) -> Tensor:
    return unknown(m.b(F.relu(m.a(x))))


def in_a_branch(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    return m.d(m.b(y) + unknown(m.c(y)))


def twice(m: Any, x: Tensor) -> Tensor:
    y = unknown(m.b(F.relu(m.a(x))))
    return m.d(F.relu(m.c(y) + y)) + unknown(y)


def nested(m: Any, x: Tensor) -> Any:
    y = F.relu(m.a(x))
    z = m.b(y)
    return {
        "maps": [y, (z, None)],
        "logits": m.head(z.mean((2, 3))),
        "best": unknown(z).argmax(1),
        "n": x.shape[0],
    }


def in_place(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    z = m.b(y)
    y.add_(1).relu_()
    z[:, 3:9] *= 0.5
    return m.c(z + y), y


def views(m: Any, x: Tensor) -> Any:
    """Views of what a segment gives, kept until the end, while later segments run."""
    y = F.relu(m.a(x))
    z = m.b(y).transpose(2, 3).flatten(1, 2).unfold(2, 3, 2)
    w = m.c(unknown(y))
    return z, y[..., 1:], m.d(F.relu(w)), w.permute(0, 2, 3, 1)


def to_the_batch(m: Any, x: Tensor) -> Tensor:
    """Pieces of an image become images, and are put together again."""
    n, c, h, w = x.shape
    y = x.view(n, c, 2, h // 2, w).transpose(1, 2).reshape(2 * n, c, h // 2, w)
    y = m.b(F.relu(m.a(y)))
    return m.c(y.view(n, 2, 16, h // 2, w).transpose(1, 2).reshape(n, 16, h, w))


def by_size(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = torch.rot90(m.b(F.max_pool2d(y, 2)), 2, (2, 3))
    return m.c(y + F.interpolate(z, size=y.shape[2:], mode="bicubic")) * (y.shape[2] // 2)


NETWORKS = {
    call.__name__: call
    for call in (
        at_start, in_the_middle, at_the_end, in_a_branch, twice, nested, in_place, views, to_the_batch,
        by_size,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_an_unknown_operator(name: str) -> None:
    model = network(NETWORKS[name])
    packed = dsprune.pack(model, torch.randn(2, 3, 12, 10))
    assert packed.fused
    for shape in ((2, 3, 12, 10), (1, 3, 12, 10), (5, 3, 20, 24)):
        x = torch.randn(shape)
        before = x.clone()
        with torch.no_grad():
            given = packed(x)
            same(given, exact(model, (x,)))
            assert torch.equal(x, before)
            again = packed(x.contiguous(memory_format=torch.channels_last))
            for a, b in zip(tree_flatten(given)[0], tree_flatten(again)[0], strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        covered = dsprune.coverage(packed, x)
        assert covered.native == 1.0 and covered.segments >= 1, str(covered)
        assert packed.program_reason is not None


def test_one_operator_costs_itself_alone() -> None:
    packed = dsprune.pack(network(in_the_middle), x := torch.randn(1, 3, 16, 16))
    covered = dsprune.coverage(packed, x)
    assert (covered.native, covered.segments, covered.reasons) == (1.0, 2, {UNKNOWN: 1})
    assert covered.macs == dsprune.summary(packed, x).macs
    with torch.no_grad():
        packed(x)
    assert packed.program_reason == f"operator {UNKNOWN}"
    text = str(covered)
    assert "native segment 2" in text and UNKNOWN in text and f"{covered.parts[0][1]:,}" in text


def test_arithmetic_on_sizes_is_no_reason() -> None:
    """Neither where it is known before the call, nor where it needs the batch."""

    def call(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y = m.b(y + torch.rot90(y, 2, (2, 3)) * (y.shape[2] // 2 + y.shape[3]))
        return y.reshape(y.shape[0] * 2, 8, y.shape[2] * y.shape[3] // 3, 3)

    packed = dsprune.pack(network(call), torch.randn(2, 3, 12, 12))
    for shape in ((2, 3, 12, 12), (4, 3, 9, 15)):
        covered = dsprune.coverage(packed, torch.randn(shape))
        assert covered.reasons and all(name.startswith("aten.") for name in covered.reasons)
        assert not any(
            "sym" in name or "mul.Scalar" in name or "floordiv" in name for name in covered.reasons
        )


def test_several_outputs_are_one_segment() -> None:
    def call(m: Any, x: Tensor) -> Any:
        y = F.relu(m.b(F.relu(m.a(x))))
        z = F.relu(m.c(y))
        return {"y": y, "rest": (z, [y, m.head(z.mean((2, 3)))])}

    model = network(call)
    packed = dsprune.pack(model, torch.randn(2, 3, 12, 10))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 11, 10)
        with torch.no_grad():
            out = packed(x)
        same(out, exact(model, (x,)))
        assert packed.program_reason is None
        covered = dsprune.coverage(packed, x)
        assert (covered.native, covered.segments, covered.reasons, covered.reason) == (1.0, 1, {}, None)


def test_several_inputs() -> None:
    """Images of two sizes, a vector and integers; in tuples and dictionaries, by name."""

    def call(m: Any, x: Tensor, more: Any, pick: Tensor, *, gain: Tensor) -> Any:
        y = F.relu(m.a(x)) + F.interpolate(m.a(more["small"]), size=x.shape[2:], mode="bicubic")
        z = m.b(y) * gain
        return m.c(z), m.head(more["vector"][0]), z.mean((2, 3))[pick], pick + 1

    model = network(call)

    def arguments(n: int, h: int, w: int) -> tuple[Any, dict[str, Any]]:
        more = {"small": torch.randn(n, 3, h // 2, w // 2), "vector": [torch.randn(n, 16)]}
        return (torch.randn(n, 3, h, w), more, torch.randint(0, n, (7,))), {"gain": torch.rand(n, 1, 1, 1)}

    args, kwargs = arguments(2, 12, 8)

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor, more: Any, pick: Tensor, gain: Tensor) -> Any:
            return self.net(x, more, pick, gain=gain)

    whole = Positional().eval()
    packed = dsprune.pack(whole, (*args, kwargs["gain"]))
    for n, h, w in ((2, 12, 8), (1, 12, 8), (3, 10, 14)):
        args, kwargs = arguments(n, h, w)
        with torch.no_grad():
            given = packed(*args, **kwargs)
        same(given, exact(whole, (*args, kwargs["gain"])))
        covered = dsprune.coverage(packed, *args, kwargs["gain"])
        assert covered.native == 1.0 and covered.segments >= 1


def test_a_wholly_native_network_has_the_bits_of_its_program() -> None:
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(nets.Residual(), 0), 0).eval()

    class Ends(nn.Module):
        """The same network between operators that run in torch."""

        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.flip(3)).flip(1)

    x = torch.randn(3, 3, 16, 16)
    one, between = dsprune.pack(model, x), dsprune.pack(Ends().eval(), x)
    with torch.no_grad():
        assert torch.equal(between(x), one(x.flip(3)).flip(1))
        assert one.program_reason is None and dsprune.coverage(between, x).segments == 1


def test_memory_of_earlier_calls_is_left_alone() -> None:
    """What was returned is the caller's: no later call writes there, nor into views that torch made."""
    for call in (views, twice, nested):
        packed = dsprune.pack(network(call), torch.randn(2, 3, 12, 10))
        with torch.no_grad():
            kept = [packed(torch.randn(2, 3, 12, 10)) for _ in range(3)]
            copies = [tree_map_only(Tensor, Tensor.clone, out) for out in kept]
            for _ in range(3):
                packed(torch.randn(2, 3, 12, 10))
        for a, b in zip(tree_flatten(kept)[0], tree_flatten(copies)[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_dead_values_are_freed() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def call(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        for layer in (m.b, m.c, m.d):
            y = layer(unknown(y))
        return y

    packed = dsprune.pack(network(call), x := torch.randn(1, 3, 16, 16))
    found = runner(packed).plan([x])
    assert found is not None and len(found.segments) == 4
    for segment in found.segments:

        def count(_: Any, inputs: Any, output: Tensor) -> None:
            gc.collect()
            alive.append(sum(ref() is not None for ref in seen))
            seen.append(weakref.ref(output))

        segment.register_forward_hook(count)
    with torch.no_grad():
        packed(x)
    assert len(alive) == 4 and max(alive) == 0


def test_plans_are_bounded_and_good_for_any_batch() -> None:
    packed = dsprune.pack(network(twice), torch.randn(2, 3, 12, 10))
    with torch.no_grad():
        for batch in range(1, 14):
            packed(torch.randn(batch, 3, 12, 10))
        assert len(runner(packed)._plans) == 1
        for size in range(8, 13 + KEPT_PLANS):
            packed(torch.randn(1, 3, size, 9))
    assert len(runner(packed)._plans) == KEPT_PLANS


def test_operators_that_look_at_the_batch_are_planned_for_each() -> None:
    class Moved(nn.Module):
        """Keeps what is positive, however much that is."""

        def __init__(self) -> None:
            super().__init__()
            self.net = network(lambda m, x: m.b(F.relu(m.a(x))))

        def forward(self, x: Tensor) -> Any:
            y = self.net(x)
            return y, torch.nonzero(y > 0).sum(0)

    model = Moved().eval()
    packed = dsprune.pack(model, torch.randn(2, 3, 8, 8))
    if not packed.fused:
        pytest.skip(f"no graph: {packed.unfused_reason}")
    with torch.no_grad():
        for batch in (2, 5, 1, 2):
            x = torch.randn(batch, 3, 8, 8)
            same(packed(x), exact(model, (x,)))
    assert dsprune.coverage(packed, torch.randn(2, 3, 8, 8)).native == 1.0


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "save"])
def test_copies(how: str, tmp_path: Any) -> None:
    model = network(lambda m, x: {"out": m.c(unknown(m.b(F.relu(m.a(x))))), "n": None})
    packed = dsprune.pack(model, x := torch.randn(2, 3, 12, 10))
    with torch.no_grad():
        expected = packed(x)
        if how == "save":
            dsprune.save(packed, tmp_path / "net.safetensors")
            made = dsprune.load(tmp_path / "net.safetensors", copy.deepcopy(model))
        else:
            made = copy.deepcopy(packed) if how == "deepcopy" else None
        if made is not None:
            assert torch.equal(made(x)["out"], expected["out"]) and made(x)["n"] is None
            assert dsprune.coverage(made, x).segments == 2
        graph = pickle.loads(pickle.dumps(runner(packed).network)) if how == "pickle" else packed.network
        again = NativeRunner(graph, None)
        found = again.find([x])
        assert found is not None and torch.equal(again.run(found, [x])["out"], expected["out"])


def test_threads() -> None:
    packed = dsprune.pack(network(twice), torch.randn(2, 3, 12, 10))
    inputs = [torch.randn(1 + i % 3, 3, 12 + 2 * (i % 3), 10) for i in range(18)]

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return packed(x)

    expected = [infer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(infer, inputs), expected, strict=True))


def test_gradients_hooks_and_new_weights() -> None:
    packed, seen = dsprune.pack(network(twice), x := torch.randn(2, 3, 12, 10)), []
    with torch.no_grad():
        before = packed(x)
        layer = packed.network.get_submodule("c")
        handle = layer.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(packed(x), before, rtol=1e-4, atol=1e-5)
        assert seen == [1] and dsprune.coverage(packed, x).native == 0.0
        handle.remove()
        layer.weight.mul_(2)  # type: ignore[operator, union-attr]
        after = packed(x)
        torch.testing.assert_close(after, packed.network(x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(after, before)
    x.requires_grad_()
    packed(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0


def test_what_multiplies_little_stays_in_torch() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return F.relu(unknown(F.max_pool2d(unknown(F.relu(unknown(m.a(x)))), 2)))

    packed = dsprune.pack(network(call), x := torch.randn(1, 3, 12, 12))
    covered = dsprune.coverage(packed, x)
    assert (covered.native, covered.segments) == (1.0, 1)
    assert covered.reasons == {UNKNOWN: 3, "aten.relu.default": 2, "aten.max_pool2d.default": 1}


def test_large_linear_layers_by_themselves_stay_in_torch() -> None:
    """They would be kept twice, to be read from memory as before."""

    class Head(nn.Module):
        def __init__(self, features: int) -> None:
            super().__init__()
            self.net = network(lambda m, x: m.b(F.relu(m.a(x))))
            self.fc = nn.Linear(16 * 8 * 8, features)

        def forward(self, x: Tensor) -> Any:
            return self.fc(unknown(self.net(x)).flatten(1))

    x = torch.randn(2, 3, 8, 8)
    for features, layers in ((8, 0), (300, 1)):
        covered = dsprune.coverage(dsprune.pack(Head(features).eval(), x), x)
        assert covered.reasons.get("Linear", 0) == layers and (covered.native == 1.0) == (layers == 0)


def test_a_step_that_fails_costs_its_operator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when the program is built: one by one, the operator is found and the rest stays native."""
    model = network(lambda m, x: m.c(F.relu(m.b(F.max_pool2d(m.a(x), 2, 2)))))
    build = segments.Program.build

    def refuse(self: Any, *outputs: Any) -> Any:
        if any(name == "max_pool" for name, _ in self._steps):
            raise ValueError("program: no pooling today")
        return build(self, *outputs)

    monkeypatch.setattr(segments.Program, "build", refuse)
    packed = dsprune.pack(model, x := torch.randn(2, 3, 12, 12))
    with torch.no_grad():
        same(packed(x), exact(model, (x,)))
    covered = dsprune.coverage(packed, x)
    assert covered.reasons == {"aten.max_pool2d.default": 1} and covered.segments == 2
    assert "no pooling today" in (covered.reason or "")


def test_coverage_of_networks_that_are_no_graph() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.calls = nn.Conv2d(3, 8, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.conv(x)

    with pytest.warns(UserWarning, match="replaced one by one"):
        packed = dsprune.pack(Counting().eval(), x := torch.randn(1, 3, 8, 8))
    covered = dsprune.coverage(packed, x)
    assert (covered.native, covered.segments) == (0.0, 0) and list(covered.reasons) == [packed.unfused_reason]
    with pytest.raises(TypeError, match="packed: expected a PackedNetwork"):
        dsprune.coverage(nn.Conv2d(3, 3, 1), x)  # type: ignore[arg-type]
