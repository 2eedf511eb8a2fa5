"""Forward mode, the transforms of torch.func, batching, and views of unusual kinds: right everywhere.

What is right is what torch makes of the same formula in its own operators, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

import dsprune
from dsp_kernels import GroupLayout, group_lasso, permuted_grouped_conv2d, sample_groups, tail
from dsp_kernels.norm import batch_norm_act, conv2d_batch_norm_act
from dsp_kernels.program import Program

# torch's own forward-mode formulas are scripted when they are first needed.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated:DeprecationWarning")

Function = Callable[..., Tensor]

LAYOUT = GroupLayout(4, 6, [([2, 0], [0, 4, 1]), ([1, 3, 2], [5])])  # filters 2 and 3 are dead


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def conv(activation: str | None) -> tuple[Function, Function]:
    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return permuted_grouped_conv2d(
            x, weight, LAYOUT, bias, kernel_size=3, padding=1, residual=residual, activation=activation
        )

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = F.conv2d(x, LAYOUT.unpack(weight, 3), bias, padding=1) + residual
        return y if activation is None else F.relu(y) if activation == "relu" else F.relu6(y)

    return ours, plain


def norm(conv_too: bool) -> tuple[Function, Function]:
    def ours(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        if conv_too:
            return conv2d_batch_norm_act(
                x, weight, LAYOUT.plan(), scale, shift, residual, out_channels=6, kernel_size=3,
                padding=1, activation="relu",
            )[0]  # fmt: skip
        return batch_norm_act(plain_conv(x, weight), scale, shift, residual, activation="relu")[0]

    def plain_conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, LAYOUT.unpack(weight, 3), padding=1)

    def plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor) -> Tensor:
        y = plain_conv(x, weight)  # by hand: torch's own has wrong second derivatives in forward mode
        y = y - y.mean((0, 2, 3), keepdim=True)
        y = y / (y.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return F.relu(y * scale[:, None, None] + shift[:, None, None] + residual)

    return ours, plain


def lasso() -> tuple[Function, Function]:
    def ours(first: Tensor, second: Tensor, logs: Tensor) -> Tensor:
        return group_lasso([first, second], [logs, logs], [0.5, 2.0])

    def plain(first: Tensor, second: Tensor, logs: Tensor) -> Tensor:
        p, out = logs.exp(), []
        for weight, scale in ((first, 0.5), (second, 2.0)):
            norms = (p.square() @ weight.reshape(*weight.shape[:2], -1).square().sum(-1)).sqrt()
            out.append(scale * (p.sqrt().sum(1).square() * norms.sum(1)).sum())
        return torch.stack(out)

    return ours, plain


def samples(hard: bool) -> tuple[Function, Function]:
    def ours(logits: Tensor, noise: Tensor) -> Tensor:
        out = sample_groups(logits, 0.7, noise=noise, hard=hard)
        return out.exp() if not hard else torch.where(out.isfinite(), out, 0.0)

    def plain(logits: Tensor, noise: Tensor) -> Tensor:
        soft = torch.log_softmax(logits / 0.7 + noise, 0)
        best = soft == soft.amax(0, keepdim=True)
        return soft.exp() if not hard else torch.where(best, soft - soft.detach(), 0.0)

    return ours, plain


CONV = (draw(2, 4, 5, 5), draw(LAYOUT.weight_numel(3), seed=1), draw(6, seed=2), draw(2, 6, 5, 5, seed=3))
NORM = (CONV[0], CONV[1], draw(6, seed=4), draw(6, seed=5), CONV[3])
LASSO = (draw(5, 3, 2, 2), draw(5, 4, seed=1), torch.log_softmax(draw(3, 5, seed=2), 0))
CASES: dict[str, tuple[tuple[Function, Function], tuple[Tensor, ...]]] = {
    "conv": (conv(None), CONV),
    "conv, ReLU": (conv("relu"), CONV),
    "conv, ReLU6": (conv("relu6"), tuple(3 * value for value in CONV)),
    "batch norm": (norm(False), NORM),
    "conv and batch norm": (norm(True), NORM),
    "lasso": (lasso(), LASSO),
    "soft samples": (samples(False), (draw(3, 5), draw(3, 5, seed=1))),
    "hard samples": (samples(True), (draw(3, 5), draw(3, 5, seed=1))),
    "linear": ((tail.linear, F.linear), (draw(2, 4), draw(3, 4, seed=1), draw(3, seed=2))),
    "pooling": (
        (lambda x: tail.adaptive_avg_pool(x, [2, 3]), lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
        (draw(2, 3, 7, 8),),
    ),
}
DTYPES = {"linear": torch.float32, "pooling": torch.float32}  # these two know no other


def directions(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(draw(*a.shape, seed=10 + i).to(a.dtype) for i, a in enumerate(args))


def dual(f: Function, args: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        out = f(*map(forward_ad.make_dual, args, directions(args)))
        tangent = forward_ad.unpack_dual(out).tangent
    assert tangent is not None
    return tangent


def loss(f: Function) -> Function:
    return lambda *args: (f(*args) * torch.linspace(0.5, 1.5, f(*args).numel()).view_as(f(*args))).sin().sum()


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


HOW: dict[str, Callable[[Function, tuple[Tensor, ...]], Tensor]] = {
    "dual tensors": dual,
    "jvp": lambda f, a: torch.func.jvp(f, a, directions(a))[1],
    "jacfwd": lambda f, a: torch.func.jacfwd(f, argnums=len(a) - 1)(*a),
    "jacrev": lambda f, a: torch.func.jacrev(f, argnums=len(a) - 1)(*a),
    "grad": lambda f, a: torch.func.grad(loss(f))(*a),
    "vjp": lambda f, a: first(torch.func.vjp(f, *a)[1](f(*a).sin())),
    "gradient along a tangent": lambda f, a: torch.func.jvp(torch.func.grad(loss(f)), a, directions(a))[1],
    "gradient of a tangent": lambda f, a: torch.func.grad(
        lambda *b: torch.func.jvp(f, b, directions(a))[1].sin().sum()
    )(*a),
    "vmap": lambda f, a: torch.func.vmap(f)(*(torch.stack([v, 0.5 * v, v + 0.1]) for v in a)),
    "vmap of one": lambda f, a: torch.func.vmap(f, (len(a[0].shape),) + (None,) * (len(a) - 1))(
        torch.stack([a[0], -a[0]], -1), *a[1:]
    ),
    "vmap of grad": lambda f, a: torch.func.vmap(torch.func.grad(loss(f)), (0,) + (None,) * (len(a) - 1))(
        torch.stack([a[0], 0.5 * a[0]]), *a[1:]
    ),
    "batched gradients": lambda f, a: batched_gradients(f, a),
}


def batched_gradients(f: Function, args: tuple[Tensor, ...]) -> Tensor:
    leaf = args[0].clone().requires_grad_()
    y = f(leaf, *args[1:])
    towards = torch.stack([y.detach().cos(), y.detach() + 1])
    return torch.autograd.grad(y, leaf, towards, is_grads_batched=True)[0]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CASES)
def test_operators_under_transforms(name: str, how: str) -> None:
    (ours, plain), args = CASES[name]
    if (name, how) == ("lasso", "batched gradients"):  # torch's rule for them has no lists of tensors
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            HOW[how](ours, args)
        return
    wanted = HOW[how](plain, args)
    dtype = DTYPES.get(name, torch.float64)
    given = HOW[how](ours, tuple(a.to(dtype) for a in args))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(given.double(), wanted, rtol=tolerance, atol=tolerance)


# ---- packed networks ----


@functools.cache
def networks(form: str) -> tuple[dsprune.PackedNetwork, nn.Module]:
    """A packed network and the dense one in float64."""
    torch.manual_seed(0)
    model = nets.structured_zeros(nets.random_norms(nets.Residual()), 0).eval()
    packed = dsprune.pack(model, torch.randn(1, 3, 8, 8), train=form == "layers")
    return packed, model.double()


IMAGES = draw(3, 3, 8, 8, seed=7)
OF_NETWORKS = [how for how in HOW if how not in ("vmap of one", "jacfwd", "jacrev")]


@pytest.mark.parametrize("how", OF_NETWORKS)
@pytest.mark.parametrize("form", ["fused", "layers"])
def test_packed_networks_under_transforms(form: str, how: str) -> None:
    packed, dense = networks(form)
    with torch.no_grad():
        packed(IMAGES.float())  # a program is there, and must not be taken
    wanted = HOW[how](dense, (IMAGES,))
    given = HOW[how](packed, (IMAGES.float(),))
    torch.testing.assert_close(given.double(), wanted, rtol=1e-4, atol=1e-4)
    if form == "fused":
        with torch.no_grad():
            again = HOW["dual tensors"](packed, (IMAGES.float(),))
            assert "torch.func" in (packed.program_reason or "")
            batched = torch.func.vmap(packed)(IMAGES.float()[:, None])
            torch.testing.assert_close(batched[:, 0].double(), dense(IMAGES), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again, HOW["jvp"](packed, (IMAGES.float(),)))


@pytest.mark.parametrize("form", ["fused", "layers"])
def test_functional_calls_of_packed_networks(form: str) -> None:
    """Derivatives for weights that are given from outside, and an ensemble of weights."""
    packed, dense = networks(form)
    weights = {name: value.detach() for name, value in packed.named_parameters()}
    x = IMAGES.float()

    def of(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(packed, weights, (x,))

    with torch.no_grad():
        torch.testing.assert_close(of(weights, x).double(), dense(IMAGES), rtol=1e-4, atol=1e-4)
        doubled = {name: 2 * value for name, value in weights.items()}
        other = of(doubled, x)
        torch.testing.assert_close(packed(x).double(), dense(IMAGES), rtol=1e-4, atol=1e-4)
        stacked = {name: torch.stack([value, 2 * value]) for name, value in weights.items()}
        both = torch.func.vmap(of, (0, None))(stacked, x)
        torch.testing.assert_close(both, torch.stack([of(weights, x), other]), rtol=1e-4, atol=1e-4)
    gradient = torch.func.grad(lambda w: of(w, x).square().sum())(weights)
    step = {name: draw(*value.shape, seed=i).float() for i, (name, value) in enumerate(weights.items())}
    along = sum(float((gradient[name] * step[name]).sum()) for name in weights)
    tangent = torch.func.jvp(lambda w: of(w, x).square().sum(), (weights,), (step,))[1]
    assert along == pytest.approx(float(tangent), rel=1e-3)


# ---- views of unusual kinds ----


def views(values: Tensor) -> dict[str, Tensor]:
    """``values`` in other clothes: each equals it, or says what it holds instead."""
    packed_twice = torch.view_as_complex(torch.stack([values, -values], -1).contiguous())
    return {
        "negative bit": packed_twice.conj().imag,
        "strided": torch.stack([values, values], -1)[..., 1],
        "channels last": values.contiguous(memory_format=torch.channels_last),
        "flipped twice": values.flip(-1).contiguous().flip(-1),
        "sliced": F.pad(values, (1, 2))[..., 1:-2],
        "expanded": values[:1, :, :1, :1].expand_as(values),
        "no images": values[:0],
        "a parameter": nn.Parameter(values.clone()),
        "a buffer of its own class": values.as_subclass(Plain),
    }


class Plain(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("view", views(torch.zeros(2, 2, 2, 2)))
def test_views_as_inputs(view: str) -> None:
    packed, dense = networks("fused")
    x = views(IMAGES.float())[view]
    assert x.is_neg() == (view == "negative bit")
    plain = torch.empty(x.shape).copy_(x.detach()).as_subclass(Tensor)
    with torch.no_grad():
        torch.testing.assert_close(packed(x).double(), dense(plain.double()), rtol=1e-4, atol=1e-4)
        if view not in ("a parameter", "a buffer of its own class"):
            assert packed.program_reason is None
        for call in (packed.network, networks("layers")[0]):
            torch.testing.assert_close(call(x).double(), dense(plain.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", None])
def test_negative_views_as_any_argument(backend: str | None) -> None:
    args = tuple(value.float() for value in CONV)
    turned = tuple(torch.view_as_complex(torch.stack([v, -v], -1)).conj().imag for v in args)
    assert all(value.is_neg() for value in turned)

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return permuted_grouped_conv2d(
            x, weight, LAYOUT, bias, kernel_size=3, padding=1, residual=residual, backend=backend
        )

    wanted = conv(None)[1](*CONV).float()
    torch.testing.assert_close(run(*turned), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(layout_of(turned[1]), LAYOUT.unpack(args[1], 3))
    given, logs = LASSO[0].float(), LASSO[2].float()
    other = torch.view_as_complex(torch.stack([given, -given], -1)).conj().imag
    torch.testing.assert_close(group_lasso([other], [logs]), group_lasso([given], [logs]))


def layout_of(weight: Tensor) -> Tensor:
    return LAYOUT.unpack(weight, 3)


def test_negative_views_as_weights_and_inputs_of_programs() -> None:
    weight, x = draw(4, 3, 3, 3).float(), IMAGES.float()
    turned = torch.view_as_complex(torch.stack([weight, -weight], -1)).conj().imag
    program = Program((3, 8, 8))
    program.build(program.conv2d(program.input, turned, turned[:, 0, 0, 0]))
    wanted = F.conv2d(IMAGES, weight.double(), weight[:, 0, 0, 0].double())
    for given in (x, views(x)["negative bit"]):
        torch.testing.assert_close(program(given).double(), wanted, rtol=1e-4, atol=1e-4)
    # As a packed network's own weights, and those that are packed.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight = nn.Parameter(turned)
    packed = dsprune.pack(model, x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)
