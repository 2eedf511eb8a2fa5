"""The compiled convolution against float64, and the launcher that hands it tensors."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from conv_cases import CORNERS, Case, cases, check_forward, check_gradients
from hypothesis import given, settings
from torch import Tensor

from dsp_kernels import GroupLayout, available_backends, permuted_grouped_conv2d
from dsp_kernels.conv import conv2d_from_plan, native

REASON = available_backends()["native"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native backend: {REASON}")

LAYOUT = GroupLayout(5, 6, [([4, 0, 2], [1, 4]), (range(5), [0]), ([3], []), ([1, 4], [5])])


def tensors() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 7, 6), torch.randn(LAYOUT.weight_numel(3))


def run(x: Tensor, weight: Tensor, bias: Tensor | None = None, **kw: Any) -> Tensor:
    return permuted_grouped_conv2d(x, weight, LAYOUT, bias, kernel_size=3, padding=1, backend="native", **kw)


@pytest.mark.parametrize("name", CORNERS)
def test_corner_forward(name: str) -> None:
    check_forward(CORNERS[name], torch.float32, "native")


@pytest.mark.parametrize("name", CORNERS)
def test_corner_gradients(name: str) -> None:
    check_gradients(CORNERS[name], torch.float32, "native")


@settings(max_examples=150)
@given(cases())
def test_forward(case: Case) -> None:
    out = check_forward(case, torch.float32, "native")
    last = case.channels_last and min(case.in_channels, case.size[0] * case.size[1]) > 1
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@settings(max_examples=80)
@given(cases())
def test_gradients(case: Case) -> None:
    check_gradients(case, torch.float32, "native")


@pytest.mark.parametrize("width", [*range(1, 20), 31, 32, 33, 47, 63, 64, 65])
def test_every_width(width: int) -> None:
    """The last pixels of a row are where vector code goes wrong."""
    case = Case(width, 6, 7, 3, 1, (5, width), (3, 3), (1, 1), (1, 1), (1, 1), activation="relu")
    check_forward(case, torch.float32, "native")
    check_gradients(case, torch.float32, "native")


@pytest.mark.parametrize("filters", range(1, 18))
def test_every_number_of_filters_in_a_group(filters: int) -> None:
    layout = GroupLayout(4, 20, [([3, 1], range(filters)), ([0, 2, 1], range(filters, 20))])
    x, dense = torch.randn(1, 4, 9, 9), torch.randn(20, 4, 3, 3)
    out = permuted_grouped_conv2d(x, layout.pack(dense), layout, kernel_size=3, padding=1, backend="native")
    exact = torch.conv2d(x.double(), (dense * layout.mask()[:, :, None, None]).double(), padding=1)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["3x3", "many channels", "uneven stride", "1x1", "7x7 stem"])
def test_same_bits_whatever_the_number_of_threads(name: str) -> None:
    case = CORNERS[name]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out = check_forward(case, torch.float32, "native")
            results.append((out, *check_gradients(case, torch.float32, "native")))
    finally:
        torch.set_num_threads(before)
    for again in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], again, strict=True))


def test_calls_from_several_python_threads() -> None:
    x, weight = tensors()
    expected = run(x, weight)
    wrong: list[int] = []

    def work(which: int) -> None:
        if not all(run(x, weight).equal(expected) for _ in range(50)):
            wrong.append(which)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_an_image_does_not_depend_on_its_batch() -> None:
    x, weight = torch.randn(5, 5, 9, 9), torch.randn(LAYOUT.weight_numel(3))
    whole = run(x, weight)
    for i in range(5):
        assert run(x[i : i + 1], weight).equal(whole[i : i + 1])


def test_strided_arguments_are_laid_out() -> None:
    x, weight = tensors()
    bias, residual = torch.randn(6), torch.randn(2, 6, 7, 6)
    expected = run(x, weight, bias, residual=residual)
    wide = torch.full((2, 10, 14, 12), float("nan"))
    wide[:, ::2, ::2, ::2] = x
    assert run(wide[:, ::2, ::2, ::2], weight, bias, residual=residual).equal(expected)
    assert run(x, torch.stack([weight, weight], 1)[:, 1], bias, residual=residual).equal(expected)
    last = residual.contiguous(memory_format=torch.channels_last)
    assert run(x, weight, torch.stack([bias, bias], 1)[:, 0], residual=last).equal(expected)


def test_the_arguments_are_left_alone() -> None:
    x, weight = tensors()
    bias, residual = torch.randn(6), torch.randn(2, 6, 7, 6)
    before = [t.clone() for t in (x, weight, bias, residual, LAYOUT.plan())]
    run(x, weight, bias, residual=residual, activation="relu")
    assert all(a.equal(b) for a, b in zip(before, (x, weight, bias, residual, LAYOUT.plan()), strict=True))


def test_nan_and_infinity_pass_as_in_torch() -> None:
    layout = GroupLayout(2, 2, [([0], [0]), ([1], [1])])
    x = torch.randn(1, 2, 8, 8)
    x[0, 0, 3, 3], x[0, 1, 2, 2] = float("nan"), float("inf")
    weight = torch.ones(2, 1, 3, 3)
    out = permuted_grouped_conv2d(x, weight.reshape(-1), layout, kernel_size=3, padding=1, backend="native")
    expected = torch.conv2d(x, weight, padding=1, groups=2)
    assert out.isnan().equal(expected.isnan())
    assert out.isinf().equal(expected.isinf())
    relu = permuted_grouped_conv2d(
        x, weight.reshape(-1), layout, kernel_size=3, padding=1, backend="native", activation="relu"
    )
    assert relu.isnan().equal(expected.relu().isnan())


@pytest.mark.parametrize("batch", [0, 2])
def test_dead_layouts_and_empty_batches(batch: int) -> None:
    layout = GroupLayout(3, 4, [([1], [])])
    bias, residual = torch.tensor([-1.0, 0.0, 2.0, 9.0]), torch.randn(batch, 4, 5, 5)
    x = torch.randn(batch, 3, 5, 5, requires_grad=True)
    weight = torch.empty(0, requires_grad=True)
    out = permuted_grouped_conv2d(
        x, weight, layout, bias, kernel_size=1, residual=residual, activation="relu6", backend="native"
    )
    assert out.equal((bias[:, None, None] + residual).clamp(0, 6))
    of_x, of_weight = torch.autograd.grad(out.sum(), (x, weight))
    assert of_x.equal(torch.zeros_like(x))
    assert of_weight.shape == (0,)


def test_the_rule_takes_it_for_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSP_KERNELS_BACKEND", raising=False)
    x, weight = tensors()
    chosen = permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=3, padding=1)
    assert chosen.equal(run(x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_refused_with_what_is_accepted(dtype: torch.dtype) -> None:
    x, weight = tensors()
    with pytest.raises(
        ValueError, match=rf"backend 'native' cannot run here: takes torch.float32.*{dtype}.*reference"
    ):
        run(x.to(dtype), weight.to(dtype))


def test_double_backward_agrees_with_the_definition() -> None:
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(3)
        x, weight = (t.requires_grad_() for t in tensors())
        out = permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=3, padding=1, stride=2, backend=backend)
        of_x, of_weight = torch.autograd.grad(out.pow(3).sum(), (x, weight), create_graph=True)
        results.append(torch.autograd.grad(of_x.square().sum() + of_weight.square().sum(), (x, weight)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_opcheck() -> None:
    ops, shape = torch.ops.dsp_kernels, ((3, 3), (2, 1), (1, 1), (1, 1))
    x, weight = (t.requires_grad_() for t in tensors())
    grad, plan = torch.randn(2, 6, 4, 6, requires_grad=True), LAYOUT.plan()
    for op, arguments in (
        (ops.permuted_grouped_conv2d, (x, weight, plan, None, None, 6, *shape, "none", "native")),
        (ops.permuted_grouped_conv2d_grad_input, (grad, weight, plan, [2, 5, 7, 6], *shape, "native")),
        (ops.permuted_grouped_conv2d_grad_weight, (grad, x, plan, weight.numel(), *shape, "native")),
    ):
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}


def test_compiled_by_inductor_forward_and_backward() -> None:
    x, weight = (t.requires_grad_() for t in tensors())

    def step(x: Tensor, weight: Tensor) -> Tensor:
        y = run(x * 2, weight, activation="relu")
        return run(y[:, :5].contiguous(memory_format=torch.channels_last), weight) + 1

    torch.compiler.reset()
    out = torch.compile(step, fullgraph=True)(x, weight)
    expected = step(x, weight)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), (x, weight))
    for got, want in zip(ours, torch.autograd.grad(expected.square().sum(), (x, weight)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.ones(2, 4, 7, 6)}, "refused"),
        ({"weight": torch.ones(116)}, "refused"),
        ({"plan": LAYOUT.plan()[:-1]}, "refused"),
        ({"plan": torch.zeros(40, dtype=torch.int32)}, "refused"),
        ({"out_channels": 7}, "refused"),
    ],
)
def test_the_core_refuses_what_does_not_fit_the_plan(change: dict[str, Any], says: str) -> None:
    x, weight = tensors()
    arguments = {"x": x, "weight": weight, "plan": LAYOUT.plan(), "out_channels": 6, "kernel_size": 3}
    with pytest.raises(ValueError, match=says) as raised:
        conv2d_from_plan(**(arguments | change), backend="native")
    assert len(str(raised.value)) > len("the native convolution refused its arguments: ") + 10


@pytest.mark.parametrize("position", range(43))
@pytest.mark.parametrize("value", [-1, 2**31 - 1, 2**20])
def test_no_word_of_the_plan_is_trusted(position: int, value: int) -> None:
    """Either refused, or a plan that is as valid as the original (more channels than are named)."""
    x, weight = tensors()
    plan = LAYOUT.plan().clone()
    assert plan.numel() == 43
    plan[position] = value
    with pytest.raises(ValueError, match="refused"):
        conv2d_from_plan(x, weight, plan, out_channels=6, kernel_size=3, backend="native")
    grad = torch.randn(2, 6, 5, 4)
    shape = ((3, 3), (1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="refused"):
        native.grad_input(grad, weight, plan, (2, 5, 7, 6), *shape)
    with pytest.raises(ValueError, match="refused"):
        native.grad_weight(grad, x, plan, weight.numel(), *shape)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual", "plan"])
def test_the_launcher_refuses_what_the_core_would_misread(name: str) -> None:
    x, weight = tensors()
    arguments: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "plan": LAYOUT.plan(),
        "bias": torch.randn(6),
        "residual": torch.randn(2, 6, 5, 4),
    }
    arguments[name] = arguments[name].double()
    rest: dict[str, Any] = {
        "out_channels": 6,
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "activation": "none",
    }
    with pytest.raises(ValueError, match=f"{name} must be"):
        native.forward(**arguments, **rest)
