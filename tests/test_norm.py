"""Batch normalisation with residual and activation: the native kernel against float64, and its layer."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dsprune
from dsp_kernels import available_backends
from dsp_kernels.norm import batch_norm_act, native, reference
from dsprune.models import cifar_resnet
from dsprune.nn import PackedBatchNorm2d, PackedConv2d, norm_act

needs_native = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)


def case(shape, seed, affine=True, residual=False, mean=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + mean
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    other = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = [x, weight if affine else None, bias if affine else None, other if residual else None]
    return [None if v is None else v.to(dtype) for v in values]


def gradients(run, tensors, grad):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = run(*leaves)
    out.backward(grad.to(out.dtype))
    return out.detach(), [None if t is None else t.grad for t in leaves]


@needs_native
@settings(max_examples=40)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 7),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    affine=st.booleans(),
    residual=st.booleans(),
    activation=st.sampled_from([None, "relu"]),
    mean=st.sampled_from([0.0, 3.0, -40.0]),
    seed=st.integers(0, 99),
)
def test_native_is_the_definition(batch, channels, height, width, affine, residual, activation, mean, seed):
    if batch * height * width < 4:
        return  # of two or three values the variance may be next to nothing, and its root blows up rounding
    shape = (batch, channels, height, width)
    single = case(shape, seed, affine, residual, mean)
    double = [None if t is None else t.double() for t in single]
    assert native.takes(single[0])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))

    def run(*tensors):
        return batch_norm_act(*tensors, activation=activation)[0]

    out, given_grads = gradients(run, single, grad)
    expected, wanted = gradients(run, double, grad.double())
    # Rounding moves x - mean by an ulp of the mean, the root scales it up.
    spread = float(double[0].std(dim=(0, 2, 3), correction=0).min())
    bound = 1e-5 * (1 + abs(mean)) * (1 + 1 / spread) ** 3
    settled = (expected > bound) | (expected == 0) if activation else expected == expected
    assert (out - expected).abs().max() <= bound
    if bool(settled.all()):  # no sign of the activation hangs on rounding
        for value, right in zip(given_grads, wanted, strict=True):
            if right is not None:
                count = batch * height * width if value.dim() == 1 else 1
                assert (value - right).abs().max() <= 10 * bound * count**0.5 * (1 + float(right.abs().max()))


@needs_native
def test_statistics_are_torchs():
    x, weight, bias, _ = case((16, 6, 9, 7), 3, mean=5.0)
    out, mean, variance = batch_norm_act(x, weight, bias)
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        variance, x.double().var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=1e-6
    )
    expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@needs_native
def test_a_large_mean_keeps_the_variance():
    """The sums are taken around a value of the channel: 1e4 +- 1 in float32 has a variance near 1 still."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 2, 16, 16, generator=generator) + 1e4).contiguous()
    _, _, variance = batch_norm_act(x)
    expected = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=0)


@needs_native
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_same_bits_on_any_number_of_threads(activation, residual):
    tensors = case((6, 5, 11, 13), 7, residual=residual)
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out, grads = gradients(lambda *t: batch_norm_act(*t, activation=activation)[0], tensors, grad)
            results.append([out, *(g for g in grads if g is not None)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_nan_and_inf_stay_in_their_channel():
    x, weight, bias, _ = case((2, 4, 5, 5), 0)
    x[0, 1, 2, 2], x[1, 3, 0, 0], x[0, 3, 0, 0] = float("nan"), float("inf"), float("inf")
    out, _, _ = batch_norm_act(x, weight, bias)
    assert out[:, [1, 3]].isnan().all() and out[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(activation, residual):
    tensors = case((3, 2, 3, 2), 5, residual=residual, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def run(x, weight, bias, other=None):
        return batch_norm_act(x, weight, bias, other, activation=activation)[0]

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@needs_native
def test_second_derivative_of_the_native_kernel():
    """Under create_graph the definition differentiates; its first derivative is the kernel's."""
    x, weight, bias, other = case((4, 3, 5, 4), 2, residual=True)
    leaves = [t.requires_grad_() for t in (x, weight, bias, other)]
    out = batch_norm_act(*leaves, activation="relu")[0]
    first = torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    second = torch.autograd.grad(again[0].square().sum(), leaves)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in second)


@needs_native
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(activation, residual):
    x, weight, bias, other = case((2, 3, 4, 5), 1, residual=residual)
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias, other)]
    torch.library.opcheck(torch.ops.dsp_kernels.batch_norm_act.default, (*leaves, 1e-5, activation))
    y, mean, variance = batch_norm_act(*leaves, activation=None if activation == "none" else activation)
    args = (torch.randn_like(y), x, y, weight, bias, mean, variance, 1e-5, activation, residual)
    torch.library.opcheck(
        torch.ops.dsp_kernels.batch_norm_act_backward.default,
        tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_definition(dtype):
    x, weight, bias, _ = case((4, 3, 5, 5), 4, dtype=dtype)
    out, mean, _ = batch_norm_act(x, weight, bias, activation="relu")
    expected, _, _ = reference.forward(x.double(), weight.double(), bias.double(), None, 1e-5, "relu")
    assert out.dtype == dtype and mean.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 1}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "floating point"),
        ({"x": torch.zeros(3, 4, 4)}, ValueError, "x must be"),
        ({"x": torch.zeros(1, 3, 1, 1)}, ValueError, "two values"),
        ({"weight": torch.zeros(2)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
        ({"residual": torch.zeros(2, 3, 4, 5)}, ValueError, "residual must have"),
        ({"activation": "gelu"}, ValueError, "activation must be"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {"x": torch.zeros(2, 3, 4, 4)} | change
    with pytest.raises(error, match=text):
        batch_norm_act(**arguments)


@needs_native
def test_the_core_refuses_what_does_not_fit():
    x, weight, bias, _ = case((2, 3, 4, 4), 0)
    with pytest.raises(ValueError, match="weight must be float32 of shape"):
        native.forward(x, weight[:2], bias, None, 1e-5, "none")
    with pytest.raises(ValueError, match="refused"):
        native.forward(x[:0], weight, bias, None, 1e-5, "none")


# ---- the layers ----


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_layer_trains_as_torchs(momentum, tracked):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, momentum=momentum, track_running_stats=tracked)
    nn.init.uniform_(norm.weight)
    twin = copy.deepcopy(norm)
    layer = PackedBatchNorm2d.from_norm(norm)
    assert layer.weight is norm.weight and list(layer.state_dict()) == list(twin.state_dict())
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7)
        torch.testing.assert_close(layer(x), twin(x), rtol=1e-5, atol=1e-5)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    layer.eval(), twin.eval()
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-6, atol=1e-6)
    last = x.contiguous(memory_format=torch.channels_last)
    assert layer.train()(last).is_contiguous(memory_format=torch.channels_last)


def test_the_output_may_be_written_to():
    """As models do that call relu in place."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    layer = PackedBatchNorm2d.from_norm(nn.BatchNorm2d(3))
    torch.relu_(layer(x)).sum().backward()
    assert x.grad is not None


def test_norm_act_is_its_parts():
    torch.manual_seed(0)
    norm, x, other = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    layer = PackedBatchNorm2d.from_norm(copy.deepcopy(norm))
    torch.testing.assert_close(norm_act(layer, x, other), torch.relu(norm(x) + other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm_act(layer, x), torch.relu(norm(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_dense_layer_is_torchs(bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=bias)
    layer = PackedConv2d.from_conv(copy.deepcopy(conv))
    assert list(layer.state_dict()) == list(conv.state_dict()) and repr(conv)[6:] == repr(layer)[12:]
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    conv(x).square().sum().backward()
    layer(twin).square().sum().backward()
    torch.testing.assert_close(twin.grad, x.grad, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(layer.parameters(), conv.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    half = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    assert torch.equal(layer.double()(half), conv.double()(half))
    copy.deepcopy(layer)


@needs_native
def test_a_packed_network_trains_as_the_masked_one():
    """Three steps of SGD: the same losses and weights as the dense network whose zeros are held."""
    torch.manual_seed(0)
    model = cifar_resnet(20)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight[: module.out_channels // 2, ::2] = 0
    masks = {n: (p != 0).float() for n, p in model.named_parameters() if p.dim() == 4}
    packed = dsprune.pack(model.train(), torch.randn(2, 3, 16, 16), train=True)
    kinds = {type(module) for module in packed.modules()}
    assert PackedBatchNorm2d in kinds and nn.BatchNorm2d not in kinds
    model = copy.deepcopy(model)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))
    losses = []
    for network in (model, packed):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            if network is model:
                with torch.no_grad():
                    for name, mask in masks.items():
                        model.get_parameter(name).mul_(mask)
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-3)
    after = dsprune.unpack(packed, copy.deepcopy(model)).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-2, atol=1e-3)


@needs_native
@pytest.mark.parametrize("isa", ["avx2", "generic"])
def test_lesser_instruction_sets(isa):
    code = (
        "import torch\nfrom dsp_kernels.norm import batch_norm_act, reference\n"
        "torch.manual_seed(0)\nx = torch.randn(3, 4, 7, 9, requires_grad=True)\n"
        "r = torch.randn(3, 4, 7, 9)\ng = torch.randn(3, 4, 7, 9)\n"
        "y = batch_norm_act(x, residual=r, activation='relu')[0]\ny.backward(g)\n"
        "z = x.detach().double().requires_grad_()\n"
        "w = reference.forward(z, None, None, r.double(), 1e-5, 'relu')[0]\nw.backward(g.double())\n"
        "assert (y - w).abs().max() < 1e-5 and (x.grad - z.grad).abs().max() < 1e-4\n"
    )
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DSP_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
