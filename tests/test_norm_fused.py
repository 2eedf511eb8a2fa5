"""A packed convolution and the batch normalisation behind it as one operator: against the two apart."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from dsp_kernels import GroupLayout, available_backends, permuted_grouped_conv2d
from dsp_kernels.norm import batch_norm_act, conv2d_batch_norm_act
from dsprune.nn import PackedBatchNorm2d, PackedConv2d, PermutedGroupedConv2d, conv_norm_act

needs_native = pytest.mark.skipif(
    available_backends()["native"] is not None, reason=f"native: {available_backends()['native']}"
)

# Filters 2 and 5 are dead, channel 4 is unread.
LAYOUT = GroupLayout(5, 6, [([0, 2, 3], [4, 0]), ([1, 2], [3, 1])])
BLANK = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.uint8)


def tensors(batch, size, stride, residual, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 5, *size, generator=generator, dtype=torch.float64)
    weight = torch.randn(LAYOUT.weight_numel(3), generator=generator, dtype=torch.float64)
    scale = torch.rand(6, generator=generator, dtype=torch.float64) + 0.5
    shift = torch.randn(6, generator=generator, dtype=torch.float64)
    out = [(s - 1) // stride + 1 for s in size]
    other = torch.randn(batch, 6, *out, generator=generator, dtype=torch.float64) if residual else None
    return [None if t is None else t.to(dtype) for t in (x, weight, scale, shift, other)]


def together(x, weight, scale, shift, other, stride, activation, blank=BLANK):
    return conv2d_batch_norm_act(
        x,
        weight,
        LAYOUT.plan(),
        scale,
        shift,
        other,
        out_channels=6,
        kernel_size=3,
        stride=stride,
        padding=1,
        activation=activation,
        blank=blank,
    )[0]


def apart(x, weight, scale, shift, other, stride, activation):
    inner = permuted_grouped_conv2d(x, weight, LAYOUT, kernel_size=3, stride=stride, padding=1)
    return batch_norm_act(inner, scale, shift, other, activation=activation)[0]


def gradients(run, given, grad, *rest):
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    out = run(*leaves, *rest)
    out.backward(grad.to(out.dtype))
    return out.detach(), [t.grad for t in leaves if t is not None]


@settings(max_examples=30)
@given(
    batch=st.integers(2, 4),
    height=st.integers(2, 19),
    width=st.integers(2, 19),
    stride=st.integers(1, 3),
    residual=st.booleans(),
    activation=st.sampled_from([None, "relu"]),
    blank=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_two_apart(batch, height, width, stride, residual, activation, blank, seed):
    """Float32 against the definitions in float64, unless a sign of the activation hangs on rounding."""
    given_ = tensors(batch, (height, width), stride, residual, seed, torch.float32)
    double = [None if t is None else t.double() for t in given_]
    hint = BLANK if blank else None
    expected = apart(*double, stride, activation)
    assume(expected.numel() // 6 >= 8 and not bool(((expected > 0) & (expected < 1e-4)).any()))
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1))
    out, found = gradients(together, given_, grad, stride, activation, hint)
    expected, wanted = gradients(apart, double, grad.double(), stride, activation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            value.double(), right, rtol=1e-3, atol=1e-3 * (1 + float(right.abs().max()))
        )


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck(activation, residual):
    given_ = [t for t in tensors(2, (3, 4), 2, residual, 3, torch.float64) if t is not None]
    leaves = [t.requires_grad_() for t in given_]

    def run(x, weight, scale, shift, other=None):
        return together(x, weight, scale, shift, other, 2, activation)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@needs_native
@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    x, weight, scale, shift, other = tensors(2, (5, 6), 1, residual, 1, torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, scale, shift, other)]
    how = ((3, 3), (1, 1), (1, 1), (1, 1), 1e-5, "relu")
    torch.library.opcheck(
        torch.ops.dsp_kernels.conv2d_batch_norm_act.default,
        (leaves[0], leaves[1], LAYOUT.plan(), leaves[2], leaves[3], BLANK, leaves[4], 6, *how),
    )
    x, weight, scale, shift, other = [None if t is None else t.detach() for t in leaves]
    inner, y, mean, variance = torch.ops.dsp_kernels.conv2d_batch_norm_act.default(
        x, weight, LAYOUT.plan(), scale, shift, BLANK, other, 6, *how
    )
    assert (inner[:, BLANK.bool()] == 0).all() and (mean[BLANK.bool()] == 0).all()
    torch.library.opcheck(
        torch.ops.dsp_kernels.conv2d_batch_norm_act_backward.default,
        (
            *(torch.randn_like(y), x, weight, LAYOUT.plan(), scale, shift, BLANK),
            *(inner, y, mean, variance, *how, residual, True),
        ),
    )


@needs_native
def test_same_bits_on_any_number_of_threads():
    given_ = tensors(6, (17, 9), 2, True, 7, torch.float32)
    grad = torch.randn(6, 6, 9, 5, generator=torch.Generator().manual_seed(1))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            out, grads = gradients(together, given_, grad, 2, "relu")
            results.append([out, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 1}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 5, 4, 4, dtype=torch.int32)}, TypeError, "floating point"),
        ({"x": torch.zeros(5, 4, 4)}, ValueError, "4-D"),
        ({"x": torch.zeros(1, 5, 1, 1)}, ValueError, "two values"),
        ({"weight": torch.zeros(6, 5, 3, 3)}, ValueError, "weight must be 1-D"),
        ({"weight": torch.zeros(LAYOUT.weight_numel(3)).double()}, ValueError, "dtype of x"),
        ({"plan": torch.zeros(4)}, ValueError, "plan must be"),
        ({"norm_weight": torch.zeros(5)}, ValueError, "norm_weight must have shape"),
        ({"norm_bias": torch.zeros(5)}, ValueError, "norm_bias must have shape"),
        ({"blank": torch.zeros(5, dtype=torch.uint8)}, ValueError, "blank must have shape"),
        ({"blank": torch.zeros(6)}, TypeError, "blank must be uint8"),
        ({"residual": torch.zeros(2, 6, 4, 5)}, ValueError, "residual must have"),
        ({"activation": "gelu"}, ValueError, "activation must be"),
        ({"stride": 0}, ValueError, "stride"),
        ({"weight": [1.0]}, TypeError, "weight must be a tensor, got list"),
        ({"plan": None}, TypeError, "plan must be a tensor"),
        ({"plan": GroupLayout(4, 6, LAYOUT.groups[1:]).plan()}, ValueError, "x has"),
        ({"x": torch.zeros(2, 4, 4, 4)}, ValueError, "x has"),
        ({"out_channels": 5}, ValueError, "out(put)? has"),
        ({"weight": torch.zeros(7)}, ValueError, "weight .* 7"),
        ({"out_channels": 6.0}, TypeError, "out_channels must be an int"),
        ({"out_channels": 0}, ValueError, "out_channels must be an int of at least 1"),
        ({"norm_weight": 1.0}, TypeError, "norm_weight must be a tensor or None"),
        ({"norm_bias": torch.zeros(6).double()}, TypeError, "norm_bias must be float32"),
        ({"norm_bias": torch.zeros(6, device="meta")}, ValueError, "norm_bias must be on the device of x"),
        ({"residual": torch.zeros(2, 6, 4, 4).half()}, TypeError, "residual must have the dtype of x"),
        ({"residual": 0}, TypeError, "residual must be a tensor or None"),
        ({"eps": -1e-5}, ValueError, "eps must be finite"),
        ({"eps": float("nan")}, ValueError, "eps must be finite"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {
        "x": torch.zeros(2, 5, 4, 4),
        "weight": torch.zeros(LAYOUT.weight_numel(3)),
        "plan": LAYOUT.plan(),
        "out_channels": 6,
        "kernel_size": 3,
        "padding": 1,
    }
    with pytest.raises(error, match=text):
        conv2d_batch_norm_act(**(arguments | change))


def pair(seed=0):
    torch.manual_seed(seed)
    dense = nn.Conv2d(5, 6, 3, padding=1, bias=False)
    with torch.no_grad():
        dense.weight.mul_(LAYOUT.mask()[:, :, None, None])
    norm = nn.BatchNorm2d(6)
    nn.init.uniform_(norm.weight)
    return dense, norm


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("residual", [False, True])
def test_layers_together_are_torchs(packed, activation, residual):
    dense, norm = pair()
    conv = (
        PermutedGroupedConv2d.from_conv(dense, LAYOUT)
        if packed
        else PackedConv2d.from_conv(copy.deepcopy(dense))
    )
    ours = PackedBatchNorm2d.from_norm(copy.deepcopy(norm))
    x = torch.randn(4, 5, 7, 6)
    other = torch.randn(4, 6, 7, 6) if residual else None
    for _ in range(2):
        out = conv_norm_act(conv, ours, x, other, activation)
        expected = norm(dense(x))
        expected = expected if other is None else expected + other
        expected = torch.relu(expected) if activation else expected
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            conv_norm_act(dense, norm.eval(), x, other, activation),
            conv_norm_act(conv, ours.eval(), x, other, activation),
            rtol=1e-4,
            atol=1e-5,
        )
        norm.train(), ours.train()
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("conv", "backend", "error", "text"),
    [
        (nn.Linear(2, 2), None, TypeError, r"conv: expected a torch\.nn\.Conv2d, got Linear"),
        (nn.Conv2d(4, 4, 1, groups=2), None, ValueError, "conv: expected groups=1, .* got groups=2"),
        (nn.Conv2d(4, 4, 3, padding="same"), None, ValueError, "conv: .* padding='same'"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), None, ValueError, "conv: .* padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 3), "zz", ValueError, "backend: expected one of .* got 'zz'"),
        (nn.Conv2d(4, 4, 3), 3, TypeError, "backend: expected one of .* got 3"),
    ],
)
def test_dense_layers_that_are_refused(conv, backend, error, text):
    with pytest.raises(error, match=f"^{text}"):
        PackedConv2d.from_conv(conv, backend)


def test_another_activation_is_refused():
    dense, norm = pair()
    with pytest.raises(ValueError, match=r"^activation: expected None or 'relu', got 'gelu'"):
        conv_norm_act(dense, norm, torch.randn(2, 5, 4, 4), activation="gelu")


@needs_native
def test_whoever_looks_between_sees_the_layers():
    """A hook on either layer must run: the layers then run apart, with the same result."""
    dense, norm = pair()
    conv, ours = PermutedGroupedConv2d.from_conv(dense, LAYOUT), PackedBatchNorm2d.from_norm(norm)
    x = torch.randn(4, 5, 7, 6)
    expected = conv_norm_act(conv, ours, x)
    seen = []
    handle = conv.register_forward_hook(lambda *args: seen.append(args[2].shape))
    torch.testing.assert_close(conv_norm_act(conv, ours, x), expected, rtol=1e-6, atol=1e-6)
    assert seen == [(4, 6, 7, 6)]
    handle.remove()
    conv_norm_act(conv, ours, x)
    assert len(seen) == 1
