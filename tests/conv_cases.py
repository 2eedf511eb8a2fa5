"""What the tests of the convolution share: random layouts, dense float64 references, and the error bound."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from dsp_kernels import GroupLayout, permuted_grouped_conv2d

# One constant of the bound for all kernels, sizes and dtypes.
BOUND = 4.0
# Where half precision is computed in float32 the sum's error is float32's, the output's rounding its own.
COMPUTE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def random_layout(rng: random.Random, in_channels: int, out_channels: int, n_groups: int) -> GroupLayout:
    """Overlapping channel sets in any order, single channels, dead filters, groups without filters."""
    owners = [rng.randrange(-1, n_groups) for _ in range(out_channels)]
    groups = []
    for g in range(n_groups):
        filters = [f for f, owner in enumerate(owners) if owner == g]
        rng.shuffle(filters)
        channels = rng.sample(range(in_channels), rng.choice([1, in_channels, rng.randint(1, in_channels)]))
        groups.append((channels, filters))
    return GroupLayout(in_channels, out_channels, groups)


@dataclass(frozen=True)
class Case:
    """One convolution; everything random about it comes from ``seed``."""

    seed: int
    in_channels: int
    out_channels: int
    n_groups: int
    batch: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    bias: bool = True
    residual: bool = False
    activation: str | None = None
    channels_last: bool = False

    @property
    def layout(self) -> GroupLayout:
        return random_layout(random.Random(self.seed), self.in_channels, self.out_channels, self.n_groups)

    @property
    def out_size(self) -> tuple[int, int]:
        h, w = (
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return h, w

    @property
    def geometry(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, dense weight (also where it is pruned), bias, residual."""
        g = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.batch, self.in_channels, *self.size, generator=g).to(dtype)
        weight = torch.randn(self.out_channels, self.in_channels, *self.kernel, generator=g).to(dtype)
        bias = torch.randn(self.out_channels, generator=g).to(dtype) if self.bias else None
        shape = (self.batch, self.out_channels, *self.out_size)
        residual = torch.randn(shape, generator=g).to(dtype) if self.residual else None
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, weight, bias, residual


def _pairs(values: Sequence[int]) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.sampled_from(values), st.sampled_from(values))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kernel = draw(st.one_of(st.sampled_from([(1, 1), (3, 3), (1, 7)]), _pairs([1, 2, 3, 5])))
    dilation = draw(_pairs([1, 1, 1, 2, 3]))
    padding = draw(_pairs([0, 1, 1, 2, 3]))
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = [max(1, e - 2 * p) for e, p in zip(extent, padding, strict=True)]
    size = tuple(draw(st.one_of(st.integers(n, n + 12), st.just(n + 33))) for n in least)
    return Case(
        seed=draw(st.integers(0, 2**31)),
        in_channels=draw(st.integers(1, 20)),
        out_channels=draw(st.integers(1, 20)),
        n_groups=draw(st.integers(1, 8)),
        batch=draw(st.integers(1, 3)),
        size=(size[0], size[1]),
        kernel=kernel,
        stride=draw(_pairs([1, 1, 2, 3])),
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6"])),
        channels_last=draw(st.booleans()),
    )


def dense(x: Tensor, weight: Tensor, case: Case, bias: Tensor | None = None) -> Tensor:
    """conv2d with the dense weight, zeros where the layout reads nothing."""
    masked = torch.where(case.layout.mask()[:, :, None, None], weight, 0.0)
    return F.conv2d(x, masked, bias, case.stride, case.padding, case.dilation)


def activate(y: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return y.clamp(min=0)
    return y.clamp(0, 6) if activation == "relu6" else y


def assert_within(out: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """|out - exact| <= c sqrt(K) u magnitude + one rounding of the output, per element."""
    assert out.shape == exact.shape
    assert torch.isfinite(out).all(), "an element was not written, or overflowed"
    info = torch.finfo(out.dtype)
    u = torch.finfo(COMPUTE.get(out.dtype, out.dtype)).eps / 2
    bound = BOUND * math.sqrt(max(terms, 1)) * u * magnitude
    bound = bound + info.eps / 2 * (exact.abs() + bound) + info.smallest_normal * info.eps
    error = (out.double() - exact).abs()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert bool((error <= bound).all()), f"error is {worst:.3g} times the bound"


def check_forward(case: Case, dtype: torch.dtype, backend: str) -> Tensor:
    """Runs the convolution and holds it against float64; returns its output."""
    x, weight, bias, residual = case.tensors(dtype)
    layout = case.layout
    out = permuted_grouped_conv2d(
        x,
        layout.pack(weight),
        layout,
        bias,
        residual=residual,
        activation=case.activation,
        backend=backend,
        **case.geometry,
    )
    x, weight = x.double(), weight.double()
    exact = dense(x, weight, case, None if bias is None else bias.double())
    magnitude = dense(x.abs(), weight.abs(), case, None if bias is None else bias.double().abs())
    if residual is not None:
        exact = exact + residual.double()
        magnitude = magnitude + residual.double().abs()
    assert out.dtype == dtype
    # An activation moves no two values further apart.
    assert_within(out, activate(exact, case.activation), magnitude, _terms(case))
    return out


def _terms(case: Case) -> int:
    widest = max((len(channels) for channels, filters in case.layout.groups if filters), default=0)
    return widest * case.kernel[0] * case.kernel[1] + 2


def check_gradients(case: Case, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
    """Holds all gradients of the plain convolution against autograd in float64; returns them."""
    x, weight, bias, _ = case.tensors(dtype)
    layout = case.layout
    packed = layout.pack(weight).requires_grad_()
    x.requires_grad_()
    grad = torch.randn(
        case.batch, case.out_channels, *case.out_size, generator=torch.Generator().manual_seed(case.seed + 1)
    ).to(dtype)
    if case.channels_last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    out = permuted_grouped_conv2d(x, packed, layout, bias, backend=backend, **case.geometry)
    grads = torch.autograd.grad(out, (x, packed), grad)

    def exact(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        a, b = a.double().requires_grad_(), b.double().requires_grad_()
        of_x, of_w = torch.autograd.grad(dense(a, b, case), (a, b), c.double())
        return of_x, layout.pack(of_w)

    x, weight = x.detach(), weight.detach()
    taps = case.kernel[0] * case.kernel[1]
    pixels = case.out_size[0] * case.out_size[1]
    terms = (len(layout.live_filters) * taps, case.batch * pixels)
    for got, want, magnitude, k in zip(
        grads, exact(x, weight, grad), exact(x.abs(), weight.abs(), grad.abs()), terms, strict=True
    ):
        assert got.dtype == dtype
        assert_within(got, want, magnitude, k)
    return grads


# Shapes that have broken convolutions before, kept beside the random ones.
CORNERS = {
    "1x1": Case(1, 7, 9, 3, 2, (5, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    "3x3": Case(2, 16, 16, 4, 2, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), activation="relu"),
    "3x3 stride 2": Case(3, 16, 24, 4, 1, (9, 7), (3, 3), (2, 2), (1, 1), (1, 1), residual=True),
    "one pixel": Case(4, 3, 5, 2, 1, (1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    "one column": Case(5, 4, 4, 2, 2, (17, 1), (3, 1), (1, 1), (1, 0), (1, 1)),
    "one row": Case(6, 4, 4, 2, 2, (1, 67), (1, 3), (1, 1), (0, 1), (1, 1)),
    "one channel, one filter": Case(7, 1, 1, 1, 3, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    "eight groups": Case(8, 12, 32, 8, 1, (6, 11), (3, 3), (1, 1), (1, 1), (1, 1), activation="relu6"),
    "padding wider than the kernel": Case(9, 5, 6, 2, 1, (3, 4), (2, 2), (1, 1), (4, 3), (1, 1)),
    "padding wider than the image": Case(10, 5, 6, 2, 1, (2, 1), (5, 7), (1, 1), (5, 6), (1, 1)),
    "dilated": Case(11, 6, 8, 3, 2, (11, 13), (3, 3), (1, 1), (2, 4), (2, 4)),
    "stride beyond the kernel": Case(12, 6, 8, 3, 2, (11, 13), (2, 1), (3, 4), (0, 0), (1, 1)),
    "uneven stride": Case(13, 6, 8, 3, 2, (8, 19), (3, 5), (2, 1), (1, 2), (1, 1), residual=True),
    "7x7 stem": Case(14, 3, 16, 2, 1, (30, 29), (7, 7), (2, 2), (3, 3), (1, 1), activation="relu"),
    "wide": Case(15, 8, 12, 4, 1, (3, 131), (3, 3), (1, 1), (1, 1), (1, 1)),
    "channels last": Case(16, 9, 11, 4, 2, (7, 5), (3, 3), (2, 1), (1, 0), (1, 1), channels_last=True),
    "many channels": Case(17, 130, 70, 4, 1, (4, 4), (3, 3), (1, 1), (1, 1), (1, 1), residual=True),
}
