"""Operators and packed networks traced for a CUDA device that is not there: fake tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import dsprune
from dsp_kernels import GroupLayout, backends, permuted_grouped_conv2d
from dsprune.nn import PermutedGroupedConv2d

LAYOUT = GroupLayout(16, 24, [(range(0, 12), range(10)), (range(5, 16), range(10, 20))])
GEOMETRY: dict[str, Any] = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 1), "dilation": (1, 2)}
OPERATOR = torch.ops.dsp_kernels.permuted_grouped_conv2d
OPERATOR_GRAD_INPUT = torch.ops.dsp_kernels.permuted_grouped_conv2d_grad_input
OPERATOR_GRAD_WEIGHT = torch.ops.dsp_kernels.permuted_grouped_conv2d_grad_weight
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _as_if_there_were_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backends for GPUs are there; their launchers would fail at a fake tensor's address."""
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    for backend in (backends.Backend, *backends.Backend.__subclasses__()):
        monkeypatch.setattr(backend, "available", lambda self: None)
    backends.forget()
    yield
    backends.forget()


def fake(mode: FakeTensorMode, module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module with its tensors on "cuda", without data."""
    with (
        warnings.catch_warnings()
    ):  # torch's own copy of a graph's input specification is deprecated by torch
        warnings.simplefilter("ignore", FutureWarning)
        module = copy.deepcopy(module)
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for name, value in owner.items():
                if value is None:
                    continue
                with mode:
                    kind = dtype if value.is_floating_point() else value.dtype
                    empty = torch.empty(value.shape, dtype=kind, device="cuda")
                if isinstance(value, nn.Parameter):
                    owner[name] = nn.Parameter(empty, requires_grad=value.requires_grad)
                else:
                    owner[name] = empty
    return module


@pytest.mark.parametrize("backend", [None, "triton", "cuda", "reference"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_operators(dtype: torch.dtype, memory_format: torch.memory_format, backend: str | None) -> None:
    """Shape, dtype, device and memory format of all three. (Autograd itself needs a torch with CUDA to record
    tensors there; on the CPU it is tested elsewhere.)
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
        x = torch.empty(2, 16, 9, 7, memory_format=memory_format, **options)
        weight = torch.empty(LAYOUT.weight_numel((3, 2)), **options)
        bias = torch.empty(24, **options)
        residual = torch.empty(2, 24, 5, 7, **options)
        out = permuted_grouped_conv2d(
            x, weight, LAYOUT, bias, residual=residual, activation="relu", backend=backend, **GEOMETRY
        )
        chosen = backends.choose(backend, "cuda", dtype)
        assert chosen == (backend or "triton")
        shape = tuple(GEOMETRY.values())
        grad = torch.empty_like(out)
        of_x = OPERATOR_GRAD_INPUT(grad, weight, LAYOUT.plan(), x.shape, *shape, chosen)
        of_w = OPERATOR_GRAD_WEIGHT(grad, x, LAYOUT.plan(), weight.numel(), *shape, chosen)
    for value, expected in ((out, (2, 24, 5, 7)), (of_x, (2, 16, 9, 7)), (of_w, tuple(weight.shape))):
        assert isinstance(value, FakeTensor)
        assert (tuple(value.shape), value.dtype, value.device.type) == (expected, dtype, "cuda")
    assert out.is_contiguous(memory_format=memory_format)
    assert of_x.is_contiguous(memory_format=memory_format)


def test_registration() -> None:
    """All three operators have kernels for CUDA tensors, fakes, and autograd."""
    for name in ("", "_grad_input", "_grad_weight"):
        full = f"dsp_kernels::permuted_grouped_conv2d{name}"
        for key in ("CPU", "CUDA", "Meta", "Autograd"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(full, key), (full, key)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_compiled_in_one_graph(memory_format: torch.memory_format) -> None:
    """torch.compile(fullgraph=True) keeps the operator, with the backend that was chosen."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    layer = PermutedGroupedConv2d(LAYOUT, 3, padding=1, activation="relu", backend="triton")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    layer = fake(mode, layer.requires_grad_(False), torch.float16)
    with mode, torch.no_grad():
        x = torch.empty(2, 16, 8, 8, dtype=torch.float16, device="cuda", memory_format=memory_format)
        out = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=collect))(x)
    assert out.shape == (2, 24, 8, 8) and out.is_contiguous(memory_format=memory_format)
    assert (out.dtype, out.device.type) == (torch.float16, "cuda")
    (graph,) = graphs
    (ours,) = (node for node in graph.graph.nodes if node.target is OPERATOR.default)
    assert ours.args[-1] == "triton"


def test_a_packed_network_is_exported() -> None:
    """torch.export with a device's tensors: the operators stay, with shapes for any batch."""
    torch.manual_seed(0)
    packed = dsprune.pack(
        nets.structured_zeros(nets.random_norms(nets.Residual())).eval(),
        torch.randn(2, 3, 12, 12),
        backend="reference",
    )
    packed.requires_grad_(False)
    for _, layer in packed.layers():
        layer.backend = "triton"
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    network = fake(mode, packed.network, torch.bfloat16)
    with mode:
        x = torch.empty(4, 3, 12, 12, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        batch = torch.export.Dim("batch", min=2, max=512)
        exported = torch.export.export(network, (x,), dynamic_shapes=[{0: batch}], strict=False)
    ours = [n for n in exported.graph.nodes if n.target is OPERATOR.default]
    assert len(ours) == len(list(packed.layers())) == 6
    for node in ours:
        value: Tensor = node.meta["val"]
        assert node.args[-1] == "triton" and value.device.type == "cuda" and value.dtype == torch.bfloat16
        # By its strides: torch 2.11 says of no batch that is a symbol that it is channels_last.
        _, channels, height, width = value.shape
        assert value.stride() == (channels * height * width, 1, width * channels, channels)
    (out,) = (n.meta["val"] for n in next(n for n in exported.graph.nodes if n.op == "output").args[0])
    assert isinstance(out.shape[0], torch.SymInt) and out.shape[1] == 5
