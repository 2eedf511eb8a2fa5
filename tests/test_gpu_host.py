"""Packing for a GPU without one: forms, padding, chains in a graph, and the cache of CUDA graphs with a
stand-in for the capture.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dsprune
from dsp_kernels import GroupLayout, backends, cost
from dsp_kernels.conv import op
from dsprune import gpu
from dsprune.models.resnet import Bottleneck
from dsprune.nn import PermutedGroupedConv2d

SHAPE = (2, 3, 12, 12)


class Bottlenecks(nn.Module):
    """Two blocks of ResNet-50, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nets.conv_bn(3, 16)
        self.blocks = nn.Sequential(*(Bottleneck(16 if i == 0 else 32, 8, 1) for i in range(3)))
        self.blocks[0].conv2.stride = (2, 2)
        self.blocks[0].downsample[0].stride = (2, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def pruned(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nets.structured_zeros(nets.random_norms(make(), seed), seed).eval()


@pytest.fixture(scope="module")
def residual() -> dsprune.PackedNetwork:
    return dsprune.pack(pruned(nets.Residual), torch.randn(SHAPE))


@pytest.fixture(scope="module")
def bottlenecks() -> dsprune.PackedNetwork:
    return dsprune.pack(pruned(Bottlenecks), torch.randn(SHAPE))


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    x = torch.randn(SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(a(x), b(x), rtol=tolerance, atol=tolerance)


def layers(network: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


# ---- steps ----


def test_steps_are_the_layers_that_run(residual: dsprune.PackedNetwork) -> None:
    steps = gpu.trace_steps(residual.network, (4, 3, 10, 14), torch.float16)
    seen: dict[str, tuple[Any, ...]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
            seen[name] = (tuple(args[0].shape), tuple(out.shape), len(args) > 1)

        return hook

    handles = [m.register_forward_hook(watch(m.dense_name)) for _, m in residual.layers()]
    residual.network(torch.randn(4, 3, 10, 14))
    for handle in handles:
        handle.remove()
    packed = [step for step in steps if step.conv is not None]
    assert [step.name for step in packed] == list(seen)
    for step in packed:
        conv = step.conv
        assert conv is not None
        x, out, has_residual = seen[step.name]
        assert (conv.batch, conv.layout.in_channels, *conv.size) == x
        assert (conv.batch, conv.layout.out_channels, *conv.out_size) == out
        assert conv.residual == has_residual
    assert [step.kind for step in steps if step.conv is None] == ["other", "linear"]
    assert steps[-1].bytes == 2 * (4 * 16 + 4 * 5 + 16 * 5) and steps[-1].flops == 2 * 4 * 16 * 5


def test_padding_modes_are_counted_outside_of_the_layer() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")
    packed = dsprune.pack(nn.Sequential(conv, nn.ReLU()), torch.randn(1, 4, 8, 8))
    step = next(s for s in gpu.trace_steps(packed.network, (1, 4, 8, 8), torch.float32) if s.conv)
    assert step.conv is not None and step.conv.out_size == (8, 8)


# ---- rewriting ----


def measured_fastest(packed: dsprune.PackedNetwork, form: str) -> cost.FormTable:
    """A table in which ``form`` is the fastest for every layer at SHAPE in float32 on sm_90."""
    table = cost.FormTable()
    for step in gpu.trace_steps(gpu.pad_channels(packed.network), SHAPE, torch.float32):
        if step.conv is not None:
            for each in cost.FORMS:
                table.add("sm_90", step.conv.key(torch.float32), each, 1.0 if each == form else 2.0)
    return table


def test_the_cuda_form_runs_where_it_was_measured_to_be_fastest(
    residual: dsprune.PackedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, where = measured_fastest(residual, "cuda"), cost.device("H200")
    # Where it cannot run: the next best form, and the reason.
    network, found = gpu.rewrite(residual.network, SHAPE, torch.float32, where, table=table, chain="off")
    why = backends.can_run("cuda", "cpu", torch.float32)
    rows = [row for row in found.rows if row.runs]
    assert rows and all(
        row.form != "cuda" and row.reason.endswith(f"cuda cannot run here: {why}") for row in rows
    )
    same(network, residual.network)
    with pytest.raises(ValueError, match="none of the forms can be chosen"):
        gpu.rewrite(residual.network, SHAPE, torch.float32, where, forms=("cuda",), chain="off")
    # The report for another machine goes by its measurements.
    there = gpu.predict(residual, SHAPE, dtype=torch.float32, table=table, chain="off")
    assert {row.form for row in there.rows if row.runs} == {"cuda"}

    monkeypatch.setattr(backends, "can_run", lambda *_: None)
    network, found = gpu.rewrite(residual.network, SHAPE, torch.float32, where, table=table, chain="off")
    packed = layers(network, PermutedGroupedConv2d)
    assert all(row.form == "cuda" and "measured" in row.reason for row in found.rows if row.runs)
    assert packed and all(layer.backend == "cuda" for layer in packed.values())
    for name, layer in packed.items():
        assert layer.weight.data_ptr() == residual.network.get_submodule(name).weight.data_ptr()
        assert layer.layout.groups == residual.network.get_submodule(name).layout.groups
    _, found = gpu.rewrite(residual.network, SHAPE, torch.float32, where, chain="off")
    assert not any(row.form == "cuda" for row in found.rows), "never by prediction"
    asked: list[str | None] = []
    monkeypatch.setattr(op, "choose", lambda backend, *_: asked.append(backend) or "reference")
    same(network, residual.network)
    assert asked.count("cuda") == len(packed)


@pytest.mark.parametrize("form", [form for form in cost.FORMS if form not in cost.MEASURED_ONLY])
def test_each_form_computes_the_same(residual: dsprune.PackedNetwork, form: str) -> None:
    network, found = gpu.rewrite(
        residual.network, SHAPE, torch.float32, cost.device("H200"), forms=(form,), chain="off"
    )
    same(network, residual.network)
    packed = layers(network, PermutedGroupedConv2d)
    assert len(layers(network, gpu.DenseConv2d)) == (6 if form == "torch" else 0)
    assert all(row.form == form for row in found.rows if row.runs)
    if form == "merged":
        assert packed and all(len(m.layout.groups) <= 1 for m in packed.values())
    assert any(len(m.layout.groups) > 1 for _, m in residual.layers())


def test_dense_form_of_every_geometry() -> None:
    torch.manual_seed(0)
    layout = GroupLayout(5, 7, [([0, 3], [1, 2]), ([1, 2, 4], [0, 5, 6])])
    x = torch.randn(2, 5, 9, 11)
    for activation in (None, "relu", "relu6"):
        for mode in ("zeros", "reflect"):
            layer = PermutedGroupedConv2d(
                layout, (3, 5), stride=(2, 1), padding=(1, 3), padding_mode=mode, activation=activation
            ).requires_grad_(False)
            layer.bias.normal_()
            dense = gpu.DenseConv2d(layer)
            residual = torch.randn_like(layer(x))
            torch.testing.assert_close(dense(x), layer(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(dense(x, residual), layer(x, residual), rtol=1e-5, atol=1e-5)


def test_private_activations_are_padded_to_eight() -> None:
    model = pruned(lambda: nets.Plain(12))
    packed = dsprune.pack(model, torch.randn(SHAPE))
    padded = gpu.pad_channels(packed.network)
    before, after = layers(packed.network, PermutedGroupedConv2d), layers(padded, PermutedGroupedConv2d)
    odd = [name for name, m in before.items() if m.out_channels % 8 and name != "c"]
    assert odd
    for name in odd:
        assert after[name].out_channels == 8 * -(-before[name].out_channels // 8)
        assert torch.equal(after[name].weight, before[name].weight)
    assert after["b"].in_channels == after["a.0"].out_channels
    assert after["c"].out_channels == before["c"].out_channels, "its reader is no packed layer"
    same(padded, packed.network)
    same(padded, model)
    assert before["b"].in_channels % 8, "the argument is left alone"


def test_what_others_read_is_not_padded(residual: dsprune.PackedNetwork) -> None:
    padded = gpu.pad_channels(residual.network, 64)
    same(padded, residual.network)
    after = layers(padded, PermutedGroupedConv2d)
    assert after["a1.0"].out_channels == 64
    for name in ("stem.0", "a2.0", "b2.0", "project.0"):
        assert after[name].out_channels == layers(residual.network, PermutedGroupedConv2d)[name].out_channels


def test_a_layer_that_is_called_twice_stays() -> None:
    model = pruned(nets.Zoo)
    packed = dsprune.pack(model, torch.randn(2, 3, 16, 16))
    network, _ = gpu.rewrite(
        packed.network, (2, 3, 16, 16), torch.float32, cost.device("H200"), forms=("torch",)
    )
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(network(x), packed.network(x), rtol=1e-4, atol=1e-4)


# ---- chains ----


def test_chains_take_the_place_of_three_layers(bottlenecks: dsprune.PackedNetwork) -> None:
    network, found = gpu.rewrite(bottlenecks.network, SHAPE, torch.float32, cost.device("H200"))
    rows = [row for row in found.rows if row.form == "chain"]
    assert [row.names for row in rows] == [
        ("blocks.0.conv2", "blocks.0.conv3", "blocks.1.conv1"),
        ("blocks.1.conv2", "blocks.1.conv3", "blocks.2.conv1"),
    ]
    assert len(layers(network, gpu.ChainLayer)) == 2
    assert len([n for n in network.graph.nodes if n.op == "call_module"]) < len(
        [n for n in bottlenecks.network.graph.nodes if n.op == "call_module"]
    )
    same(network, bottlenecks.network)
    assert all("against three layers" in row.reason for row in rows)
    off, without = gpu.rewrite(bottlenecks.network, SHAPE, torch.float32, cost.device("H200"), chain="off")
    assert not layers(off, gpu.ChainLayer) and without.floor > found.floor
    same(off, bottlenecks.network)


def test_measurement_decides_on_chains(
    bottlenecks: dsprune.PackedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = cost.device("H200")
    steps = {s.name: s for s in gpu.trace_steps(gpu.pad_channels(bottlenecks.network), SHAPE, torch.float16)}
    names = ("blocks.0.conv2", "blocks.0.conv3", "blocks.1.conv1")
    key = " + ".join(steps[name].conv.key(torch.float16) for name in names)  # type: ignore[union-attr]
    table = cost.FormTable({"sm_90": {key: {"chain": 9.0, "layers": 8.0}}})
    found = gpu.predict(bottlenecks, SHAPE, device=where, dtype=torch.float16, table=table)
    assert [row.names[0] for row in found.rows if row.form == "chain"] == ["blocks.1.conv2"]
    path = tmp_path / "forms.json"
    path.write_text(table.to_json())
    monkeypatch.setenv(gpu.FORMS_ENVIRONMENT, str(path))
    assert gpu.form_table().times == table.times
    path.write_text("[]")
    import os

    os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="not a table"):
        gpu.form_table()
    monkeypatch.delenv(gpu.FORMS_ENVIRONMENT)
    assert isinstance(gpu.form_table(), cost.FormTable)


def test_a_chain_behind_another_padding() -> None:
    """A reflecting convolution is padded before the chain, which then pads nothing itself."""
    model = pruned(Bottlenecks)
    for block in model.blocks:  # type: ignore[union-attr]
        block.conv2.padding_mode = "reflect"
    packed = dsprune.pack(model, torch.randn(SHAPE))
    network, found = gpu.rewrite(packed.network, SHAPE, torch.float32, cost.device("H200"))
    assert any(row.form == "chain" for row in found.rows)
    same(network, model)
    with pytest.raises(ValueError, match="chain: expected 'auto' or 'off'"):
        gpu.rewrite(packed.network, SHAPE, torch.float32, cost.device("H200"), chain="unlimited")


def test_no_chain_where_the_stream_is_not_relu_d(residual: dsprune.PackedNetwork) -> None:
    found = gpu.predict(residual, SHAPE, chain="unlimited")
    assert not any(row.form == "chain" for row in found.rows)


# ---- graphs ----


class FakeReplay:
    def __init__(self, call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> None:
        self.call, self.input = call, x.clone(memory_format=torch.channels_last)
        self.outputs = call(self.input)
        self.replays = self.entered = 0

    def __call__(self) -> None:
        assert self.entered == 1
        self.replays += 1
        for kept, fresh in zip(
            torch.utils._pytree.tree_leaves(self.outputs),
            torch.utils._pytree.tree_leaves(self.call(self.input)),
            strict=True,
        ):
            if kept is not None:
                kept.copy_(fresh)

    def enter(self) -> None:
        self.entered += 1
        assert self.entered == 1, "two callers in one graph's buffers"

    def leave(self) -> None:
        self.entered -= 1


class FakeCapturer:
    """Captures by keeping the call; what it keeps is fixed at capture, as a graph's is."""

    takes: tuple[str, ...] = ("native", "reference")

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.captured: list[FakeReplay] = []
        self.refusal: str | None = None

    def refuses(self, x: torch.Tensor) -> str | None:
        return self.refusal

    def device(self, x: torch.Tensor) -> cost.Device:
        return cost.device("H200")

    def capture(self, call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> gpu.Replay:
        if self.error is not None:
            raise RuntimeError(self.error)
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.captured.append(FakeReplay(call, x))
        return self.captured[-1]


def copied(packed: dsprune.PackedNetwork) -> dsprune.PackedNetwork:
    with (
        warnings.catch_warnings()
    ):  # torch's own copy of a graph's input specification is deprecated by torch
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(packed)


def graphed(packed: dsprune.PackedNetwork, **options: Any) -> tuple[dsprune.PackedNetwork, FakeCapturer]:
    packed = copied(packed)
    capturer = FakeCapturer(options.pop("error", None))
    packed._caches[packed.network] = gpu.GraphCache(
        packed.network, packed.backend, capturer=capturer, **options
    )
    return packed, capturer


def test_one_graph_a_shape_and_dtype_least_recent_out(residual: dsprune.PackedNetwork) -> None:
    packed, capturer = graphed(residual, kept=2)
    with torch.no_grad():
        for size in (8, 10, 8, 12, 8, 10):
            x = torch.randn(2, 3, size, size)
            torch.testing.assert_close(packed(x), residual.network(x), rtol=1e-5, atol=1e-5)
            assert packed.program_reason is None
    # 12 put 10 out, 8 was used since; 10 came back.
    assert [c.input.shape[2] for c in capturer.captured] == [8, 10, 12, 10]
    assert sum(c.replays for c in capturer.captured) == 6
    assert all(c.input.is_contiguous(memory_format=torch.channels_last) for c in capturer.captured)


def test_outputs_are_the_caller_s_own(residual: dsprune.PackedNetwork) -> None:
    packed, _ = graphed(residual)
    with torch.no_grad():
        x = torch.randn(SHAPE)
        first = packed(x)
        kept = first.clone()
        packed(torch.randn(SHAPE))
        assert torch.equal(first, kept) and torch.equal(packed(x), first)
    with torch.inference_mode():
        assert torch.equal(packed(x.clone()), first)


def test_weights_changed_in_place_are_seen(bottlenecks: dsprune.PackedNetwork) -> None:
    packed, capturer = graphed(bottlenecks)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        packed(x)
        for _, layer in packed.layers():
            layer.weight.mul_(0.5)
        expected = packed.network(x)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
        assert len(capturer.captured) == 2
        packed(x)
        assert len(capturer.captured) == 2
        packed.network.load_state_dict(bottlenecks.network.state_dict())
        torch.testing.assert_close(packed(x), bottlenecks.network(x), rtol=1e-5, atol=1e-5)
        assert len(capturer.captured) == 3


def test_a_capture_that_fails_is_tried_once(residual: dsprune.PackedNetwork) -> None:
    packed, capturer = graphed(residual, error="operation not permitted\nwhen stream is capturing")
    x = torch.randn(SHAPE)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(packed(x), residual.network(x), rtol=1e-5, atol=1e-5)
    assert packed.program_reason == "no graph could be made: operation not permitted"
    capturer.error = None
    with torch.no_grad():
        packed(x)
        assert not capturer.captured
        packed(torch.randn(1, 3, 8, 8))
    assert len(capturer.captured) == 1 and packed.program_reason is None


class TorchDispatchModeThatLooks(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_reasons_for_no_graph(residual: dsprune.PackedNetwork) -> None:
    packed, capturer = graphed(residual)
    x = torch.randn(SHAPE)

    def reason() -> str | None:
        packed(x)
        return packed.program_reason

    with torch.no_grad():
        capturer.refusal = "the stream is being captured by somebody else"
        assert reason() == capturer.refusal
        capturer.refusal = None
        with torch.autocast("cpu", torch.bfloat16):
            assert reason() == "autocast is on"
        handle = next(m for _, m in packed.layers()).register_forward_hook(lambda *_: None)
        assert reason() == "a layer has hooks"
        handle.remove()
        with TorchDispatchModeThatLooks():
            assert reason() == "a torch mode wants to see every operator"
        assert reason() is None
    x.requires_grad_()
    assert reason() == "gradients are wanted"
    capturer.takes = ("triton",)
    with torch.no_grad():
        x = torch.randn(1, 3, 9, 9)
        assert "runs layer by layer" in (reason() or "")


def test_a_plain_module_has_no_graph() -> None:
    cache = gpu.GraphCache(nn.Conv2d(3, 3, 1), None, capturer=FakeCapturer())
    with torch.no_grad():
        assert cache.find((torch.randn(1, 3, 4, 4),)) is None
        assert cache.reason == "the network is no exported graph"
        assert cache.find((torch.randn(3, 4, 4),)) is None and "one plain tensor" in (cache.reason or "")
    with pytest.raises(ValueError, match="kept: expected at least 1"):
        gpu.GraphCache(nn.Identity(), None, kept=0)


def test_threads_share_a_graph(residual: dsprune.PackedNetwork) -> None:
    packed, capturer = graphed(residual)
    inputs = [torch.randn(SHAPE) for _ in range(4)]
    with torch.no_grad():
        expected = [residual.network(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.allclose(packed(inputs[i]), expected[i], atol=1e-5):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(capturer.captured) == 1 and capturer.captured[0].replays == 40


def test_copies_have_graphs_of_their_own(residual: dsprune.PackedNetwork) -> None:
    packed, capturer = graphed(residual)
    with torch.no_grad():
        x = torch.randn(SHAPE)
        packed(x)
        other = copied(packed)
        torch.testing.assert_close(other(x), packed(x), rtol=1e-5, atol=1e-5)
    assert len(capturer.captured) == 1
    cache = gpu.GraphCache(nn.Identity(), "triton", capturer=FakeCapturer("none left"), kept=3, chain="off")
    for again in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert (again.backend, again.kept, again.chain) == ("triton", 3, "off")
        assert again.capturer.error == "none left" and again.network is not cache.network


def test_the_form_that_a_graph_runs_is_told(bottlenecks: dsprune.PackedNetwork) -> None:
    packed, _ = graphed(bottlenecks)
    cache = packed._caches[packed.network]
    x = torch.randn(SHAPE)
    assert cache.prediction(x) is None
    with torch.no_grad():
        packed(x)
    found = cache.prediction(x)
    assert found.shape == SHAPE and any(row.form == "chain" for row in found.rows)


def test_the_rewritten_network_traces_for_a_device(bottlenecks: dsprune.PackedNetwork) -> None:
    """Shapes, dtypes and formats of every step on a device that is not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    network, _ = gpu.rewrite(
        bottlenecks.network, SHAPE, torch.float16, cost.device("H200"), forms=("grouped",), chain="off"
    )
    assert isinstance(network, fx.GraphModule)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        for module in network.modules():
            for name, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is not None:
                    fake = mode.from_tensor(value.detach())
                    dtype = torch.float16 if fake.is_floating_point() else fake.dtype
                    moved = torch.empty(fake.shape, dtype=dtype, device="cuda")
                    if name in module._parameters:
                        module._parameters[name] = nn.Parameter(moved, requires_grad=False)
                    else:
                        module._buffers[name] = moved
        x = torch.empty(SHAPE, dtype=torch.float16, device="cuda", memory_format=torch.channels_last)
        out = network(x)
    assert out.shape == (2, 5) and out.dtype == torch.float16 and out.device.type == "cuda"
