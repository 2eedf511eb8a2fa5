"""The permuted grouped convolution against dense conv2d in float64, and what an operator owes to torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import CORNERS, Case, cases, check_forward, check_gradients, dense
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dsp_kernels import GroupLayout, permuted_grouped_conv2d
from dsp_kernels.conv import conv2d_from_plan

OPS = torch.ops.dsp_kernels
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUT = GroupLayout(5, 6, [([4, 0, 2], [1, 4]), (range(5), [0]), ([3], []), ([1, 4], [5])])
GEOMETRY: dict[str, Any] = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
reference = functools.partial(permuted_grouped_conv2d, backend="reference")


def example(dtype: torch.dtype = torch.float64, grad: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, packed weight, bias, residual for LAYOUT and GEOMETRY."""
    g = torch.Generator().manual_seed(5)
    tensors = (
        torch.randn(2, 5, 7, 6, generator=g),
        LAYOUT.pack(torch.randn(6, 5, 3, 2, generator=g)),
        torch.randn(6, generator=g),
        torch.randn(2, 6, 4, 4, generator=g),
    )
    x, weight, bias, residual = (t.to(dtype).requires_grad_(grad) for t in tensors)
    return x, weight, bias, residual


def call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None = "relu",
    **kw: Any,
) -> Tensor:
    return permuted_grouped_conv2d(
        x, weight, LAYOUT, bias, residual=residual, activation=activation, **(GEOMETRY | kw)
    )


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CORNERS)
def test_corner_forward(name: str, dtype: torch.dtype) -> None:
    check_forward(CORNERS[name], dtype, "reference")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CORNERS)
def test_corner_gradients(name: str, dtype: torch.dtype) -> None:
    check_gradients(CORNERS[name], dtype, "reference")


@settings(max_examples=60)
@given(cases())
def test_forward(case: Case) -> None:
    out = check_forward(case, torch.float64, "reference")
    assert out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=20)
@given(cases())
def test_forward_float32(case: Case) -> None:
    check_forward(case, torch.float32, "reference")


@settings(max_examples=30)
@given(cases())
def test_gradients(case: Case) -> None:
    check_gradients(case, torch.float64, "reference")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dead_layout_gives_bias_and_residual(dtype: torch.dtype) -> None:
    layout = GroupLayout(3, 4, [([1], [])])
    x = torch.randn(2, 3, 5, 5).to(dtype).requires_grad_()
    weight = torch.empty(0, dtype=dtype, requires_grad=True)
    bias = torch.tensor([-1.0, 0.0, 2.0, 9.0]).to(dtype)
    residual = torch.randn(2, 4, 3, 3).to(dtype)
    out = reference(x, weight, layout, bias, kernel_size=3, residual=residual, activation="relu6")
    expected = (bias.double()[:, None, None] + residual.double()).clamp(0, 6).to(dtype)
    assert out.equal(expected)
    plain = reference(x, weight, layout, kernel_size=3)
    assert plain.equal(torch.zeros(2, 4, 3, 3, dtype=dtype))
    of_x, of_weight = torch.autograd.grad(plain.sum(), (x, weight))
    assert of_x.equal(torch.zeros_like(x))
    assert of_weight.shape == (0,)


@pytest.mark.parametrize("backward", [False, True])
def test_batch_zero(backward: bool) -> None:
    _, weight, bias, _ = example(grad=backward)
    x = torch.randn(0, 5, 7, 6, dtype=torch.float64, requires_grad=backward)
    out = call(x, weight, bias, torch.randn(0, 6, 4, 4, dtype=torch.float64))
    assert out.shape == (0, 6, 4, 4)
    if backward:
        of_x, of_weight, of_bias = torch.autograd.grad(out.sum(), (x, weight, bias))
        assert of_x.shape == x.shape
        assert of_weight.equal(torch.zeros_like(weight))
        assert of_bias.equal(torch.zeros_like(bias))


def test_unread_channels_do_not_reach_the_output() -> None:
    layout = GroupLayout(4, 2, [([0, 2], [0]), ([2], [1])])
    x = torch.randn(1, 4, 4, 4)
    expected = reference(x, torch.ones(3), layout, kernel_size=1)
    x[:, [1, 3]] = float("nan")
    assert reference(x, torch.ones(3), layout, kernel_size=1).equal(expected)


def test_ints_and_pairs_mean_the_same() -> None:
    layout = GroupLayout(2, 3, [([0, 1], [0, 2])])
    x, weight = torch.randn(1, 2, 9, 9), torch.randn(36)
    as_ints = reference(x, weight, layout, kernel_size=3, stride=2, padding=1, dilation=2)
    pairs: dict[str, Any] = {"kernel_size": [3, 3], "stride": (2, 2), "padding": [1, 1], "dilation": (2, 2)}
    assert reference(x, weight, layout, **pairs).equal(as_ints)
    assert reference(x, weight, layout, **{k: torch.Size(v) for k, v in pairs.items()}).equal(as_ints)


def test_strided_inputs_are_read_where_they_are() -> None:
    x, weight, bias, residual = example()
    expected = call(x, weight, bias, residual)
    wide = torch.full((2, 10, 14, 12), float("nan"), dtype=torch.float64)
    wide[:, ::2, ::2, ::2] = x
    twice = torch.stack([weight, weight], 1)
    assert call(wide[:, ::2, ::2, ::2], twice[:, 0], bias, residual).equal(expected)
    assert call(x, weight, bias[:1].expand(6), residual[:, :1].expand(2, 6, 4, 4)).equal(
        call(x, weight, bias[:1].repeat(6), residual[:, :1].repeat(1, 6, 1, 1))
    )


@pytest.mark.parametrize(
    "shape", [(2, 5, 7, 6), (1, 5, 7, 6), (2, 5, 1, 6), (2, 5, 7, 1), (2, 1, 7, 6), (2, 5, 1, 1)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_output_keeps_the_memory_format(shape: tuple[int, ...], channels_last: bool) -> None:
    x = torch.randn(shape)
    if channels_last:
        x = torch.randn(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
    layout = GroupLayout(shape[1], 4, [(range(shape[1]), [3, 1])])
    weight = torch.randn(layout.weight_numel(1))
    theirs = F.conv2d(x, torch.randn(4, shape[1], 1, 1))
    assert reference(x, weight, layout, kernel_size=1).stride() == theirs.stride()


def test_same_bits_each_time() -> None:
    case = CORNERS["many channels"]
    outs = [
        (check_forward(case, torch.float32, "reference"), *check_gradients(case, torch.float32, "reference"))
        for _ in range(3)
    ]
    for again in outs[1:]:
        assert all(a.equal(b) for a, b in zip(outs[0], again, strict=True))


def test_inference_mode_layout_can_still_train() -> None:
    with torch.inference_mode():
        layout = GroupLayout(2, 2, [([0, 1], [0, 1])])
    weight = torch.randn(4, requires_grad=True)
    reference(torch.randn(1, 2, 3, 3), weight, layout, kernel_size=1).sum().backward()
    assert weight.grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan_device", ["cpu", "cuda"])
def test_reference_on_cuda(dtype: torch.dtype, plan_device: str) -> None:
    tensors = tuple(t.to(dtype) for t in example(torch.float32))
    exact = call(*(t.double() for t in tensors), backend="reference")
    x, weight, bias, residual = (t.cuda().requires_grad_() for t in tensors)
    plan = LAYOUT.plan().to(plan_device)
    out = conv2d_from_plan(
        x, weight, plan, bias, residual, out_channels=6, activation="relu", backend="reference", **GEOMETRY
    )
    assert out.device == x.device
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 30 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(out.double().cpu(), exact, **close)
    grads = [torch.autograd.grad(out.sum(), (x, weight), retain_graph=True) for _ in range(2)]
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


# ---- gradients ---------------------------------------------------------------------------------------------


SMALL = GroupLayout(3, 4, [([2, 0], [0, 3]), ([0, 1], [1])])


def small(activation: str | None) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A convolution with every argument and few elements: the checks go through them one by one."""
    shapes = ((1, 3, 5, 4), (SMALL.weight_numel((2, 1)),), (4,), (1, 4, 2, 4))
    tensors = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return permuted_grouped_conv2d(
            x, weight, SMALL, bias, residual=residual, activation=activation,
            kernel_size=(2, 1), stride=(3, 1), padding=(1, 0), dilation=(2, 1),
        )  # fmt: skip

    return run, tensors


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_gradcheck(activation: str | None) -> None:
    assert torch.autograd.gradcheck(*small(activation))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradgradcheck(activation: str | None) -> None:
    assert torch.autograd.gradgradcheck(*small(activation))


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_each_gradient_alone(wanted: int) -> None:
    tensors = example()
    tensors[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(call(*tensors).square().sum(), tensors[wanted])
    every = example(grad=True)
    assert alone.equal(torch.autograd.grad(call(*every).square().sum(), every)[wanted])


def test_third_order() -> None:
    x, weight, _, _ = example(grad=True)
    masked = LAYOUT.unpack(weight, (3, 2))
    geometry = (GEOMETRY["stride"], GEOMETRY["padding"], GEOMETRY["dilation"])
    results = []
    for y in (call(x, weight, None, None, None), F.conv2d(x, masked, None, *geometry)):
        value = y.pow(3).sum()
        for _ in range(3):
            (of_x,) = torch.autograd.grad(value, x, create_graph=True)
            value = of_x.pow(2).sum()
        results.append(torch.autograd.grad(value, weight)[0])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_whole_network_trains_like_the_dense_one() -> None:
    layout = GroupLayout(3, 8, [([0, 1], [0, 3, 4]), ([1, 2], [1, 2]), ([0], [5])])
    conv = nn.Conv2d(3, 8, 3, padding=1, dtype=torch.float64)
    packed = nn.Parameter(layout.pack(conv.weight.detach()))
    bias = nn.Parameter(conv.bias.detach().clone())
    mask = layout.mask()[:, :, None, None]
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for _ in range(3):
        dense_out = F.relu(F.conv2d(x, conv.weight * mask, conv.bias, padding=1))
        ours = permuted_grouped_conv2d(x, packed, layout, bias, kernel_size=3, padding=1, activation="relu")
        of_dense = torch.autograd.grad(dense_out.square().sum(), (conv.weight, conv.bias))
        of_ours = torch.autograd.grad(ours.square().sum(), (packed, bias))
        with torch.no_grad():
            conv.weight -= 1e-3 * of_dense[0]
            conv.bias -= 1e-3 * of_dense[1]
            packed -= 1e-3 * of_ours[0]
            bias -= 1e-3 * of_ours[1]
    torch.testing.assert_close(packed.detach(), layout.pack(conv.weight.detach()), rtol=1e-12, atol=1e-12)


# ---- the operators' registration ---------------------------------------------------------------------------

SHAPE = ((3, 2), (2, 1), (1, 0), (1, 2))


def operator_arguments() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x, weight, bias, residual = example(grad=True)
    grad = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    plan = LAYOUT.plan()
    return {
        "forward": (
            OPS.permuted_grouped_conv2d.default,
            (x, weight, plan, bias, residual, 6, *SHAPE, "relu", "reference"),
        ),
        "forward, bare": (
            OPS.permuted_grouped_conv2d.default,
            (x, weight, plan, None, None, 6, *SHAPE, "none", "reference"),
        ),
        "forward, channels last": (
            OPS.permuted_grouped_conv2d.default,
            (
                x.detach().contiguous(memory_format=torch.channels_last),
                *(weight, plan, bias, None, 6, *SHAPE, "relu6", "reference"),
            ),
        ),
        "grad_input": (
            OPS.permuted_grouped_conv2d_grad_input.default,
            (grad, weight, plan, [2, 5, 7, 6], *SHAPE, "reference"),
        ),
        "grad_weight": (
            OPS.permuted_grouped_conv2d_grad_weight.default,
            (grad, x, plan, weight.numel(), *SHAPE, "reference"),
        ),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_opcheck(name: str) -> None:
    op, arguments = operator_arguments()[name]
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", operator_arguments())
def test_flops(name: str) -> None:
    op, arguments = operator_arguments()[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        op(*arguments)
    assert counter.get_total_flops() == 2 * LAYOUT.pairs * 3 * 2 * (2 * 4 * 4)


def test_flops_of_training_and_of_the_dense_convolution() -> None:
    x, weight, bias, residual = example(grad=True)
    with FlopCounterMode(display=False) as ours:
        call(x, weight, bias, residual).sum().backward()
    full = GroupLayout(5, 6, [(range(5), range(6))])
    every = torch.randn(full.weight_numel((3, 2)), dtype=torch.float64)
    with FlopCounterMode(display=False) as whole:
        permuted_grouped_conv2d(x, every, full, **GEOMETRY)
    with FlopCounterMode(display=False) as theirs:
        F.conv2d(x, full.unpack(every, (3, 2)), None, (2, 1), (1, 0), (1, 2))
    assert whole.get_total_flops() == theirs.get_total_flops()
    assert ours.get_total_flops() * 30 == 3 * theirs.get_total_flops() * LAYOUT.pairs


@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_on_any_device(device: str, dtype: torch.dtype) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = LAYOUT.plan()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 5, 7, 6, device=device, dtype=dtype)
        weight = torch.empty(LAYOUT.weight_numel((3, 2)), device=device, dtype=dtype)
        out = conv2d_from_plan(x, weight, plan, out_channels=6, backend="reference", **GEOMETRY)
        assert (out.shape, out.dtype, out.device.type) == ((2, 6, 4, 4), dtype, device)


class Module(nn.Module):
    """What a packed layer does: the plan as a buffer that is not saved."""

    plan: Tensor

    def __init__(self) -> None:
        super().__init__()
        _, weight, bias, _ = example(torch.float32)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.register_buffer("plan", LAYOUT.plan().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d_from_plan(
            x, self.weight, self.plan, self.bias, out_channels=6, activation="relu", **GEOMETRY
        )


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **kw: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **kw)


def test_compile_with_the_layout_as_a_constant() -> None:
    tensors = example(grad=True)
    run = compiled(call)
    out = run(*tensors)
    assert out.equal(call(*tensors))
    grads = torch.autograd.grad(out.square().sum(), tensors)
    for got, want in zip(grads, torch.autograd.grad(call(*tensors).square().sum(), tensors), strict=True):
        assert got.equal(want)


def test_compile_of_a_module_once_for_all_batches_of_a_size() -> None:
    module = Module()
    run = compiled(module, dynamic=True)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for batch in (2, 3, 5):
            x = torch.randn(batch, 5, 7, 6)
            assert run(x).equal(module(x))


def test_compile_channels_last() -> None:
    module = Module()
    x = torch.randn(2, 5, 7, 6).contiguous(memory_format=torch.channels_last)
    out = compiled(module)(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.equal(module(x))


def test_compile_under_autocast() -> None:
    module = Module()
    x = torch.randn(2, 5, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(module)(x)
        assert out.dtype == torch.bfloat16
        assert out.equal(module(x))


def test_compile_respects_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_KERNELS_BACKEND", "reference")
    graphs: list[str] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module.print_readable(print_output=False))
        return module

    torch.compiler.reset()
    torch.compile(Module(), fullgraph=True, backend=keep)(torch.randn(2, 5, 7, 6))
    assert len(graphs) == 1
    assert "'none'" not in graphs[0]
    assert "'reference'" in graphs[0]


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    module = Module().eval()
    x = torch.randn(2, 5, 7, 6)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)
    assert OPS.permuted_grouped_conv2d.default in [node.target for node in exported.graph.nodes]
    for size in (1, 2, 7):
        x = torch.randn(size, 5, 7, 6)
        assert exported.module()(x).equal(module(x))


def test_export_with_dynamic_height_and_width() -> None:
    module = Module().eval()
    dims = {2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)}
    exported = torch.export.export(module, (torch.randn(2, 5, 9, 8),), dynamic_shapes={"x": dims})
    for size in ((9, 8), (4, 17), (33, 5)):
        x = torch.randn(2, 5, *size)
        assert exported.module()(x).equal(module(x))


def test_a_plan_buffer_is_not_saved_and_moves_with_the_module() -> None:
    module = Module()
    assert set(module.state_dict()) == {"weight", "bias"}
    assert module.double().plan.dtype == torch.int32
    assert module(torch.randn(2, 5, 7, 6, dtype=torch.float64)).dtype == torch.float64


# ---- autocast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_tensors(dtype: torch.dtype) -> None:
    tensors = example(torch.float32, grad=True)
    with torch.autocast("cpu", dtype):
        out = call(*tensors)
    assert out.dtype == dtype
    assert out.equal(call(*(t.to(dtype) for t in tensors)))
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert all(g.dtype == torch.float32 for g in grads)


def test_autocast_refuses_a_bias_that_is_no_tensor() -> None:
    x, weight = example(torch.float32)[:2]
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"^bias must be a tensor, got list"),
    ):
        call(x, weight, [0.0], None)  # type: ignore[arg-type]


def test_autocast_takes_what_a_cast_layer_before_it_gives() -> None:
    x, weight, bias, residual = example(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(x.bfloat16(), weight, bias, residual).equal(call(x, weight, bias, residual))


def test_autocast_leaves_float64_and_the_operator_alone() -> None:
    tensors = example()
    op, arguments = operator_arguments()["forward"]
    expected, direct = call(*tensors), op(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*tensors).equal(expected)
        assert op(*arguments).equal(direct)


# ---- bad input ---------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of ints": (
        {"x": torch.ones(2, 5, 7, 6, dtype=torch.int64)},
        TypeError,
        r"x must be one of .*torch\.int64",
    ),
    "x complex": ({"x": torch.ones(2, 5, 7, 6, dtype=torch.complex64)}, TypeError, r"x must be .*complex64"),
    "x of bools": (
        {"x": torch.ones(2, 5, 7, 6, dtype=torch.bool)},
        TypeError,
        r"x must be one of .*torch\.bool",
    ),
    "x no tensor": ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
    "x 3-D": ({"x": torch.ones(5, 7, 6)}, ValueError, r"x must be 4-D .*got shape \(5, 7, 6\)"),
    "x 5-D": ({"x": torch.ones(1, 2, 5, 7, 6)}, ValueError, r"x must be 4-D .*got shape \(1, 2, 5, 7, 6\)"),
    "x with other channels": (
        {"x": torch.ones(2, 4, 7, 6)},
        ValueError,
        r"x must have 5 channels .*\(2, 4, 7, 6\)",
    ),
    "x without pixels": (
        {"x": torch.ones(2, 5, 0, 6)},
        ValueError,
        r"x must have at least one pixel.*\(2, 5, 0",
    ),
    "x too small": ({"x": torch.ones(2, 5, 7, 2)}, ValueError, r"x of 7x2 pixels is too small.*would be 4x0"),
    "weight too short": (
        {"weight": torch.ones(77)},
        ValueError,
        r"weight must have 78 elements \(13 pairs.*got 77",
    ),
    "weight dense": (
        {"weight": torch.ones(6, 5, 3, 2)},
        ValueError,
        r"weight must be the 1-D packed.*\(6, 5, 3, 2\)",
    ),
    "weight of another dtype": (
        {"weight": torch.ones(78, dtype=torch.float64)},
        TypeError,
        r"weight must have the dtype of x, torch\.float32, got torch\.float64",
    ),
    "weight elsewhere": (
        {"weight": torch.ones(78, device="meta")},
        ValueError,
        "weight must be on the device of x",
    ),
    "weight no tensor": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "layout no layout": ({"layout": LAYOUT.plan()}, TypeError, "layout must be a GroupLayout, got Tensor"),
    "bias too long": ({"bias": torch.ones(7)}, ValueError, r"bias must have shape \(6,\), got \(7,\)"),
    "bias 2-D": ({"bias": torch.ones(6, 1)}, ValueError, r"bias must have shape \(6,\), got \(6, 1\)"),
    "bias of another dtype": ({"bias": torch.ones(6).half()}, TypeError, "bias must have the dtype of x"),
    "bias elsewhere": ({"bias": torch.ones(6, device="meta")}, ValueError, "bias must be on the device of x"),
    "bias a number": ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    "residual smaller": (
        {"residual": torch.ones(2, 6, 4, 3)},
        ValueError,
        r"residual must have the output's shape \(2, 6, 4, 4\), got \(2, 6, 4, 3\)",
    ),
    "residual to be broadcast": (
        {"residual": torch.ones(1, 6, 1, 1)},
        ValueError,
        "residual must have the output's",
    ),
    "residual of another dtype": (
        {"residual": torch.ones(2, 6, 4, 4).double()},
        TypeError,
        "residual must have the d",
    ),
    "residual elsewhere": (
        {"residual": torch.ones(2, 6, 4, 4, device="meta")},
        ValueError,
        "residual must be on the",
    ),
    "kernel of zero": ({"kernel_size": 0}, ValueError, "kernel_size must be .*at least 1, got 0"),
    "kernel of three": ({"kernel_size": (3, 2, 1)}, ValueError, r"kernel_size must be .*got \(3, 2, 1\)"),
    "kernel of floats": ({"kernel_size": (3.0, 2)}, TypeError, r"kernel_size must be .*got \(3.0, 2\)"),
    "stride of zero": ({"stride": (1, 0)}, ValueError, r"stride must be .*at least 1, got \(1, 0\)"),
    "stride missing": ({"stride": None}, TypeError, "stride must be .*got None"),
    "padding negative": ({"padding": -1}, ValueError, "padding must be .*at least 0, got -1"),
    "padding by name": ({"padding": "same"}, TypeError, "padding must be .*got 'same'"),
    "dilation of zero": ({"dilation": 0}, ValueError, "dilation must be .*at least 1, got 0"),
    "dilation of bools": ({"dilation": True}, TypeError, "dilation must be .*got True"),
    "activation unknown": (
        {"activation": "softsign"},
        ValueError,
        "activation must be None, 'relu', 'relu6', .* or 'mish', got 'softsign'",
    ),
    "activation a function": ({"activation": torch.relu}, ValueError, "activation must be None"),
    "backend unknown": (
        {"backend": "cudnn"},
        ValueError,
        "backend must be one of reference, native.*got 'cudnn'",
    ),
    "backend a number": ({"backend": 1}, TypeError, "backend must be one of .*got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name: str) -> None:
    change, error, says = BAD[name]
    x, weight, bias, residual = example(torch.float32)
    arguments = {"x": x, "weight": weight, "layout": LAYOUT, "bias": bias, "residual": residual, **GEOMETRY}
    permuted_grouped_conv2d(**arguments)
    with pytest.raises(error, match=says):
        permuted_grouped_conv2d(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.ones(2, 4, 7, 6)}, ValueError, "x has 4 channels, the layout has in_channels=5"),
        ({"weight": torch.ones(77)}, ValueError, "weight must have 78 elements .*got 77"),
        ({"out_channels": 7}, ValueError, "the output has 7 channels, the layout has out_channels=6"),
        ({"plan": LAYOUT.plan().long()}, ValueError, "plan must be a 1-D int32 tensor, got torch.int64"),
        ({"plan": LAYOUT.plan()[None]}, ValueError, "plan must be a 1-D int32 tensor"),
        ({"plan": LAYOUT.plan()[:-1]}, ValueError, "plan is not a plan"),
        ({"plan": LAYOUT}, TypeError, "plan must be a tensor, got GroupLayout"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    change: dict[str, Any], error: type[Exception], says: str
) -> None:
    x, weight, _, _ = example(torch.float32)
    arguments = {"x": x, "weight": weight, "plan": LAYOUT.plan(), "out_channels": 6, **GEOMETRY}
    with pytest.raises(error, match=says):
        conv2d_from_plan(**(arguments | change), backend="reference")


def test_the_operator_refuses_an_unknown_backend() -> None:
    op, arguments = operator_arguments()["forward"]
    with pytest.raises(ValueError, match="backend must be one of"):
        op(*arguments[:-1], "cudnn")


def test_dense_reference_uses_the_mask() -> None:
    """The yardstick itself: weights that the layout does not read must not count."""
    case = CORNERS["3x3"]
    x, weight, _, _ = case.tensors(torch.float64)
    poisoned = torch.where(case.layout.mask()[:, :, None, None], weight, float("nan"))
    assert dense(x, poisoned, case).equal(dense(x, weight, case))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_the_activations_gradient_at_infinities_is_torchs(activation: str) -> None:
    """An infinite gradient does not pass where the output is cut off, and NaN lets the gradient through."""
    layout = GroupLayout(1, 1, [([0], [0])])
    values = torch.tensor([-1.0, 2.0, float("nan"), -3.0, 9.0, 0.0]).reshape(1, 1, 1, 6)
    grad = torch.tensor([float("inf"), 3.0, 5.0, float("nan"), float("inf"), 1.0]).reshape(1, 1, 1, 6)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    out = permuted_grouped_conv2d(
        ours, torch.ones(1), layout, kernel_size=1, activation=activation, backend="reference"
    )
    out.backward(grad)
    getattr(torch.nn.functional, activation)(theirs).backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)
