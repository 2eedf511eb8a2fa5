"""On a CUDA device: the same answers as on the CPU, on whichever backend the rule takes there."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from conv_cases import CORNERS, Case, _terms, activate, assert_within, dense
from torch import nn

import dsp_kernels
import dsprune
from dsp_kernels import GroupLayout, cost, permuted_grouped_conv2d
from dsp_kernels.assignment import LassoTable
from dsp_kernels.conv.chain import Chain
from dsprune import gpu
from dsprune.models.resnet import Bottleneck
from dsprune.nn import PermutedGroupedConv2d

pytestmark = pytest.mark.gpu

DEVICE = "cuda"

TRITON = dsp_kernels.available_backends()["triton"] is None
needs_triton = pytest.mark.skipif(
    not TRITON, reason=f"triton backend: {dsp_kernels.available_backends()['triton']}"
)
HALF = [torch.float16, torch.bfloat16]

LAYOUT = GroupLayout(6, 8, [([0, 2, 3], [0, 1, 5]), ([1, 2, 4, 5], [2, 7]), ([5], [3, 4])])


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_convolution_and_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = torch.randn(3, 6, 9, 7, dtype=torch.float64)
    weight = torch.randn(LAYOUT.weight_numel((3, 3)), dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    grad = torch.randn(3, 8, 5, 4, dtype=torch.float64)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, weight, bias)]
        inputs = leaves[0].contiguous(memory_format=memory_format)
        out = permuted_grouped_conv2d(
            inputs, leaves[1], LAYOUT, leaves[2], kernel_size=3, stride=2, padding=1, activation="relu"
        )
        assert out.is_contiguous(memory_format=memory_format)
        gradients = torch.autograd.grad(out, leaves, grad.to(device, dtype))
        return [out.detach(), *gradients]

    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for here, there in zip(run("cpu", torch.float64), run("cuda", dtype), strict=True):
        assert there.device.type == "cuda" and there.dtype == dtype
        torch.testing.assert_close(there.double().cpu(), here, rtol=tolerance, atol=tolerance)


def test_the_native_backend_refuses_a_cuda_tensor() -> None:
    if dsp_kernels.available_backends()["native"] is not None:
        pytest.skip(f"native backend: {dsp_kernels.available_backends()['native']}")
    x = torch.randn(1, 6, 5, 5, device="cuda")
    weight = torch.randn(LAYOUT.weight_numel((1, 1)), device="cuda")
    with pytest.raises(ValueError, match="runs on cpu, not on cuda"):
        permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=1, backend="native")


def test_assignment_and_penalty() -> None:
    logits = torch.randn(3, 12, dtype=torch.float64)
    noise = torch.randn(3, 12, dtype=torch.float64)
    weights = [torch.randn(8, 6, 3, 3, dtype=torch.float64), torch.randn(4, 8, 1, 1, dtype=torch.float64)]

    def run(device: str) -> list[torch.Tensor]:
        alpha = logits.to(device).requires_grad_()
        leaves = [w.to(device).requires_grad_() for w in weights]
        sample = dsp_kernels.sample_groups(alpha, 0.5, noise=noise.to(device))
        penalties = dsp_kernels.group_lasso(leaves, list(sample.split([8, 4], dim=1)))
        return [sample.detach(), penalties.detach(), *torch.autograd.grad(penalties.sum(), [alpha, *leaves])]

    for here, there in zip(run("cpu"), run("cuda"), strict=True):
        assert there.device.type == "cuda"
        torch.testing.assert_close(there.cpu(), here, rtol=1e-10, atol=1e-12)


ASSIGNMENT_SHAPES = [(70, 24, 3, 3), (33, 136, 1, 1), (16, 9, 5, 5), (5, 12)]


def assignment_fixture(
    dtype: torch.dtype, last: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[float]]:
    """Weights of ``dtype``, log-probabilities for three groups, and step lengths."""
    weights = [torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype) for shape in ASSIGNMENT_SHAPES]
    if last:
        weights = [w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for w in weights]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logs = [torch.log_softmax(torch.randn(3, w.shape[0], dtype=wide), 0).to(DEVICE) for w in weights]
    return weights, logs, [1e-3, 2e-3, 3e-3, 4e-3]


def needs_backend(name: str) -> None:
    reason = dsp_kernels.available_backends()[name]
    if reason is not None:
        pytest.skip(f"{name} backend: {reason}")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_assignment_kernels(backend: str, dtype: torch.dtype, last: bool) -> None:
    """Values, gradients, penalty step, gradient of a step, against float64 on the CPU; the same bits."""
    needs_backend(backend)
    weights, logs, rates = assignment_fixture(dtype, last)
    matrix = torch.cat(logs, 1)
    moves = [torch.randn_like(w) for w in weights]

    def run(device: str, own: str | None, cast: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [w.detach().to(device, cast).requires_grad_() for w in weights]
        free = [log.detach().to(device, None if cast is None else cast).requires_grad_() for log in logs]
        penalties = dsp_kernels.group_lasso(leaves, free, [1.0, 0.5, 2.0, 1.5], backend=own)
        found = [penalties.detach(), *torch.autograd.grad(penalties.sum(), [*leaves, *free])]
        table = LassoTable([w.detach().clone() for w in leaves], 3, [1.0, 0.5, 2.0, 1.5], backend=own)
        soft = matrix.to(device, cast)
        found.append(table.log_gradient(soft, rates))
        found.append(table.log_gradient(soft, rates, [m.to(device, cast) for m in moves]))
        table.shrink(soft, rates)
        return found + table.weights

    got = run(DEVICE, backend, None)
    assert all(torch.equal(a, b) for a, b in zip(got, run(DEVICE, backend, None), strict=True))
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-10}
    for there, here in zip(got, run("cpu", "reference", torch.float64), strict=True):
        error = (there.double().cpu() - here).norm() / here.norm()
        assert error < tolerance[there.dtype]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_assignment_table_is_captured_in_a_graph(backend: str) -> None:
    needs_backend(backend)
    weights, logs, rates = assignment_fixture(torch.float32)
    matrix = torch.cat(logs, 1)
    lengths = torch.tensor(rates, device=DEVICE)
    before = [w.clone() for w in weights]
    table = LassoTable(weights, 3, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        table.shrink(matrix, lengths)
    torch.cuda.current_stream().wait_stream(stream)
    once = [w.clone() for w in weights]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.shrink(matrix, lengths)
    for weight, old in zip(weights, before, strict=True):
        weight.copy_(old)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(weights, once, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_fresh_memory_is_poisoned_here_too() -> None:
    assert torch.empty(1000, device="cuda").isnan().all()
    assert torch.randn(10, device="cuda").new_empty(7).isnan().all()


def test_packed_network() -> None:
    model = nets.structured_zeros(nets.random_norms(nets.Residual())).eval()
    packed = dsprune.pack(model, torch.randn(1, 3, 16, 16)).to(DEVICE)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(packed(x.to(DEVICE)).cpu(), model(x), rtol=1e-3, atol=1e-4)
    assert (packed.program_reason is None) == TRITON, packed.program_reason


def test_packing_on_the_device() -> None:
    model = nets.structured_zeros(nets.random_norms(nets.Zoo())).eval().to(DEVICE)
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    packed = dsprune.pack(model, x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-3, atol=1e-4)


def test_group_learner() -> None:
    model = nets.Residual().to(DEVICE)
    x, y = torch.randn(8, 3, 16, 16, device=DEVICE), torch.randint(5, (8,), device=DEVICE)
    learner = dsprune.GroupLearner(model, x, groups=3, strength=1e-3, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = [
        learner.step(lambda: torch.nn.functional.cross_entropy(model(x), y), optimizer) for _ in range(4)
    ]
    assert all(bool(loss.isfinite()) for loss in losses)
    assert all(bool((groups < 3).all()) for groups in learner.assignment().values())


# ---- the Triton convolution ----

GRADIENTS = ["3x3 stride 2", "1x1", "eight groups", "dilated", "channels last", "many channels"]
CHAINS = [(40, 40, 256, 40), (64, 64, 256, 64), (80, 88, 512, 80), (128, 128, 512, 128)]


def on_device(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor | None], torch.Tensor, torch.Tensor]:
    """x, packed weight, bias and residual there; float64 result and magnitude here."""
    x, weight, bias, residual = case.tensors(dtype)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    assert wide[0] is not None and wide[1] is not None
    exact = dense(wide[0], wide[1], case, wide[2])
    size = dense(wide[0].abs(), wide[1].abs(), case, None if wide[2] is None else wide[2].abs())
    if wide[3] is not None:
        exact, size = exact + wide[3], size + wide[3].abs()
    there = [None if t is None else t.to(DEVICE) for t in (x, case.layout.pack(weight), bias, residual)]
    return there, activate(exact, case.activation), size


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", CORNERS)
def test_triton_convolution(name: str, dtype: torch.dtype) -> None:
    case = CORNERS[name]
    (x, weight, bias, residual), exact, size = on_device(case, dtype)
    assert x is not None and weight is not None

    def run() -> torch.Tensor:
        return permuted_grouped_conv2d(
            x, weight, case.layout, bias, residual=residual, activation=case.activation,
            backend="triton", **case.geometry,
        )  # fmt: skip

    out = run()
    assert_within(out.cpu(), exact, size, _terms(case))
    assert all(torch.equal(run(), out) for _ in range(3)), "not the same bits"


@needs_triton
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CORNERS)
def test_eight_warps(name: str, dtype: torch.dtype) -> None:
    """The rows of the table that wait for a verified device, over steps with and without holes."""
    from dsp_kernels.conv import launches
    from dsp_kernels.conv import triton as room

    table = launches.read(launches.SHIPPED)
    rows = {row for arch, of in table.items() if arch.endswith("+verified") for row in of.values()}
    assert rows and all(isinstance(row, launches.Launch) and row.warps == 8 for row in rows)
    case = CORNERS[name]
    (x, weight, bias, residual), exact, size = on_device(case, dtype)
    assert x is not None and weight is not None
    for row in rows:
        assert isinstance(row, launches.Launch)
        with room.launching(row):
            out, again = (
                permuted_grouped_conv2d(
                    x, weight, case.layout, bias, residual=residual, activation=case.activation,
                    backend="triton", **case.geometry,
                )
                for _ in range(2)
            )  # fmt: skip
        assert_within(out.cpu(), exact, size, _terms(case))
        assert torch.equal(out, again), "not the same bits"


Tensors = tuple[torch.Tensor, ...]


def gradients_there(case: Case, dtype: torch.dtype) -> tuple[Callable[[], Tensors], Tensors, Tensors]:
    """What makes the gradients for x and weight there; float64 results and magnitudes here."""
    x, weight, _, _ = case.tensors(dtype)
    layout = case.layout
    grad = torch.randn(case.batch, case.out_channels, *case.out_size).to(dtype)
    leaves = [x.to(DEVICE).requires_grad_(), layout.pack(weight).to(DEVICE).requires_grad_()]

    def run() -> Tensors:
        out = permuted_grouped_conv2d(leaves[0], leaves[1], layout, backend="triton", **case.geometry)
        return torch.autograd.grad(out, leaves, grad.to(DEVICE))

    def exact(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Tensors:
        a, b = a.double().requires_grad_(), b.double().requires_grad_()
        of_x, of_w = torch.autograd.grad(dense(a, b, case), (a, b), c.double())
        return of_x, layout.pack(of_w)

    return run, exact(x, weight, grad), exact(x.abs(), weight.abs(), grad.abs())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
def test_triton_gradients(name: str, dtype: torch.dtype) -> None:
    case = CORNERS[name]
    run, exact, sizes = gradients_there(case, dtype)
    found = run()
    taps = case.kernel[0] * case.kernel[1]
    terms = (len(case.layout.live_filters) * taps, case.batch * case.out_size[0] * case.out_size[1])
    for got, want, size, k in zip(found, exact, sizes, terms, strict=True):
        assert_within(got.cpu(), want, size, k)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), found, strict=True)), "not the same bits"


@needs_triton
def test_compiled_layer_and_its_gradients() -> None:
    torch.manual_seed(0)
    layer = PermutedGroupedConv2d(LAYOUT, 3, padding=1, activation="relu", backend="triton").to(DEVICE)
    x = torch.randn(2, 6, 9, 7, device=DEVICE, requires_grad=True)
    eager = layer(x)
    eager_grads = torch.autograd.grad(eager.sum(), [x, *layer.parameters()])
    compiled = torch.compile(layer, fullgraph=True)(x)
    grads = torch.autograd.grad(compiled.sum(), [x, *layer.parameters()])
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, eager_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("name", ["3x3", "1x1", "many channels"])
def test_triton_convolution_in_tf32(name: str) -> None:
    """Both factors cut to 11 bits: at most 2^-9 of the sum of magnitudes, and not float32's own result."""
    torch.backends.cuda.matmul.allow_tf32 = True
    case = CORNERS[name]
    (x, weight, bias, residual), exact, size = on_device(case, torch.float32)
    assert x is not None and weight is not None
    out = permuted_grouped_conv2d(
        x, weight, case.layout, bias, residual=residual, activation=case.activation, backend="triton",
        **case.geometry,
    )  # fmt: skip
    error = (out.cpu().double() - exact).abs()
    assert bool((error <= 2.0**-9 * size + 1e-6).all())


@needs_triton
@pytest.mark.parametrize("name", ["3x3 stride 2", "1x1", "many channels"])
def test_triton_gradients_in_tf32(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    run, exact, sizes = gradients_there(CORNERS[name], torch.float32)
    found = run()
    for got, want, size in zip(found, exact, sizes, strict=True):
        assert bool(((got.cpu().double() - want).abs() <= 2.0**-9 * size + 1e-6).all())
    assert all(torch.equal(a, b) for a, b in zip(run(), found, strict=True)), "not the same bits"


@needs_triton
def test_triton_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    layout = GroupLayout(8, 8, [(range(5), range(8))])
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(40)
    found = []
    for device in ("cpu", "cuda:1"):
        a, b = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
        backend = "reference" if device == "cpu" else "triton"
        out = permuted_grouped_conv2d(a, b, layout, kernel_size=1, backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), (a, b))))
    assert torch.cuda.current_device() == 0
    for mine, theirs in zip(*found, strict=True):
        assert theirs.device == torch.device("cuda:1")
        torch.testing.assert_close(theirs.detach().cpu(), mine.detach(), rtol=1e-4, atol=1e-5)


@needs_triton
def test_triton_keeps_weights_across_streams_and_captures() -> None:
    """Laid out on one stream, read on others and inside a capture; a plan on the device."""
    layout = CORNERS["many channels"].layout
    weight = torch.randn(layout.weight_numel((3, 3)), device=DEVICE).requires_grad_()
    x = torch.randn(4, layout.in_channels, 9, 9, device=DEVICE).contiguous(memory_format=torch.channels_last)
    plan = layout.plan().to(DEVICE)

    def run() -> torch.Tensor:
        return dsp_kernels.conv.conv2d_from_plan(
            x, weight, plan, out_channels=layout.out_channels, kernel_size=3, padding=1, backend="triton"
        )

    with torch.no_grad():
        for _ in range(20):
            weight.mul_(0.9)
            streams = [torch.cuda.Stream() for _ in range(3)]
            outs = []
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    outs.append(run())
            torch.cuda.synchronize()
            expected = permuted_grouped_conv2d(
                x, weight, layout, kernel_size=3, padding=1, backend="reference"
            )
            for out in outs:
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
            assert all(torch.equal(out, outs[0]) for out in outs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        assert torch.equal(captured, outs[0])


@needs_triton
def test_triton_takes_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("takes 12 GB of free memory")
    layout = GroupLayout(8, 8, [(range(8), range(4)), (range(4), range(4, 8))])
    weight = torch.randn(layout.weight_numel(1), device=DEVICE).half()
    x = torch.empty(
        1, 8, 2**14 + 1, 2**14, dtype=torch.half, device=DEVICE, memory_format=torch.channels_last
    )
    x.normal_()
    out = permuted_grouped_conv2d(x, weight, layout, kernel_size=1, backend="triton")
    for rows in (slice(0, 3), slice(2**14 - 2, None)):
        expected = permuted_grouped_conv2d(x[:, :, rows], weight, layout, kernel_size=1, backend="reference")
        torch.testing.assert_close(out[:, :, rows], expected, rtol=1e-3, atol=1e-2)


@needs_triton
def test_the_tuner_measures_and_its_table_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import tune
    from dsp_kernels.conv import launches
    from dsp_kernels.conv import triton as room

    table = tmp_path / "table.json"
    tuner = tune.Tuner(torch.device(DEVICE, 0), table, tmp_path / "journal.json", minutes=1.0)
    works = [w for w in tune.workloads() if w.bucket(tuner.arch) == "conv/half/n64/small/taps"]
    tuner.run(works)
    (row,) = tuner.rows.values()
    measured = [r["us"] for r in row["candidates"].values() if "us" in r]
    assert measured and all(time > 0 for times in measured for time in times.values())
    launches.read(table)
    monkeypatch.setenv(launches.ENVIRONMENT, str(table))
    room.forget()
    case = CORNERS["many channels"]
    (x, weight, bias, residual), exact, size = on_device(case, torch.float16)
    assert x is not None and weight is not None
    out = permuted_grouped_conv2d(
        x, weight, case.layout, bias, residual=residual, backend="triton", **case.geometry
    )
    assert_within(out.cpu(), exact, size, _terms(case))
    monkeypatch.delenv(launches.ENVIRONMENT)
    room.forget()


# ---- the chain kernel ----


def chain(dtype: torch.dtype, channels: int, inner: int, stream: int, following: int) -> Chain:
    generator = torch.Generator().manual_seed(0)
    half, low, high = inner // 2, range(2 * channels // 3 + 1), range(channels // 3, channels)
    layouts = [
        GroupLayout(channels, inner, [(low, range(half)), (high, range(half, inner))]),
        GroupLayout(inner, stream, [(range(inner), range(stream))]),
        GroupLayout(stream, following, [(range(stream), range(following))]),
    ]
    weights = [
        (torch.randn(layout.weight_numel(k), generator=generator) / (layout.in_channels * k * k) ** 0.5)
        for layout, k in zip(layouts, (3, 1, 1), strict=True)
    ]
    biases = [torch.randn(layout.out_channels, generator=generator) for layout in layouts]
    return Chain(
        layouts,
        [w.to(DEVICE, dtype) for w in weights],
        [b.to(DEVICE, dtype) for b in biases],
        kernel=(3, 3),
        padding=(1, 1),
        shared_memory=cost.device(torch.device(DEVICE)).shared_memory,
    )


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", CHAINS)
def test_chain(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    made = chain(dtype, *shape)
    need, limit = (
        made.config.shared_bytes(made.w1.element_size()),
        cost.device(torch.device(DEVICE)).shared_memory,
    )
    if need > limit:
        pytest.skip(f"takes {need} bytes of shared memory, a block has {limit}")
    last = torch.channels_last
    # More tiles than programs, where weights stay.
    x = torch.randn(96, shape[0], 15, 13, device=DEVICE).to(dtype).contiguous(memory_format=last)
    residual = torch.randn(96, shape[2], 15, 13, device=DEVICE).to(dtype).contiguous(memory_format=last)
    out = made(x, residual)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip(out, made.layers(x, residual), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(made(x, residual), out, strict=True)), (
            "not the same bits"
        )


# ---- packed networks under CUDA graphs ----


class Bottlenecks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nets.conv_bn(3, 32)
        self.blocks = nn.Sequential(*(Bottleneck(32 if i == 0 else 64, 16, 1) for i in range(3)))
        self.head = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def packed_and_dense(dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(Bottlenecks())).eval()
    packed = dsprune.pack(model, torch.randn(1, 3, 16, 16))
    return packed.to(DEVICE, dtype), model.to(DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_packed_network_is_one_graph_a_shape(dtype: torch.dtype) -> None:
    packed, model = packed_and_dense(dtype)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    with torch.no_grad():
        for shape in ((4, 3, 16, 16), (1, 3, 24, 20), (4, 3, 16, 16)):
            x = torch.randn(shape, device=DEVICE)
            out = packed(x.to(dtype))
            assert packed.program_reason is None
            torch.testing.assert_close(out.float(), model(x), rtol=tolerance, atol=tolerance)
            assert torch.equal(packed(x.to(dtype)), out)
    found = packed._caches[packed.network].prediction(x.to(dtype))
    assert found is not None and found.rows


@needs_triton
@pytest.mark.parametrize("form", [*cost.FORMS, "chain"])
def test_every_form_in_a_network(form: str) -> None:
    if form == "cuda" and (reason := dsp_kernels.backends.can_run("cuda", DEVICE, torch.float32)):
        pytest.skip(f"cuda backend: {reason}")
    packed, model = packed_and_dense()
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    forms = ("grouped",) if form == "chain" else (form,)
    where, chained = cost.device(x.device), "auto" if form == "chain" else "off"
    table = cost.FormTable()
    if form == "cuda":  # it is taken by measurement alone
        forms = ("cuda", "torch")
        for step in gpu.trace_steps(gpu.pad_channels(packed.network), x.shape, x.dtype):
            if step.conv is not None:
                table.add(where.arch, step.conv.key(x.dtype), "cuda", 1.0)
                table.add(where.arch, step.conv.key(x.dtype), "torch", 2.0)
    network, found = gpu.rewrite(
        packed.network, x.shape, x.dtype, where, forms=forms, chain=chained, table=table
    )
    assert any(row.form == form for row in found.rows)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-4)


@needs_triton
def test_a_graph_outlives_what_the_launchers_forget_and_sees_new_weights() -> None:
    from dsp_kernels.conv import triton as room

    packed, _ = packed_and_dense()
    x = torch.randn(4, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        out = packed(x)
        room.forget()
        torch.cuda.empty_cache()
        junk = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(64)]
        assert torch.equal(packed(x), out)
        del junk
        for parameter in packed.network.parameters():
            parameter.mul_(0.5)
        expected = packed.network(x)
        torch.testing.assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
        assert packed.program_reason is None and not torch.allclose(expected, out)


@needs_triton
def test_threads_and_streams_share_a_graph() -> None:
    packed, _ = packed_and_dense()
    inputs = [torch.randn(4, 3, 16, 16, device=DEVICE) for _ in range(4)]
    with torch.no_grad():
        expected = [packed(x).clone() for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not torch.equal(packed(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_triton
def test_inside_somebody_s_capture_layers_run_one_by_one() -> None:
    packed, _ = packed_and_dense()
    x = torch.randn(4, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        for _ in range(3):  # what the layers keep has to be there before
            expected = packed.network(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = packed(x)
        assert "captured by somebody else" in str(packed.program_reason)
        graph.replay()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@needs_triton
def test_compiled_packed_network() -> None:
    packed, model = packed_and_dense()
    x = torch.randn(2, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        out = torch.compile(packed, fullgraph=True)(x)
        torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_packing_where_torch_uses_tf32() -> None:
    """torch lets cuDNN use TF32 by default; that is no difference of the packed network's."""
    torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(Bottlenecks())).eval().to(DEVICE)
    packed = dsprune.pack(copy.deepcopy(model), torch.randn(2, 3, 16, 16, device=DEVICE))
    assert packed.fused


@needs_triton
def test_the_device_is_known_to_the_cost_model() -> None:
    found = cost.device(torch.device(DEVICE))
    major, minor = torch.cuda.get_device_capability()
    assert found.arch == f"sm_{major}{minor}"
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    assert found.sms > 0 and found.shared_memory <= limit
